"""One room knows how parameters are named, and its names are true."""

from __future__ import annotations

import chex
import pytest
from flax.traverse_util import flatten_dict
from models import random_params, shapes, small

from jaxdecoder.layers import tree

CONFIGS = {
    "plain": small(),
    "gated": small(activation="swiglu", d_ff=40, bias=True, qkv_bias=True, norm="rmsnorm"),
    "grouped": small(n_heads=4, n_kv_heads=2, d_head=6, position="t5", position_buckets=6),
    "convolved": small(convolution_width=3, tie_embeddings=True, copying=True),
    "routed": small(depth="mixture_of_depths", mod_every=2),
    "patterned": small(attention=("full", "sliding_window"), n_layers=4),
    "stacks": small(layout="parallel_stacks", n_stacks=2, n_layers=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_named_axes_are_as_long_as_the_config_says(name):
    config = CONFIGS[name]
    c = config.resolve()
    long = {
        "vocabulary": c.vocab_size,
        "features": c.d_model,
        "time": c.context_length,
        "heads": c.n_heads * c.d_head,
        "kv_heads": c.n_kv_heads * c.d_head,
        "head": c.n_heads,
        "buckets": c.position_buckets,
        "neurons": c.d_ff,
        "taps": c.convolution_width,
        "score": 1,
    }
    found = set()
    for path, leaf in flatten_dict(shapes(config)).items():
        if path[0] == "copying":
            continue  # its head is as wide as the stream, and its gate is one number
        axes = tree.axes_of(path)
        if not axes:
            # Only norms of heads, the router's bias and the copying gate's have no named axis.
            assert "norm" in path[-2] or path[-1] == "bias", path
        for axis, size in zip(axes, leaf.shape[leaf.ndim - len(axes) :], strict=True):
            if c.layout == "parallel_stacks":
                # The last stack is some times as wide; slices are parts of a stack.
                assert axis == "slice" or size % long[axis] == 0, (path, axis)
            else:
                assert size == long[axis], (path, axis)
            found.add(axis)
    assert {"vocabulary", "features", "heads", "kv_heads", "neurons"} <= found


@pytest.mark.parametrize("name", ["plain", "patterned", "routed"])
def test_blocks_taken_apart_are_put_together_again(name):
    params = random_params(CONFIGS[name])
    each = tree.blocks(params[tree.BODY])
    assert len(each) == CONFIGS[name].n_layers
    places = len(params[tree.BODY][tree.BLOCKS])
    chex.assert_trees_all_equal(tree.with_blocks(params, each, places), params)
    turns = tree.take_turns(params, slice(1, 2))
    chex.assert_trees_all_equal(tree.blocks(turns[tree.BODY]), each[places : 2 * places])


def test_numbers_are_read_from_the_names_of_their_kind_alone():
    assert tree.number_of("block_12", tree.block) == 12
    for other in (None, "blocks", "block_", "blocks_1", "stack_1", "after_block_1", "block_01"):
        assert tree.number_of(other, tree.block) is None
