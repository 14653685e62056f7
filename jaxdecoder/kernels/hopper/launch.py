"""How a Hopper kernel is launched: blocks, their order, and the roles of their warpgroups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.tree_util import KeyPath

from jaxdecoder.kernels import scores
from jaxdecoder.kernels.hopper import memory, tiles
from jaxdecoder.kernels.hopper.memory import Ring, Span
from jaxdecoder.kernels.hopper.tiles import ROWS, Head
from jaxdecoder.kernels.hopper.walk import At, Step, Work, walk
from jaxdecoder.kernels.padding import padded, round_up
from jaxdecoder.kernels.problem import Operands, Problem, alike, field, result
from jaxdecoder.kernels.segments import lists_of
from jaxdecoder.kernels.typing import AnyArray, Leaf, Ref
from jaxdecoder.typing import Index

# By the number of compute warpgroups: the registers of a thread in the warpgroup that moves memory,
# and in those that compute, to which it gives the others. A block has 64k registers.
REGISTERS = {2: (24, 240), 3: (32, 160)}
# Heads run side by side as long as the arrays that they stream fit into this much of the
# second-level cache, of which Hopper cards have 50 MB.
CACHE_BYTES = 32 * 2**20
# A block may have 227 KiB of shared memory; alignment takes the rest.
SHARED_BYTES = 224 * 2**10
# Whether a kernel may have results that start as zeros: since jax 0.11, like this function.
TOTALS = hasattr(plgpu, "force_gpu_interpret_mode")

Interpret = Any
"""Parameters of Mosaic's interpreter, which not every JAX has, or None to compile for a card."""

Memory = Any
"""The shared memory of a block: a named tuple of the kernel's own."""


class Sizes(NamedTuple):
    """How a kernel is cut and ordered. Each compute warpgroup owns `tiles.ROWS` rows."""

    columns: int
    """Streamed past the rows in one step."""
    depth: int
    """Steps that are copied ahead."""
    consumers: int = 2
    """Compute warpgroups: a key of `REGISTERS`."""
    rotated: bool = False
    """Whether the first products of a step are computed at the same time as the last ones of the
    step before. The tensor cores have more to do at a time, and the registers more to hold."""
    turns: str = "late"
    """How the two warpgroups of the forward kernel take turns at the tensor cores. late: one hands
    over once it has the scores; early: as soon as their product is under way; none: neither waits
    for the other, which is the only way for three."""


class Arrays(NamedTuple):
    """The arrays of a launch, in global memory; times are padded so that copies are aligned."""

    operands: Operands
    """The segments have whole blocks."""
    dout: Leaf = None
    of_queries: Leaf = None
    """int32 (batch, heads, 2 or 3, q_time), whole blocks. By rows: the bits of the logarithm to
    base 2 of each query's sum of exponentials (inf makes all its weights 0), those of the sum of
    out * dout, and the segments, if there are any: few arrays need few descriptors."""


class Block(NamedTuple):
    """One block of a launch, as its warpgroups see it."""

    launch: Launch
    arrays: Arrays
    memory: Memory
    here: Callable[[], At]
    """Computes the place of the block, so that no register needs to keep it."""


class Kernel(NamedTuple):
    """The programs of a block's warpgroups, and the memory that they share."""

    name: str
    memory: Callable[[Launch], Memory]
    """Gives the types of shared memory."""
    load: Callable[[Block], None]
    """The program of the warpgroup that copies."""
    compute: Callable[[Block, jax.Array, list[Ref]], None]
    """(block, warpgroup, results): the program of those that compute."""
    rows_are_keys: bool = False


class Launch:
    """One problem cut into blocks for one kernel, with padded arrays."""

    def __init__(
        self,
        kernel: Kernel,
        problem: Problem,
        operands: Operands,
        sizes: Sizes,
        interpret: Interpret,
    ):
        if sizes.rotated and sizes.depth < 2:
            raise ValueError(f"{sizes}: two steps are held at a time where they are rotated")
        self.kernel, self.problem, self.sizes, self.interpret = kernel, problem, sizes, interpret
        self.consumers = sizes.consumers  # one more warpgroup moves memory
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.dtype = operands.q.dtype
        self.group = self.heads // self.kv_heads
        self.score = operands.score
        self.segmented = operands.q_segments is not None
        rows, columns = self.consumers * ROWS, sizes.columns
        self.q_block, self.k_block = (columns, rows) if kernel.rows_are_keys else (rows, columns)
        self.q_whole = round_up(self.q_time, self.q_block)
        self.k_whole = round_up(self.k_time, self.k_block)

    # --- Arrays ----------------------------------------------------------------------------

    def arrays(
        self, operands: Operands, dout: jax.Array | None = None, of_queries: jax.Array | None = None
    ) -> Arrays:
        """Pad the arrays of the launch."""
        # The copy engine reads zeros past the end of an array, but moves whole groups of 8 rows.
        q_time, k_time = round_up(self.q_time, 8), round_up(self.k_time, 8)
        times = {"q": q_time, "dout": q_time, "k": k_time, "v": k_time}
        times |= {"q_segments": self.q_whole, "k_segments": self.k_whole}
        if of_queries is not None:  # which has the segments, too
            operands = operands._replace(q_segments=None)

        def whole(path: KeyPath, x: AnyArray) -> AnyArray:
            name = field(path)
            return padded(x, 1, times[name]) if name in times else x

        arrays: Arrays = jax.tree_util.tree_map_with_path(
            whole, Arrays(operands=operands, dout=dout, of_queries=of_queries)
        )
        return arrays

    def like(self, x: AnyArray) -> jax.ShapeDtypeStruct:
        """Return the type of a result like an array of the launch."""
        return result(x.shape, x.dtype, x)

    def segments(self, ref: Ref, batch: Index, positions: Span) -> Ref:
        """Return the segments of a batch entry at some positions; None where there are none."""
        if ref is None:
            return None
        return ref.at[0 if ref.shape[0] == 1 else batch, positions]

    def segments_of(self, numbers: Ref) -> Ref | None:
        """Return the row of `Arrays.of_queries` that holds the segments, if there are any."""
        return numbers.at[2] if self.segmented else None

    def rows(self, at: At, warpgroup: Index) -> Span:
        """Return the rows that a compute warpgroup owns."""
        return pl.ds((at.row * self.consumers + warpgroup) * ROWS, ROWS)

    def learned_numbers(self) -> int:
        """Count the numbers of a head's score that have a gradient."""
        return sum(x.size // self.heads for x in scores.chosen(self.score, self.problem.learned))

    def head(self, arrays: Arrays, batch: jax.Array, head: jax.Array) -> Head:
        """Read what the scores of a head depend on."""
        operands, dropout = arrays.operands, arrays.operands.dropout
        parameters = scores.Score.parameters(operands.score, head)
        seeded = None if dropout is None else (dropout[0], dropout[1])
        k_time = self.k_time if self.k_time % self.k_block else None
        if operands.batch_index is not None and operands.head_index is not None:
            batch, head = operands.batch_index[batch], operands.head_index[head]
        return Head(self.problem, batch, head, parameters, seeded, k_time)

    # --- Shared memory ---------------------------------------------------------------------

    def ring(self, **arrays: pl.MemoryRef | None) -> Ring:
        """Declare buffers for what is streamed."""
        return Ring.of(self.sizes.depth, self.consumers, **arrays)

    def own(self, **arrays: pl.MemoryRef | None) -> Ring:
        """Declare buffers for what is owned, one for each compute warpgroup, filled once."""
        return Ring.of(self.consumers, self.consumers, **arrays)

    def owned(self) -> pl.MemoryRef:
        return memory.matrix(self.consumers, ROWS, self.width, dtype=self.dtype)

    def owned_segments(self) -> pl.MemoryRef | None:
        return memory.vector(self.consumers, ROWS, dtype=jnp.int32) if self.segmented else None

    def streamed(self) -> pl.MemoryRef:
        columns, depth = self.sizes.columns, self.sizes.depth
        return memory.matrix(depth, columns, self.width, dtype=self.dtype)

    def streamed_segments(self) -> pl.MemoryRef | None:
        columns, depth = self.sizes.columns, self.sizes.depth
        return memory.vector(depth, columns, dtype=jnp.int32) if self.segmented else None

    def stage(self) -> pl.MemoryRef | None:
        """Declare memory for the interpreter's factors: see `memory.multiply`."""
        if self.interpret is None:
            return None
        return memory.matrix(self.consumers, ROWS, self.sizes.columns, dtype=self.dtype)

    def shared_bytes(self) -> int:
        """Return the shared memory of a block, which may have `SHARED_BYTES`."""

        def size(x: pl.MemoryRef | plgpu.Barrier) -> int:
            if isinstance(x, plgpu.Barrier):
                return 8 * int(np.prod(x.num_barriers))
            return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize

        return sum(map(size, jax.tree.leaves(self.kernel.memory(self))))

    def add(self, part: Ref, place: Ref) -> None:
        """Add shared memory to global memory, in whatever order blocks come to it."""
        if self.interpret is None:
            plgpu.copy_smem_to_gmem(part, place, reduction_op="add")
        else:
            place[...] = place[...] + part[...]

    # --- The launch ------------------------------------------------------------------------

    def work(self, operands: Operands) -> Work:
        """List the columns of each row of blocks, and order the rows: heavy ones first."""
        by_keys, blocks = self.kernel.rows_are_keys, (self.q_block, self.k_block)
        states = self.problem.states(self.q_time, self.k_time, *blocks)
        # Where segments empty more blocks in the run, this order is still good enough.
        heavy = np.count_nonzero(states, axis=0 if by_keys else 1)
        order = np.argsort(-heavy, kind="stable").astype(np.int32)
        return Work(order, *lists_of(self.problem, operands, *blocks, by_keys=by_keys))

    def __call__(
        self,
        operands: Operands,
        arrays: Arrays,
        results: list[jax.ShapeDtypeStruct],
        sums: list[jax.ShapeDtypeStruct] | None = None,
    ) -> list[jax.Array]:
        """Run a block for every row of blocks, head and batch entry, heavy rows first.

        `sums` are further results, which start as zeros and which all blocks add to.
        """
        work = jax.tree.map(jnp.asarray, self.work(operands))
        n_rows, n_lists = len(work.order), len(work.counts)
        given, tree = jax.tree.flatten(alike((work, arrays)))
        heads = self.kv_heads if self.kernel.rows_are_keys else self.heads
        together = self._heads_together()
        memory_registers, compute_registers = REGISTERS[self.consumers]
        totals = [jax.new_ref(jnp.zeros(x.shape, x.dtype)) for x in sums or ()]

        def body(*refs: Ref, memory: Memory) -> None:
            work, arrays = jax.tree.unflatten(tree, refs[: len(given)])

            def here() -> At:
                # The barrier keeps the compiler from holding the answer in registers.
                section = lax.optimization_barrier(lax.axis_index("section"))
                place = section * together + lax.axis_index("head")
                batch, head = lax.div(place, jnp.int32(heads)), lax.rem(place, jnp.int32(heads))
                lists = batch if n_lists > 1 else jnp.int32(0)
                return At(work, batch, head, lists, work.order[lax.axis_index("row")])

            block, warpgroup = Block(self, arrays, memory, here), lax.axis_index("warpgroup")

            @pl.when(warpgroup < self.consumers)
            def _compute() -> None:
                plgpu.set_max_registers(compute_registers, action="increase")
                self.kernel.compute(block, warpgroup, [*refs[len(given) :], *totals])

            @pl.when(warpgroup == self.consumers)
            def _load() -> None:
                plgpu.set_max_registers(memory_registers, action="decrease")
                self.kernel.load(block)

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
        # Mosaic's launch loses the mesh axes that its results vary over.
        return alike((given, [*found, *(total[...] for total in totals)]))[1]

    def _heads_together(self) -> int:
        """Return how many heads' blocks of a row run side by side: a divisor of all of them."""
        pairs = self.batch * self.kv_heads
        time = self.q_time * self.group if self.kernel.rows_are_keys else self.k_time
        streamed = 2 * time * self.width * jnp.dtype(self.dtype).itemsize
        fitting = [n for n in range(1, pairs + 1) if pairs % n == 0 and n * streamed <= CACHE_BYTES]
        return max(fitting, default=1) * (1 if self.kernel.rows_are_keys else self.group)


def stream_keys(block: Block, at: At, keys: Ring, values: Ring) -> None:
    """Copy the keys and values that a block of queries walks past, and wait for the last."""
    launch, operands = block.launch, block.arrays.operands

    def fill(check: bool, step: Step, _: None) -> None:
        columns = at.column(step, launch.k_block)
        place = at.batch, columns, lax.div(at.head, jnp.int32(launch.group))
        segments = launch.segments(operands.k_segments, at.batch, columns)
        keys.fill(step.number, k=operands.k.at[place], segments=segments)
        values.fill(step.number, v=operands.v.at[place])

    walk(at, 1, fill, None)
    steps = at.n_columns()
    keys.drain(steps)
    values.drain(steps)
