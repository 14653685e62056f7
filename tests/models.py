"""Small models to test with, and cheap ways to run them."""

import dataclasses
import itertools
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdecoder import Decoder
from jaxdecoder.config import ModelConfig
from jaxdecoder.decoder import LAYOUTS
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


def slow(*cases):
    """These cases of a parametrised test, for the long run of tests only."""
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


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
        if [entry.key for entry in path[-2:]] == ["router", "bias"]:
            centre = 2.0  # one that takes a token alone would leave its key without a gradient
        return jnp.asarray(noise + centre, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes(config))


def random_tokens(config, *shape, seed=0):
    """Tokens of the config's vocabulary."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)


@partial(jax.jit, static_argnums=0)
def logits_of(decoder, params, tokens):
    """The logits of a full forward pass."""
    return decoder.apply({"params": params}, tokens)


# Choices that exclude each other, and the key that the refusal names.
REFUSED = {
    ("alibi", "linear"): "model.position",
    ("t5", "linear"): "model.position",
}
REFUSED_DEPTHS = {
    ("mixture_of_depths", "linformer"): "model.depth",
    ("early_exit", "parallel_stacks"): "model.depth",
    ("mixture_of_depths", "parallel_stacks"): "model.depth",
}


def covering_configs():
    """Configs in which every entry of every component's dict occurs, and every pair of position and
    attention that is not refused, of norm and placement, and of activation and layout, and every
    depth, with and without convolutions and copying. Both layers have their own attention; stacks
    have both side by side, twice."""
    wirings = itertools.product(NORMS, PLACEMENTS)
    sights = itertools.product(POSITIONS, zip_cycled(*halves(list(ATTENTIONS))))
    shapes = itertools.product(ACTIVATIONS, LAYOUTS)
    rows = zip_cycled(list(wirings), list(sights), list(shapes))
    depths = {layout: itertools.cycle(DEPTHS) for layout in LAYOUTS}

    def depth_for(layout, attention):
        """The next one that is not refused for these."""
        others = (layout, *attention)
        return next(
            depth
            for depth in depths[layout]
            if not any((depth, other) in REFUSED_DEPTHS for other in others)
        )

    additions = {depth: itertools.cycle(ADDITIONS[depth]) for depth in DEPTHS}

    def config(wiring, sight, shape):
        (norm, placement), (position, attention), (activation, layout) = wiring, sight, shape
        depth = depth_for(layout, attention)
        return small(
            norm=norm,
            norm_placement=placement,
            position=position,
            activation=activation,
            layout=layout,
            depth=depth,
            n_layers=4 if layout == "parallel_stacks" else 2,
            **(next(additions[depth]) if layout == "serial" else {}),
            **seeing(*(name for name in attention if (position, name) not in REFUSED)),
        )

    return [config(*row) for row in rows]


# What serial layers of a depth may have besides.
CONVOLUTION = {"convolution_width": 3}
COPYING = {"copying": True, "tie_embeddings": True}
ADDITIONS = {
    "fixed": ({}, CONVOLUTION | COPYING, CONVOLUTION, COPYING),
    "early_exit": ({},),
    "mixture_of_depths": ({}, {}, COPYING),
}


def telling(configs):
    """A few small ones of these, in which occurs every entry of a component that does in all."""
    found, left = [], set().union(*map(entries, configs))
    while left:
        found.append(max(configs, key=lambda c: len(entries(c) & left) / c.n_layers))
        left -= entries(found[-1])
    return found


def entries(config):
    """The components of a config, each with its family."""
    families = ("norm", "norm_placement", "position", "activation", "layout", "depth")
    held = {(family, getattr(config, family)) for family in families}
    held |= {("copying", config.copying), ("convolved", bool(config.convolution_width))}
    return held | {("attention", name) for name in config.attention_pattern}


SWITCHES = (
    "tie_embeddings",
    "bias",
    "qkv_bias",
    "head_bias",
    "qk_norm",
    "feed_forward",
    "feed_forward_projection",
)


def any_config(draw, turns=2):
    """A random small config that is allowed, its attention pattern repeated up to `turns` times.

    No token sees itself alone, no norm has but the sign of a number left to tell, and no cap is
    reached: there is a gradient to everything but a relu's closed units.
    """
    n_heads = draw(st.sampled_from([1, 2, 4]))
    width = draw(st.sampled_from([4, 6]))
    projects = draw(st.booleans())
    pattern = draw(st.lists(st.sampled_from(list(ATTENTIONS)), min_size=1, max_size=2))
    switches = {name: draw(st.booleans()) for name in SWITCHES}
    switches["head_bias"] &= not switches["tie_embeddings"]  # refused together
    context = draw(st.sampled_from([6, 8, 9, 10, 12]))
    dividing = [n for n in range(2, context) if context % n == 0]
    linformer = "linformer" in pattern
    block = draw(st.sampled_from(dividing) if linformer else st.integers(2, 5))
    positions = [
        position
        for position in POSITIONS
        if not any((position, attention) in REFUSED for attention in pattern)
    ]
    norm = draw(st.sampled_from(list(NORMS)))
    placement = draw(st.sampled_from(list(PLACEMENTS)))
    parts = [] if placement == "parallel" else ["attention", "feed_forward"]
    d_ff = draw(st.none() | st.integers(6, 30))
    layout = draw(st.sampled_from(list(LAYOUTS)))
    stacked = layout == "parallel_stacks"
    depths = [d for d in DEPTHS if not any((d, x) in REFUSED_DEPTHS for x in (layout, *pattern))]
    depth = draw(st.sampled_from(depths))
    layers = len(pattern) * draw(st.integers(1, turns)) * (1 if depth == "fixed" else 2)
    n_stacks = draw(st.integers(1, 2)) if stacked else 1
    d_model = draw(st.integers(4, 20)) if projects else n_heads * width
    if stacked:
        # Every layer of a stack gives an equal slice.
        d_model = -(-d_model // layers) * layers if projects else d_model
        layers = layers if d_model % layers == 0 else 1
        pattern = pattern if layers % len(pattern) == 0 else pattern[:1]
        switches |= {"tie_embeddings": False}
    plain = not stacked and depth == "fixed"
    may_copy = switches["tie_embeddings"] and depth != "early_exit"
    return ModelConfig(
        vocab_size=draw(st.integers(2, 20)),
        context_length=context,
        d_model=d_model,
        layout=layout,
        depth=depth,
        n_stacks=n_stacks,
        n_layers=n_stacks * layers,
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n_heads % n == 0])),
        d_head=width,
        d_ff=d_ff if switches["feed_forward_projection"] else None,
        position=draw(st.sampled_from(positions)),
        rope_fraction=draw(st.sampled_from([1.0, 2 / width])),
        rope_scaling=draw(st.sampled_from([1.0, 4.0])),
        position_buckets=4,
        position_max_distance=draw(st.integers(3, 6)),
        norm=norm,
        norm_placement=placement,
        residual=draw(st.sampled_from([True, False, *parts])),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        attention=tuple(pattern),
        attention_window=draw(st.integers(2, 6)),
        attention_dilation=draw(st.integers(1, 2)),
        attention_globals=draw(st.integers(0, block)),
        attention_block=block,
        attention_rank=draw(st.integers(1, block)),
        attention_projection=projects,
        convolution_width=draw(st.sampled_from([0, 1, 3])) if plain else 0,
        copying=draw(st.booleans()) if may_copy else False,
        logit_softcap=None if norm == "none" else draw(st.sampled_from([None, 5.0])),
        **switches,
    )


def seeing(*attention):
    """The fields for these attentions; linformer's blocks must divide the context."""
    blocks = {"attention_block": 4, "attention_rank": 2} if "linformer" in attention else {}
    return {"attention": attention, **blocks}


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
