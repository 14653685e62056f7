"""Score functions as values: pure changes to the attention scores before the softmax.

A score function maps (score, batch, head, q_index, k_index) to the new score, for whole arrays at
once. Here it is a `Score`: a static function, and apart from it the arrays it reads, its operands.
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
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree
from numpy.typing import ArrayLike

from jaxdecoder.errors import UserError
from jaxdecoder.kernels.typing import AnyArray, Indices, Leaf, Ref

ScoreFunction = Callable[..., jax.Array]
"""(score, batch, head, q_index, k_index, *parameters) -> score"""

Operand = Leaf | Ref
"""(heads,) or (heads, n)."""

Parameter = jax.Array | tuple[jax.Array, ...]
"""What a score function reads of an operand: its head's number, or its head's n numbers."""

T = TypeVar("T")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operands"], meta_fields=["function", "learned"]
)
@dataclasses.dataclass(frozen=True)
class Score:
    """A score function and its operands.

    `learned` says for each operand whether it has a gradient, which a kernel must know before it is
    built. Every new score depends on its old one alone, so the derivative by the scores is one
    `jax.jvp` with a tangent of ones. Scores without operands are hashable.

    A score of -inf hides a key. Where the mask allows nothing a score may have any value, and any
    derivative by the old score; those by the operands must be finite everywhere.
    """

    function: ScoreFunction
    operands: tuple[Operand, ...] = ()
    learned: tuple[bool, ...] = ()

    @staticmethod
    def parameters(operands: tuple[Operand, ...], head: Indices) -> tuple[Parameter, ...]:
        """Read the parameters of a head from operands: arrays, or refs in a kernel."""
        # A traced head cannot index a NumPy array.
        arrays = (jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in operands)
        return tuple(
            array[head]
            if len(array.shape) == 1
            else tuple(array[head, i] for i in range(array.shape[1]))
            for array in arrays
        )

    def apply(self, operands: tuple[Operand, ...], score: jax.Array, *index: Indices) -> jax.Array:
        """Return the new scores at (batch, head, q_index, k_index), with `operands` for its own."""
        return self.function(score, *index, *self.parameters(operands, index[1]))

    def __call__(
        self, score: ArrayLike, batch: Indices, head: Indices, q_index: Indices, k_index: Indices
    ) -> Array:
        return self.apply(self.operands, jnp.asarray(score), batch, head, q_index, k_index)


@dataclasses.dataclass(frozen=True)
class _With:
    """A function with its first argument given. Unlike `functools.partial` it is equal by value,
    so that the same score compiles once."""

    function: ScoreFunction
    constants: tuple[float, ...] | tuple[tuple[ScoreFunction, int], ...]

    def __call__(self, *arguments: Parameter | Indices) -> jax.Array:
        return self.function(self.constants, *arguments)


# --- Gradients ---------------------------------------------------------------------------------


def chosen(values: Iterable[T], flags: Iterable[bool]) -> list[T]:
    """Return the values that are flagged."""
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def put_back(found: Iterable[T], values: Iterable[T], flags: Iterable[bool]) -> list[T]:
    """Return the values, with those that were `found` in the places of the flagged ones."""
    rest = iter(found)
    return [next(rest) if flag else value for value, flag in zip(values, flags, strict=True)]


Pull = Callable[[jax.Array], tuple[jax.Array, list[jax.Array]]]
"""Takes the gradient of the new scores to that of the old ones, and to those of the learned
parameters, whose numbers are listed one after another."""


def gradient(
    function: Callable[..., jax.Array],
    score: jax.Array,
    parameters: Sequence[T],
    learned: Sequence[bool],
    vjp: Callable[..., tuple[jax.Array, Callable[..., PyTree]]] = jax.vjp,
) -> tuple[jax.Array, Pull]:
    """Return function(score, *parameters) and its pull.

    `vjp(function, score, parameters)` is `jax.vjp`, or does the same inside a kernel.
    """

    def of_learned(score: jax.Array, found: list[T]) -> jax.Array:
        return function(score, *put_back(found, parameters, learned))

    new, pull = vjp(of_learned, score, chosen(parameters, learned))

    def pull_back(d_new: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        d_score, d_parameters = pull(d_new)
        # Where nothing is to be pulled, not even an infinite slope does.
        return jnp.where(d_new == 0, 0.0, d_score), jax.tree.leaves(d_parameters)

    return new, pull_back


# --- The scores --------------------------------------------------------------------------------


def soft_cap(cap: float | int) -> Score:
    """Bound scores to (-cap, cap), smoothly: cap * tanh(score / cap) (arXiv 2408.00118)."""
    cap = float(cap)
    if not cap > 0:
        raise UserError(f"soft_cap: cap must be greater than 0, not {cap}")
    return Score(_With(_soft_cap, (cap,)))


def _soft_cap(constants: tuple[float], score: Array, *index: Indices) -> Array:
    (cap,) = constants
    return cap * jnp.tanh(score * (1 / cap))


def alibi_slopes(n_heads: int) -> Float32[np.ndarray, " heads"]:
    """Return the slopes of ALiBi (arXiv 2108.12409): 2^(-8/n), 2^(-16/n), ... for n heads.

    If n is no power of two, these are the slopes of the power of two below it, and then every
    second one of the power of two above it, as the paper's authors do.
    """
    if n_heads < 1:
        raise UserError(f"alibi_slopes: n_heads must be at least 1, not {n_heads}")
    below = 2 ** (n_heads.bit_length() - 1)
    exponents = [8 * (head + 1) / below for head in range(below)]
    exponents += [4 * (2 * head + 1) / below for head in range(n_heads - below)]
    return np.exp2(-np.array(exponents)).astype(np.float32)


def alibi(slopes: Float[Array | np.ndarray, " heads"], learned: bool = False) -> Score:
    """Return score - slope * |q - k|, with one slope for each head: ALiBi (arXiv 2108.12409)."""
    slopes = _operand("alibi", "slopes", slopes, 1)
    return Score(_alibi, (slopes,), (learned,))


def _alibi(
    score: Array, batch: Indices, head: Indices, q: Indices, k: Indices, slope: Array
) -> Array:
    return score - slope * jnp.abs(q - k).astype(score.dtype)


def t5_thresholds(n_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Return the least distance q - k in each of T5's buckets (arXiv 1910.10683), causal variant.

    Half of the buckets hold one distance each. The others grow by a constant factor, up to the
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


def t5_bucket(
    relative_position: Indices, n_buckets: int = 32, max_distance: int = 128
) -> jax.Array:
    """Return T5's bucket of k - q (arXiv 1910.10683), causal variant: the future is bucket 0."""
    thresholds = t5_thresholds(n_buckets, max_distance)
    above = (jnp.asarray(-relative_position >= least, jnp.int32) for least in thresholds[1:])
    return functools.reduce(jnp.add, above)


def relative_bias(
    table: Float[Array | np.ndarray, "heads buckets"], max_distance: int | None = None
) -> Score:
    """Add a learned bias for the distance q - k, from the row of `table` of the head.

    With `max_distance`, a distance has the column of its T5 bucket (`t5_bucket`). Without it, every
    distance has its own column, and those beyond the last share the last. Keys in the future have
    column 0. Every score costs one comparison for each column.
    """
    table = _operand("relative_bias", "table", table, 2)
    n_buckets = table.shape[1]
    thresholds = (
        tuple(range(n_buckets)) if max_distance is None else t5_thresholds(n_buckets, max_distance)
    )
    return Score(_With(_relative_bias, thresholds), (table,), (True,))


def _relative_bias(
    thresholds: tuple[int, ...],
    score: jax.Array,
    batch: Indices,
    head: Indices,
    q: Indices,
    k: Indices,
    row: tuple[jax.Array, ...],
) -> jax.Array:
    distance, bias = q - k, row[0]
    for least, column in zip(thresholds[1:], row[1:], strict=True):
        bias = jnp.where(distance >= least, column, bias)
    return score + bias


def from_function(
    function: ScoreFunction,
    *operands: ArrayLike | AnyArray,
    learned: bool | tuple[bool, ...] = False,
) -> Score:
    """Return the score of a pure function (score, batch, head, q_index, k_index, *parameters).

    The function gives the new score. Every operand is an array (heads,) or (heads, n), and gives
    one parameter: the number, or the tuple of n numbers, of the score's own head. A function that
    closes over arrays instead works where XLA runs the attention, but not in a kernel.
    """
    arrays = tuple(_operand("from_function", "an operand", operand, 1, 2) for operand in operands)
    flags = (learned,) * len(arrays) if isinstance(learned, bool) else tuple(learned)
    if len(flags) != len(arrays):
        entries = f"{len(flags)} entries for {len(arrays)} operands"
        raise UserError(f"from_function: learned has {entries}")
    score = Score(function, arrays, flags)
    _check_is_a_score(score)
    return score


def compose(*scores: Score) -> Score:
    """Apply score functions one after another, the first one first."""
    functions = tuple(score.function for score in scores)
    counts = tuple(len(score.operands) for score in scores)
    return Score(
        _With(_compose, tuple(zip(functions, counts, strict=True))),
        sum((score.operands for score in scores), ()),
        sum((score.learned for score in scores), ()),
    )


def _compose(
    parts: tuple[tuple[ScoreFunction, int], ...], score: jax.Array, *rest: Indices | Parameter
) -> jax.Array:
    index, parameters = rest[:4], rest[4:]
    for function, count in parts:
        score = function(score, *index, *parameters[:count])
        parameters = parameters[count:]
    return score


def _operand(score: str, name: str, value: ArrayLike | AnyArray, *ranks: int) -> AnyArray:
    array = value if isinstance(value, (jax.Array, np.ndarray)) else np.asarray(value, np.float32)
    if len(array.shape) not in ranks or 0 in array.shape:
        shapes = " or ".join({1: "(heads,)", 2: "(heads, n)"}[rank] for rank in ranks)
        raise UserError(f"{score}: {name} must be an array {shapes}, not of shape {array.shape}")
    return array


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
