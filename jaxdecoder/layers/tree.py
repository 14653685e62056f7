"""Parameter trees: how modules and axes are named, and how to walk a model's layers.

The only room that knows names. Whoever shards, decays, prunes, calibrates or distils asks here.

A path is the names of modules from the root to a parameter. Blocks of one kind are stacked, so
their parameters have leading axes that run over the turns of the layers' pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdecoder.typing import Params

Path = tuple[str, ...]
Leaves = dict[Path, Any]
"""Leaves by their paths: arrays, of JAX or NumPy, or what modules sowed."""
Matrices = Leaves
"""Arrays (*layers, d_in, d_out) by their paths."""

BODY, BLOCKS, KERNEL = "body", "blocks", "kernel"
TURNED = "turned"
"""The name of a kernel (d_out, d_in), as `turned` keeps some for decoding."""
SERIAL: Path = (BODY, BLOCKS)
"""The stacked blocks of the serial layout."""
HEAD: Path = ("head", KERNEL)
EMBEDDING: Path = ("embedding",)
POSITIONS: Path = ("positions", "embedding")

AXES: dict[Path, tuple[str, ...]] = {
    EMBEDDING: ("vocabulary", "features"),
    POSITIONS: ("time", "features"),
    ("positions", "bias"): ("head", "buckets"),
    ("query", KERNEL): ("features", "heads"),
    ("query", "bias"): ("heads",),
    ("key", KERNEL): ("features", "kv_heads"),
    ("key", "bias"): ("kv_heads",),
    ("value", KERNEL): ("features", "kv_heads"),
    ("value", "bias"): ("kv_heads",),
    ("out", KERNEL): ("heads", "features"),
    ("out", "bias"): ("features",),
    ("gate", KERNEL): ("features", "neurons"),
    ("gate", "bias"): ("neurons",),
    ("up", KERNEL): ("features", "neurons"),
    ("up", "bias"): ("neurons",),
    ("down", KERNEL): ("neurons", "features"),
    ("down", "bias"): ("features",),
    ("skip", KERNEL): ("features", "slice"),
    ("narrow", KERNEL): ("features", "slice"),
    ("attention_convolution", "taps"): ("features", "taps"),
    ("feed_forward_convolution", "taps"): ("features", "taps"),
    ("router", KERNEL): ("features", "score"),
    HEAD: ("features", "vocabulary"),
}
"""The end of a parameter's path -> the names of its last axes.

`heads` and `kv_heads` run over the entries of all heads, `head` over the heads themselves.
"""


def axes_of(path: Path) -> tuple[str, ...]:
    """Return the names of a parameter's last axes; empty where no axis has a name."""
    if path[-1] in ("scale", "bias") and path[-2:-1] and path[-2].endswith("norm"):
        return () if path[-2] in ("query_norm", "key_norm") else ("features",)
    return AXES.get(path[-2:]) or AXES.get(path[-1:], ())


# --- Leaves ---------------------------------------------------------------------------------------


def leaves(params: Params) -> Leaves:
    """Return the arrays of a tree by their paths."""
    found: Leaves = flatten_dict(params)
    return found


def tree_of(leaves: Leaves) -> Params:
    """Return the tree of these leaves."""
    tree: Params = unflatten_dict(leaves)
    return tree


def replaced(params: Params, changes: Leaves) -> Params:
    """Return the tree with these arrays in place of its own."""
    return tree_of({**leaves(params), **changes})


def at(params: Params, path: Path) -> Any:
    """Return the subtree, or the array, at a path."""
    for name in path:
        params = params[name]
    return params


def marked(params: Params, is_one: Callable[[Path], bool]) -> Params:
    """Return a tree of whether `is_one` says so of each path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_one(tuple(entry.key for entry in path)), params
    )


def take(params: Params, indices: Callable[[Path, str], Any]) -> Params:
    """Return the parameters with only some entries of their named axes.

    `indices`: (path of the module, name of the axis) -> (*layers, entries) or (entries), or None
    for all.
    """
    taken = {}
    for path, leaf in leaves(params).items():
        names = axes_of(path)
        for place, name in enumerate(names):
            index = indices(path[:-2], name)
            if index is None:
                continue
            layers = leaf.ndim - len(names)
            shape = index.shape[:-1] or (1,) * layers
            others = [1] * len(names)
            others[place] = index.shape[-1]
            leaf = jnp.take_along_axis(leaf, index.reshape(*shape, *others), layers + place)
        taken[path] = leaf
    return tree_of(taken)


# --- Matrices -------------------------------------------------------------------------------------


def is_kernel(path: Path) -> bool:
    """Return whether a parameter is the matrix of a linear layer; the head's is none of them."""
    return path[-1] == KERNEL and path[-2] != "head"


def is_weight(path: Path) -> bool:
    """Return whether a parameter is the matrix of a linear layer or an embedding."""
    return path[-1] in (KERNEL, "embedding")


def body_matrices(params: Params, *, head: bool = False) -> Matrices:
    """Return the linear layers' matrices, of the body alone, or with the head's if it has its own.

    Embeddings, norms, biases and the routers of a mixture of depths are never among them.
    """
    return {
        path: leaf
        for path, leaf in leaves(params).items()
        if path[-1] == KERNEL
        and path[-2] != "router"
        and (path[0] == BODY or (head and path == HEAD))
    }


def turned(params: Params) -> Params:
    """Return the parameters with the body's matrices of more inputs than outputs turned.

    Those are matrices of one layer alone, as `unroll` makes them.
    """
    narrowing = {
        path: leaf
        for path, leaf in body_matrices(params).items()
        if leaf.ndim == 2 and leaf.shape[0] > leaf.shape[1]
    }
    kept = {path: leaf for path, leaf in leaves(params).items() if path not in narrowing}
    return tree_of(kept | {(*path[:-1], TURNED): leaf.T for path, leaf in narrowing.items()})


def layers_of(stacked: jax.Array) -> jax.Array:
    """Return the matrices of one layer or of several with one axis over the layers."""
    return stacked.reshape(-1, *stacked.shape[-2:])


def with_layer(params: Params, path: Path, layer: int, kernel: jax.Array) -> Params:
    """Return the parameters with one layer's matrix replaced."""
    old = at(params, path)
    return replaced(params, {path: layers_of(old).at[layer].set(kernel).reshape(old.shape)})


# --- Blocks ---------------------------------------------------------------------------------------


def block(place: int) -> str:
    """Return the name of the block at a place of the layers' pattern."""
    return f"block_{place}"


def stack(number: int) -> str:
    """Return the name of one of the parallel stacks."""
    return f"stack_{number}"


def unrolled(turn: int) -> str:
    """Return the name of the blocks of one turn of the pattern, where turns are not stacked."""
    return f"{BLOCKS}_{turn}"


def after(name: str) -> str:
    """Return the name of the intermediate that is the residual stream after a block or stack."""
    return f"after_{name}"


def number_of(name: str | None, kind: Callable[[int], str]) -> int | None:
    """Return the number of a module of a kind, as of `block`; None if it is of another."""
    start = kind(0)[:-1]
    digits = (name or "").removeprefix(start)
    return int(digits) if digits.isdigit() and name == kind(int(digits)) else None


def blocks(body: Params) -> list[Params]:
    """Return the subtree of each block of a serial body, from the bottom up.

    The tree may be one of parameters or of intermediates.
    """
    places = range(_places(body[BLOCKS]))
    return [turn[block(place)] for turn in _turns(body[BLOCKS]) for place in places]


def streams(body: Params) -> list[jax.Array]:
    """Return the residual stream after each block, of a serial body's intermediates."""
    places = _places(body[BLOCKS])
    each = [body[BLOCKS][after(block(place))][0] for place in range(places)]
    return [x for turn in zip(*each, strict=True) for x in turn]


def with_blocks(params: Params, chosen: Sequence[Params], places: int) -> Params:
    """Return a serial model's parameters with these blocks, a pattern of `places` repeated."""
    stacked = {
        block(place): jax.tree.map(lambda *x: jnp.stack(x), *chosen[place::places])
        for place in range(places)
    }
    return {**params, BODY: {**params[BODY], BLOCKS: stacked}}


def take_turns(params: Params, index: Any) -> Params:
    """Return a serial model's parameters with some turns of its pattern alone."""
    stacked = jax.tree.map(lambda x: x[index], params[BODY][BLOCKS])
    return {**params, BODY: {**params[BODY], BLOCKS: stacked}}


def unroll(body: Params) -> Params:
    """Return a serial body with the blocks of each turn under a name of their own."""
    rest = {name: value for name, value in body.items() if name != BLOCKS}
    return rest | {unrolled(i): turn for i, turn in enumerate(_turns(body[BLOCKS]))}


def order_of(path: Path, layer: int) -> tuple[int, ...]:
    """Return where text meets a layer's matrix: sorts before those that it meets later.

    Serial blocks repeat; stacks follow one another, their layers side by side. Then comes copying,
    and last the head.
    """
    if path[0] != BODY:
        return (1 + (path[0] == "head"),)
    if path[1] == BLOCKS:
        return (0, layer, *_numbers(path, block))
    return (0, *_numbers(path, stack), int(BLOCKS not in path))


def layer_name(path: Path, turn: int, places: int) -> str:
    """Return what to call the layer of a stacked module, counted from 0 at the bottom.

    `turn`: which of the repetitions of a pattern that has so many `places`.
    """
    layers = [str(turn * places + place) for place in _numbers(path, block)]
    stacks = [f"stack {number}" for number in _numbers(path, stack)]
    return ", ".join(stacks + layers)


def _numbers(path: Iterable[str], kind: Callable[[int], str]) -> list[int]:
    found = (number_of(name, kind) for name in path)
    return [number for number in found if number is not None]


def _places(stacked: Params) -> int:
    return len(_numbers(stacked, block))


def _turns(stacked: Params) -> list[Params]:
    turns = range(len(jax.tree.leaves(stacked)[0]))
    return [jax.tree.map(lambda x, turn=turn: x[turn], stacked) for turn in turns]
