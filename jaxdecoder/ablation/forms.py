"""The forms that a claim can have, as tables of the file or as sentences.

    [[claims]]
    form = "beats"
    better = { norm_placement = "pre" }
    worse = { norm_placement = "post" }
    by = 0.02

says what the sentence "norm_placement=pre beats norm_placement=post by 0.02" says. Every form is a
class here and a judge in `claims.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from jaxdecoder.errors import UserError
from jaxdecoder.typing import Table, Value

Conditions = Annotated[Table, Field(min_length=1)]
"""Values of factors, by their short or full names."""


def show(value: Value) -> str:
    """Return a value as it is written in a claim: no quotes, true and false as in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "+".join(map(show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class Form(BaseModel):
    """What all forms share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    words: ClassVar[str]
    """How the sentence goes."""
    pattern: ClassVar[str]
    """What the sentence is recognised by; its groups are the fields."""

    @classmethod
    def of(cls, match: re.Match[str]) -> Form:
        """Return the claim of a sentence."""
        return cls(**{name: text.strip() for name, text in match.groupdict().items()})


class Beats(Form):
    """One arm has a lower metric than another, by more than a margin in nats."""

    words: ClassVar[str] = "A [does not] beat[s] B [by NATS]"
    pattern: ClassVar[str] = (
        r"(?P<better>\S+=.+?) (?P<negated>does not )?beats? (?P<worse>\S+=.+?)"
        r"( by (?P<by>\d*\.?\d+))?"
    )
    form: Literal["beats"] = "beats"
    better: Conditions
    worse: Conditions
    by: Annotated[float, Field(ge=0.0)] = 0.0
    negated: bool = False

    @classmethod
    def of(cls, match: re.Match[str]) -> Form:
        better, worse = (_conditions(match[name]) for name in ("better", "worse"))
        by, negated = float(match["by"] or 0.0), bool(match["negated"])
        return cls(better=better, worse=worse, by=by, negated=negated)

    def __str__(self) -> str:
        verb = "does not beat" if self.negated else "beats"
        margin = f" by {self.by:g}" if self.by else ""
        return f"{shown(self.better)} {verb} {shown(self.worse)}{margin}"


class Trend(Form):
    """A measure falls or rises with a factor."""

    words: ClassVar[str] = "raising FACTOR lowers|raises MEASURE"
    pattern: ClassVar[str] = (
        r"(raising|widening) (?P<factor>\S+) (?P<verb>lowers|narrows|raises|widens) "
        r"(the )?(?P<measure>.+)"
    )
    form: Literal["trend"] = "trend"
    factor: str
    measure: str
    direction: Literal["lowers", "raises"]

    @classmethod
    def of(cls, match: re.Match[str]) -> Form:
        lowers = match["verb"] in ("lowers", "narrows")
        direction: Literal["lowers", "raises"] = "lowers" if lowers else "raises"
        return cls(factor=match["factor"], measure=match["measure"].strip(), direction=direction)

    def __str__(self) -> str:
        return f"raising {self.factor} {self.direction} {self.measure}"


class SameEffect(Form):
    """The effect of a factor has one sign at every value of another."""

    words: ClassVar[str] = "the effect of FACTOR does not depend on FACTOR"
    pattern: ClassVar[str] = (
        r"the effect of (?P<factor>\S+) does not depend on (the )?(?P<other>.+)"
    )
    form: Literal["same_effect"] = "same_effect"
    factor: str
    other: str

    def __str__(self) -> str:
        return f"the effect of {self.factor} does not depend on {self.other}"


class SameBestRate(Form):
    """The best learning rate is the same at the first and the last value of a factor."""

    words: ClassVar[str] = "the best learning rate does not depend on FACTOR"
    pattern: ClassVar[str] = r"the best learning rate does not depend on (?P<factor>\S+)"
    form: Literal["same_best_rate"] = "same_best_rate"
    factor: str

    def __str__(self) -> str:
        return f"the best learning rate does not depend on {self.factor}"


FORMS = (Beats, Trend, SameEffect, SameBestRate)


def _form_of(given: Value) -> str:
    if isinstance(given, Form):
        return str(getattr(given, "form", ""))
    return str(given.get("form", "")) if isinstance(given, dict) else "sentence"


Claim = Annotated[
    Annotated[str, Tag("sentence")]
    | Annotated[Beats, Tag("beats")]
    | Annotated[Trend, Tag("trend")]
    | Annotated[SameEffect, Tag("same_effect")]
    | Annotated[SameBestRate, Tag("same_best_rate")],
    Discriminator(
        _form_of,
        custom_error_type="claim",
        custom_error_message="a sentence, or a table with form = beats, trend, same_effect or "
        "same_best_rate",
    ),
]
"""What a file may have in its claims."""


def read_sentence(sentence: str) -> Form:
    """Return the claim that a sentence makes.

    Raises:
        UserError: if it has no known form.
    """
    for form in FORMS:
        if match := re.fullmatch(form.pattern, sentence.strip()):
            return form.of(match)
    raise UserError("no known form; there are: " + "; ".join(form.words for form in FORMS))


def _conditions(text: str) -> dict[str, str]:
    """Return the names and shown values of conditions such as `norm=none,residual=true`."""
    parts = (part.strip().partition("=") for part in text.split(","))
    return {name: value for name, _, value in parts}


def shown(conditions: Table) -> str:
    """Return conditions as they are written in a claim."""
    return ",".join(f"{name}={show(value)}" for name, value in conditions.items())
