"""What attention is asked to do, apart from how: the seam between the operation and its kernels.

`flash_attention` turns its arguments into a `Problem`, which is static and hashable, and
`Operands`, which are arrays. An `Implementation` is a pair of functions of the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxdecoder.kernels import masks, scores
from jaxdecoder.kernels.device import Device


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static part: a key for caches, and a constant for the compiler.

    A pair of positions is allowed if `mask` allows it; a kernel finds its blocks with
    `states`, and inside a PARTIAL block asks `allowed`. Positions count from 0, for queries and
    for keys.
    """

    mask: masks.Mask
    """All that is known before tracing."""
    positional_mask: masks.Mask
    """`mask` without the `documents` under its `&`: those have become segments in the operands."""
    score: Callable[..., Any] | None
    """The score function (score, batch, head, q_index, k_index, *parameters), after `scale`."""
    learned: tuple[bool, ...]
    """For every score operand, whether its gradient is wanted; the others' are zero."""
    scale: float
    dropout: bool
    """Whether weights are dropped: those that are kept stay as they are, whoever asks scales."""
    segments_vary: bool
    """Whether segments are data, so that only the run can tell which blocks they empty."""

    def states(
        self, q_time: int, k_time: int, block_q: int, block_k: int
    ) -> Int8[np.ndarray, "q_blocks k_blocks"]:
        """The block map, for `masks.block_lists`, of an attention matrix padded to whole blocks.

        FULL means that a kernel need not check anything in the block: neither mask nor segments
        nor the end of the keys (padded queries are harmless, their output is cut off).
        """
        return _states(self.mask, self.segments_vary, q_time, k_time, block_q, block_k)

    def allowed(
        self,
        q_index: Any,
        k_index: Any,
        q_segment: Any = None,
        k_segment: Any = None,
        k_time: int | None = None,
    ) -> Any:
        """Which pairs of a block are allowed; all arguments broadcast against one another.

        Segments are those of the operands, and `k_time` is the number of keys where the indices
        may run past it. None for either leaves the check out.
        """
        allowed = self.positional_mask(q_index, k_index)
        if q_segment is not None:
            allowed = allowed & (q_segment == k_segment)
        return allowed if k_time is None else allowed & (k_index < k_time)

    def new_score(self, operands: tuple[Any, ...], score: Any, *index: Any) -> Any:
        """The score function of scaled scores at (batch, head, q_index, k_index)."""
        if self.score is None:
            return score
        return scores.Score(self.score).apply(operands, score, *index)


@functools.lru_cache(maxsize=64)
def _states(
    mask: masks.Mask, segments_vary: bool, q_time: int, k_time: int, block_q: int, block_k: int
) -> np.ndarray:
    states = np.array(masks.block_map(mask, q_time, k_time, block_q, block_k, exact=True))
    unsure = np.zeros_like(states, bool)
    unsure[:, -1] = k_time % block_k != 0
    states[(states == masks.FULL) & (unsure | segments_vary)] = masks.PARTIAL
    states.flags.writeable = False
    return states


class Operands(NamedTuple):
    """The arrays, real or abstract (`shape` and `dtype` are all that a choice may look at)."""

    q: Any
    """(batch, q_time, heads, width)"""
    k: Any
    """(batch, k_time, kv_heads, width); query head h reads head h // (heads / kv_heads)."""
    v: Any
    score: tuple[Any, ...] = ()
    """The operands of the score function, each (heads,) or (heads, n): see `scores.Score`."""
    q_segments: Any = None
    """int32 (batch or 1, q_time): a query sees only the keys with its own number."""
    k_segments: Any = None
    dropout: Any = None
    """uint32 (2,), seed and threshold, where weights are dropped: one is kept if
    `dropout.keep(seed, threshold, batch, head, q, k)`."""
    batch_index: Any = None
    """int32 (batch,): which entries of the whole batch these are, for scores and dropout; the
    first ones, in order, when left out."""
    head_index: Any = None
    """int32 (heads,): likewise of the query heads."""


class Gradients(NamedTuple):
    """Cotangents, with the shapes and types of the operands."""

    q: Any
    k: Any
    v: Any
    score: tuple[Any, ...] = ()
    """One for each score operand; anything, None too, where it is not learned."""


LogSumExp = Float[Array, "batch heads q_time"]


class Implementation(NamedTuple):
    """One way to compute attention.

    `forward` gives the output, in the type of q, and the float32 logarithm of the sum of the
    exponentials of each query's allowed scores, (batch, heads, q_time), -inf for a query without
    keys (whose output is zeros). `backward` may be None: JAX then differentiates `forward`, which
    may leave the logarithm out.
    `refuses` says why it cannot solve a problem of such operands on a device, as the end of the
    sentence "it cannot, because ...", or None.
    """

    forward: Callable[[Problem, Operands], tuple[jax.Array, LogSumExp | None]]
    backward: Callable[[Problem, Operands, jax.Array, LogSumExp, jax.Array], Gradients] | None
    refuses: Callable[[Problem, Operands, Device], str | None]


def captures_arrays(problem: Problem, operands: Operands) -> str | None:
    """Which function closes over arrays, mask or score, if one does: a kernel cannot take it in."""
    parameters = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands.score)
    return _captures_arrays(problem, parameters)


@functools.lru_cache(maxsize=256)
def _captures_arrays(problem: Problem, parameters: tuple[jax.ShapeDtypeStruct, ...]) -> str | None:
    index = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    score = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    one = jax.ShapeDtypeStruct((), jnp.int32)

    def holds(function: Callable[..., Any], *arguments: Any) -> bool:
        consts = jax.make_jaxpr(function)(*arguments).consts
        return any(np.ndim(const) > 0 for const in consts)

    if holds(problem.positional_mask, index, index):
        return "the mask"
    if problem.score is not None:
        value = scores.Score(problem.score, (), problem.learned)
        if holds(value.apply, parameters, score, one, one, index, index):
            return "the score"
    return None


def alike(tree: Any) -> Any:
    """Inside `shard_map`, lets all arrays vary over the mesh axes that any of them varies over.

    A kernel mixes them, and the transpose of this step sums the gradients of the shared ones.
    """
    axes: frozenset[str] = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def vary(x: Any) -> Any:
        missing = tuple(axes - _varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def result(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """A kernel's result, which varies over the mesh axes that `like` varies over."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


# Constants may be arrays of other kinds than jax.Array, under remat for one.
def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
