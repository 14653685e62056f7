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
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

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
from jaxdecoder.errors import UserError, not_utf8
from jaxdecoder.files import as_text

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


def load(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    where: str = "command line",
) -> Config:
    """Read a TOML file, then apply overrides: arguments such as `--model.n-layers 2`, or values by
    dotted key.

    What fields must have in common is judged after the overrides: they may give what the file
    leaves out. Raises `UserError` for anything that is not right, naming the key and the file, or
    `where` the overrides come from.
    """
    path = Path(os.path.expanduser(path))
    draft = _checked(_DRAFT, read_toml(path), str(path))
    if not draft.train.out:
        train = dataclasses.replace(draft.train, out=str(Path("runs") / path.stem))
        draft = dataclasses.replace(draft, train=train)
    if not overrides:
        return from_dict(to_dict(draft), str(path))
    if isinstance(overrides, Mapping):
        changed = with_values(to_dict(draft), overrides, where)
    else:
        changed = _overridden(draft, overrides)
    try:
        return from_dict(changed, where)
    except UserError as error:
        _refuse_what_the_file_has(draft, str(path), str(error).removeprefix(where))
        raise


def read_toml(path: Path) -> Tables:
    """Return the tables of a TOML file, or a `UserError` that names it."""
    try:
        return tomllib.loads(as_text(path.read_bytes(), str(path)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbours(path)}") from None
    except (OSError, ValueError) as error:  # not TOML, or no name that a file can have
        raise UserError(f"{path}: {error}") from None


def from_dict(tables: Tables, where: str) -> Config:
    """Check the tables of a config file and build the `Config`; `where` names them in errors."""
    try:
        config: Config = _checked(_ADAPTER, tables, where)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def with_values(tables: Tables, values: Mapping[str, Any], where: str) -> Tables:
    """Return tables with the values of these dotted fields changed."""
    changed = {name: dict(table) for name, table in tables.items()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if not name:
            raise UserError(f"{where}.{key}: name the field in full, as in model.norm_placement")
        changed.setdefault(section, {})[name] = value
    return changed


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


class Difference(NamedTuple):
    """A dotted key in which two configs differ, with both values as TOML shows them."""

    key: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.then} there, {self.now} here"


def differences(a: Config, b: Config) -> list[Difference]:
    """Return what differs between a config that was used before and one given now."""
    found = []
    for section in dataclasses.fields(Config):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for item in dataclasses.fields(left):
            x, y = getattr(left, item.name), getattr(right, item.name)
            if x != y:
                found.append(Difference(f"{section.name}.{item.name}", show(x), show(y)))
    return found


def choices(cls: type, name: str) -> tuple[str, ...]:
    """Return the values that a field may have, for example of `(ModelConfig, "norm")`."""
    return tuple(get_args(_types(cls)[name]))


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; an ablation asks thousands of times."""
    return get_type_hints(cls)


def _without_checks(section: type, fields: Sequence[Any] = ()) -> Any:
    """Return a dataclass that does not check what its fields have in common."""
    namespace = {"__post_init__": lambda self: None, "__module__": section.__module__}
    name = section.__name__
    return dataclasses.make_dataclass(
        name, fields, bases=(section,), namespace=namespace, frozen=True
    )


_Draft = _without_checks(
    Config,
    [
        (name, draft := _without_checks(section), field(default_factory=draft))
        for name, section in get_type_hints(Config).items()
    ],
)
"""A `Config` whose values are right each by itself, and may still be changed."""

_ADAPTER: Any = pydantic.TypeAdapter(Config)
_DRAFT: Any = pydantic.TypeAdapter(_Draft)


def _checked(adapter: Any, tables: Tables, where: str) -> Any:
    """Return the tables as what the adapter makes of them, each value checked by itself."""
    tables = _renamed(tables, where)
    _refuse_unknown_keys(tables, Config, where)
    _refuse_broken_text(tables, where)
    try:
        # Strict JSON mode takes TOML's types as they are: no "3" for 3, but arrays for tuples.
        return adapter.validate_json(json.dumps(tables, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise UserError("\n".join(explain(where, e) for e in _first_of_each(error))) from None


def _overridden(draft: Config, arguments: Sequence[str]) -> Tables:
    """Return the tables of a draft after command-line arguments; `--help` lists every field."""
    changed: Any = tyro.cli(
        _Draft,
        default=draft,
        args=_with_flags(arguments),
        prog="train.py CONFIG",
        description="Train a decoder. Every field of the config can be given here.",
    )
    return to_dict(changed)


def _with_flags(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `--train.tune false` is `--train.no-tune`, as the parser has it."""
    flags = {
        f"{section}.{name}"
        for section, kind in _types(Config).items()
        for name, of in _types(kind).items()
        if of is bool
    }
    said, left = [], list(arguments)
    while left:
        option, equals, value = left.pop(0).partition("=")
        key = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or key not in flags:
            said.append(f"{option}{equals}{value}")
            continue
        if not equals:
            # A flag by itself means true.
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        if value.lower() not in ("true", "false"):
            raise UserError(f"command line: {key} = {show(value)}: should be true or false")
        section, _, name = option.removeprefix("--").partition(".")
        no = "" if value.lower() == "true" else "no-"
        said.append(f"--{section}.{no}{name}")
    return said


def _refuse_what_the_file_has(draft: Config, where: str, complaint: str) -> None:
    """Blame the file for a complaint about the overridden values if it has the same mistake."""
    try:
        from_dict(to_dict(draft), where)
    except UserError as error:
        if str(error) == where + complaint:
            raise error from None


def _refuse_broken_text(tables: Tables, where: str) -> None:
    """Refuse bytes that are not UTF-8, which Python smuggles through the command line."""
    for section, table in tables.items():
        for key, value in table.items():
            if isinstance(value, str) and not_utf8(value):
                raise UserError(f"{where}: {section}.{key} = {show(value)}: is not UTF-8 text")


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
