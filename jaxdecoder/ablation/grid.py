"""Read an ablation from one TOML file: its arms, seeds, learning rates and claims.

base = "../shakespeare_nano.toml"      # the preset all arms start from
seeds = 5
learning_rates = [1e-3, 3e-3]          # left out: the base's; else every arm gets its best
budget = "steps"                       # or "tokens", "flops": what is equal for all arms
claims = ["norm_placement=post beats norm_placement=pre"]   # or tables, see forms.py

[overrides]                            # for every arm
train.steps = 300

[factors]                              # their full grid gives the arms; or list [[arms]]
model.norm_placement = ["pre", "post"]

[full]                                 # what `--size full` changes, keys as above
seeds = 8
overrides.train.steps = 5000
"""

from __future__ import annotations

import itertools
import os
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic
from flax.traverse_util import flatten_dict
from pydantic import Field

from jaxdecoder import analysis
from jaxdecoder.ablation.forms import Claim, show
from jaxdecoder.config import Config, explain, from_dict, load, read_toml, to_dict, with_values
from jaxdecoder.errors import UserError
from jaxdecoder.typing import Table, Value

METRICS = ("validation_loss", "train_loss", "overfitting")
Metric = Literal["validation_loss", "train_loss", "overfitting"]
Budget = Literal["steps", "tokens", "flops"]
LEARNING_RATE = "optimizer.learning_rate"


class Spec(pydantic.BaseModel):
    """The tables of the file, with their types checked."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    base: str
    seeds: Annotated[int, Field(gt=0)] = 5
    first_seed: Annotated[int, Field(ge=0)] = 0
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    budget: Budget = "steps"
    metric: Metric = "validation_loss"
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    claims: tuple[Claim, ...] = ()
    overrides: Table = {}
    factors: Table = {}
    arms: tuple[Table, ...] = ()
    full: Table = {}


class Arm(NamedTuple):
    """One of the compared configs: the values in which it differs, by dotted names of fields."""

    values: tuple[tuple[str, Value], ...]

    @property
    def name(self) -> str:
        """Return its values as text: norm_placement=post,n_heads=4."""
        return ",".join(f"{key.split('.')[-1]}={show(value)}" for key, value in self.values)

    def value(self, key: str) -> Value:
        """Return its value of a dotted field."""
        return dict(self.values)[key]


class Member(NamedTuple):
    """One training run of an ablation."""

    arm: Arm
    learning_rate: float
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Return the name of its run folder."""
        return f"{self.arm.name or 'base'},lr={self.learning_rate:g},seed={self.seed}"


class Ablation(NamedTuple):
    """A whole ablation, checked."""

    path: Path
    size: str
    spec: Spec
    base: Config
    arms: tuple[Arm, ...]
    learning_rates: tuple[float, ...]
    """The rates that all arms are trained at, ascending; if the file gives none, the base's."""
    members: tuple[Member, ...]

    @property
    def factors(self) -> dict[str, tuple[Value, ...]]:
        """Return every field in which arms differ, with its values in order of appearance."""
        found: dict[str, dict[Value, None]] = {}
        for arm in self.arms:
            for key, value in arm.values:
                found.setdefault(key, {})[value] = None
        return {key: tuple(values) for key, values in found.items()}

    def rates(self, arm: Arm) -> tuple[float, ...]:
        """Return the learning rates that an arm is trained at."""
        return tuple(dict.fromkeys(m.learning_rate for m in self.members if m.arm == arm))


def read(path: str | Path, *, out: str | Path = "", size: str = "small") -> Ablation:
    """Read an ablation file; `out` is the folder for the members' runs.

    Raises:
        UserError: with file and key, for a factor that is not a config field, a value that its
            field cannot have, a base that does not exist, or a size that the file does not have.
    """
    path = Path(path)
    tables = read_toml(path)
    if size not in ("small", "full"):
        raise UserError(f"--size {size}: must be small or full")
    if size == "full":
        if "full" not in tables:
            raise UserError(f"{path}: it has no [full] table, so there is no --size full")
        if not isinstance(tables["full"], dict):
            raise UserError(f"{path}: full: must be a table, not {tables['full']!r}")
        tables = _merged(tables, tables["full"])
    try:
        spec = Spec.model_validate_json(pydantic.TypeAdapter(dict).dump_json(tables), strict=True)
    except pydantic.ValidationError as error:
        found = [
            # A claim's place is followed by its form, which is no key.
            explain(str(path), {**e, "loc": e["loc"][:2] + e["loc"][3:4]}, depth=3)
            for e in error.errors()
        ]
        raise UserError("\n".join(found)) from None
    base_path = path.parent / os.path.expanduser(spec.base)
    base = load(base_path, _flat(spec.overrides), f"{path}: overrides")
    arms = _arms(spec, base, path)
    rates = tuple(sorted(spec.learning_rates)) or (base.optimizer.learning_rate,)
    if len(set(rates)) < len(rates):
        raise UserError(f"{path}: learning_rates = {list(rates)}: one of them is there twice")
    members = tuple(
        _member(base, spec, arm, rate, seed, Path(out), path)
        for arm in arms
        for rate in rates
        for seed in range(spec.first_seed, spec.first_seed + spec.seeds)
    )
    return Ablation(path, size, spec, base, arms, rates, members)


def _arms(spec: Spec, base: Config, path: Path) -> tuple[Arm, ...]:
    """Return the grid of the factors, or the listed arms, with a value for every named field."""
    factors = _flat(spec.factors)
    if bool(factors) == bool(spec.arms):
        raise UserError(f"{path}: give either [factors], for their full grid, or [[arms]]")
    for key, values in factors.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: factors.{key}: must be a list of values, not {values!r}")
    if factors:
        rows = [
            dict(zip(factors, row, strict=True)) for row in itertools.product(*factors.values())
        ]
    else:
        rows = [_flat(arm) for arm in spec.arms]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    where = f"{path}: {'factors' if factors else 'arms'}"
    if LEARNING_RATE in keys and spec.learning_rates:
        raise UserError(f"{where}: {LEARNING_RATE} is a factor, so learning_rates must be left out")
    arms = []
    for row in rows:
        config = _with_values(base, row, where)
        arms.append(Arm(tuple((key, attrgetter(key)(config)) for key in keys)))
    if len(set(arms)) < len(arms):
        twice = next(arm for arm in arms if arms.count(arm) > 1)
        raise UserError(f"{where}: the arm {twice.name} is there twice")
    return tuple(arms)


def _member(
    base: Config, spec: Spec, arm: Arm, rate: float, seed: int, out: Path, path: Path
) -> Member:
    config = _with_values(base, dict(arm.values), f"{path}: {arm.name}")
    if spec.learning_rates:
        config = _with_values(config, {LEARNING_RATE: rate}, f"{path}: learning_rates")
    # If the learning rate is a factor, it is that of the arm.
    member = Member(arm, config.optimizer.learning_rate, seed, config)
    for name in ("fsdp", "tensor", "context"):
        if (parts := getattr(config.mesh, name)) != 1:
            why = "a member of an ablation lies on one device, with others beside it; 1 would do"
            raise UserError(f"{path}: mesh.{name} = {parts}: {why}")
    changes = {
        "train.seed": seed,
        "train.steps": _steps(base, config, spec.budget),
        "train.out": str(out / "members" / member.name),
    }
    return member._replace(config=_with_values(config, changes, str(path)))


def _steps(base: Config, config: Config, budget: Budget) -> int:
    """Return the steps that give a member the budget of the base, to the nearest step."""
    if budget == "steps":
        return config.train.steps
    share = _tokens_per_step(base) / _tokens_per_step(config)
    if budget == "flops":
        share *= _flops(base, "base") / _flops(config, "the arm")
    return max(1, round(base.train.steps * share))


def _tokens_per_step(config: Config) -> int:
    return config.train.batch_size * config.model.context_length


def _flops(config: Config, where: str) -> float:
    return analysis.flops_per_token(analysis.with_vocab_size(config, where)).train["total"]


def _with_values(config: Config, values: Table, where: str) -> Config:
    """Return the config with these dotted fields changed and checked."""
    return from_dict(with_values(to_dict(config), values, where), where)


def _flat(tables: Table) -> Table:
    """Return nested tables as dotted keys; TOML may write model.x = 1 as either."""
    return dict(flatten_dict(tables, sep="."))


def _merged(tables: Table, changes: Table) -> Table:
    merged = dict(tables)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
