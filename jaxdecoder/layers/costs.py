"""What components cost: the records that stand beside them, and that `jaxdecoder.analysis` adds up.

Multiply-adds are those of matrix products; a kernel's weight is one for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxdecoder.config import Architecture

FLOAT32 = 4
"""Bytes of a number."""


class Kernels(NamedTuple):
    """Matrices of linear layers, all of one shape."""

    matrices: int
    d_in: int
    d_out: int


def weights(kernels: Iterable[Kernels]) -> int:
    """Return how many weights these have together."""
    return sum(n * d_in * d_out for n, d_in, d_out in kernels)


def parameters(kernels: Iterable[Kernels], bias: bool) -> int:
    """Return their weights and, where there are any, their biases."""
    return sum(n * (d_in + bias) * d_out for n, d_in, d_out in kernels)


def nothing(c: Architecture) -> int:
    """Return 0: what a component costs that has nothing of its own."""
    return 0


class Costs(NamedTuple):
    """What a component of no layout costs a whole model; all are 0 in a model without it."""

    parameters: Callable[[Architecture], int]
    weights: Callable[[Architecture], int]
    """Multiply-adds that every token costs, wherever it stands."""
    cache: Callable[[Architecture, int], int]
    """(config, bytes a number) -> bytes that decoding keeps for a sequence."""
    pairs: Callable[[Architecture, int, int, bool], int] = lambda c, queries, start, dense: 0
    """(config, queries, start, dense) -> multiply-adds of what so many queries from `start` on see
    of the tokens before them: at best, or as plain XLA computes it."""
    kernels: Callable[[Architecture], list[Kernels]] = lambda c: []
    """Those that have the config's weight format."""
