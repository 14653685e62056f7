"""Structured pruning: remove heads, neurons, features or layers from a model.

The arrays become smaller, and the config says so. Layers are stacked, so every layer loses the same
number of heads or neurons, but each layer loses its own.

A gate multiplies the output of a part: 1 leaves the model as it is, 0 is the model without the
part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Architecture
from jaxdecoder.errors import UserError
from jaxdecoder.layers import tree
from jaxdecoder.layers.serial import n_turns, turn
from jaxdecoder.training.sparsity import count_of
from jaxdecoder.typing import Params

Gates = dict[tree.Path, Float[Array, "... units"]]
"""Gates by the path of their module: an attention, a feed-forward, or the whole model, ()."""
Keep = dict[tree.Path, Int[np.ndarray, "... kept"]]
"""The units that stay, in order, by the same paths."""

Ones = Callable[[Params, Architecture], Gates]
Gated = Callable[[Params, Architecture, Gates], Params]


class Part(NamedTuple):
    """A kind of unit that a model has several of, and can lose.

    refusal: (config) -> why this model cannot lose any, or "".
    units: (config) -> how many units a layer has.
    groups: (config) -> how many groups the units form; every group loses the same number.
    ones: (params, config) -> a gate of 1 for each unit.
    gated: (params, config, gates) -> the parameters of the model with these gates.
    remove: (params, config, keep) -> parameters and config of the model with only these units.
    """

    refusal: Callable[[Architecture], str]
    units: Callable[[Architecture], int]
    groups: Callable[[Architecture], int]
    ones: Ones
    gated: Gated
    remove: Callable[[Params, Architecture, Keep], tuple[Params, Architecture]]


def going(config: Architecture, part: Part, sparsity: float) -> tuple[int, int]:
    """Return how many units of a group go, rounded to the nearest number, and the group's size.

    Raises:
        UserError: if none of them would go, or all.
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
    """Choose the units with the highest scores in each group; `going` says how many go."""
    count, size = going(config, part, sparsity)

    def choose(x: Float[np.ndarray, "*layers units"]) -> Int[np.ndarray, "*layers kept"]:
        # Feed-forwards of a stack may be a multiple of the config's width.
        factor = x.shape[-1] // part.units(config)
        groups = x.reshape(*x.shape[:-1], part.groups(config), -1)
        best = np.argsort(-groups, axis=-1, kind="stable")[..., : factor * (size - count)]
        first = np.arange(groups.shape[-2])[:, None] * groups.shape[-1]
        return np.sort((best + first).reshape(*x.shape[:-1], -1), axis=-1)

    return {path: choose(np.asarray(x)) for path, x in scores.items()}


# --- Heads and neurons ----------------------------------------------------------------------------


NO_OUT = "without model.attention_projection the heads are as wide as the residual stream"
NO_DOWN = "without model.feed_forward_projection the neurons are the residual stream's features"


def heads_refusal(c: Architecture) -> str:
    """Say why no heads can be removed, or return ""."""
    if not c.attention_projection:
        return NO_OUT
    if c.position == "alibi":
        return 'model.position = "alibi" gives every head its slope by how many there are'
    return ""


def neurons_refusal(c: Architecture) -> str:
    """Say why no neurons can be removed, or return ""."""
    if not c.feed_forward:
        return "model.feed_forward is false"
    if not c.feed_forward_projection:
        return NO_DOWN
    return ""


def remove_heads(params: Params, config: Architecture, keep: Keep) -> tuple[Params, Architecture]:
    """Return the model with only these heads."""
    columns = np.arange(config.d_head)
    wide = {
        path: (index[..., None] * config.d_head + columns).reshape(*index.shape[:-1], -1)
        for path, index in keep.items()
    }
    own = config.n_kv_heads == config.n_heads
    axes = {"head": keep, "heads": wide, **({"kv_heads": wide} if own else {})}
    count = next(iter(keep.values())).shape[-1]
    smaller = replace(config, n_heads=count, n_kv_heads=count if own else config.n_kv_heads)
    return tree.take(params, lambda path, axis: axes.get(axis, {}).get(path)), smaller


def remove_neurons(params: Params, config: Architecture, keep: Keep) -> tuple[Params, Architecture]:
    """Return the model with only these neurons."""
    leaf, index = next((tree.at(params, path), index) for path, index in keep.items())
    d_ff = config.d_ff * index.shape[-1] // leaf["down"]["kernel"].shape[-2]
    axes = {"neurons": keep}
    return tree.take(params, lambda path, axis: axes.get(axis, {}).get(path)), replace(
        config, d_ff=d_ff
    )


def _reads(name: str, unit: Callable[[Architecture], int]) -> tuple[Ones, Gated]:
    """Return `ones` and `gated` for gates on a linear layer's inputs, each over `unit` inputs."""

    def kernels(params: Params) -> tree.Leaves:
        found = tree.leaves(params).items()
        return {path: leaf for path, leaf in found if path[-2:] == (name, tree.KERNEL)}

    def ones(params: Params, c: Architecture) -> Gates:
        return {
            path[:-2]: jnp.ones((*leaf.shape[:-2], leaf.shape[-2] // unit(c)))
            for path, leaf in kernels(params).items()
        }

    def gated(params: Params, c: Architecture, gates: Gates) -> Params:
        scaled = {
            path: leaf * jnp.repeat(gates[path[:-2]], unit(c), axis=-1)[..., None]
            for path, leaf in kernels(params).items()
        }
        return tree.replaced(params, scaled)

    return ones, gated


# --- Width ----------------------------------------------------------------------------------------


def width_refusal(c: Architecture) -> str:
    """Say why no features of the residual stream can be removed, or return ""."""
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


def gate_features(params: Params, config: Architecture, gates: Gates) -> Params:
    """Apply gates to every array whose output is features: embeddings, ends of branches, norms."""
    return _scaled(params, gates[()], lambda path: tree.axes_of(path)[-1:] == ("features",))


def remove_features(
    params: Params, config: Architecture, keep: Keep
) -> tuple[Params, Architecture]:
    """Return the model with only these features of the residual stream; heads and neurons stay.

    Without norms it equals the model in which the other features are zero. With rmsnorm it does so
    too, although the mean is over fewer features: the scale is multiplied by sqrt(d / d') and the
    epsilon by d / d'. (Norms of queries and keys share the epsilon, and change slightly.) layernorm
    normalises only the features that stay.
    """
    index = keep[()]
    ratio = config.d_model / len(index)
    smaller = replace(config, d_model=len(index))
    params = tree.take(params, lambda path, axis: index if axis == "features" else None)
    if config.norm == "rmsnorm":
        smaller = replace(smaller, norm_epsilon=config.norm_epsilon * ratio)
        params = _scaled(
            params, ratio**0.5, lambda path: path[-1] == "scale" and bool(tree.axes_of(path))
        )
    return params, smaller


def _scaled(params: Params, factor: Any, chosen: Callable[[tree.Path], bool]) -> Params:
    scaled = {path: x * factor for path, x in tree.leaves(params).items() if chosen(path)}
    return tree.replaced(params, scaled)


# --- Layers ---------------------------------------------------------------------------------------


def layers_refusal(c: Architecture) -> str:
    """Say why no layers can be removed, or return ""."""
    if c.layout != "serial":
        return f'in model.layout = "{c.layout}" layers stand side by side, each with its slice'
    return ""


def remove_layers(params: Params, config: Architecture, keep: Keep) -> tuple[Params, Architecture]:
    """Return the model with only these turns of the layers' pattern, or layers if all are alike."""
    index = keep[tree.SERIAL]
    n_layers = len(index) * len(turn(config))
    # The first exit stays at its depth, if there is still a block above it.
    first = min(config.exit_minimum, max(1, n_layers - 1))
    smaller = replace(config, n_layers=n_layers, exit_minimum=first)
    return tree.take_turns(params, index), smaller


def _ungated(params: Params, config: Architecture, gates: Gates) -> Params:
    raise AssertionError("layers are measured by their influence, not by gates")


def _single(config: Architecture) -> int:
    return 1


PARTS: dict[str, Part] = {
    "heads": Part(
        heads_refusal,
        lambda c: c.n_heads,
        lambda c: c.n_kv_heads if c.n_kv_heads != c.n_heads else 1,  # those that share keys
        *_reads("out", lambda c: c.d_head),
        remove_heads,
    ),
    "neurons": Part(
        neurons_refusal, lambda c: c.d_ff, _single, *_reads("down", _single), remove_neurons
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
        n_turns,
        _single,
        lambda params, c: {tree.SERIAL: jnp.ones(n_turns(c))},
        _ungated,
        remove_layers,
    ),
}
