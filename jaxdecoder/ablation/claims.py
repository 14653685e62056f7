"""Judge claims in plain words by the results of the members.

Every form of claim is an entry of `FORMS`: a pattern and a judge. A judge reduces the claim to one
number per seed (or several, if the claim is about several). The verdict comes from a t test on
these numbers, corrected for all claims of the report.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdecoder.ablation.grid import LEARNING_RATE, METRICS, Ablation, Arm, show
from jaxdecoder.ablation.statistics import Estimate, best_on_curve, estimate, holm
from jaxdecoder.errors import UserError

LEVEL = 0.05
"""The greatest probability that any claim of a report is judged although there is no effect."""

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


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


class Judgement(NamedTuple):
    """The result of one claim, before the correction for the other claims."""

    direction: bool | None
    """Whether the runs speak for the claim (True) or against it (False); None: neither."""
    p_value: float
    """p value of that direction."""
    what: str
    """The quantity that `estimate` estimates."""
    estimate: Estimate
    caveat: str = ""
    """A sentence that says why the result may not be reliable."""


class Verdict(NamedTuple):
    """A claim with its verdict."""

    claim: str
    verdict: str
    judgement: Judgement
    adjusted_p: float
    """p value after Holm's correction over the claims of the report."""


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

    def matching(self, conditions: dict[str, Any]) -> list[Arm]:
        """Return the arms that have these values."""
        return [
            arm
            for arm in self.ablation.arms
            if all(arm.value(key) == value for key, value in conditions.items())
        ]

    def pairs(self, a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Arm, Arm]]:
        """Pair arms with the values `a` with arms with the values `b`, if all other values agree.

        If only one arm has the values `a` and only one has `b`, they are a pair in any case.
        """
        named = {*a, *b}

        def rest(arm: Arm) -> tuple[Any, ...]:
            return tuple(pair for pair in arm.values if pair[0] not in named)

        every = list(itertools.product(self.matching(a), self.matching(b)))
        if len(every) == 1 and every[0][0] != every[0][1]:
            return every
        return [(x, y) for x, y in every if rest(x) == rest(y)]

    def levels(self, factor: str) -> list[tuple[Any, list[Arm]]]:
        """Return the values of a factor, each with its arms, in the same order for all values."""
        return [(value, self.matching({factor: value})) for value in self.ablation.factors[factor]]


SENSITIVITY = "learning-rate sensitivity"
"""Mean loss over the grid of learning rates minus the lowest: the cost of a wrong choice."""

Judge = Callable[[Evidence, "re.Match[str]"], Judgement]


def beats(evidence: Evidence, match: re.Match[str]) -> Judgement:
    """Judge "A beats B": paired over seeds, B's metric minus A's is above the margin."""
    better, worse = (_conditions(evidence.ablation, match[name]) for name in ("a", "b"))
    pairs = evidence.pairs(better, worse)
    if not pairs:
        raise UserError(
            f"no arm with {match['a']} has a partner with {match['b']} that agrees in the rest"
        )
    margin = float(match["margin"] or 0.0)
    gains = [
        float(np.mean([evidence.gain(a, b, seed) for a, b in pairs])) - margin
        for seed in evidence.seeds
    ]
    found = evidence.estimate(gains)
    holds = None if found.mean == 0 else found.mean > 0
    if match["negation"] and holds is not None:
        holds = not holds
    beyond = f" beyond {margin:g}" if margin else ""
    what = f"nats by which {match['a'].strip()} is better than {match['b'].strip()}{beyond}"
    return Judgement(holds, found.p_value, what, found, _at_ends(evidence, itertools.chain(*pairs)))


def _at_ends(evidence: Evidence, arms: Iterable[Arm]) -> str:
    """Return the caveat that the grid of learning rates is too narrow for some arms, or ""."""
    names = [arm.name for arm in dict.fromkeys(arms) if evidence.at_end(arm)]
    if not names:
        return ""
    return f"The best learning rate is at an end of the grid for {' and '.join(names)}."


def raises(evidence: Evidence, match: re.Match[str]) -> Judgement:
    """Judge "raising a factor lowers (or raises) a measure" by the slope over the factor's values.

    Only the order of the values counts: from 1 to 4 heads is one step, as from 4 to 16.
    """
    factor = _factor(evidence.ablation, match["factor"])
    measure = _measure(evidence, match["measure"])
    levels = evidence.levels(factor)
    if not all(isinstance(value, int | float) for value, _ in levels):
        raise UserError(f"{match['factor']} has no higher and lower values")
    levels.sort(key=lambda level: level[0])
    place = np.arange(len(levels)) - (len(levels) - 1) / 2
    slopes = []
    for seed in evidence.seeds:
        means = [np.mean([evidence.value(a, seed, measure) for a in arms]) for _, arms in levels]
        slopes.append(float(place @ np.array(means) / (place @ place)))
    found = evidence.estimate(slopes)
    lowers = match["verb"] in ("lowers", "narrows")
    holds = None if found.mean == 0 else (found.mean < 0) == lowers
    what = f"change of {measure.replace('_', ' ')} with each higher value of {match['factor']}"
    caveat = "" if measure == SENSITIVITY else _at_ends(evidence, evidence.ablation.arms)
    return Judgement(holds, found.p_value, what, found, caveat)


def effect_is_the_same(evidence: Evidence, match: re.Match[str]) -> Judgement:
    """Judge "the effect of a factor does not depend on another": it has one sign at every value.

    Supported if the sign is significant at each value (intersection-union test). Refuted if two
    values have significant opposite signs (corrected for the choice of the two).
    """
    ablation = evidence.ablation
    factor = _factor(ablation, match["factor"])
    values = ablation.factors[factor]
    if len(values) != 2:
        raise UserError(f"the effect of {match['factor']} needs two values, not {len(values)}")
    effects = [
        # No power line: the claim is about all effects together.
        evidence.estimate(effect)._replace(detectable=math.nan)
        for effect in _effects(evidence, factor, match["other"])
    ]
    caveat = "" if _is_rate(ablation, match["other"]) else _at_ends(evidence, ablation.arms)
    unknown = [effect for effect in effects if math.isnan(effect.mean)]
    if unknown:
        return Judgement(None, 1.0, f"an effect of {match['factor']}", unknown[0], caveat)
    signs = {np.sign(effect.mean) for effect in effects}
    if len(signs) == 1 and 0.0 not in signs:
        weakest = max(effects, key=lambda effect: effect.p_value)
        what = f"the weakest of the {len(effects)} effects of {match['factor']}"
        return Judgement(True, weakest.p_value, what, weakest, caveat)
    above = min((e for e in effects if e.mean >= 0), key=lambda e: e.p_value)
    below = min((e for e in effects if e.mean <= 0), key=lambda e: e.p_value)
    rarer = max(above, below, key=lambda e: e.p_value)
    pairs = len(effects) * (len(effects) - 1) // 2
    what = f"the weaker of two opposite effects of {match['factor']}"
    return Judgement(False, min(1.0, pairs * rarer.p_value), what, rarer, caveat)


def _effects(evidence: Evidence, factor: str, other: str) -> list[list[float]]:
    """Return the effect of a factor for each value of the other, and for each seed.

    The effect is the change of the metric from the factor's first value to its second. If the other
    is the learning rate, it takes each rate; otherwise the best rate of each arm.
    """
    ablation = evidence.ablation
    first, second = ({factor: value} for value in ablation.factors[factor])
    pairs = evidence.pairs(first, second)
    if _is_rate(ablation, other):
        return [
            [
                float(
                    np.mean([evidence.curve(b, s)[i] - evidence.curve(a, s)[i] for a, b in pairs])
                )
                for s in evidence.seeds
            ]
            for i in range(len(ablation.learning_rates))
        ]
    key = _factor(ablation, other)
    if key == factor:
        raise UserError(f"{other} cannot be compared with itself")
    by_value = {
        value: [(a, b) for a, b in pairs if a.value(key) == value]
        for value in ablation.factors[key]
    }
    for value, those in by_value.items():
        if not those:
            raise UserError(f"at {key}={show(value)} no two arms differ in {factor} alone")
    return [
        [float(np.mean([evidence.gain(a, b, seed) for a, b in those])) for seed in evidence.seeds]
        for those in by_value.values()
    ]


def best_is_the_same(evidence: Evidence, match: re.Match[str]) -> Judgement:
    """Judge "the best learning rate does not depend on a factor", from its first to its last value.

    The best rate is the vertex of the curve's parabola; moves are in doublings. Supported if it
    moves significantly less than a step of the grid (two one-sided tests). Refuted if it moves by a
    step or more, and significantly differs from 0. If the best is at an end of the grid, the true
    best may be anywhere beyond. It may have moved by more, so the claim can be refuted but not
    supported.
    """
    rates = np.log2(evidence.ablation.learning_rates)
    if len(rates) < 3:
        raise UserError("a best learning rate needs learning_rates to hold three at least")
    levels = evidence.levels(_factor(evidence.ablation, match["factor"]))
    (_, first), (_, last) = levels[0], levels[-1]

    def best(arms: list[Arm], seed: int) -> float:
        return best_on_curve(rates, np.mean([evidence.curve(arm, seed) for arm in arms], axis=0))

    def at_an_end(arms: list[Arm]) -> bool:
        curves = [evidence.curve(arm, seed) for arm in arms for seed in evidence.seeds]
        return int(np.argmin(np.mean(curves, axis=0))) in (0, len(rates) - 1)

    moves = np.array([best(last, seed) - best(first, seed) for seed in evidence.seeds])
    # No power line: the claim is that there is no difference.
    found = evidence.estimate(moves)._replace(detectable=math.nan)
    step = float(np.mean(np.diff(rates)))
    what = f"doublings by which the best learning rate moves with {match['factor']}"
    if abs(found.mean) >= step:
        return Judgement(False, found.p_value, what, found)
    if at_an_end(first) or at_an_end(last):
        caveat = "The best learning rate is at an end of the grid, which is too narrow to tell."
        return Judgement(None, 1.0, what, found, caveat)
    # One-sided tests against both margins: half the p values of two-sided tests.
    p = max(evidence.estimate(moves + margin).p_value / 2 for margin in (-step, step))
    return Judgement(True, p, what, found)


FORMS: dict[str, tuple[str, Judge]] = {
    "A [does not] beat[s] B [by NATS]": (
        r"(?P<a>\S+=.+?) (?P<negation>does not )?beats? (?P<b>\S+=.+?)( by (?P<margin>\d*\.?\d+))?",
        beats,
    ),
    "raising FACTOR lowers|raises MEASURE": (
        r"(raising|widening) (?P<factor>\S+) (?P<verb>lowers|narrows|raises|widens) "
        r"(the )?(?P<measure>.+)",
        raises,
    ),
    "the effect of FACTOR does not depend on FACTOR": (
        r"the effect of (?P<factor>\S+) does not depend on (the )?(?P<other>.+)",
        effect_is_the_same,
    ),
    "the best learning rate does not depend on FACTOR": (
        r"the best learning rate does not depend on (?P<factor>\S+)",
        best_is_the_same,
    ),
}


def check(ablation: Ablation) -> None:
    """Refuse claims that the arms of the ablation cannot answer, before anything is trained.

    It judges them once on made-up results, because a judge itself checks what it needs.

    Raises:
        UserError: with the claim and what is missing.
    """
    if ablation.spec.claims and ablation.spec.seeds < 2:
        raise UserError(
            f"{ablation.path}: seeds = 1: a claim is judged by an interval, and one seed gives "
            "none; 5 are a good start"
        )
    blank = dict.fromkeys(METRICS, 1.0)
    outcomes = [Outcome(m.arm, m.learning_rate, m.seed, blank) for m in ablation.members]
    judge(ablation, outcomes)


def judge(ablation: Ablation, outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Return the verdict on each claim of the ablation.

    Raises:
        UserError: with the claim, if it has no known form or names arms that do not exist.
    """
    evidence = Evidence(ablation, outcomes)
    judgements = [_judge(evidence, claim) for claim in ablation.spec.claims]
    adjusted = holm([judgement.p_value for judgement in judgements])
    verdicts = []
    for claim, judgement, p in zip(ablation.spec.claims, judgements, adjusted, strict=True):
        sure = judgement.direction is not None and p <= LEVEL
        verdict = (SUPPORTED if judgement.direction else REFUTED) if sure else UNDECIDED
        verdicts.append(Verdict(claim, verdict, judgement, p))
    return verdicts


def _judge(evidence: Evidence, claim: str) -> Judgement:
    for pattern, judge_form in FORMS.values():
        match = re.fullmatch(pattern, claim.strip())
        if match:
            try:
                return judge_form(evidence, match)
            except UserError as error:
                raise UserError(f'{evidence.ablation.path}: claim "{claim}": {error}') from None
    raise UserError(
        f'{evidence.ablation.path}: claim "{claim}": no known form; there are: ' + "; ".join(FORMS)
    )


def _conditions(ablation: Ablation, text: str) -> dict[str, Any]:
    """Parse conditions such as `norm=none,residual=true` into values of factors."""
    conditions = {}
    for part in text.split(","):
        name, _, shown = part.strip().partition("=")
        key = _factor(ablation, name)
        known = {show(value): value for value in ablation.factors[key]}
        if shown not in known:
            raise UserError(f"no arm has {name}={shown}; there are {', '.join(known)}")
        conditions[key] = known[shown]
    return conditions


def _factor(ablation: Ablation, name: str) -> str:
    """Return the dotted field for a factor's short or full name."""
    factors = ablation.factors
    fits = [key for key in factors if name in (key, key.split(".")[-1])]
    if len(fits) != 1:
        raise UserError(f"{name} is no factor here; there are {', '.join(factors)}")
    return fits[0]


def _is_rate(ablation: Ablation, name: str) -> bool:
    if name.strip() not in ("learning_rate", "learning rate") or LEARNING_RATE in ablation.factors:
        return False
    if len(ablation.learning_rates) < 2:
        raise UserError("learning_rates holds one rate only")
    return True


def _measure(evidence: Evidence, name: str) -> str:
    name = name.strip()
    if name == SENSITIVITY:
        if len(evidence.ablation.learning_rates) < 2:
            raise UserError(f"a {SENSITIVITY} needs several learning_rates")
        return name
    if name.replace(" ", "_") in METRICS:
        return name.replace(" ", "_")
    known = ", ".join([*(metric.replace("_", " ") for metric in METRICS), SENSITIVITY])
    raise UserError(f'"{name}" is no measure; there are {known}')


def knowing_nothing(vocab_size: int) -> dict[str, float]:
    """Return the losses of a model that gives every token the same probability.

    Diverged members count as this model.
    """
    return {
        "validation_loss": math.log(vocab_size),
        "train_loss": math.log(vocab_size),
        # Its overfitting would be 0, which would look like the best value.
        "overfitting": math.nan,
    }
