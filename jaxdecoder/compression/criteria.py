"""By what single weights go: a criterion is a function and an entry of `CRITERIA`.

Read without JAX, so that --help is quick: a function that needs more than the operators of arrays
imports it inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Scope = Literal["matrix", "output", "global"]
Need = Literal["nothing", "input_norms", "lot"]


class Criterion(NamedTuple):
    """How much each weight matters.

    score: (weights (*layers, d_in, d_out), what is needed of them) -> a score for each, 0 or more;
        the lowest go.
    needs: what that is. input_norms: the norm of each input feature over the calibration set,
        (*layers, d_in); lot: a NumPy generator of its own, by --seed.
    scope: which weights compare with one another if it is left out.
    gradual: whether it is the one by which training makes zeros, too.
    """

    score: Callable[[Any, Any], Any]
    needs: Need = "nothing"
    scope: Scope = "matrix"
    gradual: bool = False


def magnitude(weights: Any, nothing: Any) -> Any:
    """|w| (arXiv 1506.02626)."""
    return abs(weights)


def wanda(weights: Any, input_norms: Any) -> Any:
    """|w_ij| times the norm of input feature i over the calibration set (arXiv 2306.11695)."""
    return abs(weights) * input_norms[..., None]


def random(weights: Any, lot: Any) -> Any:
    """A number by lot, for a control."""
    return lot.random(weights.shape, "float32")


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, gradual=True),
    "wanda": Criterion(wanda, needs="input_norms", scope="output"),
    "random": Criterion(random, needs="lot"),
}
