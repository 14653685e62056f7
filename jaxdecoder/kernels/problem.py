"""The seam between attention as an operation and its implementations.

`flash_attention` turns its arguments into a `Problem`, which is static and hashable, and
`Operands`, which are arrays. An `Implementation` is a pair of functions of the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt32

from jaxdecoder.kernels import masks, scores
from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.dropout import keep
from jaxdecoder.kernels.typing import AnyArray, Indices

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static part of a problem: a key for caches, and a constant for the compiler.

    A pair of positions is allowed if `mask` allows it. A kernel finds its blocks with `states`,
    and inside a PARTIAL block asks `allowed`. A kernel counts queries and keys from 0; positions
    of queries count from `q_start`.
    """

    mask: masks.Mask
    """All that is known of the mask before tracing."""
    positional_mask: masks.Mask
    """`mask` without the `documents` under its `&`: those have become segments in the operands."""
    score: scores.ScoreFunction | None
    """Changes the scores after `scale`; its parameters come from the operands."""
    learned: tuple[bool, ...]
    """For every score operand, whether its gradient is wanted; the others' are zero."""
    scale: float
    dropout: bool
    """Whether weights are dropped. A kernel does not scale those it keeps: its caller does."""
    segments_vary: bool
    """Whether segments are data, so that only the run can tell which blocks they empty."""
    q_start: int = 0
    """The position of the first query, where the queries are a part of a sequence."""

    def states(
        self, q_time: int, k_time: int, block_q: int, block_k: int
    ) -> Int8[np.ndarray, "q_blocks k_blocks"]:
        """Return the block map, for `masks.block_lists`, of a matrix padded to whole blocks.

        FULL means that a kernel need not check anything in the block: neither mask nor segments
        nor the end of the keys. Padded queries are harmless, because their output is cut off.
        """
        sizes = q_time, k_time, block_q, block_k
        return _states(self.mask, self.segments_vary, *sizes, self.q_start)

    def allowed(
        self,
        q_index: Indices,
        k_index: Indices,
        q_segment: Int[Array, "..."] | None = None,
        k_segment: Int[Array, "..."] | None = None,
        k_time: int | None = None,
    ) -> Bool[AnyArray, "..."]:
        """Return which pairs of a block are allowed; all arguments broadcast against one another.

        Segments are those of the operands, and `k_time` is the number of keys where the indices
        may run past it. None for either leaves the check out.
        """
        allowed = self.positional_mask(self.position(q_index), k_index)
        if q_segment is not None:
            allowed = allowed & (q_segment == k_segment)
        return allowed if k_time is None else allowed & (k_index < k_time)

    def new_score(
        self,
        operands: tuple[scores.Operand, ...],
        place: Indices,
        score: jax.Array,
        batch: Indices,
        head: Indices,
        q_index: Indices,
        k_index: Indices,
    ) -> jax.Array:
        """Apply the score function to scaled scores; `place`: of the heads in its operands.

        Entries and heads have their numbers among all, see `numbers`.
        """
        if self.score is None:
            return score
        index = batch, head, self.position(q_index), k_index
        return self.score(score, *index, *scores.Score.parameters(operands, place))

    def kept(
        self,
        seed: UInt32[Array, ""],
        threshold: UInt32[Array, ""],
        batch: AnyArray,
        head: AnyArray,
        q_index: AnyArray,
        k_index: AnyArray,
    ) -> Bool[Array, "..."]:
        """Return which weights are not dropped."""
        return keep(seed, threshold, batch, head, self.position(q_index), k_index)

    def position(self, q_index: Indices) -> Any:
        """Return the positions of queries, of their places in the operands."""
        return q_index + self.q_start if self.q_start else q_index


@functools.lru_cache(maxsize=64)
def _states(
    mask: masks.Mask,
    segments_vary: bool,
    q_time: int,
    k_time: int,
    block_q: int,
    block_k: int,
    q_start: int,
) -> np.ndarray:
    states = np.array(masks.block_map(mask, q_time, k_time, block_q, block_k, q_start, exact=True))
    unsure = np.zeros_like(states, bool)
    unsure[:, -1] = k_time % block_k != 0
    states[(states == masks.FULL) & (unsure | segments_vary)] = masks.PARTIAL
    states.flags.writeable = False
    return states


class Operands(NamedTuple):
    """The arrays of a problem.

    Where an implementation is chosen they may be abstract, with a shape and a dtype alone. Inside
    a kernel the fields are refs to these arrays or to parts of them.
    """

    q: Float[Array, "batch q_time heads width"]
    k: Float[Array, "batch k_time kv_heads width"]
    """Query head h reads key head h // (heads / kv_heads)."""
    v: Float[Array, "batch k_time kv_heads width"]
    score: tuple[scores.Operand, ...] = ()
    """The operands of the score function, each (heads,) or (heads, n): see `scores.Score`."""
    q_segments: Int32[Array, "batch_or_1 q_time"] | None = None
    """A query sees only the keys with its own number."""
    k_segments: Int32[Array, "batch_or_1 k_time"] | None = None
    dropout: UInt32[Array, "2"] | None = None
    """Seed and threshold, where weights are dropped: one is kept if
    `dropout.keep(seed, threshold, batch, head, q, k)`."""
    batch_index: Int32[Array, " batch"] | None = None
    """The number of each entry in the whole batch, for scores and dropout; they count from 0 when
    this is left out."""
    head_index: Int32[Array, " heads"] | None = None
    """The number of each query head among all of them, likewise."""


def numbered(problem: Problem, operands: Operands) -> Operands:
    """Number batch entries and heads that have no numbers, if the problem depends on them."""
    if operands.batch_index is not None or (problem.score is None and not problem.dropout):
        return operands
    batch, _, heads, _ = operands.q.shape
    return operands._replace(
        batch_index=jnp.arange(batch, dtype=jnp.int32),
        head_index=jnp.arange(heads, dtype=jnp.int32),
    )


def numbers(operands: Operands, batch: AnyArray, head: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Return the numbers, among all, of these batch entries and query heads of the operands."""
    if operands.batch_index is None or operands.head_index is None:
        return batch, head
    return operands.batch_index[batch], operands.head_index[head]


class Gradients(NamedTuple):
    """The gradients of a problem's operands, with their shapes and types."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    score: Sequence[AnyArray] = ()
    """Those of the learned score operands alone, float32 or of the operands' types."""


LogSumExp = Float[Array, "batch heads q_time"]


class Known(NamedTuple):
    """What the gradients need of the forward pass."""

    dout: Float[Array, "batch q_time heads width"]
    """The gradient of the output."""
    logsumexp: LogSumExp
    """inf for a query without keys, so that all its weights are exp(-inf - inf) = 0."""
    delta: Float[Array, "batch heads q_time"]
    """The sum of out * dout over the width."""

    @classmethod
    def of(cls, out: jax.Array, logsumexp: LogSumExp, dout: jax.Array) -> Known:
        """Gather them from the results of the forward pass."""
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
        logsumexp = jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp)
        return cls(dout, logsumexp, delta.swapaxes(1, 2))


class Implementation(NamedTuple):
    """One way to compute attention."""

    forward: Callable[[Problem, Operands], tuple[jax.Array, LogSumExp | None]]
    """Gives the output, in the type of q, and the float32 logarithm of the sum of the exponentials
    of each query's allowed scores. A query without keys has zeros and -inf."""
    backward: Callable[[Problem, Operands, jax.Array, LogSumExp, jax.Array], Gradients] | None
    """(problem, operands, out, logsumexp, dout) -> gradients. Without it JAX differentiates
    `forward`, which may then give None for the logarithm."""
    refuses: Callable[[Problem, Operands, Device], str | None] = lambda *_: None
    """Says why it cannot solve a problem of such operands on a device, as the end of the sentence
    "it cannot, because ..."; None if it can."""


def reads_arrays(problem: Problem, operands: Operands) -> str | None:
    """Return why no kernel can take mask and score in, if they read arrays of their own."""
    if not masks.is_positional(problem.positional_mask):
        return "a kernel has no array to look documents up in, unless they are joined by & alone"
    parameters = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands.score)
    captured = _captures_arrays(problem, parameters)
    return captured and f"{captured} reads an array, which a kernel has no place for"


@functools.lru_cache(maxsize=256)
def _captures_arrays(problem: Problem, parameters: tuple[jax.ShapeDtypeStruct, ...]) -> str | None:
    """Name the function, mask or score, that closes over arrays, if one does."""
    index = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    score = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    if holds_arrays(problem.positional_mask, index, index):
        return "the mask"
    if problem.score is not None:
        apply = scores.Score(problem.score).apply
        if holds_arrays(apply, parameters, score, one, one, index, index):
            return "the score"
    return None


def holds_arrays(
    function: Callable[..., AnyArray],
    *arguments: jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct | scores.Operand, ...],
) -> bool:
    """Return whether a function, traced with such arguments, closes over arrays."""
    return any(np.ndim(const) > 0 for const in jax.make_jaxpr(function)(*arguments).consts)


def alike(tree: Tree) -> Tree:
    """Inside `shard_map`, let all arrays vary over the mesh axes that any of them varies over.

    A kernel mixes them, and the transpose of this step sums the gradients of the shared ones.
    """
    axes: frozenset[str] = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def vary(x: AnyArray) -> AnyArray:
        missing = tuple(axes - _varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    varied: Tree = jax.tree.map(vary, tree)
    return varied


def result(shape: tuple[int, ...], dtype: DTypeLike, like: AnyArray) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result that varies over the mesh axes that `like` does."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _varying(x: AnyArray) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def field(path: KeyPath) -> str:
    """Return the name of the innermost field on the path to a leaf of named tuples."""
    return next(key.name for key in reversed(path) if isinstance(key, GetAttrKey))
