"""Structured pruning: heads, neurons, features and layers, and models without some of them.

What is removed is gone: the arrays are smaller, and the config says so. Layers are stacked, so each
loses as many heads or neurons as the others, its own ones.

A gate multiplies what a part gives: 1 leaves the model as it is, 0 is the model without the part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.errors import UserError
from jaxdecoder.layers.serial import periods, turn
from jaxdecoder.training.sparsity import Path, count_of

Gates = dict[Path, Float[Array, "... units"]]
"""By the path of the module whose parts they are: an attention, a feed-forward, or all, ()."""
Keep = dict[Path, Int[np.ndarray, "... kept"]]
"""Which units stay, in order, by the same paths."""


class Part(NamedTuple):
    """What a model has several of.

    refusal: (config) -> why this model cannot lose any, or "".
    units: (config) -> how many a layer has.
    groups: (config) -> how many groups they form, each of which loses as many as the others.
    ones: (params, config) -> a gate of 1 for each.
    gated: (params, config, gates) -> the parameters of the model with these gates.
    remove: (params, config, keep) -> parameters and config of the model of those that stay.
    """

    refusal: Callable[[Architecture], str]
    units: Callable[[Architecture], int]
    groups: Callable[[Architecture], int]
    ones: Callable[[Any, Architecture], Gates]
    gated: Callable[[Any, Architecture, Gates], Any]
    remove: Callable[[Any, Architecture, Keep], tuple[Any, Architecture]]


# The last two names of a parameter's path -> what its last axes run over.
AXES: dict[Path, tuple[str, ...]] = {
    ("embedding",): ("vocabulary", "features"),
    ("positions", "embedding"): ("time", "features"),
    ("positions", "bias"): ("head", "buckets"),
    ("query", "kernel"): ("features", "heads"),
    ("query", "bias"): ("heads",),
    ("key", "kernel"): ("features", "kv_heads"),
    ("key", "bias"): ("kv_heads",),
    ("value", "kernel"): ("features", "kv_heads"),
    ("value", "bias"): ("kv_heads",),
    ("out", "kernel"): ("heads", "features"),
    ("out", "bias"): ("features",),
    ("gate", "kernel"): ("features", "neurons"),
    ("gate", "bias"): ("neurons",),
    ("up", "kernel"): ("features", "neurons"),
    ("up", "bias"): ("neurons",),
    ("down", "kernel"): ("neurons", "features"),
    ("down", "bias"): ("features",),
    ("attention_convolution", "taps"): ("features", "taps"),
    ("feed_forward_convolution", "taps"): ("features", "taps"),
    ("router", "kernel"): ("features", "score"),
    ("head", "kernel"): ("features", "vocabulary"),
}


def axes_of(path: Path) -> tuple[str, ...]:
    """What the last axes of a parameter run over; empty if it has to do with no part."""
    if path[-1] in ("scale", "bias") and path[-2].endswith("norm"):
        return () if path[-2] in ("query_norm", "key_norm") else ("features",)
    return AXES.get(path[-2:], ())


def going(config: Architecture, part: Part, sparsity: float) -> tuple[int, int]:
    """How many of a group of units go, to the nearest number, and how many it has.

    Raises:
        UserError: if that is none of them, or all.
    """
    size = part.units(config) // part.groups(config)
    count = count_of(sparsity, size)
    if 0 < count < size:
        return count, size
    which = "none" if count == 0 else "all"
    if size == 1:
        raise UserError(
            f"--sparsity {sparsity}: there is but one, or one a group, and it must stay"
        )
    raise UserError(
        f"--sparsity {sparsity}: of {size}, {which} would go; "
        f"{1 / size:.3g} to {(size - 1) / size:.3g} would do"
    )


def kept(scores: Gates, config: Architecture, part: Part, sparsity: float) -> Keep:
    """The highest of each group of units, once `going` are gone."""
    count, size = going(config, part, sparsity)

    def choose(x: Float[np.ndarray, "*layers units"]) -> Int[np.ndarray, "*layers kept"]:
        # The feed-forwards of a stack may be some times as wide as the config's.
        factor = x.shape[-1] // part.units(config)
        groups = x.reshape(*x.shape[:-1], part.groups(config), -1)
        best = np.argsort(-groups, axis=-1, kind="stable")[..., : factor * (size - count)]
        first = np.arange(groups.shape[-2])[:, None] * groups.shape[-1]
        return np.sort((best + first).reshape(*x.shape[:-1], -1), axis=-1)

    return {path: choose(np.asarray(x)) for path, x in scores.items()}


def take(params: Any, indices: Callable[[Path, str], Any]) -> Any:
    """The parameters with only some entries of their axes.

    `indices`: (path of the module, name of the axis) -> (*layers, entries) or (entries), or None
    for all.
    """
    taken = {}
    for path, leaf in flatten_dict(params).items():
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
    return unflatten_dict(taken)


# --- Heads and neurons ----------------------------------------------------------------------------


NO_OUT = "without model.attention_projection the heads are as wide as the residual stream"
NO_DOWN = "without model.feed_forward_projection the neurons are the residual stream's features"


def heads_refusal(c: Architecture) -> str:
    """Why no heads can go."""
    if not c.attention_projection:
        return NO_OUT
    if c.position == "alibi":
        return 'model.position = "alibi" gives every head its slope by how many there are'
    return ""


def neurons_refusal(c: Architecture) -> str:
    """Why no neurons can go."""
    if not c.feed_forward:
        return "model.feed_forward is false"
    if not c.feed_forward_projection:
        return NO_DOWN
    return ""


def head_groups(c: Architecture) -> int:
    """Heads that share keys and values are a group; where none do, a head goes with its own."""
    return c.n_kv_heads if c.n_kv_heads != c.n_heads else 1


def remove_heads(params: Any, config: Architecture, keep: Keep) -> tuple[Any, Architecture]:
    """The model of these heads."""
    wide = {path: _columns(index, config.d_head) for path, index in keep.items()}
    own = config.n_kv_heads == config.n_heads
    axes = {"head": keep, "heads": wide, **({"kv_heads": wide} if own else {})}
    count = next(iter(keep.values())).shape[-1]
    smaller = replace(config, n_heads=count, n_kv_heads=count if own else config.n_kv_heads)
    return take(params, lambda path, axis: axes.get(axis, {}).get(path)), smaller


def remove_neurons(params: Any, config: Architecture, keep: Keep) -> tuple[Any, Architecture]:
    """The model of these neurons."""
    leaf, index = next((_at(params, path), index) for path, index in keep.items())
    d_ff = config.d_ff * index.shape[-1] // leaf["down"]["kernel"].shape[-2]
    axes = {"neurons": keep}
    return take(params, lambda path, axis: axes.get(axis, {}).get(path)), replace(config, d_ff=d_ff)


def _columns(index: Int[np.ndarray, "*layers units"], width: int) -> Any:
    """The entries of units that are so many entries wide."""
    return (index[..., None] * width + np.arange(width)).reshape(*index.shape[:-1], -1)


def _at(params: Any, path: Path) -> Any:
    for name in path:
        params = params[name]
    return params


def _reads(name: str, unit: Callable[[Architecture], int]) -> tuple[Any, Any]:
    """Gates on what one kind of linear layer reads, `unit` entries each: `ones` and `gated`."""

    def kernels(params: Any) -> dict[Path, Any]:
        leaves = flatten_dict(params).items()
        return {path: leaf for path, leaf in leaves if path[-2:] == (name, "kernel")}

    def ones(params: Any, c: Architecture) -> Gates:
        return {
            path[:-2]: jnp.ones((*leaf.shape[:-2], leaf.shape[-2] // unit(c)))
            for path, leaf in kernels(params).items()
        }

    def gated(params: Any, c: Architecture, gates: Gates) -> Any:
        scaled = {
            path: leaf * jnp.repeat(gates[path[:-2]], unit(c), axis=-1)[..., None]
            for path, leaf in kernels(params).items()
        }
        return unflatten_dict({**flatten_dict(params), **scaled})

    return ones, gated


# --- Width ----------------------------------------------------------------------------------------


def width_refusal(c: Architecture) -> str:
    """Why no features of the residual stream can go."""
    if c.layout != "serial":
        return f'in model.layout = "{c.layout}" features are slices of layers'
    if c.position == "sinusoidal":
        return 'model.position = "sinusoidal" makes its waves by the width'
    if c.copying:
        return "model.copying points with a head as wide as the residual stream"
    if not c.attention_projection:
        return NO_OUT
    if c.feed_forward and not c.feed_forward_projection:
        return NO_DOWN
    return ""


def gate_features(params: Any, config: Architecture, gates: Gates) -> Any:
    """Gates on every array that gives features: embeddings, outputs of branches, norms."""
    return unflatten_dict(
        {
            path: leaf * gates[()] if axes_of(path)[-1:] == ("features",) else leaf
            for path, leaf in flatten_dict(params).items()
        }
    )


def remove_features(params: Any, config: Architecture, keep: Keep) -> tuple[Any, Architecture]:
    """The model of these features of the residual stream; heads and neurons stay as they are.

    Without norms this is the model in which the other features are zero. So it is with rmsnorm,
    whose mean is now over fewer features: with its scale times sqrt(d / d') and its epsilon times
    d / d' it gives what it gave (norms of queries and keys share the epsilon, and come out nearly
    the same). layernorm is that of the features that stay.
    """
    index = keep[()]
    ratio = config.d_model / len(index)
    smaller = replace(config, d_model=len(index))
    params = take(params, lambda path, axis: index if axis == "features" else None)
    if config.norm == "rmsnorm":
        smaller = replace(smaller, norm_epsilon=config.norm_epsilon * ratio)
        params = unflatten_dict(
            {
                path: leaf * ratio**0.5 if path[-1] == "scale" and axes_of(path) else leaf
                for path, leaf in flatten_dict(params).items()
            }
        )
    return params, smaller


# --- Layers ---------------------------------------------------------------------------------------

BLOCKS = ("body", "blocks")


def layers_refusal(c: Architecture) -> str:
    """Why no layers can go."""
    if c.layout != "serial":
        return f'in model.layout = "{c.layout}" layers stand side by side, each with its slice'
    return ""


def remove_layers(params: Any, config: Architecture, keep: Keep) -> tuple[Any, Architecture]:
    """The model of these turns of the layers' pattern: single layers where all are alike."""
    index = keep[BLOCKS]
    n_layers = len(index) * len(turn(config))
    # The first exit stays where it is, if there is still a block above it.
    first = min(config.exit_minimum, max(1, n_layers - 1))
    smaller = replace(config, n_layers=n_layers, exit_minimum=first)
    taken = {
        path: leaf[index] if path[:2] == BLOCKS else leaf
        for path, leaf in flatten_dict(params).items()
    }
    return unflatten_dict(taken), smaller


def _ungated(params: Any, config: Architecture, gates: Gates) -> Any:
    raise AssertionError("layers are measured by their influence, not by gates")


def _single(config: Architecture) -> int:
    return 1


PARTS: dict[str, Part] = {
    "heads": Part(
        heads_refusal,
        lambda c: c.n_heads,
        head_groups,
        *_reads("out", lambda c: c.d_head),
        remove_heads,
    ),
    "neurons": Part(
        neurons_refusal,
        lambda c: c.d_ff,
        _single,
        *_reads("down", _single),
        remove_neurons,
    ),
    "width": Part(
        width_refusal,
        lambda c: c.d_model,
        _single,
        lambda params, c: {(): jnp.ones(c.d_model)},
        gate_features,
        remove_features,
    ),
    "layers": Part(
        layers_refusal,
        periods,
        _single,
        lambda params, c: {BLOCKS: jnp.ones(periods(c))},
        _ungated,
        remove_layers,
    ),
}
