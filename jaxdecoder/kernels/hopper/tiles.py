"""What the Hopper kernels share inside: rings of buffers, matrix products, and tiles of scores."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core
from jax.extend.core.primitives import add_jaxvals_p, jit_p

from jaxdecoder.kernels.dropout import keep
from jaxdecoder.kernels.problem import Problem

ROWS = 64  # of one `wgmma`, and of a compute warpgroup's tile
CONSUMERS = 2  # compute warpgroups of a block; one more moves memory
LOG2E = math.log2(math.e)

# Where the tensor cores leave a product in the registers of a warpgroup, and what lies along it.
TILE = plgpu.Layout.WGMMA
ALONG_ROWS = TILE.reduce(1)
ALONG_COLUMNS = TILE.reduce(0)


class Work(NamedTuple):
    """A launch's rows of blocks, in the order they are begun, and the columns each of them walks.

    See `masks.BlockLists`. int32.
    """

    order: Any
    counts: Any
    full_counts: Any
    indices: Any


class Arrays(NamedTuple):
    """The arrays of a launch, in global memory; times are padded so that copies are aligned."""

    q: Any
    k: Any
    v: Any
    dout: Any = None
    of_queries: Any = None
    """float32 (batch, heads, 2, q_time), whole blocks: the logarithm to base 2 of each query's sum
    of exponentials, inf to make all its weights 0, and the sum of out * dout."""
    q_segments: Any = None
    """(batch or 1, q_time), whole blocks"""
    k_segments: Any = None
    score: tuple[Any, ...] = ()
    seed: Any = None


# --- Shared memory -----------------------------------------------------------------------------


def matrix(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices (..., rows, columns) that `wgmma` and the copy engine can read."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Ring(NamedTuple):
    """Buffers that one warpgroup fills ahead, in turn, and the compute warpgroups empty.

    All count the steps from 0 on their own.
    """

    buffer: Any
    loaded: Any
    consumed: Any

    @classmethod
    def of(cls, depth: int, memory: Any) -> Ring:
        """The shared memory that a ring of `depth` buffers takes; `memory` has that first axis."""
        barrier = functools.partial(plgpu.Barrier, num_barriers=depth)
        return cls(memory, barrier(), barrier(num_arrivals=CONSUMERS))

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.buffer.shape[0]))

    def fill(self, step: Any, source: Any) -> None:
        slot = self.slot(step)

        @pl.when(step >= self.buffer.shape[0])
        def _wait_until_empty() -> None:
            plgpu.barrier_wait(self.consumed.at[slot])

        plgpu.copy_gmem_to_smem(source, self.buffer.at[slot], self.loaded.at[slot])

    def drain(self, steps: Any) -> None:
        """Waits, after so many steps, until all is empty."""

        def wait(step: Any, _: None) -> None:
            plgpu.barrier_wait(self.consumed.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.buffer.shape[0], 0), steps, wait, None)

    def take(self, step: Any) -> Any:
        slot = self.slot(step)
        plgpu.barrier_wait(self.loaded.at[slot])
        return self.buffer.at[slot]

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.consumed.at[self.slot(step)])


# --- Matrix products ---------------------------------------------------------------------------


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def multiply(*pairs: tuple[Any, Any]) -> list[jax.Array]:
    """a b in float32 for every pair, which lies in shared memory."""

    def multiplied(*accumulators: Any) -> list[jax.Array]:
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    shapes = [plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs]
    return pl.run_scoped(multiplied, *shapes)


def add_product(total: jax.Array, a: jax.Array, b: Any, stage: Any = None) -> jax.Array:
    """total + a b with `a` from the registers, or by way of the shared memory `stage`."""
    a = a.astype(b.dtype)
    if stage is not None:
        stage[...] = a
        plgpu.commit_smem()
        return total + multiply((stage, b))[0]

    def multiplied(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, a, b)

    return pl.run_state(multiplied)(plgpu.ACC.init(total))


def zeros(*shape: int) -> jax.Array:
    layout = TILE if len(shape) == 2 else ALONG_ROWS
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(x: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Repeats a vector that lies along an axis of a tile over the other one."""
    return lax.broadcast_in_dim(x, shape, (axis,))


# --- Scores ------------------------------------------------------------------------------------


class Head(NamedTuple):
    """One head of one batch entry, and what becomes of its scores."""

    problem: Problem
    batch: Any
    head: Any
    parameters: tuple[Any, ...]
    """What the score function reads of its operands."""
    seed: Any
    k_time: int | None
    """The number of keys, where the last block runs past it."""

    @property
    def needs_index(self) -> bool:
        """Whether scores depend on where they are, even where all are allowed."""
        return self.problem.score is not None or self.problem.dropout_rate > 0


class Tile(NamedTuple):
    """A tile of scores of one head, queries along `query_axis`."""

    head: Head
    q_start: Any
    k_start: Any
    shape: tuple[int, int]
    query_axis: int
    q_segments: Any = None
    """As vectors along their axes."""
    k_segments: Any = None

    def index(self) -> tuple[jax.Array, jax.Array]:
        q, k = (
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=TILE)
            for axis in (self.query_axis, 1 - self.query_axis)
        )
        return self.q_start + q, self.k_start + k

    def allowed(self) -> jax.Array:
        segments = (None, None)
        if self.q_segments is not None:
            segments = (
                spread(self.q_segments, self.query_axis, self.shape),
                spread(self.k_segments, 1 - self.query_axis, self.shape),
            )
        allowed = self.head.problem.allowed(*self.index(), *segments, self.head.k_time)
        return jnp.broadcast_to(allowed, self.shape)

    def base_two_scores(self, products: jax.Array) -> jax.Array:
        """The scores over log(2), so that their exponentials are powers of 2."""
        head, problem = self.head, self.head.problem
        if problem.score is None:
            return products * (problem.scale * LOG2E)
        place = head.batch, head.head, *self.index()
        return problem.score(products * problem.scale, *place, *head.parameters) * LOG2E

    def scores_with_pull(self, products: jax.Array, learned: bool) -> tuple[jax.Array, Any]:
        """The same, and what takes the scores' gradient to that of `scale` times the products,
        and to the terms of the gradients of the learned numbers (none unless `learned`)."""
        head, problem = self.head, self.head.problem
        if problem.score is None:
            return self.base_two_scores(products), lambda ds: (ds, [])
        function, index = problem.score, self.index()
        wanted = [learned and flag for flag in problem.learned]
        chosen = [p for p, flag in zip(head.parameters, wanted, strict=True) if flag]
        # One copy for every score, so that their gradients are not summed yet.
        chosen = jax.tree.map(lambda x: jnp.broadcast_to(x, self.shape), chosen)

        def new_score(s: jax.Array, chosen: list[Any]) -> jax.Array:
            rest = iter(chosen)
            pairs = zip(head.parameters, wanted, strict=True)
            full = [next(rest) if flag else p for p, flag in pairs]
            return function(s, head.batch, head.head, *index, *full)

        def value_and_slopes(s: jax.Array, chosen: list[Any]) -> tuple[jax.Array, Any]:
            value, pull = jax.vjp(new_score, s, chosen)
            return value, pull(jnp.ones_like(value))

        s = products * problem.scale
        value, (slope, slopes) = _lowerable(value_and_slopes, s, chosen)

        def pull(ds: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            return ds * slope, [ds * x for x in jax.tree.leaves(slopes)]

        return value * LOG2E, pull

    def gradients(
        self,
        check: bool,
        products: jax.Array,
        dweights: jax.Array,
        logsumexp: jax.Array,
        delta: jax.Array,
        learned: bool,
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """The attention weights after dropout, the gradient of `scale` times the products, and the
        terms of the learned numbers' gradients; all arrays have the shape of the tile."""
        s, pull = self.scores_with_pull(products, learned)
        if check:
            s = jnp.where(self.allowed(), s, -jnp.inf)
        weights = jnp.exp2(s - logsumexp)
        ds, terms = pull(weights * (self.dropped(dweights) - delta))
        return self.dropped(weights), ds, terms

    def dropped(self, weights: jax.Array) -> jax.Array:
        rate = self.head.problem.dropout_rate
        if rate == 0.0:
            return weights
        kept = keep(self.head.seed, rate, self.head.batch, self.head.head, *self.index())
        return jnp.where(kept, weights * (1.0 / (1.0 - rate)), 0.0)


def _lowerable(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)`, its sums of derivatives as plain sums, which Mosaic can lower."""
    leaves, tree = jax.tree.flatten(arguments)
    jaxpr, shape = jax.make_jaxpr(lambda *xs: function(*tree.unflatten(xs)), return_shape=True)(
        *leaves
    )
    results = _evaluate(jaxpr, *leaves)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def _evaluate(closed: core.ClosedJaxpr, *arguments: Any) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(x: Any) -> Any:
        return x.val if isinstance(x, core.Literal) else values[x]

    for equation in jaxpr.eqns:
        given = [value(x) for x in equation.invars]
        if equation.primitive is add_jaxvals_p:
            results = [given[0] + given[1]]
        elif equation.primitive is jit_p:
            results = _evaluate(equation.params["jaxpr"], *given)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*given, **params)
            results = results if equation.primitive.multiple_results else [results]
        values |= dict(zip(equation.outvars, results, strict=True))
    return [value(x) for x in jaxpr.outvars]
