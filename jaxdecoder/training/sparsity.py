"""Zeros among the weights: groups of weights that are compared, and zeros made in training.

Matrices go by their paths in the parameters. Layers are stacked, so a leaf (*layers, d_in, d_out)
is a matrix for each layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxdecoder.config import CompressionConfig
from jaxdecoder.layers.tree import Matrices, Path, body_matrices, leaves, replaced
from jaxdecoder.typing import Params


class Scope(NamedTuple):
    """A choice of the weights that are compared with one another.

    split: matrices -> arrays (groups, members), each row a group.
    join: such arrays, and the shapes they came from -> the matrices.
    """

    split: Callable[[Matrices], list[jax.Array]]
    join: Callable[[list[jax.Array], dict[Path, tuple[int, ...]]], Matrices]


def _split_matrices(matrices: Matrices) -> list[jax.Array]:
    return [x.reshape(-1, x.shape[-2] * x.shape[-1]) for x in matrices.values()]


def _join_matrices(groups: list[jax.Array], shapes: dict[Path, tuple[int, ...]]) -> Matrices:
    return {p: x.reshape(shape) for x, (p, shape) in zip(groups, shapes.items(), strict=True)}


def _split_outputs(matrices: Matrices) -> list[jax.Array]:
    return [x.swapaxes(-1, -2).reshape(-1, x.shape[-2]) for x in matrices.values()]


def _join_outputs(groups: list[jax.Array], shapes: dict[Path, tuple[int, ...]]) -> Matrices:
    return {
        path: x.reshape(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2)
        for x, (path, shape) in zip(groups, shapes.items(), strict=True)
    }


def _split_nothing(matrices: Matrices) -> list[jax.Array]:
    return [jnp.concatenate([x.ravel() for x in matrices.values()])[None]]


def _join_all(groups: list[jax.Array], shapes: dict[Path, tuple[int, ...]]) -> Matrices:
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    parts = jnp.split(groups[0][0], ends[:-1])
    return {p: x.reshape(shape) for x, (p, shape) in zip(parts, shapes.items(), strict=True)}


SCOPES: dict[str, Scope] = {
    "matrix": Scope(_split_matrices, _join_matrices),
    "output": Scope(_split_outputs, _join_outputs),
    "global": Scope(_split_nothing, _join_all),
}
"""Within each matrix of each layer, among the weights of one output unit, or among all."""


def count_of(share: float, size: int) -> int:
    """Return this share of `size`, to the nearest whole number, halves upwards."""
    return math.floor(share * size + 0.5)


def keep_highest(
    scores: Float[Array, "groups members"], dropped: Int[Array, "#groups"]
) -> Bool[Array, "groups members"]:
    """Return False for exactly `dropped` lowest scores of each group; ties go by place."""
    ranks = jnp.argsort(jnp.argsort(scores, axis=-1), axis=-1)
    return ranks >= dropped[:, None]


def zeros_of(params: Params, others: Params) -> Params:
    """Return `others` with zeros where a matrix of the body in `params` has them."""
    theirs = leaves(others)
    cut = {p: jnp.where(x == 0, 0, theirs[p]) for p, x in body_matrices(params).items()}
    return replaced(others, cut)


# --- Zeros made in training -----------------------------------------------------------------------


class Rounds(NamedTuple):
    """The state of `gradual`."""

    step: Int[Array, ""]


def rounds(c: CompressionConfig) -> dict[int, float]:
    """Return the steps after which weights become zero, with the share that is zero from then on.

    s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3: many while there are many to spare, and few
    towards the end (arXiv 1710.01878).
    """
    span = max(1, c.sparsity_end - c.sparsity_begin)
    steps = {*range(c.sparsity_begin, c.sparsity_end, c.sparsity_every), c.sparsity_end} - {0}
    return {
        step: c.sparsity + (c.sparsity_from - c.sparsity) * ((c.sparsity_end - step) / span) ** 3
        for step in sorted(steps)
    }


def gradual(c: CompressionConfig) -> optax.GradientTransformation:
    """Make zeros in the body's matrices, more of them at every one of `rounds`.

    The smallest weights go, as they would be after the update. Comes after `keep_zeros`, which
    keeps what is zero already; how many there are to be is known beforehand, exactly.
    """
    scope, schedule = SCOPES[c.sparsity_scope], rounds(c)
    steps = np.array(list(schedule), np.int32)

    def make_zeros(updates: Params, params: Params, number: Int[Array, ""]) -> Params:
        ours, theirs = body_matrices(params), leaves(updates)
        shapes = {path: x.shape for path, x in ours.items()}
        sizes = scope.split({path: jnp.abs(x + theirs[path]) for path, x in ours.items()})
        kept = []
        for groups in sizes:
            counts = np.array([count_of(share, groups.shape[1]) for share in schedule.values()])
            kept.append(keep_highest(groups, jnp.asarray(counts, jnp.int32)[number][None]))
        masks = scope.join(kept, shapes)
        cut = {path: jnp.where(masks[path], theirs[path], -x) for path, x in ours.items()}
        return replaced(updates, cut)

    def update(updates: Params, state: Rounds, params: Params) -> tuple[Params, Rounds]:
        step = state.step + 1
        due = steps == step
        cut = jax.lax.cond(
            jnp.any(due), lambda: make_zeros(updates, params, jnp.argmax(due)), lambda: updates
        )
        return cut, Rounds(step)

    return optax.GradientTransformation(lambda params: Rounds(jnp.zeros((), jnp.int32)), update)
