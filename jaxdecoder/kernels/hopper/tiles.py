"""A tile of scores inside the Hopper kernels: which are allowed, what they become, their pull."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels.dropout import keep
from jaxdecoder.kernels.hopper import lowering
from jaxdecoder.kernels.hopper.lowering import LOG2E
from jaxdecoder.kernels.hopper.memory import TILE, along, spread, zeros
from jaxdecoder.kernels.problem import Problem
from jaxdecoder.kernels.scores import Parameter, Pull, Score, gradient
from jaxdecoder.kernels.typing import Ref
from jaxdecoder.typing import Index

ROWS = 64  # of one `wgmma`, and of a compute warpgroup's tile
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Head(NamedTuple):
    """One head of one batch entry, and what its scores depend on."""

    problem: Problem
    batch: jax.Array
    head: jax.Array
    parameters: tuple[Parameter, ...]
    """Those of the score function, if there is one."""
    dropout: tuple[jax.Array, jax.Array] | None
    """Seed and threshold, where weights are dropped."""
    k_time: int | None
    """The number of keys, where the last block runs past it."""

    @property
    def needs_index(self) -> bool:
        """Whether scores depend on where they are, even where all are allowed."""
        return self.problem.score is not None or self.problem.dropout


class Tile(NamedTuple):
    """A tile of scores of one head, with queries along `query_axis`."""

    head: Head
    q_start: Index
    k_start: Index
    shape: tuple[int, int]
    query_axis: int
    q_segments: Ref | None = None
    """In shared memory, like the next."""
    k_segments: Ref | None = None

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Return the positions of queries and keys, for every score."""
        q, k = (
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=TILE)
            for axis in (self.query_axis, 1 - self.query_axis)
        )
        return self.q_start + q, self.k_start + k

    def numbers_of_scores(self) -> tuple[jax.Array, ...]:
        """Return batch entry, head and positions of the scores."""
        head, (q, k) = self.head, self.positions()
        return head.batch, head.head, head.problem.position(q), k

    def allowed(self) -> jax.Array:
        """Return which scores are allowed."""

        def segments(axis: int, ref: Ref | None) -> jax.Array | None:
            return None if ref is None else spread(along(axis, ref), axis, self.shape)

        q_segments = segments(self.query_axis, self.q_segments)
        k_segments = segments(1 - self.query_axis, self.k_segments)
        head, positions = self.head, self.positions()
        allowed = head.problem.allowed(*positions, q_segments, k_segments, k_time=head.k_time)
        return jnp.broadcast_to(allowed, self.shape)

    def base_two_scores(self, products: jax.Array) -> tuple[jax.Array, float]:
        """Return scores over log(2), so that their exponentials are powers of 2, in two parts.

        The second is a positive factor that the first is still to be multiplied by, which costs
        nothing together with a subtraction.
        """
        head, problem = self.head, self.head.problem
        if problem.score is None and problem.scale > 0:
            return products, problem.scale * LOG2E
        s = products * problem.scale
        if problem.score is not None:
            index = self.numbers_of_scores()
            s = lowering.lowerable(problem.score, s, *index, *head.parameters)
        return s, LOG2E

    def scores(
        self, check: bool, products: jax.Array, learned: bool
    ) -> tuple[jax.Array, float, Pull]:
        """Return `base_two_scores`, -inf where they are not allowed, and their pull.

        The pull is that to `scale` times the products. If `learned`, it gives the gradients of the
        learned numbers, too, in one term for every score.
        """
        s, factor, pull = self._scores_and_pull(products, learned)
        return (jnp.where(self.allowed(), s, -jnp.inf) if check else s), factor, pull

    def _scores_and_pull(self, products: jax.Array, learned: bool) -> tuple[jax.Array, float, Pull]:
        head, problem = self.head, self.head.problem
        if problem.score is None:
            return *self.base_two_scores(products), lambda ds: (ds, [])
        function, index = problem.score, self.numbers_of_scores()

        def new_score(s: jax.Array, *parameters: Parameter) -> jax.Array:
            return function(s, *index, *parameters)

        wanted = [learned and flag for flag in problem.learned]
        s = products * problem.scale
        value, pull = gradient(new_score, s, head.parameters, wanted, lowering.vjp)
        return value, LOG2E, pull

    def dropout(self) -> Callable[[jax.Array], jax.Array]:
        """Return what drops weights, or their gradients: always the same ones."""
        head = self.head
        if head.dropout is None or not head.problem.dropout:
            return lambda weights: weights
        kept = keep(*head.dropout, *self.numbers_of_scores())
        return lambda weights: jnp.where(kept, weights, 0.0)


def try_out(problem: Problem, score: tuple[jax.ShapeDtypeStruct, ...]) -> None:
    """Lower for a GPU all that a problem asks for on a tile; raise what Mosaic raises."""
    shape = (ROWS, ROWS)

    def body(dropout: Ref, *refs: Ref) -> None:
        *score, out = refs
        zero = jnp.int32(0)
        parameters = Score.parameters(tuple(score), zero)
        head = Head(problem, zero, zero, parameters, (dropout[0], dropout[1]), ROWS - 1)
        tile = Tile(head, zero, zero, shape, 0)
        s, _, pull = tile.scores(True, zeros(*shape), learned=True)
        ds, terms = pull(tile.dropout()(s))
        out[...] = sum(terms, ds)

    results = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = plgpu.kernel(body, out_type=results, compiler_params=COMPILER)
    traced = jax.jit(kernel).trace(jax.ShapeDtypeStruct((2,), jnp.uint32), *score)
    traced.lower(lowering_platforms=("cuda",))
