"""The launch of the portable kernels: how a problem is cut, padded and handed to Pallas."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from jaxdecoder.kernels import masks
from jaxdecoder.kernels.padding import padded, round_up
from jaxdecoder.kernels.problem import Known, Operands, Problem, alike, field, result
from jaxdecoder.kernels.product import dot
from jaxdecoder.kernels.segments import lists_of
from jaxdecoder.kernels.typing import AnyArray

try:  # Only GPUs need it, and JAX means to remove it.
    from jax.experimental.pallas import triton
except ImportError:  # pragma: no cover
    triton = None  # type: ignore[assignment]


class Sizes(NamedTuple):
    """How a kernel is cut: its block of queries, its block of keys, and its launch."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Inputs(NamedTuple):
    """The arrays of a launch, and inside a kernel their parts for one batch entry and key head."""

    operands: Operands
    known: Known | None = None
    """For the backward kernels."""


Result = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]
"""The type of a kernel's result, and the part of it that one program writes."""


class Tiling:
    """One problem cut into blocks: sizes, padded arrays and the launch of a kernel on them."""

    def __init__(self, problem: Problem, operands: Operands, chosen: Sizes):
        self.problem, self.chosen = problem, chosen
        self.block_q, self.block_k = chosen.block_q, chosen.block_k
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.padded_q = round_up(self.q_time, self.block_q)
        self.padded_k = round_up(self.k_time, self.block_k)
        # Triton's tiles are powers of two, and its matrix products at least 16 wide.
        self.padded_width = max(16, 1 << (self.width - 1).bit_length())
        self.ragged = self.padded_k != self.k_time
        precision = jax.lax.Precision.HIGHEST if operands.q.dtype == jnp.float32 else None
        self.dot = functools.partial(dot, precision=precision)

    def lists(self, operands: Operands, by_keys: bool = False) -> masks.BlockLists:
        """Return the blocks with work, with a first axis for batch entries: see `lists_of`."""
        return lists_of(self.problem, operands, self.block_q, self.block_k, by_keys=by_keys)

    def inputs(self, operands: Operands, known: Known | None = None) -> Inputs:
        """Return the arrays, padded to whole blocks and to the width of Triton's tiles."""

        def whole(path: KeyPath, x: AnyArray) -> AnyArray:
            name = field(path)
            if x.ndim == 4:
                x = padded(x, 3, self.padded_width)
            if name in ("logsumexp", "delta"):
                # Weights of padded queries are exp(-inf) = 0.
                return padded(x, 2, self.padded_q, jnp.inf if name == "logsumexp" else 0)
            if name in ("q", "dout", "q_segments"):
                return padded(x, 1, self.padded_q)
            return padded(x, 1, self.padded_k) if name in ("k", "v", "k_segments") else x

        inputs: Inputs = jax.tree_util.tree_map_with_path(whole, Inputs(operands, known))
        return inputs

    def cut(self, x: jax.Array, time: int) -> jax.Array:
        """Take the padding off an array (batch, time, heads, width)."""
        return x[:, :time, :, : self.width]

    def rows(self, like: jax.Array, block: int) -> Result:
        """Return a result like queries or keys, of which a program writes a block of one head."""
        batch, time, heads, _ = like.shape
        shape = batch, round_up(time, block), heads, self.padded_width
        spec = pl.BlockSpec((None, block, None, shape[3]), lambda i, h, b: (b, i, h, 0))
        return result(shape, like.dtype, like), spec

    def by_row(self, like: jax.Array) -> Result:
        """Return a result with a number for every query, head and batch entry."""
        shape = (self.batch, self.heads, self.padded_q)
        spec = pl.BlockSpec((None, None, self.block_q), lambda i, h, b: (b, h, i))
        return result(shape, jnp.float32, like), spec

    def by_row_of(self, operand: AnyArray) -> Result:
        """Return a result with a part of a score operand's gradient for every block of queries."""
        n = operand.size // self.heads
        shape = (self.batch, self.heads, self.padded_q // self.block_q, n)
        spec = pl.BlockSpec((None, None, None, n), lambda i, h, b: (b, h, i, 0))
        return result(shape, jnp.float32, operand), spec

    def call(
        self,
        kernel: functools.partial[None],
        lists: masks.BlockLists,
        inputs: Inputs,
        results: list[Result],
        heads: int,
    ) -> list[jax.Array]:
        """Run a kernel for every row of the lists, head (query's or key's) and batch entry."""
        grid = lists.counts.shape[1], heads, self.batch
        lists, inputs = alike((jax.tree.map(jnp.asarray, lists), inputs))
        in_specs = jax.tree.map(of_entry, lists), self._in_specs(inputs, heads)
        return launched(kernel, self.chosen, grid, (lists, inputs), in_specs, results)

    def _in_specs(self, inputs: Inputs, heads: int) -> Inputs:
        """Return what a program (row, head, batch entry) sees of each array, in its place."""
        group, width, share = self.group, self.padded_width, heads // self.kv_heads
        of_queries = pl.BlockSpec(
            (None, self.padded_q, group, width), lambda i, h, b: (b, 0, h // share, 0)
        )
        of_keys = pl.BlockSpec(
            (None, self.padded_k, None, width), lambda i, h, b: (b, 0, h // share, 0)
        )
        numbers = pl.BlockSpec((None, group, self.padded_q), lambda i, h, b: (b, h // share, 0))
        fixed = {"q": of_queries, "dout": of_queries, "k": of_keys, "v": of_keys}
        fixed |= {"logsumexp": numbers, "delta": numbers}

        def spec(path: KeyPath, x: jax.Array) -> pl.BlockSpec:
            name = field(path)
            return fixed.get(name) or (of_entry if name.endswith("_segments") else whole)(x)

        specs: Inputs = jax.tree_util.tree_map_with_path(spec, inputs)
        return specs


def whole(x: jax.Array) -> pl.BlockSpec:
    """Show all of an array to every program of a grid of three axes."""
    return pl.BlockSpec(x.shape, lambda i, h, b: (0,) * x.ndim)


def of_entry(x: jax.Array) -> pl.BlockSpec:
    """Show an array (batch or 1, ...) to a program (row, head, batch entry): its entry."""
    rest = (0,) * (x.ndim - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, h, b: (b if x.shape[0] > 1 else 0, *rest))


def launched(
    kernel: functools.partial[None],
    chosen: Sizes,
    grid: tuple[int, int, int],
    inputs: tuple[PyTree, ...],
    in_specs: tuple[PyTree, ...],
    results: list[Result],
) -> list[jax.Array]:
    """Run a kernel, named after its function, through Triton; on a CPU it is interpreted."""
    shapes, out_specs = zip(*results, strict=True)
    launch = functools.partial(
        pl.pallas_call,
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=list(out_specs),
        out_shape=list(shapes),
        name=kernel.func.__name__.strip("_"),
    )
    parameters = None
    if triton is not None:
        parameters = triton.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages)
    ways = {"cpu": launch(interpret=True), "default": launch(compiler_params=parameters)}
    return list(jax.lax.platform_dependent(*inputs, **ways))
