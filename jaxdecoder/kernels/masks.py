"""Attention masks as values: pure functions of two positions that combine with `&`, `|` and `~`.

A mask answers one question, "may the query at position q see the key at position k?", for whole
arrays of positions at once:

    mask = causal() & (sliding_window(128) | first(4))
    mask(q_index[:, None], k_index[None, :])        # bool (queries, keys)

The same expression also answers for whole blocks, without looking inside them: `mask.block` says
EMPTY (nothing allowed), FULL (everything allowed) or PARTIAL (some, or not known), and that is
what lets an attention kernel skip most of its work. A block of an expression that depends on the
distance alone, or on one position alone, is decided exactly, by counting along one axis; the
operators combine answers by Kleene's three-valued logic, in which PARTIAL means "unknown".

Positions are 32-bit integers counted from the start of the sequence. A mask is immutable and
hashable, so it can be a static argument of `jax.jit` and the key of a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32
from numpy.typing import ArrayLike

from jaxdecoder.errors import UserError
from jaxdecoder.kernels.typing import AnyArray, Indices

EMPTY, PARTIAL, FULL = 0, 1, 2

# When blocks are evaluated entry by entry: the number of (query, key) pairs at a time, the side of
# the largest tile, and the number of pairs that `block_map(exact=True)` may evaluate.
CHUNK_ENTRIES = 2**21
TILE = 512
EXACT_ENTRIES = 2**28

Answers = bool | np.bool_ | AnyArray
"""Whether pairs of positions are allowed: one answer for all of them, or an array of answers."""

MaskFunction = Callable[[Indices, Indices], Answers]
"""(q_index, k_index) -> answers"""


@dataclasses.dataclass(frozen=True, repr=False)
class Mask:
    """A node of a mask expression: the name of a rule and its arguments.

    Make one with the constructors below and the operators `&`, `|` and `~`.
    """

    rule: str
    arguments: tuple[Any, ...] = ()

    def __call__(self, q_index: Indices, k_index: Indices) -> Any:
        """Return whether each query may see each key, in the broadcast shape of the positions.

        It is a JAX array if they are, and else a NumPy array, or one answer for two numbers.
        """
        allowed = _allowed(self, q_index, k_index)
        shape = np.broadcast_shapes(np.shape(q_index), np.shape(k_index))
        if np.shape(allowed) == shape:
            return allowed
        on_device = any(isinstance(x, jax.Array) for x in (allowed, q_index, k_index))
        return (jnp if on_device else np).broadcast_to(allowed, shape)

    def block(
        self, q_lo: ArrayLike, q_hi: ArrayLike, k_lo: ArrayLike, k_hi: ArrayLike
    ) -> np.ndarray:
        """Return EMPTY, PARTIAL or FULL for the blocks q_lo <= q < q_hi, k_lo <= k < k_hi.

        The bounds are integers or NumPy arrays that broadcast; no block may be void. EMPTY and
        FULL are always true. PARTIAL may be an EMPTY or FULL block that was not recognised.
        """
        shape = np.broadcast_shapes(*map(np.shape, (q_lo, q_hi, k_lo, k_hi)))
        bounds = Bounds(*(np.array(bound, np.int32, ndmin=1) for bound in (q_lo, q_hi, k_lo, k_hi)))
        states = _states(self, bounds, np.ones(1, bool))
        return np.array(np.broadcast_to(states, shape or 1)).reshape(shape)

    def __and__(self, other: Mask) -> Mask:
        return Mask("&", (self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Mask("|", (self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Mask("~", (self,))

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value: combine masks with &, | and ~")

    def __repr__(self) -> str:
        if self.rule == "~":
            return f"~{_bracketed(self.arguments[0], 3)}"
        if self.rule in OPERATORS:
            left, right = self.arguments
            strength = PRECEDENCE[self.rule]
            # A right operand of the same operator keeps its brackets: operators group to the left.
            return f"{_bracketed(left, strength)} {self.rule} {_bracketed(right, strength + 1)}"
        return f"{self.rule}({', '.join(map(_shown, self.arguments))})"


def _bracketed(mask: Mask, strength: int) -> str:
    return f"({mask})" if PRECEDENCE.get(mask.rule, 3) < strength else repr(mask)


def _shown(argument: Any) -> str:
    if isinstance(argument, bytes):
        labels = [str(label) for label in _labels(argument)]
        return f"[{', '.join(labels if len(labels) <= 16 else [*labels[:15], '...'])}]"
    return getattr(argument, "__qualname__", None) or repr(argument)


# --- The masks ---------------------------------------------------------------------------------


def everything() -> Mask:
    """Let every query see every key."""
    return Mask("everything")


def nothing() -> Mask:
    """Let no query see any key."""
    return Mask("nothing")


def causal() -> Mask:
    """Let a query see itself and the past: k <= q."""
    return Mask("causal")


def diagonal() -> Mask:
    """Let a query see itself: k = q."""
    return Mask("diagonal")


def future() -> Mask:
    """Let a query see itself and the future, the upper triangle: k >= q."""
    return diagonal() | ~causal()


def sliding_window(n: SupportsIndex) -> Mask:
    """Let a query see no further back than n positions, its own among them: q - k < n.

    The future is allowed: `causal() & sliding_window(n)` allows exactly n keys.
    """
    return Mask("sliding_window", (_positive("sliding_window", "n", n),))


def first(n: SupportsIndex) -> Mask:
    """Let every query see the first n keys (global tokens, attention sinks): k < n."""
    return Mask("first", (_positive("first", "n", n),))


def prefix(n: SupportsIndex) -> Mask:
    """Let the first n positions see one another, in both directions: q < n and k < n.

    `causal() | prefix(n)` is the prefix language model (arXiv 1910.10683). It equals
    `causal() | first(n)`, because later queries see the prefix anyway. Alone or under `&`, `prefix`
    excludes later queries and `first` does not.
    """
    return Mask("prefix", (_positive("prefix", "n", n),))


def strided(n: SupportsIndex) -> Mask:
    """Let a query see every n-th position, counted from its own: (q - k) mod n = 0.

    The column term of the strided Sparse Transformer (arXiv 1904.10509), which is
    `causal() & (sliding_window(n) | strided(n))`.
    """
    return Mask("strided", (_positive("strided", "n", n),))


def dilated(window: SupportsIndex, dilation: SupportsIndex) -> Mask:
    """Let a query see the last `window` keys that are `dilation` apart (arXiv 2004.05150)."""
    lengths = _positive("dilated", "window", window), _positive("dilated", "dilation", dilation)
    return Mask("dilated", lengths)


def fixed_blocks(block: SupportsIndex, summary: SupportsIndex = 1) -> Mask:
    """Return the Sparse Transformer's fixed pattern (arXiv 1904.10509), for use with `causal()`.

    A query sees its own block of `block` positions, and the last `summary` positions of each.
    """
    size = _positive("fixed_blocks", "block", block)
    last = _integer("fixed_blocks", "summary", summary)
    if not 0 <= last <= size:
        raise UserError(f"fixed_blocks: summary must lie between 0 and block = {size}, not {last}")
    return Mask("fixed_blocks", (size, last))


def summaries(block: SupportsIndex, rank: SupportsIndex, start: SupportsIndex) -> Mask:
    """Let a query see keys that stand for earlier blocks of positions.

    From `start` on, every block in turn has `rank` such keys. A query sees those of the blocks
    before its own: 0 <= k - start < rank * (q // block).
    """
    sizes = _positive("summaries", "block", block), _positive("summaries", "rank", rank)
    return Mask("summaries", (*sizes, _positive("summaries", "start", start)))


def documents(segment_ids: ArrayLike | AnyArray) -> Mask:
    """Let positions of the same document see one another: segment_ids[q] = segment_ids[k].

    `segment_ids` is a constant, one integer for every position of the sequence. Only equality
    counts, so the ids are relabelled by first appearance, and masks that agree are equal. It is
    looked up in an array, so a kernel passes it as an operand: see `split_documents`. Segments
    that change with the batch are the attention operation's own `segment_ids`.
    """
    if isinstance(segment_ids, jax.core.Tracer):
        raise UserError(
            "documents: segment_ids must be known before tracing; "
            "pass ids that change with the batch to the attention operation"
        )
    ids = np.asarray(segment_ids)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(
            "documents: segment_ids must be one row of integers, one for each position, "
            f"not {ids.dtype} of shape {ids.shape}"
        )
    _, appearance, label = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(appearance))
    return Mask("documents", (rank[label].astype(np.int32).tobytes(),))


def from_function(function: MaskFunction) -> Mask:
    """Return the mask of a pure function (q_index, k_index) -> bool that broadcasts its arguments.

    Its blocks are found by evaluating it, in chunks, wherever the rest of the expression leaves
    the answer open. Two masks are equal if they wrap the same function object, so define the
    function once, outside the step that uses it.
    """
    _check_is_a_mask(function)
    return Mask("from_function", (function,))


# --- Rules -------------------------------------------------------------------------------------


class Bounds(NamedTuple):
    """Blocks of positions, lower bounds inclusive, upper exclusive; the arrays broadcast."""

    q_lo: np.ndarray
    q_hi: np.ndarray
    k_lo: np.ndarray
    k_hi: np.ndarray


class Rule(NamedTuple):
    """The meaning of a mask: `allowed(q, k, *arguments)` for entries, and how blocks are decided.

    `axis` names the one quantity that the answer depends on, if there is one. Otherwise `blocks` is
    `(bounds, *arguments) -> states`. Without either, blocks are evaluated entry by entry.
    """

    allowed: Callable[..., Answers]
    axis: str | None = None
    blocks: Callable[..., np.ndarray] | None = None


def _modulo(x: Indices, n: int) -> Indices:
    """Return x mod n, never negative; for a power of two without a GPU's slow integer division."""
    return x & (n - 1) if n & (n - 1) == 0 else x % n


def _quotient(x: Indices, n: int) -> Indices:
    """Return x // n, likewise."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else x // n


def _labels(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.int32)


def _same_document(q: Indices, k: Indices, data: bytes) -> Answers:
    labels = _labels(data)
    if any(isinstance(index, jax.Array) for index in (q, k)):
        return jnp.asarray(labels)[q] == jnp.asarray(labels)[k]
    return labels[q] == labels[k]


def _prefix_blocks(bounds: Bounds, n: int) -> np.ndarray:
    queries = _states_along("key", first(n), Bounds(*bounds[2:], *bounds[:2]))
    return np.minimum(queries, _states_along("key", first(n), bounds))


def _fixed_blocks(bounds: Bounds, block: int, summary: int) -> np.ndarray:
    def plain_below(k: np.ndarray) -> np.ndarray:  # keys below k that summarise no block
        return k // block * (block - summary) + np.minimum(k % block, block - summary)

    q_lo, q_hi, k_lo, k_hi = bounds
    plain = plain_below(k_hi) - plain_below(k_lo)
    own_lo, own_hi = q_lo // block * block, ((q_hi - 1) // block + 1) * block
    # The keys that lie in the queries' own blocks; an empty range has equal ends.
    lo, hi = np.clip(own_lo, k_lo, k_hi), np.clip(own_hi, k_lo, k_hi)
    some = (hi > lo) | (plain < k_hi - k_lo)
    one_block = own_hi - own_lo == block
    every = (plain == 0) | (one_block & (plain_below(hi) - plain_below(lo) == plain))
    return some.astype(np.int8) + every


def _summary_blocks(bounds: Bounds, block: int, rank: int, start: int) -> np.ndarray:
    q_lo, q_hi, k_lo, k_hi = bounds
    some = np.maximum(k_lo, start) < np.minimum(k_hi, start + rank * ((q_hi - 1) // block))
    every = (k_lo >= start) & (k_hi <= start + rank * (q_lo // block))
    return some.astype(np.int8) + every


def _document_blocks(bounds: Bounds, data: bytes) -> np.ndarray:
    labels = np.append(_labels(data), 0)

    def extremes(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if hi.max() >= labels.size:
            raise UserError(
                f"documents: there are ids for {labels.size - 1} positions, "
                f"but the sequence has at least {hi.max()}"
            )
        lo, hi = np.broadcast_arrays(lo, hi)
        pairs = np.stack([lo.ravel(), hi.ravel()], 1).ravel()
        least = np.minimum.reduceat(labels, pairs)[::2].reshape(lo.shape)
        return least, np.maximum.reduceat(labels, pairs)[::2].reshape(lo.shape)

    (q_min, q_max), (k_min, k_max) = extremes(*bounds[:2]), extremes(*bounds[2:])
    some = (q_min <= k_max) & (k_min <= q_max)
    return some.astype(np.int8) + (some & (q_min == q_max) & (k_min == k_max))


RULES = {
    "everything": Rule(lambda q, k: True, "distance"),
    "nothing": Rule(lambda q, k: False, "distance"),
    "causal": Rule(lambda q, k: k <= q, "distance"),
    "diagonal": Rule(lambda q, k: k == q, "distance"),
    "sliding_window": Rule(lambda q, k, n: q - k < n, "distance"),
    "strided": Rule(lambda q, k, n: _modulo(q - k, n) == 0, "distance"),
    "dilated": Rule(
        lambda q, k, window, dilation: (
            (q - k < window * dilation) & (_modulo(q - k, dilation) == 0)
        ),
        "distance",
    ),
    "first": Rule(lambda q, k, n: k < n, "key"),
    "prefix": Rule(lambda q, k, n: (q < n) & (k < n), blocks=_prefix_blocks),
    "fixed_blocks": Rule(
        lambda q, k, block, summary: (
            (_quotient(q, block) == _quotient(k, block)) | (_modulo(k, block) >= block - summary)
        ),
        blocks=_fixed_blocks,
    ),
    "summaries": Rule(
        lambda q, k, block, rank, start: (k >= start) & (k < start + rank * _quotient(q, block)),
        blocks=_summary_blocks,
    ),
    "documents": Rule(_same_document, blocks=_document_blocks),
    "from_function": Rule(lambda q, k, function: function(q, k)),
}


class Operator(NamedTuple):
    """An operator on answers, its equal on block states, and the state that decides the result."""

    answers: Callable[[Answers, Answers], Answers]
    states: Callable[..., np.ndarray]
    decisive: int


OPERATORS = {
    "&": Operator(operator.and_, np.minimum, EMPTY),
    "|": Operator(operator.or_, np.maximum, FULL),
}
PRECEDENCE = {"|": 1, "&": 2, "~": 3}


def _allowed(mask: Mask, q: Indices, k: Indices) -> Answers:
    if mask.rule == "~":
        allowed = _allowed(mask.arguments[0], q, k)
        return not allowed if isinstance(allowed, bool) else ~allowed  # ~True is the number -2
    if mask.rule in OPERATORS:
        left, right = (_allowed(operand, q, k) for operand in mask.arguments)
        return OPERATORS[mask.rule].answers(left, right)
    return RULES[mask.rule].allowed(q, k, *mask.arguments)


def _operands(mask: Mask, operators: Iterable[str] = PRECEDENCE) -> Iterator[Mask]:
    """Yield what operators, of these kinds or of any, join, in whatever way it is bracketed."""
    if mask.rule in operators:
        for operand in mask.arguments:
            yield from _operands(operand, operators)
    else:
        yield mask


def _axis(mask: Mask) -> str | None:
    axes = {RULES[leaf.rule].axis for leaf in _operands(mask)}
    return axes.pop() if len(axes) == 1 else None


def _is_evaluated(mask: Mask) -> bool:
    return any(leaf.rule == "from_function" for leaf in _operands(mask))


# --- Blocks ------------------------------------------------------------------------------------


def _states(mask: Mask, bounds: Bounds, wanted: np.ndarray) -> np.ndarray:
    """Return the states of blocks; where `wanted` is false, any state will do."""
    axis = _axis(mask)
    if axis is not None:
        return _states_along(axis, mask, bounds)
    if mask.rule == "~":
        return FULL - _states(mask.arguments[0], bounds, wanted)
    if mask.rule in OPERATORS:
        _, combine, decisive = OPERATORS[mask.rule]
        states = np.full(1, FULL - decisive, np.int8)
        for operand in _operands_cheapest_first(mask):
            open_ = wanted & (states != decisive)
            states = combine(states, _states(operand, bounds, open_))
        return states
    blocks = RULES[mask.rule].blocks
    if blocks is None:
        return _evaluated_states(mask, bounds, wanted)
    return blocks(bounds, *mask.arguments)


def _operands_cheapest_first(mask: Mask) -> list[Mask]:
    """Return a chain's operands, joining those along one axis, which decides them exactly."""
    joined: dict[str | Mask, Mask] = {}
    for operand in _operands(mask, (mask.rule,)):
        axis = _axis(operand)
        key = axis or operand
        joined[key] = Mask(mask.rule, (joined[key], operand)) if axis in joined else operand
    return sorted(joined.values(), key=_is_evaluated)


def _states_along(axis: str, mask: Mask, bounds: Bounds) -> np.ndarray:
    """Return the exact states of a mask that depends on one axis, by counting along it."""
    q_lo, q_hi, k_lo, k_hi = bounds
    # A block contains every distance q - k between its least and its greatest.
    lo, hi = (q_lo - k_hi + 1, q_hi - k_lo) if axis == "distance" else (k_lo, k_hi)
    start = int(lo.min())
    positions = np.arange(start, int(hi.max()), dtype=np.int32)
    allowed = mask(positions, 0) if axis == "distance" else mask(0, positions)
    running = np.concatenate([[0], np.cumsum(allowed, dtype=np.int32)])
    count = running[hi - start] - running[lo - start]
    return (count > 0).astype(np.int8) + (count == hi - lo)


def _evaluated_states(mask: Mask, bounds: Bounds, wanted: np.ndarray) -> np.ndarray:
    """Return the exact states of the wanted blocks by evaluating entries; PARTIAL elsewhere."""
    *flat, chosen = np.broadcast_arrays(*bounds, wanted)
    states = np.full(chosen.shape, PARTIAL, np.int8)
    q_lo, q_hi, k_lo, k_hi = chosen_bounds = Bounds(*(bound[chosen] for bound in flat))
    counts = _counts(mask, chosen_bounds)
    size = (q_hi - q_lo).astype(np.int64) * (k_hi - k_lo)
    states[chosen] = (counts > 0).astype(np.int8) + (counts == size)
    return states


def _counts(mask: Mask, bounds: Bounds) -> np.ndarray:
    """Count the allowed entries of each block (bounds in one dimension), in bounded memory."""
    counts = np.zeros(bounds.q_lo.shape, np.int64)
    if counts.size == 0:
        return counts
    q_tile = min(TILE, int((bounds.q_hi - bounds.q_lo).max()))
    k_tile = min(TILE, int((bounds.k_hi - bounds.k_lo).max()))
    step = max(1, CHUNK_ENTRIES // (q_tile * k_tile))
    for owner, q_lo, k_lo in _tiles(bounds, q_tile, k_tile, step):
        q = q_lo[:, None, None] + np.arange(q_tile, dtype=np.int32)[:, None]
        k = k_lo[:, None, None] + np.arange(k_tile, dtype=np.int32)
        q_end, k_end = bounds.q_hi[owner, None, None], bounds.k_hi[owner, None, None]
        # Tiles may overhang their block; positions that do not exist are never asked about.
        with jax.ensure_compile_time_eval():
            allowed = np.asarray(mask(np.minimum(q, q_end - 1), np.minimum(k, k_end - 1)))
        inside = allowed & (q < q_end) & (k < k_end)
        np.add.at(counts, owner, np.count_nonzero(inside, axis=(1, 2)))
    return counts


def _tiles(
    bounds: Bounds, q_tile: int, k_tile: int, step: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield tiles that cover blocks, at most `step` at a time: (their block, first q, first k)."""
    q_tiles = -(-(bounds.q_hi - bounds.q_lo) // q_tile)
    k_tiles = -(-(bounds.k_hi - bounds.k_lo) // k_tile)
    ends = np.cumsum(q_tiles.astype(np.int64) * k_tiles)
    for start in range(0, int(ends[-1]), step):
        tile = np.arange(start, min(start + step, int(ends[-1])))
        owner = np.searchsorted(ends, tile, side="right")
        row, column = np.divmod(tile - np.append(0, ends)[owner], k_tiles[owner])
        q_lo = bounds.q_lo[owner] + row * q_tile
        k_lo = bounds.k_lo[owner] + column * k_tile
        yield owner, q_lo.astype(np.int32), k_lo.astype(np.int32)


def _grid(q_length: int, k_length: int, block_q: int, block_k: int, q_offset: int) -> Bounds:
    lengths = {"q_length": q_length, "k_length": k_length, "block_q": block_q, "block_k": block_k}
    for name, length in lengths.items():
        _positive("block_map", name, length)
    q_lo = np.arange(0, q_length, block_q, dtype=np.int32)[:, None]
    k_lo = np.arange(0, k_length, block_k, dtype=np.int32)[None, :]
    return Bounds(
        q_lo + q_offset,
        np.minimum(q_lo + block_q, q_length) + q_offset,
        k_lo,
        np.minimum(k_lo + block_k, k_length),
    )


@functools.lru_cache(maxsize=64)
def block_map(
    mask: Mask,
    q_length: int,
    k_length: int,
    block_q: int,
    block_k: int,
    q_offset: int = 0,
    exact: bool = False,
) -> Int8[np.ndarray, "q_blocks k_blocks"]:
    """Return EMPTY, PARTIAL or FULL for every block of an attention matrix.

    The last blocks may be ragged. Query i has position q_offset + i, key j has j. With `exact`,
    blocks left PARTIAL are evaluated entry by entry, unless that means more than EXACT_ENTRIES
    entries. The result is shared by all callers and read-only.
    """
    bounds = _grid(q_length, k_length, block_q, block_k, q_offset)
    states = mask.block(*bounds)
    partial = states == PARTIAL
    if exact and partial.sum() * block_q * block_k <= EXACT_ENTRIES:
        states = np.where(partial, _evaluated_states(mask, bounds, partial), states)
    states.flags.writeable = False
    return states


class BlockLists(NamedTuple):
    """For every row of a block map, the columns that are not EMPTY, the FULL ones first.

    Of row i, `indices[i, :full_counts[i]]` are FULL and need no mask,
    `indices[i, full_counts[i]:counts[i]]` are PARTIAL, and the rest repeats the last of them, so
    that a kernel that reads ahead reads a block that exists.
    """

    counts: Int32[Array | np.ndarray, "*batch rows"]
    full_counts: Int32[Array | np.ndarray, "*batch rows"]
    indices: Int32[Array | np.ndarray, "*batch rows longest"]


def block_lists(states: Int8[np.ndarray, "rows columns"]) -> BlockLists:
    """Return the lists that a kernel visits.

    The forward pass takes them of a block map, where rows are queries; the gradients of keys and
    values take them of its transpose.
    """
    counts = np.count_nonzero(states, axis=1)
    longest = max(1, int(counts.max()))
    # A stable sort by state keeps columns of the same state in ascending order.
    order = np.argsort(FULL - states, axis=1, kind="stable")[:, :longest]
    last = np.maximum(counts, 1)[:, None] - 1
    indices = np.take_along_axis(order, np.minimum(np.arange(longest)[None], last), axis=1)
    return BlockLists(
        counts.astype(np.int32),
        np.count_nonzero(states == FULL, axis=1).astype(np.int32),
        indices.astype(np.int32),
    )


@functools.lru_cache(maxsize=256)
def allowed_entries(mask: Mask, q_length: int, k_length: int, q_offset: int = 0) -> int:
    """Count the (query, key) pairs that the mask allows, which attention really computes.

    Only PARTIAL blocks are evaluated, and none for a mask that depends on the distance alone.
    """
    if _axis(mask) == "distance":
        start = q_offset - k_length + 1
        allowed = mask(np.arange(start, q_offset + q_length, dtype=np.int32), 0)
        running = np.concatenate([[0], np.cumsum(allowed, dtype=np.int64)])
        return int((running[k_length:] - running[:-k_length])[:q_length].sum())
    bounds = _grid(q_length, k_length, 128, 128, q_offset)
    states = mask.block(*bounds)
    q_lo, q_hi, k_lo, k_hi = (np.broadcast_to(bound, states.shape) for bound in bounds)
    full, partial = states == FULL, states == PARTIAL
    sizes = (q_hi - q_lo).astype(np.int64) * (k_hi - k_lo)
    inside = _counts(mask, Bounds(q_lo[partial], q_hi[partial], k_lo[partial], k_hi[partial]))
    return int(sizes[full].sum() + inside.sum())


# --- Documents and kernels ---------------------------------------------------------------------


def is_positional(mask: Mask) -> bool:
    """Return whether the mask is arithmetic on positions, without `documents` to look up."""
    return all(leaf.rule != "documents" for leaf in _operands(mask))


def is_simple(mask: Mask) -> bool:
    """Return whether every rule is quick to compute: on the distance or on the key alone."""
    return all(RULES[leaf.rule].axis is not None for leaf in _operands(mask))


def split_documents(mask: Mask) -> tuple[Mask, Int32[np.ndarray, " time"] | None]:
    """Divide a mask m & documents(ids) into (m, ids), for a kernel that takes the ids as operand.

    Without a `documents` among the operands of `&`, the ids are None. A `documents` under `|` or
    `~` stays where it is: see `is_positional`.
    """
    rest = [operand for operand in _operands(mask, "&") if operand.rule != "documents"]
    found = [_labels(m.arguments[0]) for m in _operands(mask, "&") if m.rule == "documents"]
    if not found:
        return mask, None
    if len({labels.size for labels in found}) > 1:
        raise UserError(
            "documents: masks joined by & have ids for different lengths: "
            f"{', '.join(str(labels.size) for labels in found)}"
        )
    _, joint = np.unique(np.stack(found), axis=1, return_inverse=True)
    return functools.reduce(operator.and_, rest or [everything()]), joint.ravel().astype(np.int32)


# --- Checks ------------------------------------------------------------------------------------


def _integer(mask: str, name: str, value: SupportsIndex) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except (TypeError, jax.errors.JAXTypeError) as error:
        raise UserError(
            f"{mask}: {name} must be a whole number known before tracing, not {value!r}"
        ) from error


def _positive(mask: str, name: str, value: SupportsIndex) -> int:
    number = _integer(mask, name, value)
    if number <= 0:
        raise UserError(f"{mask}: {name} must be at least 1, not {number}")
    return number


def _check_is_a_mask(function: MaskFunction) -> None:
    def fail(what: str) -> UserError:
        return UserError(
            f"from_function({getattr(function, '__qualname__', repr(function))}): {what}. A mask "
            "is a pure function (q_index, k_index) -> bool array, made of operators and jax.numpy, "
            "whose answer for a pair depends on that pair's two positions only"
        )

    q, k = np.arange(8, dtype=np.int32)[:, None], np.arange(12, dtype=np.int32)[None, :]
    shape = (8, 12)
    try:
        hash(function)
        jax.eval_shape(function, q, k)
        with jax.ensure_compile_time_eval():
            once, again, part = (
                np.asarray(function(*at)) for at in ((q, k), (q, k), (q[2:5], k[:, 3:]))
            )
    except Exception as error:
        raise fail(f"it raised {type(error).__name__} on arrays of positions: {error}") from error
    if once.dtype != np.bool_:
        raise fail(f"it returned {once.dtype}, not bool")
    try:
        once, again = np.broadcast_to(once, shape), np.broadcast_to(again, shape)
        part = np.broadcast_to(part, (3, 9))
    except ValueError as error:
        raise fail(
            f"for positions of shapes {q.shape} and {k.shape} it returned shape {once.shape}, "
            f"not {shape}"
        ) from error
    if not np.array_equal(once, again):
        raise fail("two calls with the same positions gave different answers")
    if not np.array_equal(once[2:5, 3:], part):
        raise fail("a pair's answer changed with the other positions in the array")
