"""Score functions as values: pure changes to the attention scores before the softmax.

A score function maps (score, batch, head, q_index, k_index) to the new score, for whole arrays at
once. Here it is a `Score`: a static function with the arrays it reads, its operands, held apart.
A `Score` is a pytree, so its operands are traced, sharded and differentiated like any others, and
a kernel can take them as inputs of its own instead of finding them captured in a closure.

The first axis of every operand is the heads. A score function only ever uses the row of its own
head, taken apart into single numbers, because that is what a kernel can hold: no gather is needed.

    score = compose(alibi(alibi_slopes(8)), soft_cap(50.0))
    score(scores, batch, head, q_index, k_index)                    # the operands it was made with
    score.apply(operands, scores, batch, head, q_index, k_index)    # others, say to differentiate
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from jaxdecoder.errors import UserError

Index = Any  # an integer, or an array of integers that broadcasts with the scores


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operands"],
    meta_fields=["function", "learned"],
)
@dataclasses.dataclass(frozen=True)
class Score:
    """`function(score, batch, head, q_index, k_index, *parameters)` and its operands.

    `operands` are arrays of shape (heads,) or (heads, n); `learned` says for each whether it has a
    gradient, which a kernel must know before it is built. Every new score depends on its old one
    alone, so the derivative by the scores is one `jax.jvp` with a tangent of ones. Scores without
    operands are hashable.

    A score of -inf hides a key. Where the mask allows nothing a score may have any value, and any
    derivative by the old score; those by the operands must be finite everywhere.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...] = ()
    learned: tuple[bool, ...] = ()

    def parameters(self, operands: tuple[Any, ...], head: Index) -> tuple[Any, ...]:
        """What the function reads of the operands (arrays, or refs inside a kernel): the head's
        number of an operand (heads,), and the head's tuple of numbers of an operand (heads, n)."""
        # A traced head cannot index a NumPy array.
        arrays = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in operands)
        return tuple(
            array[head]
            if len(array.shape) == 1
            else tuple(array[head, i] for i in range(array.shape[1]))
            for array in arrays
        )

    def apply(
        self,
        operands: tuple[Any, ...],
        score: Any,
        batch: Index,
        head: Index,
        q_index: Index,
        k_index: Index,
    ) -> Any:
        """The new scores, with `operands` in the place of the score's own."""
        parameters = self.parameters(operands, head)
        return self.function(score, batch, head, q_index, k_index, *parameters)

    def __call__(
        self, score: Any, batch: Index, head: Index, q_index: Index, k_index: Index
    ) -> Any:
        return self.apply(self.operands, score, batch, head, q_index, k_index)


@dataclasses.dataclass(frozen=True)
class _With:
    """`functools.partial` for trailing constants, equal by value: the same score compiles once."""

    function: Callable[..., Any]
    constants: tuple[Any, ...]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(self.constants, *arguments)


def soft_cap(cap: float | int) -> Score:
    """Keeps scores within (-cap, cap), smoothly: cap * tanh(score / cap) (arXiv 2408.00118)."""
    cap = float(cap)
    if not cap > 0:
        raise UserError(f"soft_cap: cap must be greater than 0, not {cap}")
    return Score(_With(_soft_cap, (cap,)))


def _soft_cap(
    constants: tuple[float], score: Any, batch: Index, head: Index, q: Index, k: Index
) -> Any:
    (cap,) = constants
    return cap * jnp.tanh(score * (1 / cap))


def alibi_slopes(n_heads: int) -> Float32[np.ndarray, " heads"]:
    """The slopes of ALiBi (arXiv 2108.12409): 2^(-8/n), 2^(-16/n), ... for n heads.

    If n is no power of two: those of the power of two below it, and then every other one of the
    power of two above it, as the paper's authors do.
    """
    if n_heads < 1:
        raise UserError(f"alibi_slopes: n_heads must be at least 1, not {n_heads}")
    below = 2 ** (n_heads.bit_length() - 1)
    exponents = [8 * (head + 1) / below for head in range(below)]
    exponents += [4 * (2 * head + 1) / below for head in range(n_heads - below)]
    return np.exp2(-np.array(exponents)).astype(np.float32)


def alibi(slopes: Float[Array | np.ndarray, " heads"], learned: bool = False) -> Score:
    """Attention with linear biases (arXiv 2108.12409): score - slope * |q - k|, a slope a head."""
    slopes = _operand("alibi", "slopes", slopes, 1)
    return Score(_alibi, (slopes,), (learned,))


def _alibi(score: Any, batch: Index, head: Index, q: Index, k: Index, slope: Any) -> Any:
    return score - slope * jnp.abs(q - k).astype(score.dtype)


def t5_thresholds(n_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The least distance q - k in each of T5's buckets, in the causal variant (arXiv 1910.10683).

    Half of the buckets hold one distance each; the others grow by a constant factor, up to the
    last, which holds every distance from `max_distance` on.
    """
    single = n_buckets // 2
    if n_buckets < 2 or max_distance <= single:
        raise UserError(
            "t5 buckets: n_buckets must be at least 2 and max_distance greater than half of it, "
            f"not n_buckets = {n_buckets} and max_distance = {max_distance}"
        )
    # In float32, in the published order of operations, so that roundings fall the same way.
    distance = np.arange(single, max_distance + 1)
    logarithm = np.log(distance.astype(np.float32) / np.float32(single))
    scaled = logarithm / np.float32(math.log(max_distance / single))
    bucket = single + (scaled * np.float32(n_buckets - single)).astype(np.int32)
    grown = single + np.searchsorted(bucket, np.arange(single, n_buckets))
    return (*range(single), *(int(distance) for distance in grown))


def t5_bucket(relative_position: Index, n_buckets: int = 32, max_distance: int = 128) -> Any:
    """T5's bucket of k - q (arXiv 1910.10683), in the causal variant: the future is bucket 0."""
    thresholds = t5_thresholds(n_buckets, max_distance)
    return sum(jnp.asarray(-relative_position >= least, jnp.int32) for least in thresholds[1:])


def relative_bias(
    table: Float[Array | np.ndarray, "heads buckets"], max_distance: int | None = None
) -> Score:
    """Adds a learned bias for the distance q - k, one row of `table` a head.

    With `max_distance`, distances fall into T5's buckets (`t5_bucket`). Without it, every distance
    has its own column and those beyond the last share it. Keys in the future have column 0. The
    cost is one comparison a column for every score.
    """
    table = _operand("relative_bias", "table", table, 2)
    n_buckets = table.shape[1]
    thresholds = (
        tuple(range(n_buckets)) if max_distance is None else t5_thresholds(n_buckets, max_distance)
    )
    return Score(_With(_relative_bias, thresholds), (table,), (True,))


def _relative_bias(
    thresholds: tuple[int, ...],
    score: Any,
    batch: Index,
    head: Index,
    q: Index,
    k: Index,
    row: tuple[Any, ...],
) -> Any:
    distance, bias = q - k, row[0]
    for least, column in zip(thresholds[1:], row[1:], strict=True):
        bias = jnp.where(distance >= least, column, bias)
    return score + bias


def from_function(
    function: Callable[..., Any], *operands: Any, learned: bool | tuple[bool, ...] = False
) -> Score:
    """The score of any pure function (score, batch, head, q_index, k_index, *parameters) -> score.

    Every operand is an array (heads,) or (heads, n), and gives one parameter: the number, or the
    tuple of n numbers, of the score's own head. A function that closes over arrays instead works
    where XLA runs the attention, but not in a kernel.
    """
    arrays = tuple(_operand("from_function", "an operand", operand, 1, 2) for operand in operands)
    flags = (learned,) * len(arrays) if isinstance(learned, bool) else tuple(learned)
    if len(flags) != len(arrays):
        raise UserError(
            f"from_function: learned has {len(flags)} entries for {len(arrays)} operands"
        )
    score = Score(function, arrays, flags)
    _check_is_a_score(score)
    return score


def compose(*scores: Score) -> Score:
    """Applies score functions one after another, the first one first."""
    functions = tuple(score.function for score in scores)
    counts = tuple(len(score.operands) for score in scores)
    return Score(
        _With(_compose, tuple(zip(functions, counts, strict=True))),
        sum((score.operands for score in scores), ()),
        sum((score.learned for score in scores), ()),
    )


def _compose(
    parts: tuple[tuple[Callable[..., Any], int], ...],
    score: Any,
    batch: Index,
    head: Index,
    q: Index,
    k: Index,
    *parameters: Any,
) -> Any:
    for function, count in parts:
        score = function(score, batch, head, q, k, *parameters[:count])
        parameters = parameters[count:]
    return score


def _operand(score: str, name: str, value: Any, *ranks: int) -> Any:
    if not hasattr(value, "shape"):
        value = np.asarray(value, np.float32)
    if len(value.shape) not in ranks or 0 in value.shape:
        shapes = " or ".join({1: "(heads,)", 2: "(heads, n)"}[rank] for rank in ranks)
        raise UserError(f"{score}: {name} must be an array {shapes}, not of shape {value.shape}")
    return value


def _check_is_a_score(score: Score) -> None:
    name = getattr(score.function, "__qualname__", repr(score.function))
    rule = (
        "A score function is pure, (score, batch, head, q_index, k_index) -> score, made of "
        "operators and jax.numpy, and keeps the shape and the kind of the scores"
    )
    shape, index = (8, 12), jax.ShapeDtypeStruct((8, 12), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    scores = jax.ShapeDtypeStruct(shape, jnp.float32)
    try:
        result = jax.eval_shape(score.apply, score.operands, scores, scalar, scalar, index, index)
    except Exception as error:
        raise UserError(
            f"from_function({name}): it raised {type(error).__name__}: {error}. {rule}"
        ) from error
    if getattr(result, "shape", None) != shape or not jnp.issubdtype(result.dtype, jnp.floating):
        raise UserError(f"from_function({name}): for scores {scores} it gave {result}. {rule}")
