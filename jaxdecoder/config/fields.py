"""Kinds of numbers that config fields hold, and the error for a value that cannot be."""

from __future__ import annotations

import json
import os
from typing import Annotated

from pydantic import Field

from jaxdecoder.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class ConfigError(UserError):
    """A value that cannot be: `key` is its dotted path, such as `model.d_model`."""

    def __init__(self, key: str, value: object, why: str):
        super().__init__(f"{key} = {show(value)}: {why}")
        self.key, self.value, self.why = key, value, why


def nearest_multiples(value: int, of: int) -> str:
    below, above = value // of * of, -(-value // of) * of
    return f"{below} or {above}" if below else str(above)


def expand_home(section: object, *names: str) -> None:
    """Replace a leading ~ in these paths of a frozen dataclass; for its `__post_init__`."""
    for name in names:
        object.__setattr__(section, name, os.path.expanduser(getattr(section, name)))


def show(value: object) -> str:
    return json.dumps(value, default=str)
