"""Judge claims by the results of the members.

Every form of claim has a judge. It reduces the claim to one number per seed (or several, if the
claim is about several). The verdict comes from a t test on these numbers, corrected for all claims
of the report.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdecoder.ablation import forms
from jaxdecoder.ablation.evidence import LEVEL, SENSITIVITY, Evidence, Outcome
from jaxdecoder.ablation.forms import Beats, Form, SameBestRate, SameEffect, Trend, show, shown
from jaxdecoder.ablation.grid import LEARNING_RATE, METRICS, Ablation, Arm
from jaxdecoder.ablation.statistics import Estimate, best_on_curve, holm
from jaxdecoder.errors import UserError
from jaxdecoder.typing import Table

SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


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


def beats(evidence: Evidence, claim: Beats) -> Judgement:
    """Judge "A beats B": paired over seeds, B's metric minus A's is above the margin."""
    better, worse = (_conditions(evidence.ablation, those) for those in (claim.better, claim.worse))
    pairs = evidence.pairs(better, worse)
    a, b = (shown(those) for those in (claim.better, claim.worse))
    if not pairs:
        raise UserError(f"no arm with {a} has a partner with {b} that agrees in the rest")
    gains = [
        float(np.mean([evidence.gain(x, y, seed) for x, y in pairs])) - claim.by
        for seed in evidence.seeds
    ]
    found = evidence.estimate(gains)
    holds = None if found.mean == 0 else (found.mean > 0) != claim.negated
    beyond = f" beyond {claim.by:g}" if claim.by else ""
    what = f"nats by which {a} is better than {b}{beyond}"
    return Judgement(holds, found.p_value, what, found, _at_ends(evidence, itertools.chain(*pairs)))


def _at_ends(evidence: Evidence, arms: Iterable[Arm]) -> str:
    """Return the caveat that the grid of learning rates is too narrow for some arms, or ""."""
    names = [arm.name for arm in dict.fromkeys(arms) if evidence.at_end(arm)]
    if not names:
        return ""
    return f"The best learning rate is at an end of the grid for {' and '.join(names)}."


def trend(evidence: Evidence, claim: Trend) -> Judgement:
    """Judge "raising a factor lowers (or raises) a measure" by the slope over the factor's values.

    Only the order of the values counts: from 1 to 4 heads is one step, as from 4 to 16.
    """
    factor = _factor(evidence.ablation, claim.factor)
    measure = _measure(evidence, claim.measure)
    levels = evidence.levels(factor)
    if not all(isinstance(value, int | float) for value, _ in levels):
        raise UserError(f"{claim.factor} has no higher and lower values")
    levels.sort(key=lambda level: level[0])
    place = np.arange(len(levels)) - (len(levels) - 1) / 2
    slopes = []
    for seed in evidence.seeds:
        means = [np.mean([evidence.value(a, seed, measure) for a in arms]) for _, arms in levels]
        slopes.append(float(place @ np.array(means) / (place @ place)))
    found = evidence.estimate(slopes)
    holds = None if found.mean == 0 else (found.mean < 0) == (claim.direction == "lowers")
    what = f"change of {measure.replace('_', ' ')} with each higher value of {claim.factor}"
    caveat = "" if measure == SENSITIVITY else _at_ends(evidence, evidence.ablation.arms)
    return Judgement(holds, found.p_value, what, found, caveat)


def same_effect(evidence: Evidence, claim: SameEffect) -> Judgement:
    """Judge "the effect of a factor does not depend on another": it has one sign at every value.

    Supported if the sign is significant at each value (intersection-union test). Refuted if two
    values have significant opposite signs (corrected for the choice of the two).
    """
    ablation = evidence.ablation
    factor = _factor(ablation, claim.factor)
    values = ablation.factors[factor]
    if len(values) != 2:
        raise UserError(f"the effect of {claim.factor} needs two values, not {len(values)}")
    effects = [
        # No power line: the claim is about all effects together.
        evidence.estimate(effect)._replace(detectable=math.nan)
        for effect in _effects(evidence, factor, claim.other)
    ]
    caveat = "" if _is_rate(ablation, claim.other) else _at_ends(evidence, ablation.arms)
    unknown = [effect for effect in effects if math.isnan(effect.mean)]
    if unknown:
        return Judgement(None, 1.0, f"an effect of {claim.factor}", unknown[0], caveat)
    signs = {np.sign(effect.mean) for effect in effects}
    if len(signs) == 1 and 0.0 not in signs:
        weakest = max(effects, key=lambda effect: effect.p_value)
        what = f"the weakest of the {len(effects)} effects of {claim.factor}"
        return Judgement(True, weakest.p_value, what, weakest, caveat)
    above = min((e for e in effects if e.mean >= 0), key=lambda e: e.p_value)
    below = min((e for e in effects if e.mean <= 0), key=lambda e: e.p_value)
    rarer = max(above, below, key=lambda e: e.p_value)
    pairs = len(effects) * (len(effects) - 1) // 2
    what = f"the weaker of two opposite effects of {claim.factor}"
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


def same_best_rate(evidence: Evidence, claim: SameBestRate) -> Judgement:
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
    levels = evidence.levels(_factor(evidence.ablation, claim.factor))
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
    what = f"doublings by which the best learning rate moves with {claim.factor}"
    if abs(found.mean) >= step:
        return Judgement(False, found.p_value, what, found)
    if at_an_end(first) or at_an_end(last):
        caveat = "The best learning rate is at an end of the grid, which is too narrow to tell."
        return Judgement(None, 1.0, what, found, caveat)
    # One-sided tests against both margins: half the p values of two-sided tests.
    p = max(evidence.estimate(moves + margin).p_value / 2 for margin in (-step, step))
    return Judgement(True, p, what, found)


JUDGES: dict[type[Form], Callable[[Evidence, Any], Judgement]] = {
    Beats: beats,
    Trend: trend,
    SameEffect: same_effect,
    SameBestRate: same_best_rate,
}
"""(evidence, claim of the judge's form) -> its result."""


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
        verdicts.append(Verdict(str(claim), verdict, judgement, p))
    return verdicts


def _judge(evidence: Evidence, claim: str | Form) -> Judgement:
    try:
        read = forms.read_sentence(claim) if isinstance(claim, str) else claim
        return JUDGES[type(read)](evidence, read)
    except UserError as error:
        raise UserError(f'{evidence.ablation.path}: claim "{claim}": {error}') from None


def _conditions(ablation: Ablation, given: Table) -> Table:
    """Return conditions by the dotted names of fields, with the values that arms have."""
    conditions = {}
    for name, value in given.items():
        key = _factor(ablation, name)
        known = {show(value): value for value in ablation.factors[key]}
        if show(value) not in known:
            raise UserError(f"no arm has {name}={show(value)}; there are {', '.join(known)}")
        conditions[key] = known[show(value)]
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
