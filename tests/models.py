"""Small models to test with, and cheap ways to run them."""

import dataclasses
import itertools
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecoder import Decoder
from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.depth import DEPTHS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS

# Whatever bounds how far attention sees is short enough to bound it in this context. No token stops
# early, so that decoding gives what the full pass does.
SMALL = ModelConfig(
    vocab_size=13,
    context_length=8,
    d_model=16,
    n_layers=2,
    n_heads=4,
    d_ff=24,
    attention_window=3,
    attention_block=3,
    position_buckets=4,
    position_max_distance=5,
    exit_threshold=1.0,
    mod_capacity=0.4,
)

# Small models spend their time in the compiler, and half of that in optimisation.
quick_jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def small(**changes):
    """The small model with these fields changed."""
    return dataclasses.replace(SMALL, **changes)


def shapes(config):
    """The shapes of a decoder's parameters."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def random_params(config, seed=0):
    """Parameters none of which is at a special value: no zero bias, no unit scale."""

    def fill(path, leaf):
        # An array's numbers depend on its own path alone.
        name = zlib.crc32(jax.tree_util.keystr(path).encode())
        noise = np.random.default_rng([seed, name]).normal(size=leaf.shape, scale=0.3)
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(noise + centre, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(config))


def random_tokens(config, *shape, seed=0):
    """Tokens of the config's vocabulary."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)


@partial(quick_jit, static_argnums=0)
def logits_of(decoder, params, tokens):
    """The logits of a full forward pass."""
    return decoder.apply({"params": params}, tokens)


def covering_configs():
    """Configs in which every entry of every component's dict occurs, and every pair of position and
    attention, and every pair of norm and placement. Both layers have their own attention."""
    wirings = itertools.product(NORMS, PLACEMENTS)
    sights = itertools.product(POSITIONS, zip_cycled(*halves(list(ATTENTIONS))))
    rows = zip_cycled(list(wirings), list(sights), list(ACTIVATIONS), list(DEPTHS))
    return [
        small(
            norm=norm,
            norm_placement=placement,
            position=position,
            attention=attention,
            activation=activation,
            depth=depth,
        )
        for (norm, placement), (position, attention), activation, depth in rows
    ]


def halves(items):
    """The first half of these items, the longer one, and the second."""
    middle = -(-len(items) // 2)
    return items[:middle], items[middle:]


def zip_cycled(*columns):
    """Rows of these columns, the shorter ones repeated."""
    longest = max(map(len, columns))
    return [tuple(column[i % len(column)] for column in columns) for i in range(longest)]


def name_of(config):
    """What distinguishes a config from the small one."""
    changed = (
        getattr(config, field.name)
        if not isinstance(getattr(config, field.name), bool | int)
        else f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(SMALL, field.name)
    )
    return "-".join(map(str, changed))
