"""Kinds of values that config fields and options hold, and the error for one that cannot be."""

from __future__ import annotations

import json
import os
from typing import Annotated

import tyro
from pydantic import Field

from jaxdecoder.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
SEEDS = 2**31
"""Seeds are below this: the largest number that all random generators here take."""
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

PathOption = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: os.path.expanduser(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda path: [path],
    ),
]
"""A path on the command line. Shells expand a leading ~ only where it stands bare."""


class ConfigError(UserError):
    """A value that cannot be: `key` is its dotted path, such as `model.d_model`."""

    def __init__(self, key: str, value: object, why: str):
        super().__init__(f"{key} = {show(value)}: {why}")
        self.key, self.value, self.why = key, value, why


def check_seed(name: str, seed: int) -> None:
    """Raise a `UserError` for a seed that is out of range; `name`: of the option that gave it."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"{name} {seed}: must be from 0 to {SEEDS - 1}")


def nearest_multiples(value: int, of: int) -> str:
    below, above = value // of * of, -(-value // of) * of
    return f"{below} or {above}" if below else str(above)


def expand_home(section: object, *names: str) -> None:
    """Replace a leading ~ in these paths of a frozen dataclass; for its `__post_init__`."""
    for name in names:
        object.__setattr__(section, name, os.path.expanduser(getattr(section, name)))


def show(value: object) -> str:
    return json.dumps(value, default=str)
