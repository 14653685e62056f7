"""Criteria for pruning single weights. A criterion is a function and an entry of `CRITERIA`.

This module loads no JAX, so that --help is quick. A function that needs more than the operators of
arrays imports it inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Scope = Literal["matrix", "output", "global"]
Weights = Any
"""An array, of JAX or NumPy."""
Need = Literal["nothing", "input_norms", "lot"]


class Criterion(NamedTuple):
    """A measure of how much each weight matters.

    score: (weights (*layers, d_in, d_out), what it needs) -> a score for each, 0 or more; the
        weights with the lowest scores become zero.
    needs: what it needs. input_norms: the norm of each input feature over the calibration set,
        (*layers, d_in); lot: its own NumPy generator, by --seed.
    scope: which weights are compared with each other if the option is left out.
    gradual: whether training can use it to prune gradually.
    """

    score: Callable[[Weights, Any], Weights]
    needs: Need = "nothing"
    scope: Scope = "matrix"
    gradual: bool = False


def magnitude(weights: Weights, nothing: None) -> Weights:
    """|w| (arXiv 1506.02626)."""
    return abs(weights)


def wanda(weights: Weights, input_norms: Weights) -> Weights:
    """|w_ij| times the norm of input feature i over the calibration set (arXiv 2306.11695)."""
    return abs(weights) * input_norms[..., None]


def random(weights: Weights, lot: Any) -> Weights:
    """A random number, as a control."""
    return lot.random(weights.shape, "float32")


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, gradual=True),
    "wanda": Criterion(wanda, needs="input_norms", scope="output"),
    "random": Criterion(random, needs="lot"),
}
