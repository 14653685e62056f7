"""What a handful of paired runs can tell: differences with intervals, corrections and power.

All comparisons are paired over seeds: two arms see the same data in the same order, so what a seed
does to both cancels.
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
    """The mean of one number a seed, such as a difference of losses, and what it is worth."""

    mean: float
    low: float
    """Lower end of the t interval."""
    high: float
    bootstrap_low: float
    """Lower end of the bootstrap interval, which assumes no normal distribution but, with few
    seeds, comes out too narrow; verdicts use the t interval."""
    bootstrap_high: float
    p_value: float
    """Of Student's t test that the mean is 0, two-sided."""
    effect_size: float
    """Mean over standard deviation (Cohen's d of paired samples)."""
    detectable: float
    """The smallest true mean that so many seeds would tell from 0 with probability POWER; NaN where
    the mean is not what is asked about."""
    n: int


POWER = 0.8


def estimate(
    values: Sequence[float] | Float[np.ndarray, "n"],
    confidence: float = 0.95,
    level: float | None = None,
) -> Estimate:
    """Student's interval and test for the mean of values drawn once a seed, and a bootstrap.

    `level` is what a p value must be below to tell the mean from 0; left out, 1 - confidence. Of
    values that are not all known (NaN), nothing is.

    Raises:
        ValueError: for fewer than two values, from which no interval follows.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"an interval needs two values at least, not {x.size}")
    mean, deviation, n = float(x.mean()), float(x.std(ddof=1)), len(x)
    if not np.isfinite(x).all():
        nan = math.nan
        return Estimate(nan, nan, nan, nan, nan, 1.0, nan, nan, n)
    # Rounding aside, values that are all alike say the same at any confidence.
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


def detectable(deviation: float, n: int, *, alpha: float = 0.05, power: float = POWER) -> float:
    """The smallest mean that a two-sided t test at level alpha finds with this power.

    `deviation` is the standard deviation of the n values. The power is that of the noncentral t
    distribution, as an integral over the sample's deviation: SciPy's own gives NaN for few degrees
    of freedom and large effects.
    """
    freedom = n - 1
    critical = stats.t.ppf(1 - alpha / 2, freedom)
    # Gauss-Legendre nodes over all there is of a chi distribution.
    nodes, weights = np.polynomial.legendre.leggauss(300)
    chi = (nodes + 1) / 2 * (math.sqrt(freedom) + 8)
    weights = weights * (math.sqrt(freedom) + 8) / 2 * stats.chi.pdf(chi, freedom)
    thresholds = critical * chi / math.sqrt(freedom)

    def missing(effect: float) -> float:
        shift = effect * math.sqrt(n)
        beyond = special.ndtr(shift - thresholds) + special.ndtr(-shift - thresholds)
        return float(weights @ beyond) - power

    largest = 1.0
    while missing(largest) < 0:
        largest *= 2
    return deviation * float(optimize.brentq(missing, 0.0, largest))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values under Holm's correction (Scandinavian Journal of Statistics 6, 1979).

    Judged at level alpha, the chance that any of several true null hypotheses is rejected is at
    most alpha.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def best_on_curve(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Where on `x` a curve through the points is lowest: the vertex of the parabola through the
    lowest point and its neighbours, or an end of the grid if the lowest is there."""
    i = int(np.argmin(y))
    if i in (0, len(x) - 1):
        return float(x[i])
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    vertex = x[i] - b / (2 * a) if a > 0 else x[i]
    return float(np.clip(vertex, x[i - 1], x[i + 1]))
