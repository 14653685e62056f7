"""Unstructured sparsity: score each weight, and choose which weights become zero.

A criterion scores weights. A scope says which weights are compared with each other. A mask keeps
those with the highest scores. A weight that is zero already scores below all others, so that a
share is always of the remaining weights: half, and then half again, leaves a quarter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdecoder.compression.calibration import input_squares
from jaxdecoder.compression.criteria import CRITERIA, Need
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.layers.tree import Matrices, Path
from jaxdecoder.training.runs import Model
from jaxdecoder.training.sparsity import SCOPES, keep_highest
from jaxdecoder.typing import Table

Needed = dict[Path, Any]
"""The data that a criterion needs, by the paths of the matrices."""


def lots(matrices: Matrices, seed: int) -> Needed:
    """Return a random generator for each matrix, which depends only on the seed and its path."""
    names = {path: zlib.crc32("/".join(path).encode()) for path in matrices}
    return {path: np.random.default_rng([seed, name]) for path, name in names.items()}


NEEDS: dict[Need, Callable[[Any, Matrices, Model, Corpus], Needed]] = {
    "nothing": lambda o, matrices, model, corpus: dict.fromkeys(matrices),
    "input_norms": lambda o, matrices, model, corpus: jax.tree.map(
        jnp.sqrt, input_squares(model, corpus, o.calibration_tokens)
    ),
    "lot": lambda o, matrices, model, corpus: lots(matrices, o.seed),
}
"""(options, including those of `OPTIONS_FOR`; matrices; model; corpus) -> what is needed."""


def scores_by(
    name: str, options: Any, matrices: Matrices, model: Model, corpus: Corpus
) -> Matrices:
    """Score each weight by the criterion of this name."""
    criterion = CRITERIA[name]
    needed = NEEDS[criterion.needs](options, matrices, model, corpus)
    return {path: criterion.score(weights, needed[path]) for path, weights in matrices.items()}


def mask(matrices: Matrices, scores: Matrices, sparsity: float, scope: str) -> Matrices:
    """Return masks that are True for the weights that stay.

    In each group of the scope, a share `sparsity` of the weights that are not zero yet goes,
    rounded to the nearest integer, halves upwards.
    """
    groups = SCOPES[scope].split(below_all_where_zero(matrices, scores))
    shapes = {path: weights.shape for path, weights in matrices.items()}
    kept = [keep_highest(group, _dropped(np.asarray(group), sparsity)) for group in groups]
    return SCOPES[scope].join(kept, shapes)


def n_of_m(matrices: Matrices, scores: Matrices, n: int, m: int) -> Matrices:
    """Return masks that are True for the n highest of every m consecutive inputs of an output.

    Sparse tensor cores read 2 of 4 (arXiv 2104.08378).

    Raises:
        UserError: if a matrix's inputs do not divide into groups of m.
    """
    ranked = below_all_where_zero(matrices, scores)

    def keep(path: Path, x: jax.Array) -> jax.Array:
        *layers, d_in, d_out = x.shape
        if d_in % m:
            raise UserError(f"--m {m}: {'/'.join(path)} has {d_in} inputs, which it must divide")
        groups = x.swapaxes(-1, -2).reshape(-1, m)
        kept = keep_highest(groups, jnp.array([m - n]))
        return kept.reshape(*layers, d_out, d_in).swapaxes(-1, -2)

    return {path: keep(path, x) for path, x in ranked.items()}


def below_all_where_zero(matrices: Matrices, scores: Matrices) -> Matrices:
    """Return the scores, but give weights that are zero a score below all others."""
    return {path: jnp.where(w == 0, -1.0, scores[path]) for path, w in matrices.items()}


def apply(matrices: Matrices, masks: Matrices) -> Matrices:
    """Set the weights to zero where the masks are False."""
    return {path: jnp.where(masks[path], w, 0.0) for path, w in matrices.items()}


def zeros(matrices: Matrices) -> Table:
    """Count the weights and the zeros among them, in all and by matrix."""
    counts = {
        "/".join(path): {"weights": w.size, "zeros": int(np.sum(np.asarray(w) == 0))}
        for path, w in matrices.items()
    }
    total = {name: sum(count[name] for count in counts.values()) for name in ("weights", "zeros")}
    return {**total, "matrices": counts}


def _dropped(scores: Float[np.ndarray, "groups members"], sparsity: float) -> Int[Array, " groups"]:
    """Return how many weights of each group are zero or go."""
    already = np.sum(scores < 0, axis=1)
    going = np.floor(sparsity * (scores.shape[1] - already) + 0.5)
    return jnp.asarray(already + going, jnp.int32)
