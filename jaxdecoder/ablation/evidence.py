"""The results of an ablation's members, in the form that claims are judged by."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdecoder.ablation.grid import Ablation, Arm
from jaxdecoder.ablation.statistics import Estimate, estimate
from jaxdecoder.typing import Table, Value

LEVEL = 0.05
"""The greatest probability that any claim of a report is judged although there is no effect."""

SENSITIVITY = "learning-rate sensitivity"
"""Mean loss over the grid of learning rates minus the lowest: the cost of a wrong choice."""


class Outcome(NamedTuple):
    """The result of one member."""

    arm: Arm
    learning_rate: float
    seed: int
    metrics: dict[str, float]
    """By the names of `METRICS`, in nats per token."""
    diverged_at: int | None = None
    """The step at which a number was no longer finite. The losses are then those of a model that
    knows nothing, and the overfitting is unknown (NaN)."""


class Evidence:
    """The outcomes of an ablation, in the form that judges need.

    Every arm is compared at its best learning rate, on average over its seeds. A rate at which a
    seed diverged is not the best, unless seeds diverged at all rates.
    """

    def __init__(self, ablation: Ablation, outcomes: Sequence[Outcome]):
        self.ablation = ablation
        self.metric: str = ablation.spec.metric
        self.seeds = sorted({outcome.seed for outcome in outcomes})
        self._by_member = {(o.arm, o.learning_rate, o.seed): o for o in outcomes}
        self._rates = {arm: ablation.rates(arm) for arm in ablation.arms}

    def estimate(self, values: Sequence[float] | np.ndarray) -> Estimate:
        """Estimate the mean of one number per seed, at the level of Holm's first step."""
        level = LEVEL / max(1, len(self.ablation.spec.claims))
        return estimate(values, self.ablation.spec.confidence, level)

    def curve(self, arm: Arm, seed: int, metric: str | None = None) -> np.ndarray:
        """Return the metric of one arm and seed at every learning rate."""
        name = metric or self.metric
        return np.array([outcome.metrics[name] for outcome in self._by_rate(arm, seed)])

    def diverged(self, arm: Arm, seed: int) -> np.ndarray:
        """Return whether one arm and seed diverged, at every learning rate."""
        return np.array([o.diverged_at is not None for o in self._by_rate(arm, seed)])

    def _by_rate(self, arm: Arm, seed: int) -> list[Outcome]:
        return [self._by_member[arm, rate, seed] for rate in self._rates[arm]]

    def _best(self, arm: Arm) -> int:
        curve = np.mean([self.curve(arm, seed) for seed in self.seeds], axis=0)
        spoilt = np.any([self.diverged(arm, seed) for seed in self.seeds], axis=0)
        return int(np.argmin(curve if spoilt.all() else np.where(spoilt, np.inf, curve)))

    def best_rate(self, arm: Arm) -> float:
        """Return the learning rate at which an arm's mean over seeds is lowest."""
        return self._rates[arm][self._best(arm)]

    def at_end(self, arm: Arm) -> bool:
        """Return whether an arm's best learning rate is the first or last of several."""
        n = len(self._rates[arm])
        return n > 1 and self._best(arm) in (0, n - 1)

    def value(self, arm: Arm, seed: int, measure: str) -> float:
        """Return a measure of one arm and seed: a metric at its best rate, or the sensitivity."""
        if measure == SENSITIVITY:
            curve = self.curve(arm, seed)
            return float(curve.mean() - curve.min())
        return float(self.curve(arm, seed, measure)[self._best(arm)])

    def gain(self, a: Arm, b: Arm, seed: int) -> float:
        """Return by how much the metric of `a` is lower than that of `b`; NaN if both diverged."""
        if all(self.diverged(arm, seed)[self._best(arm)] for arm in (a, b)):
            return math.nan
        return self.value(b, seed, self.metric) - self.value(a, seed, self.metric)

    def matching(self, conditions: Table) -> list[Arm]:
        """Return the arms that have these values."""
        return [
            arm
            for arm in self.ablation.arms
            if all(arm.value(key) == value for key, value in conditions.items())
        ]

    def pairs(self, a: Table, b: Table) -> list[tuple[Arm, Arm]]:
        """Pair arms with the values `a` with arms with the values `b`, if all other values agree.

        If only one arm has the values `a` and only one has `b`, they are a pair in any case.
        """
        named = {*a, *b}

        def rest(arm: Arm) -> tuple[Value, ...]:
            return tuple(pair for pair in arm.values if pair[0] not in named)

        every = list(itertools.product(self.matching(a), self.matching(b)))
        if len(every) == 1 and every[0][0] != every[0][1]:
            return every
        return [(x, y) for x, y in every if rest(x) == rest(y)]

    def levels(self, factor: str) -> list[tuple[Value, list[Arm]]]:
        """Return the values of a factor, each with its arms, in the same order for all values."""
        return [(value, self.matching({factor: value})) for value in self.ablation.factors[factor]]


def knowing_nothing(vocab_size: int) -> dict[str, float]:
    """Return the losses of diverged members: of a model that gives all tokens one probability."""
    return {
        "validation_loss": math.log(vocab_size),
        "train_loss": math.log(vocab_size),
        # Its overfitting would be 0, which would look like the best value.
        "overfitting": math.nan,
    }
