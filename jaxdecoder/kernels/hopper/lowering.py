"""Functions of scores in operations that Mosaic lowers, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core.primitives import add_jaxvals_p, jit_p
from jaxtyping import PyTree

from jaxdecoder.kernels import scores
from jaxdecoder.kernels.typing import Leaf

LOG2E = math.log2(math.e)

Result = TypeVar("Result")


def lowerable(function: Callable[..., Result], *arguments: PyTree) -> Result:
    """Return function(*arguments), computed in operations that Mosaic lowers, exactly enough.

    Sums of derivatives become plain sums. tanh becomes exponentials: the card's own instruction has
    a relative error of 2^-11, with which a soft cap of 50 would be off by up to 0.02.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    shape = jax.eval_shape(function, *arguments)
    results = _evaluate(jaxpr, *jax.tree.leaves(arguments))
    found: Result = jax.tree.unflatten(jax.tree.structure(shape), results)
    return found


def vjp(
    function: Callable[..., jax.Array], score: jax.Array, parameters: list[scores.Parameter]
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, list[scores.Parameter]]]]:
    """Return function(score, parameters) and its pull, like `jax.vjp`, for scores of a tile.

    The function works on every score apart. The gradients of the parameters are not summed: there
    is a term for every score.
    """
    # A copy of each number for every score keeps its derivatives from being summed.
    parameters = jax.tree.map(lambda x: jnp.broadcast_to(x, score.shape), parameters)

    def value_and_slopes(
        score: jax.Array, parameters: list[scores.Parameter]
    ) -> tuple[jax.Array, tuple[jax.Array, list[scores.Parameter]]]:
        value, pull = jax.vjp(function, score, parameters)
        return value, pull(jnp.ones_like(value))

    value, (slope, slopes) = lowerable(value_and_slopes, score, parameters)

    def pull(ds: jax.Array) -> tuple[jax.Array, list[scores.Parameter]]:
        return ds * slope, jax.tree.map(lambda x: jnp.where(ds == 0, 0.0, ds * x), slopes)

    return value, pull


def tanh(x: jax.Array) -> jax.Array:
    """Return tanh(x) to an absolute error of a few 2^-24; an exponential that overflows gives 1."""
    return 1.0 - 2.0 / (jnp.exp2(x * (2 * LOG2E)) + 1.0)


def _evaluate(closed: core.ClosedJaxpr, *arguments: Leaf) -> list[Leaf]:
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def value(x: core.Var | core.Literal) -> Leaf:
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
