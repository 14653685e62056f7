"""The serial layout: blocks one after another, their parameters stacked along a layer axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.config import Architecture, ModelConfig
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.layers import depth, feed_forward, tree
from jaxdecoder.layers.block import PLACEMENTS, Block, empty_cache
from jaxdecoder.layers.body import Exits, Head, Layout, Passed
from jaxdecoder.layers.cache import Caches, Cursor
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.remat import unit


class Trail(NamedTuple):
    """What a `Turn` leaves behind besides the residual stream; a part is None if unasked for."""

    caches: Caches | None
    streams: Float[Array, "blocks batch time d_model"] | None
    """The residual stream after each block."""
    penalty: Float[Array, "batch time"] | None
    """The routers' loss, summed over the blocks."""


class Turn(nn.Module):
    """One turn of the pattern that the blocks repeat over the depth, see `turn`."""

    config: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        dropout: Rate | None,
    ) -> tuple[Float[Array, "batch time d_model"], Trail]:
        """Return the residual stream after these blocks, and what they leave behind."""
        c = self.config
        extended: list[PyTree] = []
        streams, penalties = [], []
        for i, (mechanism, routed) in enumerate(turn(c)):
            kind = depth.Routed if routed else Block
            block = kind(c, mechanism, self.dtype, name=tree.block(i))
            layer = None if caches is None else caches[i]
            x, layer, *penalty = block(x, positions, layer, cursor, dropout)
            self.sow("intermediates", tree.after(tree.block(i)), x)
            extended.append(layer)
            streams.append(x)
            penalties += penalty
        training = dropout is not None
        return x, Trail(
            None if caches is None else tuple(extended),
            jnp.stack(streams) if training and len(depth.exits_of(c)) > 1 else None,
            sum(penalties[1:], penalties[0]) if training and penalties else None,
        )


class Serial(nn.Module):
    """All blocks, then the norm before the head.

    `nn.scan` stacks the blocks' parameters along a leading axis, so one layout serves every depth
    and removing a layer is a slice. Decoding reads every weight for every token, and a slice would
    be a copy: with caches, the parameters are as `tree.unroll` lays them out, each its own array.

    In training the blocks are a loop only where `loops` says so.
    """

    config: Architecture
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        dropout: Rate | None,
        head: Head | None = None,
    ) -> Passed:
        """See `Body`."""
        c = self.config
        norm = NORMS[c.norm].new(c, self.dtype, name="final_norm")
        if caches is None:
            blocks = nn.scan(
                _as_unit(c, dropout),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=n_turns(c),
                unroll=1 if loops(c) else n_turns(c),
            )(c, self.dtype, name=tree.BLOCKS)
            x, trail = blocks(x, positions, None, None, dropout)
            return Passed(norm(x), None, *self._trained(norm, trail))
        if head is not None and x.shape[1] == 1 and len(depth.exits_of(c)) > 1:
            return self._stop_early(lambda x: head(norm(x)), x, positions, caches, cursor)
        extended: list[PyTree] = []
        for i in range(n_turns(c)):
            own = caches[i * len(turn(c)) : (i + 1) * len(turn(c))]
            blocks = Turn(c, self.dtype, name=tree.unrolled(i))
            x, trail = blocks(x, positions, own, cursor, dropout)
            extended += trail.caches or ()
        return Passed(norm(x), tuple(extended))

    def _stop_early(
        self, head: Head, x: jax.Array, positions: jax.Array, caches: Caches, cursor: Cursor | None
    ) -> Passed:
        """Take one token of each row through as many blocks as it needs."""
        c = self.config

        def step(number: int) -> depth.BlockStep:
            repeat, place = divmod(number, len(turn(c)))
            block = Block(c, turn(c)[place][0], self.dtype, parent=None)
            params = self.variables["params"][tree.unrolled(repeat)][tree.block(place)]
            return lambda x, cache: block.apply({"params": params}, x, positions, cache, cursor)

        stopped, extended = depth.stop_early(c, [*map(step, range(c.n_layers))], head, x, caches)
        return Passed(stopped.x, extended, logits=stopped.logits, depth=stopped.depth)

    def _trained(
        self, norm: Callable[[jax.Array], jax.Array], trail: Trail
    ) -> tuple[Exits, jax.Array | float]:
        """Return the exits and the penalty of `Passed`, from what all turns left behind."""
        c = self.config
        exits: Exits = ()
        if trail.streams is not None:
            streams = trail.streams.reshape(c.n_layers, *trail.streams.shape[2:])
            shares = depth.exits_of(c).items()
            exits = tuple((s, norm(streams[d - 1])) for d, s in shares if d < c.n_layers)
        routed = sum(routed for _, routed in turn(c)) * n_turns(c)
        if trail.penalty is None:
            return exits, 0.0
        return exits, c.mod_loss_weight / routed * jnp.sum(trail.penalty, axis=0)


def loops(config: Architecture) -> bool:
    """Say whether training goes through the blocks in a loop of the compiled program.

    A loop stacks what each turn keeps for the backward pass, which moves and holds more memory
    than the same blocks one after another; those take longer to compile. Recomputed activations
    stay in a loop: outside one, XLA would see that it has them already, and keep them.
    """
    return config.remat != "none" or current_device().platform not in ("cpu", "gpu")


def _as_unit(config: Architecture, dropout: Rate | None) -> type[Turn]:
    """Return `Turn` as a unit of the config's `remat`; a rate known now stays known."""
    known = () if isinstance(dropout, jax.Array) else 5
    wrapped: type[Turn] = unit(config, Turn, prevent_cse=False, static_argnums=known)
    return wrapped


def turn(config: ModelConfig) -> tuple[tuple[str, bool], ...]:
    """Return the mechanisms of consecutive blocks, and whether they have a router; it repeats."""
    mechanisms, routed = config.attention_pattern, depth.DEPTHS[config.depth].routed(config)
    length = math.lcm(len(mechanisms), len(routed))
    return tuple((mechanisms[i % len(mechanisms)], routed[i % len(routed)]) for i in range(length))


def n_turns(config: ModelConfig) -> int:
    """Return how often the turn repeats over the depth."""
    return config.n_layers // len(turn(config))


def empty_caches(config: Architecture, batch: int, dtype: DTypeLike) -> Caches:
    """Return the caches of all layers, with nothing in them."""

    def empty(mechanism: str, routed: bool) -> PyTree:
        cache = empty_cache(config, mechanism, batch, dtype)
        taken = jnp.zeros((batch, config.context_length), bool)
        return depth.RoutedCache(cache, taken) if routed else cache

    return tuple(empty(*block) for block in turn(config) * n_turns(config))


def norms(c: Architecture) -> int:
    """Count those of the blocks, and the one before the head."""
    return c.n_layers * PLACEMENTS[c.norm_placement].norms(2 if c.feed_forward else 1) + 1


SERIAL = Layout(
    Serial,
    tree.unroll,
    empty_caches,
    width=lambda c: c.d_model,
    kernels=lambda c: {"feed_forward": feed_forward.kernels(c, c.n_layers)},
    norms=norms,
)
