"""How a Hopper kernel is launched: blocks, their order, and the roles of their warpgroups."""

from __future__ import annotations

import functools
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
from jaxdecoder.kernels.hopper.tiles import CONSUMERS, ROWS, Arrays, Head, Work
from jaxdecoder.kernels.problem import Operands, Problem, alike

# Of 65536 registers, 168 for each of 384 threads at the start; a warpgroup hands over eights.
MEMORY_REGISTERS, COMPUTE_REGISTERS = 40, 232
# Heads whose keys and values fit into this share of the 50 MB or more of second-level cache are
# attended to together.
CACHE_BYTES = 32 * 2**20


class Sizes(NamedTuple):
    """How a kernel is cut. Its compute warpgroups own `tiles.ROWS` rows each."""

    columns: int
    """Streamed past the rows in one step."""
    depth: int
    """Steps that are copied ahead, at most."""


class At(NamedTuple):
    """Where a block stands."""

    batch: Any
    head: Any
    row: Any


class Launch:
    """One problem cut into blocks, for one kernel: sizes, padded arrays, and the launch."""

    def __init__(self, problem: Problem, operands: Operands, sizes: Sizes, interpret: Any = None):
        self.problem, self.sizes, self.interpret = problem, sizes, interpret
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.dtype = operands.q.dtype
        self.group = self.heads // self.kv_heads
        self.segmented = operands.q_segments is not None
        self.segments_shared = self.segmented and operands.q_segments.shape[0] == 1
        # The copy engine moves whole groups of 8 rows.
        self.aligned_q, self.aligned_k = _up(self.q_time, 8), _up(self.k_time, 8)

    def whole(self, time: int, block: int) -> int:
        return _up(time, block)

    def segment_row(self, batch: Any) -> Any:
        return 0 if self.segments_shared else batch

    def stage(self, columns: int) -> Any:
        """The interpreter has no `wgmma` of registers."""
        if self.interpret is None:
            return None
        return tiles.matrix(CONSUMERS, ROWS, columns, dtype=self.dtype)

    def head(self, arrays: Arrays, batch: Any, head: Any) -> Head:
        ragged = self.k_time % self.sizes.columns != 0 
        return Head(self.problem, arrays, batch, head, self.k_time if ragged else None)

    def call(
        self,
        name: str,
        states: np.ndarray,
        heads: int,
        arrays: Arrays,
        memory: Any,
        load: Callable[..., None],
        compute: Callable[..., None],
        results: list[jax.ShapeDtypeStruct],
    ) -> list[jax.Array]:
        """Runs a block for every row of `states`, head and batch entry, heavy rows first."""
        lists = masks.block_lists(states)
        order = np.argsort(-lists.counts, kind="stable").astype(np.int32)
        work = jax.tree.map(jnp.asarray, Work(order, *lists))
        work, arrays = alike((work, arrays))
        operands, tree = jax.tree.flatten((work, arrays))
        together = self._heads_together(heads)

        def body(*refs: Any, memory: Any) -> None:
            work, arrays = tree.unflatten(refs[: len(operands)])
            place = lax.axis_index("section") * together + lax.axis_index("head")
            batch, head = lax.div(place, jnp.int32(heads)), lax.rem(place, jnp.int32(heads))
            at = At(batch, head, work.order[lax.axis_index("row")])
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < CONSUMERS)
            def _compute() -> None:
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
                compute(self, arrays, work, at, memory, warpgroup, refs[len(operands) :])

            @pl.when(warpgroup == CONSUMERS)
            def _load() -> None:
                plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")
                load(self, arrays, work, at, memory)

        body.__name__ = name
        return plgpu.kernel(
            body,
            out_type=results,
            scratch_types={"memory": memory},
            grid=(self.batch * heads // together, len(order), together),
            grid_names=("section", "row", "head"),
            num_threads=CONSUMERS + 1,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=self.interpret,
        )(*operands)

    def _heads_together(self, heads: int) -> int:
        """Neighbouring blocks are of heads that fit into the cache, and differ in rows last."""
        pairs = self.batch * self.kv_heads
        streamed = max(self.k_time, self.q_time * self.heads // heads) * self.width * 4
        fitting = [n for n in range(1, pairs + 1) if pairs % n == 0 and n * streamed <= CACHE_BYTES]
        return max(fitting, default=1) * (heads // self.kv_heads)


def walk(work: Work, row: Any, step: Callable[..., Any], carry: Any) -> Any:
    """Steps along a row of blocks: those that need no mask, then the others."""
    full, end = work.full_counts[row], work.counts[row]
    carry = lax.fori_loop(0, full, functools.partial(step, False), carry)
    return lax.fori_loop(full, end, functools.partial(step, True), carry)


def padded(x: Any, axis: int, size: int, filling: float = 0) -> Any:
    if x is None or x.shape[axis] == size:
        return x
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=filling)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
