"""The serial layout: blocks one after another, their parameters stacked along a layer axis."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import Block
from jaxdecoder.layers.cache import Caches, Cursor
from jaxdecoder.layers.norms import NORMS


class Period(nn.Module):
    """One turn of the attention pattern: as many blocks as the pattern has mechanisms."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time d_model"], Caches | None]:
        """The residual stream after these blocks, and their caches, one a block."""
        extended: list[Any] = []
        for i, mechanism in enumerate(self.config.attention_pattern):
            block = Block(self.config, mechanism, self.dtype, name=f"block_{i}")
            layer = None if caches is None else caches[i]
            x, layer = block(x, positions, layer, cursor, deterministic)
            self.sow("intermediates", f"after_block_{i}", x)
            extended.append(layer)
        return x, None if caches is None else tuple(extended)


class Serial(nn.Module):
    """All blocks, then the norm before the head.

    `nn.scan` stacks the blocks' parameters along a leading axis, so one layout serves every depth
    and removing a layer is a slice. Decoding reads every weight for every token, and a slice would
    be a copy: `unrolled` takes them as `unroll` lays them out, each its own array.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    unrolled: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time d_model"],
        positions: Int[Array, "#batch time"],
        caches: Caches | None,
        cursor: Cursor | None,
        deterministic: bool,
    ) -> tuple[Float[Array, "batch time d_model"], Caches | None]:
        """What the head sees, and the extended caches; only `unrolled` takes caches."""
        c = self.config
        count, turn = periods(c), len(c.attention_pattern)
        extended: list[Any] = []
        if self.unrolled:
            for i in range(count):
                held = None if caches is None else caches[i * turn : (i + 1) * turn]
                period = Period(c, self.dtype, name=f"blocks_{i}")
                x, layers = period(x, positions, held, cursor, deterministic)
                extended += layers or ()
        else:
            assert caches is None
            blocks = nn.scan(
                nn.remat(Period, prevent_cse=False, static_argnums=5) if c.remat else Period,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=count,
                unroll=count if jax.default_backend() == "cpu" else 1,
            )(c, self.dtype, name="blocks")
            x, _ = blocks(x, positions, None, None, deterministic)
        x = NORMS[c.norm](c, self.dtype, name="final_norm")(x)
        return x, None if caches is None else tuple(extended)


def periods(config: ModelConfig) -> int:
    """How often the attention pattern repeats over the depth."""
    return config.n_layers // len(config.attention_pattern)


def unroll(params: Any, config: ModelConfig) -> Any:
    """The parameters of a `Serial` as those of the same one with `unrolled`."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    for i in range(periods(config)):
        rest[f"blocks_{i}"] = jax.tree.map(lambda stacked, i=i: stacked[i], params["blocks"])
    return rest


def empty_caches(config: ModelConfig, batch: int, dtype: Any) -> Caches:
    """The caches of all layers, with nothing in them."""
    layers = config.attention_pattern * periods(config)
    return tuple(ATTENTIONS[name].empty_cache(config, batch, dtype) for name in layers)
