"""Statistics of a few paired runs: differences with intervals, corrections and power.

All comparisons are paired over seeds. With one seed, two arms see the same data in the same order,
so the effect of the seed cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

RESAMPLES = 5000


class Estimate(NamedTuple):
    """The mean of one number per seed, such as a difference of losses, and its uncertainty."""

    mean: float
    low: float
    """Lower end of the t interval."""
    high: float
    bootstrap_low: float
    """Lower end of the bootstrap interval. It assumes no normal distribution, but with few seeds it
    is too narrow. Verdicts use the t interval."""
    bootstrap_high: float
    p_value: float
    """p value of Student's two-sided t test that the mean is 0."""
    effect_size: float
    """Mean over standard deviation (Cohen's d of paired samples)."""
    detectable: float
    """The smallest true mean that this many seeds distinguish from 0 with probability POWER; NaN if
    the question is not about the mean."""
    n: int


POWER = 0.8


def estimate(
    values: Sequence[float] | Float[np.ndarray, "n"],
    confidence: float = 0.95,
    level: float | None = None,
) -> Estimate:
    """Estimate the mean of one value per seed: Student's interval and test, and a bootstrap.

    `level`: the mean is different from 0 if the p value is below this; left out, 1 - confidence. If
    any value is unknown (NaN), the whole estimate is.

    Raises:
        ValueError: for fewer than two values, which give no interval.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"an interval needs two values at least, not {x.size}")
    mean, deviation, n = float(x.mean()), float(x.std(ddof=1)), len(x)
    if not np.isfinite(x).all():
        nan = math.nan
        return Estimate(nan, nan, nan, nan, nan, 1.0, nan, nan, n)
    # If all values are equal (except for rounding), the interval is that value.
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        p = 1.0 if abs(mean) <= 1e-12 else 0.0
        effect = 0.0 if p else math.copysign(math.inf, mean)
        return Estimate(mean, mean, mean, mean, mean, p, effect, 0.0, n)
    test = stats.ttest_1samp(x, 0.0)
    low, high = test.confidence_interval(confidence)
    resampled = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(
        mean,
        float(low),
        float(high),
        float(resampled.low),
        float(resampled.high),
        float(test.pvalue),
        mean / deviation,
        detectable(deviation, n, alpha=level or 1 - confidence),
        n,
    )


def detectable(deviation: float, n: int, *, alpha: float = 0.05) -> float:
    """Return the smallest mean that a two-sided t test at level alpha finds with `POWER`.

    `deviation` is the standard deviation of the n values. The power comes from the noncentral t
    distribution, as an integral over the sample's deviation: SciPy's own function gives NaN for few
    degrees of freedom and large effects.
    """
    freedom = n - 1
    critical = stats.t.ppf(1 - alpha / 2, freedom)
    # Gauss-Legendre nodes over the whole chi distribution.
    nodes, weights = np.polynomial.legendre.leggauss(300)
    chi = (nodes + 1) / 2 * (math.sqrt(freedom) + 8)
    weights = weights * (math.sqrt(freedom) + 8) / 2 * stats.chi.pdf(chi, freedom)
    thresholds = critical * chi / math.sqrt(freedom)

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(n)
        beyond = special.ndtr(shift - thresholds) + special.ndtr(-shift - thresholds)
        return float(weights @ beyond) - POWER

    largest = 1.0
    while missing(largest) < 0:
        largest *= 2
    return deviation * float(optimize.brentq(missing, 0.0, largest))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's correction (Scandinavian Journal of Statistics 6, 1979).

    At level alpha, the probability that any of several true null hypotheses is rejected is then at
    most alpha.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def best_on_curve(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Return the x at which a curve through the points is lowest.

    It is the vertex of the parabola through the lowest point and its neighbours, or an end of the
    grid if the lowest point is there.
    """
    i = int(np.argmin(y))
    if i in (0, len(x) - 1):
        return float(x[i])
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    vertex = x[i] - b / (2 * a) if a > 0 else x[i]
    return float(np.clip(vertex, x[i - 1], x[i + 1]))
