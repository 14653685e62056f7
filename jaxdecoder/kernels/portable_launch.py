"""The launch of the portable kernels: how a problem is cut, padded and handed to Pallas."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxdecoder.kernels import masks
from jaxdecoder.kernels.problem import Operands, Problem, alike, result
from jaxdecoder.kernels.segments import narrowed

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

    q: Any
    k: Any
    v: Any
    dout: Any
    logsumexp: Any
    delta: Any
    q_segments: Any
    k_segments: Any
    score: tuple[Any, ...]
    dropout: Any
    batch_index: Any
    head_index: Any


class Tiling:
    """One problem cut into blocks: sizes, padded arrays and the launch of a kernel on them."""

    def __init__(self, problem: Problem, operands: Operands, chosen: Sizes):
        self.problem, self.chosen = problem, chosen
        self.block_q, self.block_k = chosen.block_q, chosen.block_k
        self.batch, self.q_time, self.heads, self.width = operands.q.shape
        self.k_time, self.kv_heads = operands.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.padded_q = -(-self.q_time // self.block_q) * self.block_q
        self.padded_k = -(-self.k_time // self.block_k) * self.block_k
        # Triton's tiles are powers of two, and its matrix products at least 16 wide.
        self.padded_width = max(16, 1 << (self.width - 1).bit_length())
        self.ragged = self.padded_k != self.k_time
        self.states = problem.states(self.q_time, self.k_time, self.block_q, self.block_k)
        self.precision = jax.lax.Precision.HIGHEST if operands.q.dtype == jnp.float32 else None

    def lists(self, operands: Operands, by_keys: bool = False) -> masks.BlockLists:
        """Those of each batch entry, or one for all: (batch or 1, rows, ...)."""
        lists = masks.block_lists(self.states.T if by_keys else self.states)
        if not self.problem.segments_vary:
            return masks.BlockLists(*(x[None] for x in lists))
        queries, keys = (operands.q_segments, self.block_q), (operands.k_segments, self.block_k)
        return narrowed(lists, *(keys + queries if by_keys else queries + keys))

    def inputs(
        self,
        operands: Operands,
        dout: jax.Array | None = None,
        logsumexp: jax.Array | None = None,
        delta: jax.Array | None = None,
    ) -> Inputs:
        def padded(x: Any, axis: int, size: int, filling: float = 0) -> Any:
            if x is None:
                return None
            sizes = {axis: size} | ({3: self.padded_width} if x.ndim == 4 else {})
            widths = [(0, sizes.get(a, n) - n) for a, n in enumerate(x.shape)]
            return x if not np.any(widths) else jnp.pad(x, widths, constant_values=filling)

        return Inputs(
            padded(operands.q, 1, self.padded_q),
            padded(operands.k, 1, self.padded_k),
            padded(operands.v, 1, self.padded_k),
            padded(dout, 1, self.padded_q),
            padded(logsumexp, 2, self.padded_q, jnp.inf),  # weights of padded queries are 0
            padded(delta, 2, self.padded_q),
            padded(operands.q_segments, 1, self.padded_q),
            padded(operands.k_segments, 1, self.padded_k),
            operands.score,
            operands.dropout,
            operands.batch_index,
            operands.head_index,
        )

    def cut(self, x: jax.Array, time: int) -> jax.Array:
        """Takes the padding off an array (batch, time, heads, width)."""
        return x[:, :time, :, : self.width]

    def by_query(self, like: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """A result with a row of numbers for every query, head and batch entry."""
        shape = (self.batch, self.padded_q, self.heads, self.padded_width)
        block = (None, self.block_q, None, self.padded_width)
        return result(shape, like.dtype, like), pl.BlockSpec(block, lambda i, h, b: (b, i, h, 0))

    def by_key(self, like: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = (self.batch, self.padded_k, self.kv_heads, self.padded_width)
        block = (None, self.block_k, None, self.padded_width)
        return result(shape, like.dtype, like), pl.BlockSpec(block, lambda j, h, b: (b, j, h, 0))

    def by_row(self, like: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """A result with a number for every query, head and batch entry."""
        shape = (self.batch, self.heads, self.padded_q)
        spec = pl.BlockSpec((None, None, self.block_q), lambda i, h, b: (b, h, i))
        return result(shape, jnp.float32, like), spec

    def by_row_of(self, operand: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        """A part of the gradient of a score operand for every block of queries."""
        n = operand.size // self.heads
        shape = (self.batch, self.heads, self.padded_q // self.block_q, n)
        spec = pl.BlockSpec((None, None, None, n), lambda i, h, b: (b, h, i, 0))
        return result(shape, jnp.float32, operand), spec

    def dot(self, a: jax.Array, b: jax.Array, transpose_b: bool = False) -> jax.Array:
        axes = (1,), (1 if transpose_b else 0,)
        return jax.lax.dot_general(
            a, b, (axes, ((), ())), precision=self.precision, preferred_element_type=jnp.float32
        )

    def call(
        self,
        kernel: Callable[..., None],
        lists: masks.BlockLists,
        inputs: Inputs,
        results: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
        heads: int,
    ) -> Any:
        """Runs a kernel for every row of the lists, head (query's or key's) and batch entry."""
        shapes, out_specs = zip(*results, strict=True)
        grid = (lists.counts.shape[1], heads, self.batch)
        lists, inputs = alike((jax.tree.map(jnp.asarray, lists), inputs))

        def kv_head(h: Any) -> Any:
            return h // (heads // self.kv_heads)

        def whole(x: Any) -> pl.BlockSpec | None:
            if x is None:
                return None
            return pl.BlockSpec(x.shape, lambda i, h, b: (0,) * x.ndim)

        def of_entry(x: Any) -> pl.BlockSpec | None:
            if x is None:
                return None
            rest = (0,) * (x.ndim - 1)
            return pl.BlockSpec(
                (None, *x.shape[1:]), lambda i, h, b: (b if x.shape[0] > 1 else 0, *rest)
            )

        group, width = self.group, self.padded_width
        of_queries = pl.BlockSpec(
            (None, self.padded_q, group, width), lambda i, h, b: (b, 0, kv_head(h), 0)
        )
        of_keys = pl.BlockSpec(
            (None, self.padded_k, None, width), lambda i, h, b: (b, 0, kv_head(h), 0)
        )
        numbers = pl.BlockSpec((None, group, self.padded_q), lambda i, h, b: (b, kv_head(h), 0))
        in_specs = Inputs(
            of_queries,
            of_keys,
            of_keys,
            None if inputs.dout is None else of_queries,
            None if inputs.logsumexp is None else numbers,
            None if inputs.delta is None else numbers,
            of_entry(inputs.q_segments),
            of_entry(inputs.k_segments),
            tuple(map(whole, inputs.score)),
            whole(inputs.dropout),
            whole(inputs.batch_index),
            whole(inputs.head_index),
        )
        launch = functools.partial(
            pl.pallas_call,
            kernel,
            grid=grid,
            in_specs=(jax.tree.map(of_entry, lists), in_specs),
            out_specs=list(out_specs),
            out_shape=list(shapes),
            name=kernel.func.__name__.strip("_"),  # type: ignore[attr-defined]
        )
        return jax.lax.platform_dependent(
            lists,
            inputs,
            cpu=launch(interpret=True),
            default=launch(compiler_params=compiler_params(self.chosen)),
        )


def compiler_params(chosen: Sizes) -> Any:
    if triton is None:
        return None
    return triton.CompilerParams(num_warps=chosen.num_warps, num_stages=chosen.num_stages)
