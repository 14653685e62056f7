"""What the Hopper kernels share inside: rings of buffers, matrix products, and tiles of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from jaxdecoder.kernels.scores import Score

ROWS = 64  # of one `wgmma`, and of a compute warpgroup's tile
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
LOG2E = math.log2(math.e)

# Where the tensor cores leave a product in the registers of a warpgroup.
TILE = plgpu.Layout.WGMMA


class Work(NamedTuple):
    """A launch's rows of blocks, in the order they are begun, and the columns each of them walks.

    See `masks.BlockLists`, which are here for each batch entry or, with a first axis of 1, for all.
    int32.
    """

    order: Any
    """(rows,)"""
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
    """int32 (batch, heads, 2 or 3, q_time), whole blocks. By rows: the bits of the logarithm to
    base 2 of each query's sum of exponentials (inf makes all its weights 0), those of the sum of
    out * dout, and the segments, if there are any: few arrays need few descriptors."""
    q_segments: Any = None
    """(batch or 1, q_time), whole blocks"""
    k_segments: Any = None
    score: tuple[Any, ...] = ()
    dropout: Any = None
    batch_index: Any = None
    """See `problem.Operands`, as the next."""
    head_index: Any = None


# --- Shared memory -----------------------------------------------------------------------------


def matrix(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices (..., rows, columns) that `wgmma` and the copy engine can read."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    # From jax 0.12 on a protocol's method without a body makes both look abstract to mypy.
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vector(*shape: int, dtype: Any = jnp.float32) -> Any:
    return plgpu.SMEM(shape, dtype)


class Ring(NamedTuple):
    """Buffers that the memory warpgroup fills ahead, in turn, and the compute warpgroups empty.

    Each holds the same arrays, by name. All warpgroups count the steps from 0 on their own.
    """

    arrays: dict[str, Any]
    loaded: Any
    consumed: Any

    @classmethod
    def of(cls, depth: int, consumers: int, **arrays: Any) -> Ring:
        """The shared memory for `depth` buffers, the first axis of the arrays that are not None.

        So many warpgroups empty each of them."""
        arrays = {name: array for name, array in arrays.items() if array is not None}
        return cls(
            arrays,
            plgpu.Barrier(num_arrivals=len(arrays), num_barriers=depth),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=depth),
        )

    @property
    def depth(self) -> int:
        return self.loaded.shape[0]

    def slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.depth))

    def fill(self, step: Any, **sources: Any) -> None:
        slot = self.slot(step)

        @pl.when(step >= self.depth)
        def _wait_until_empty() -> None:
            plgpu.barrier_wait(self.consumed.at[slot])

        for name, array in self.arrays.items():
            plgpu.copy_gmem_to_smem(sources[name], array.at[slot], self.loaded.at[slot])

    def take(self, step: Any) -> dict[str, Any]:
        slot = self.slot(step)
        plgpu.barrier_wait(self.loaded.at[slot])
        return self.held(step)

    def held(self, step: Any) -> dict[str, Any]:
        """What was taken and is not yet released."""
        slot = self.slot(step)
        return {name: array.at[slot] for name, array in self.arrays.items()}

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.consumed.at[self.slot(step)])

    def drain(self, steps: Any) -> None:
        """Waits, after so many steps, until all is empty."""

        def wait(step: Any, _: None) -> None:
            plgpu.barrier_wait(self.consumed.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.depth, 0), steps, wait, None)


def part(ref: Any, *index: Any) -> Any:
    return None if ref is None else ref.at[index]


def along(axis: int, ref: Any) -> Any:
    """Loads a vector that lies along an axis of a tile."""
    return plgpu.layout_cast(ref[...], TILE.reduce(1 - axis))


def floats_along(axis: int, ref: Any) -> Any:
    """The same, from the bits of float32 numbers."""
    return lax.bitcast_convert_type(along(axis, ref), jnp.float32)


# --- Matrix products ---------------------------------------------------------------------------


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


class Product(NamedTuple):
    """start + a b in float32."""

    a: Any
    """(rows, n) in shared memory, or, as the first of several, in registers."""
    b: Any
    """(n, columns) in shared memory."""
    start: jax.Array | None = None
    """(rows, columns); zeros if left out. What is to be added costs nothing here."""
    more: tuple[tuple[Any, Any], ...] = ()
    """Pairs like a and b, in shared memory, whose products are added, too."""


def multiply(
    *products: Product, stage: Any, issued: Callable[[], None] = lambda: None
) -> list[jax.Array]:
    """All the products, which are under way together; `issued` is called meanwhile.

    In the interpreter there is a `stage` in shared memory, which a factor in registers goes to.
    """
    first = products[0]
    if stage is not None and isinstance(first.a, jax.Array):
        stage[...] = first.a
        plgpu.commit_smem()
        products = (first._replace(a=stage), *products[1:])

    def multiplied(*accumulators: Any) -> None:
        for accumulator, product in zip(accumulators, products, strict=True):
            for a, b in ((product.a, product.b), *product.more):
                plgpu.wgmma(accumulator, a, b)
        issued()

    shapes = [(product.a.shape[0], product.b.shape[1]) for product in products]
    if stage is None:
        starts = [
            zeros(*s) if p.start is None else p.start for s, p in zip(shapes, products, strict=True)
        ]
        found = pl.run_state(lambda refs: multiplied(*refs))(tuple(map(plgpu.ACC.init, starts)))
        return list(found)

    def scoped(*accumulators: Any) -> list[jax.Array]:
        multiplied(*accumulators)
        return [accumulator[...] for accumulator in accumulators]

    found = pl.run_scoped(scoped, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
    return [x if p.start is None else x + p.start for x, p in zip(found, products, strict=True)]


def zeros(*shape: int) -> jax.Array:
    layout = TILE if len(shape) == 2 else TILE.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(x: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Repeats a vector that lies along an axis of a tile over the other one."""
    return lax.broadcast_in_dim(x, shape, (axis,))


# --- Scores ------------------------------------------------------------------------------------


def parameters(problem: Problem, operands: tuple[Any, ...], head: Any) -> tuple[Any, ...]:
    """What the score function reads of its operands."""
    if problem.score is None:
        return ()
    return Score(problem.score, (), problem.learned).parameters(operands, head)


class Head(NamedTuple):
    """One head of one batch entry, and what becomes of its scores."""

    problem: Problem
    batch: Any
    head: Any
    parameters: tuple[Any, ...]
    dropout: Any
    """Seed and threshold, where weights are dropped."""
    k_time: int | None
    """The number of keys, where the last block runs past it."""

    @property
    def needs_index(self) -> bool:
        """Whether scores depend on where they are, even where all are allowed."""
        return self.problem.score is not None or self.problem.dropout


class Tile(NamedTuple):
    """A tile of scores of one head, queries along `query_axis`."""

    head: Head
    q_start: Any
    k_start: Any
    shape: tuple[int, int]
    query_axis: int
    q_segments: Any = None
    """In shared memory."""
    k_segments: Any = None

    def positions(self) -> tuple[jax.Array, jax.Array]:
        q, k = (
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=TILE)
            for axis in (self.query_axis, 1 - self.query_axis)
        )
        return self.q_start + q, self.k_start + k

    def allowed(self) -> jax.Array:
        segments: tuple[Any, ...] = (None, None)
        if self.q_segments is not None:
            axes = self.query_axis, 1 - self.query_axis
            pairs = zip(axes, (self.q_segments, self.k_segments), strict=True)
            segments = tuple(spread(along(axis, ref), axis, self.shape) for axis, ref in pairs)
        q_segments, k_segments = segments
        positions = self.positions()
        allowed = self.head.problem.allowed(
            *positions, q_segments, k_segments, k_time=self.head.k_time
        )
        return jnp.broadcast_to(allowed, self.shape)

    def base_two_scores(self, products: jax.Array) -> tuple[jax.Array, float]:
        """The scores over log(2), so that their exponentials are powers of 2: a part, and the
        positive factor that is still to be multiplied with, together with a subtraction."""
        head, problem = self.head, self.head.problem
        if problem.score is None and problem.scale > 0:
            return products, problem.scale * LOG2E
        s = products * problem.scale
        if problem.score is not None:
            place = head.batch, head.head, *self.positions()
            s = _lowerable(problem.score, s, *place, *head.parameters)
        return s, LOG2E

    def scores(
        self, check: bool, products: jax.Array, learned: bool
    ) -> tuple[jax.Array, float, Callable[[jax.Array], tuple[jax.Array, list[jax.Array]]]]:
        """As `base_two_scores`, -inf where they are not allowed; and what takes their gradient
        to that of `scale` times the products, and to the terms of the gradients of the learned
        numbers, if they are wanted here."""
        s, factor, pull = self._scores_and_pull(products, learned)
        return (jnp.where(self.allowed(), s, -jnp.inf) if check else s), factor, pull

    def _scores_and_pull(self, products: jax.Array, learned: bool) -> tuple[jax.Array, float, Any]:
        head, problem = self.head, self.head.problem
        if problem.score is None:
            return *self.base_two_scores(products), lambda ds: (ds, [])
        function, index = problem.score, self.positions()
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
            # Where nothing is to be pulled, not even an infinite slope does.
            none = ds == 0

            def times(x: jax.Array) -> jax.Array:
                return jnp.where(none, 0.0, ds * x)

            return times(slope), [times(x) for x in jax.tree.leaves(slopes)]

        return value, LOG2E, pull

    def dropout(self) -> Callable[[jax.Array], jax.Array]:
        """Drops weights, or their gradients: always the same ones."""
        head = self.head
        if not head.problem.dropout:
            return lambda weights: weights
        kept = keep(*head.dropout, head.batch, head.head, *self.positions())
        return lambda weights: jnp.where(kept, weights, 0.0)


def try_out(problem: Problem, score: tuple[Any, ...]) -> None:
    """Lowers for a GPU all that a problem asks for on a tile; raises what Mosaic does of it."""
    shape = (ROWS, ROWS)

    def body(dropout: Any, *refs: Any) -> None:
        *score, out = refs
        zero = jnp.int32(0)
        read = parameters(problem, tuple(score), zero)
        tile = Tile(
            Head(problem, zero, zero, read, (dropout[0], dropout[1]), ROWS - 1),
            zero,
            zero,
            shape,
            0,
        )
        s, _, pull = tile.scores(True, zeros(*shape), learned=True)
        ds, terms = pull(tile.dropout()(s))
        out[...] = sum(terms, ds)

    results = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = plgpu.kernel(body, out_type=results, compiler_params=COMPILER)
    traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((2,), jnp.uint32), *score)
    traced.lower(lowering_platforms=("cuda",))


def _lowerable(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)` in operations that Mosaic lowers, and exactly enough.

    Sums of derivatives become plain sums. tanh becomes exponentials: the card's own instruction has
    a relative error of 2^-11, with which a soft cap of 50 would be off by up to 0.02.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    shape = jax.eval_shape(function, *arguments)
    results = _evaluate(jaxpr, *jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def tanh(x: jax.Array) -> jax.Array:
    """tanh to an absolute error of a few 2^-24; an exponential that overflows gives 1."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * LOG2E)) + 1.0)


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
        elif equation.primitive is lax.tanh_p:
            results = [tanh(*given)]
        elif equation.primitive is jit_p:
            results = _evaluate(equation.params["jaxpr"], *given)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*given, **params)
            results = results if equation.primitive.multiple_results else [results]
        values |= dict(zip(equation.outvars, results, strict=True))
    return [value(x) for x in jaxpr.outvars]
