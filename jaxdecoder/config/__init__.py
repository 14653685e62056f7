"""Everything a run is made of, in one value: `Config`, read from TOML and the command line.

Fields left at `None` are derived from others (see `ModelConfig.resolve`); everything else is
explicit. A mistake is refused before any compute, with the file, the key and a value that would
do.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pydantic
import tomli_w
import tyro
from pydantic_core import ErrorDetails

from jaxdecoder.config.fields import ConfigError, show
from jaxdecoder.config.model import Architecture, ModelConfig
from jaxdecoder.config.sections import (
    CompressionConfig,
    DataConfig,
    DistillationConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxdecoder.errors import UserError

Tables = dict[str, Any]
"""What a TOML file holds, by key."""


@dataclass(frozen=True)
class Config:
    """A whole run: model, data, optimiser, training, devices, compression, distillation."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        c, steps = self.compression, self.train.steps
        if c.sparsity and c.sparsity_end > steps:
            raise ConfigError(
                "compression.sparsity_end",
                c.sparsity_end,
                f"compression.sparsity = {c.sparsity} is reached only then, and train.steps = "
                f"{steps}; at most {steps} would do",
            )
        if self.model.packed and self.train.steps:
            raise ConfigError(
                "train.steps",
                self.train.steps,
                f'the codes of model.weight_format = "{self.model.weight_format}" do not train; 0 '
                "would do, or model.weight_packed = false to train through the rounding, or a run "
                "of floats made by compress.py dequantize",
            )

    @property
    def architecture(self) -> Architecture:
        """The model, resolved."""
        return self.model.resolve()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, then apply command-line overrides such as `--model.n-layers 2`.

    Raises `UserError`, naming the file and the key, for anything that is not right.
    """
    path = Path(path)
    config = from_dict(read_toml(path), str(path))
    if not config.train.out:
        train = dataclasses.replace(config.train, out=str(Path("runs") / path.stem))
        config = dataclasses.replace(config, train=train)
    return override(config, overrides) if overrides else config


def read_toml(path: Path) -> Tables:
    """Return the tables of a TOML file, or a `UserError` that names it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def from_dict(tables: Tables, where: str) -> Config:
    """Check the tables of a config file and build the `Config`; `where` names them in errors."""
    tables = _renamed(tables, where)
    _refuse_unknown_keys(tables, Config, where)
    try:
        # Strict JSON mode takes TOML's types as they are: no "3" for 3, but arrays for tuples.
        return _ADAPTER.validate_json(json.dumps(tables, default=str), strict=True)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    except pydantic.ValidationError as error:
        raise UserError("\n".join(explain(where, e) for e in _first_of_each(error))) from None


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Apply command-line arguments to a config; `--help` lists every field."""
    try:
        changed = tyro.cli(
            Config,
            default=config,
            args=list(arguments),
            prog="train.py CONFIG",
            description="Train a decoder. Every field of the config can be given here.",
        )
        return from_dict(to_dict(changed), "command line")
    except ConfigError as error:
        raise UserError(f"command line: {error}") from None


def to_dict(config: Config) -> Tables:
    """Return a config as plain tables; fields that are `None` are left out, as TOML has no null."""
    tables = dataclasses.asdict(config)
    return {
        name: {key: value for key, value in table.items() if value is not None}
        for name, table in tables.items()
    }


def to_toml(config: Config) -> str:
    """Return the complete config as TOML text; `from_dict` of it gives the same config back."""
    return tomli_w.dumps(json.loads(json.dumps(to_dict(config))))


def differences(a: Config, b: Config) -> list[str]:
    """Return the dotted keys in which two configs differ, each with both values."""
    lines = []
    for section in dataclasses.fields(Config):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for item in dataclasses.fields(left):
            x, y = getattr(left, item.name), getattr(right, item.name)
            if x != y:
                lines.append(f"{section.name}.{item.name}: {show(x)} there, {show(y)} here")
    return lines


def choices(cls: type, name: str) -> tuple[str, ...]:
    """Return the values that a field may have, for example of `(ModelConfig, "norm")`."""
    return tuple(get_args(_types(cls)[name]))


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; an ablation asks thousands of times."""
    return get_type_hints(cls)


_ADAPTER = pydantic.TypeAdapter(Config)


def _renamed(tables: Tables, where: str) -> Tables:
    """Return the tables with what earlier versions called otherwise under its name of today."""
    train = tables.get("train")
    if not isinstance(train, dict) or not isinstance(train.get("fsdp"), bool):
        return tables
    rest = {key: value for key, value in train.items() if key != "fsdp"}
    if not train["fsdp"]:
        return {**tables, "train": rest}
    if "mesh" in tables:
        why = "is mesh.fsdp = -1 with mesh.data = 1 today; leave it out beside a table [mesh]"
        raise UserError(f"{where}: train.fsdp = true: {why}")
    return {**tables, "train": rest, "mesh": {"data": 1, "fsdp": -1}}


def _refuse_unknown_keys(tables: Tables, cls: type, where: str, prefix: str = "") -> None:
    known = _types(cls)
    for key, value in tables.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: {prefix}{key}: unknown key; {hint}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} = {show(value)}: must be a table [{key}]")
            _refuse_unknown_keys(value, known[key], where, f"{key}.")  # type: ignore[arg-type]


def _first_of_each(error: pydantic.ValidationError) -> list[ErrorDetails]:
    """Return one complaint a key: a union reports each of its alternatives."""
    firsts: dict[tuple[str, ...], ErrorDetails] = {}
    for e in error.errors():
        firsts.setdefault(tuple(str(part) for part in e["loc"][:2]), e)
    return list(firsts.values())


def explain(where: str, error: ErrorDetails, depth: int = 2) -> str:
    """Return one of pydantic's complaints as a sentence that names file, key and value.

    `depth`: how many parts of the place that pydantic names are keys.
    """
    key = ".".join(str(part) for part in error["loc"][:depth])
    message = error["msg"]
    value = error["input"]
    if error["type"] == "missing":
        return f"{where}: {key}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{where}: {key} = {show(value)}: unknown key"
    if error["type"] == "literal_error" and isinstance(value, str):
        options = [o.strip("'") for o in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
        message = f"must be one of {', '.join(options)}" + (f"; {near[0]}?" if near else "")
    message = message.removeprefix("Input should be").strip()
    return f"{where}: {key} = {show(value)}: should be {message}".replace("be must be", "be")


def _neighbours(path: Path) -> str:
    names = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""
