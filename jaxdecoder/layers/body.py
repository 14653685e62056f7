"""What stands between embedding and head: the seam that all layouts share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.layers.cache import Caches, Cursor
from jaxdecoder.layers.costs import Kernels
from jaxdecoder.typing import Params

Exits = tuple[tuple[float, Float[Array, "batch time width"]], ...]
"""Shares of the loss, and what the head sees there."""

Head = Callable[[Float[Array, "batch time width"]], Float[Array, "batch time vocab"]]
"""features -> logits."""


class Passed(NamedTuple):
    """What a body gives back."""

    features: Float[Array, "batch time width"]
    """What the head sees."""
    caches: Caches | None = None
    """The extended caches, if any came in."""
    exits: Exits = ()
    """In training: shares of the loss, and what the head sees, at lesser depths."""
    penalty: Float[Array, "batch time"] | float = 0.0
    """In training: what is minimised besides, in nats a token."""
    logits: Float[Array, "batch time vocab"] | None = None
    """What the head said of the features, where the body had to ask it."""
    depth: Int[Array, "batch"] | None = None
    """Blocks that a single token of each row passed, where it may stop early."""

    @property
    def heads(self) -> Exits:
        """Shares of the loss, 1 together, and what the head sees there: all blocks, and exits."""
        return ((1.0 - sum(share for share, _ in self.exits), self.features), *self.exits)


class Body(Protocol):
    """The module of all layers."""

    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        dropout: Rate | None,
        head: Head | None = None,
    ) -> Passed:
        """Pass embedded tokens through the layers; one that has exits asks the `head` there.

        With caches the parameters are those of `Layout.unroll`.
        """


class Layout(NamedTuple):
    """How the layers between embedding and head are wired, and what that costs.

    body: (config, dtype) -> the module.
    unroll: (parameters of the body) -> the same as decoding reads them.
    empty_caches: (config, batch, dtype) -> the body's caches with nothing in them.
    width: (config) -> the width of what the head sees.
    kernels: (config) -> by part, the linear layers that stand around the attention of all layers;
        each has a bias where the config has biases.
    norms: (config) -> how many norms there are; one that is wider counts as several of d_model.
    """

    body: Callable[[Architecture, DTypeLike], Body]
    unroll: Callable[[Params], Params]
    empty_caches: Callable[[Architecture, int, DTypeLike], Caches]
    width: Callable[[Architecture], int]
    kernels: Callable[[Architecture], dict[str, list[Kernels]]]
    norms: Callable[[Architecture], int]
