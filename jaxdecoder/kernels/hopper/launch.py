"""How a Hopper kernel is launched: blocks, their order, and the roles of their warpgroups."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels import masks
from jaxdecoder.kernels.hopper import tiles
from jaxdecoder.kernels.hopper.tiles import ROWS, Arrays, Head, Work
from jaxdecoder.kernels.problem import Operands, Problem, alike, result
from jaxdecoder.kernels.segments import narrowed

# By the number of compute warpgroups: the registers of a thread of the one that moves memory, which
# hands its others on, and of those that compute. A block has 64k registers, evenly at first.
REGISTERS = {2: (24, 240), 3: (32, 160)}
# Heads are attended to together while what streams past them fits into this much of the
# second-level cache, of which Hopper cards have 50 MB.
CACHE_BYTES = 32 * 2**20
# Of the 227 KiB of shared memory that a block may have, what alignment leaves.
SHARED_BYTES = 224 * 2**10
# Whether a kernel may have results that start as zeros: since jax 0.11, like this function.
TOTALS = hasattr(plgpu, "force_gpu_interpret_mode")


class Sizes(NamedTuple):
    """How a kernel is cut and ordered. Each compute warpgroup owns `tiles.ROWS` rows."""

    columns: int
    """Streamed past the rows in one step."""
    depth: int
    """Steps that are copied ahead."""
    consumers: int = 2
    """Compute warpgroups: a key of `REGISTERS`."""
    rotated: bool = False
    """Whether the first products of a step are under way together with the last ones of the step
    before: the tensor cores have more to do at a time, and the registers more to hold."""
    turns: str = "late"
    """How the two warpgroups of the forward kernel take turns at the tensor cores. late: one hands
    over once it has the scores; early: as soon as their product is under way; none: neither waits
    for the other, which it must be for three."""


class At(NamedTuple):
    """Where a block stands."""

    batch: Any
    head: Any
    lists: Any
    """The entry of `Work`."""
    row: Any


class Kernel(NamedTuple):
    """What the warpgroups of a block do, and share."""

    name: str
    memory: Callable[..., Any]
    """(launch) -> types of shared memory"""
    load: Callable[..., None]
    """(launch, arrays, work, at, memory), the warpgroup that copies"""
    compute: Callable[..., None]
    """(launch, arrays, work, at, memory, warpgroup, results), those that compute"""
    rows_are_keys: bool = False


class Launch:
    """One problem cut into blocks for one kernel, with padded arrays."""

    def __init__(
        self, kernel: Kernel, problem: Problem, operands: Operands, sizes: Sizes, interpret: Any
    ):
        if sizes.rotated and sizes.depth < 2:
            raise ValueError(f"{sizes}: two steps are held at a time where they are rotated")
        self.kernel, self.problem, self.sizes, self.interpret = kernel, problem, sizes, interpret
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.dtype = operands.q.dtype
        self.group = self.heads // self.kv_heads
        self.score = operands.score
        self.segmented = operands.q_segments is not None
        self.segments_shared = self.segmented and operands.q_segments.shape[0] == 1
        rows, columns = self.consumers * ROWS, sizes.columns
        self.q_block, self.k_block = (columns, rows) if kernel.rows_are_keys else (rows, columns)
        self.q_whole, self.k_whole = up(self.q_time, self.q_block), up(self.k_time, self.k_block)

    @property
    def consumers(self) -> int:
        """Compute warpgroups; one more moves memory."""
        return self.sizes.consumers

    def arrays(self, operands: Operands, dout: Any = None, of_queries: Any = None) -> Arrays:
        # The copy engine reads zeros past the end of an array, but moves whole groups of 8 rows.
        q_time, k_time = up(self.q_time, 8), up(self.k_time, 8)
        return Arrays(
            padded(operands.q, 1, q_time),
            padded(operands.k, 1, k_time),
            padded(operands.v, 1, k_time),
            padded(dout, 1, q_time),
            of_queries,
            padded(operands.q_segments, 1, self.q_whole) if dout is None else None,
            padded(operands.k_segments, 1, self.k_whole),
            operands.score,
            operands.dropout,
            operands.batch_index,
            operands.head_index,
        )

    def like(self, x: jax.Array) -> jax.ShapeDtypeStruct:
        return result(x.shape, x.dtype, x)

    def segments(self, ref: Any, batch: Any, positions: Any) -> Any:
        return tiles.part(ref, 0 if self.segments_shared else batch, positions)

    def segments_of(self, numbers: Any) -> Any:
        """The row of `Arrays.of_queries` that holds them."""
        return numbers.at[2] if self.segmented else None

    def rows(self, at: At, warpgroup: Any) -> Any:
        """Those a compute warpgroup owns."""
        return pl.ds((at.row * self.consumers + warpgroup) * ROWS, ROWS)

    def ring(self, **arrays: Any) -> tiles.Ring:
        """What is streamed."""
        return tiles.Ring.of(self.sizes.depth, self.consumers, **arrays)

    def own(self, **arrays: Any) -> tiles.Ring:
        """What is owned, filled once, a buffer a compute warpgroup."""
        return tiles.Ring.of(self.consumers, self.consumers, **arrays)

    def learned_numbers(self) -> int:
        """How many numbers of a head's score have a gradient."""
        pairs = zip(self.score, self.problem.learned, strict=True)
        return sum(x.size // self.heads for x, learned in pairs if learned)

    def owned(self) -> Any:
        return tiles.matrix(self.consumers, ROWS, self.width, dtype=self.dtype)

    def owned_segments(self) -> Any:
        return tiles.vector(self.consumers, ROWS, dtype=jnp.int32) if self.segmented else None

    def streamed(self) -> Any:
        columns, depth = self.sizes[:2]
        return tiles.matrix(depth, columns, self.width, dtype=self.dtype)

    def streamed_segments(self) -> Any:
        columns, depth = self.sizes[:2]
        return tiles.vector(depth, columns, dtype=jnp.int32) if self.segmented else None

    def stage(self) -> Any:
        """Where factors go that the tensor cores would take from registers, if not interpreted."""
        if self.interpret is None:
            return None
        return tiles.matrix(self.consumers, ROWS, self.sizes.columns, dtype=self.dtype)

    def shared_bytes(self) -> int:
        """Shared memory of a block, at most `SHARED_BYTES`."""
        types = jax.tree.leaves(self.kernel.memory(self))

        def size(x: Any) -> int:
            if isinstance(x, plgpu.Barrier):
                return 8 * int(np.prod(x.num_barriers))
            return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize

        return sum(map(size, types))

    def add(self, part: Any, place: Any) -> None:
        """Adds shared memory to global memory, in whatever order blocks come to it."""
        if self.interpret is None:
            plgpu.copy_smem_to_gmem(part, place, reduction_op="add")
        else:
            place[...] = place[...] + part[...]

    def head(self, arrays: Arrays, batch: Any, head: Any) -> Head:
        parameters = tiles.parameters(self.problem, arrays.score, head)
        dropout = None if arrays.dropout is None else (arrays.dropout[0], arrays.dropout[1])
        k_time = self.k_time if self.k_time % self.k_block else None
        if arrays.batch_index is not None:
            batch, head = arrays.batch_index[batch], arrays.head_index[head]
        return Head(self.problem, batch, head, parameters, dropout, k_time)

    def work(self, operands: Operands) -> Work:
        """The lists of each batch entry, or one for all."""
        states = self.problem.states(self.q_time, self.k_time, self.q_block, self.k_block)
        by_keys = self.kernel.rows_are_keys
        lists = masks.block_lists(states.T if by_keys else states)
        # Where the run narrows them, what the mask leaves says well enough which rows are heavy.
        order = np.argsort(-lists.counts, kind="stable").astype(np.int32)
        if not self.problem.segments_vary:
            return Work(order, *(x[None] for x in lists))
        queries = operands.q_segments, self.q_block
        keys = operands.k_segments, self.k_block
        return Work(order, *narrowed(lists, *(keys + queries if by_keys else queries + keys)))

    def __call__(
        self,
        operands: Operands,
        arrays: Arrays,
        results: list[jax.ShapeDtypeStruct],
        sums: list[jax.ShapeDtypeStruct] | None = None,
    ) -> list[jax.Array]:
        """Runs a block for every row of blocks, head and batch entry, heavy rows first.

        `sums` are further results, which start as zeros and which all blocks add to.
        """
        work = jax.tree.map(jnp.asarray, self.work(operands))
        n_rows, n_lists = len(work.order), len(work.counts)
        given, tree = jax.tree.flatten(alike((work, arrays)))
        heads = self.kv_heads if self.kernel.rows_are_keys else self.heads
        together = self._heads_together()
        memory_registers, compute_registers = REGISTERS[self.consumers]
        totals = [jax.new_ref(jnp.zeros(x.shape, x.dtype)) for x in sums or ()]

        def body(*refs: Any, memory: Any) -> None:
            work, arrays = jax.tree.unflatten(tree, refs[: len(given)])

            def here() -> At:
                # A barrier keeps the compiler from keeping the answer, at the price of registers.
                section = lax.optimization_barrier(lax.axis_index("section"))
                place = section * together + lax.axis_index("head")
                batch, head = lax.div(place, jnp.int32(heads)), lax.rem(place, jnp.int32(heads))
                lists = batch if n_lists > 1 else jnp.int32(0)
                return At(batch, head, lists, work.order[lax.axis_index("row")])

            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < self.consumers)
            def _compute() -> None:
                plgpu.set_max_registers(compute_registers, action="increase")
                results = [*refs[len(given) :], *totals]
                self.kernel.compute(self, arrays, work, here, memory, warpgroup, results)

            @pl.when(warpgroup == self.consumers)
            def _load() -> None:
                plgpu.set_max_registers(memory_registers, action="decrease")
                self.kernel.load(self, arrays, work, here(), memory)

        body.__name__ = self.kernel.name
        found = plgpu.kernel(
            body,
            out_type=results,
            scratch_types={"memory": self.kernel.memory(self)},
            grid=(self.batch * heads // together, n_rows, together),
            grid_names=("section", "row", "head"),
            num_threads=self.consumers + 1,
            thread_name="warpgroup",
            compiler_params=tiles.COMPILER,
            interpret=self.interpret,
        )(*given)
        # Mosaic's launch forgets what varies over a mesh.
        return alike((given, [*found, *(total[...] for total in totals)]))[1]

    def _heads_together(self) -> int:
        """How many heads' blocks of the same row run side by side: a divisor of all of them."""
        pairs = self.batch * self.kv_heads
        time = self.q_time * self.group if self.kernel.rows_are_keys else self.k_time
        streamed = 2 * time * self.width * jnp.dtype(self.dtype).itemsize
        fitting = [n for n in range(1, pairs + 1) if pairs % n == 0 and n * streamed <= CACHE_BYTES]
        return max(fitting, default=1) * (1 if self.kernel.rows_are_keys else self.group)


class Step(NamedTuple):
    """One step of a walk: the count of those before it, and where it stands.

    What is not asked for is not computed.
    """

    number: Any
    within: Any
    first: Any
    span: Any
    members: int

    @property
    def member(self) -> Any:
        """Of the heads that share a walk."""
        return jnp.int32(0) if self.members == 1 else lax.div(self.within, self.span)

    @property
    def column(self) -> Any:
        """In the list of columns."""
        return self.first + (self.within if self.members == 1 else lax.rem(self.within, self.span))


def column_of(work: Work, at: At, step: Step) -> Any:
    """The column that a step is at."""
    return work.indices[at.lists, at.row, step.column]


def walk(work: Work, at: At, members: int, visit: Callable[..., Any], carry: Any = None) -> Any:
    """Visits the columns of a row once for every member: first those that need no mask.

    `visit(check, step, carry)` is traced for both kinds; loops that are not nested leave more
    registers to the accumulators.
    """
    full, end = work.full_counts[at.lists, at.row], work.counts[at.lists, at.row]
    for check, first, last in ((False, jnp.int32(0), full), (True, full, end)):
        span = last - first
        one = _one_step(visit, check, first, span, members)
        carry = _loop(span * members, one, carry, apart=check)
    return carry


def walk_ahead(
    work: Work,
    at: At,
    members: int,
    begin: Callable[[Any], Any],
    visit: Callable[..., Any],
    carry: Any,
) -> Any:
    """Like `walk`, but every step finds products that the step before it has begun.

    `begin(carry)` makes those of step 0, and `visit(check, step, carry, products, more)` gives the
    carry and, if there are `more` steps, the products of the next. The last step is traced apart,
    and checked in any case.
    """
    full, end = work.full_counts[at.lists, at.row], work.counts[at.lists, at.row]

    def all_steps(carry: Any) -> Any:
        carry = carry, begin(carry)
        partial = end > full
        for check, first, last in ((False, jnp.int32(0), full), (True, full, end)):
            span = last - first
            count = span * members - (partial if check else ~partial).astype(jnp.int32)
            one = _one_step(functools.partial(_and_more, visit), check, first, span, members)
            carry = _loop(count, one, carry, apart=check)
        first = jnp.where(partial, full, 0)
        span = end - first
        step = Step(end * members - 1, span * members - 1, first, span, members)
        return visit(True, step, *carry, False)[0]

    return lax.cond(end > 0, all_steps, lambda carry: carry, carry)


def _loop(count: Any, one: Callable[[Any, Any], Any], carry: Any, apart: bool) -> Any:
    """`one` so many times; `apart` from the loop before, for compilers have got adjacent loops
    wrong, and a condition costs nothing."""
    loop = functools.partial(lax.fori_loop, 0, count, one)
    return lax.cond(count > 0, loop, lambda carry: carry, carry) if apart else loop(carry)


def _and_more(visit: Callable[..., Any], check: bool, step: Step, carry: Any) -> Any:
    return visit(check, step, *carry, True)


def _one_step(
    visit: Callable[..., Any], check: bool, first: Any, span: Any, members: int
) -> Callable[[Any, Any], Any]:
    def one(t: Any, carry: Any) -> Any:
        return visit(check, Step(first * members + t, t, first, span, members), carry)

    return one


def stream_keys(
    launch: Launch, arrays: Arrays, work: Work, at: At, keys: tiles.Ring, values: tiles.Ring
) -> None:
    """Copies the keys and values that a block of queries walks past, and waits for the last."""

    def fill(check: bool, step: Step, _: None) -> None:
        columns = pl.ds(column_of(work, at, step) * launch.k_block, launch.k_block)
        place = at.batch, columns, lax.div(at.head, jnp.int32(launch.group))
        segments = launch.segments(arrays.k_segments, at.batch, columns)
        keys.fill(step.number, k=arrays.k.at[place], segments=segments)
        values.fill(step.number, v=arrays.v.at[place])

    walk(work, at, 1, fill)
    steps = work.counts[at.lists, at.row]
    keys.drain(steps)
    values.drain(steps)


def padded(x: Any, axis: int, size: int, filling: float = 0) -> Any:
    if x is None or x.shape[axis] == size:
        return x
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=filling)


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
