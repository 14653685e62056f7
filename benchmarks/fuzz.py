"""Fuzz the configs and command lines: each trains two steps or is refused by the name of a key.

    python -m benchmarks.fuzz [--configs 1000] [--seed 0] [--out FILE.json]

A few fields of a tiny config are given other values, likely and unlikely ones, in the file or on
the command line. A traceback of ours, a message that names none of the given keys, and a case that
takes longer than its limit are failures. The table counts what came of the cases.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from benchmarks.turns import machine
from jaxdecoder.config import Config
from jaxdecoder.errors import UserError
from jaxdecoder.files import as_markdown, write_atomically

TINY: dict[str, dict[str, Any]] = {
    "model": {"context_length": 16, "d_model": 16, "n_layers": 2, "n_heads": 2},
    "data": {"tokenizer": "byte", "stories_bytes": 20_000},
    "train": {
        "steps": 2,
        "batch_size": 4,
        "evaluation_batches": 1,
        "final_batches": 1,
        "steps_per_call": 1,
    },
}
KEPT = ("train.out", "data.cache", "train.cpu_devices", "data.processes", "train.history")
"""Fields that are not drawn: they are where the case lives, or the machine's."""
COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 17, 32, 48)
ODD_COUNTS = (-1, 2**31, 2**63, 2**70, True, 1.5, "4")
NUMBERS = (0.0, 1e-40, 1e-8, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0, 100.0)
ODD_NUMBERS = (-1.0, -1e-40, 1e40, math.inf, -math.inf, math.nan, "0.5", True)
TEXTS = (
    "",
    "x",
    "gpt2",
    "byte",
    "char",
    "bpe",
    "~",
    "$HOME",
    "a b",
    "[x]",
    "é",
    "-1",
    "\x00",
    "\n",
)
SMALL = ("vocab_size", "steps", "stories_bytes")
"""Fields whose unlikely large values would be honest work."""
LIMIT = 180
"""Seconds a case may take."""


class Case(NamedTuple):
    """What is given in the file, and what on the command line."""

    file: dict[str, dict[str, Any]]
    line: dict[str, Any]
    keys: list[str]


class Found(NamedTuple):
    """What came of a case: trained, refused, or a failure, with its last words."""

    outcome: str
    said: str


def draw(rng: random.Random) -> Case:
    """Draw a case: the tiny config with one to six fields of other values."""
    fields = [
        (section.name, field.name, kind)
        for section in dataclasses.fields(Config)
        for field, kind in _fields(get_type_hints(Config)[section.name])
        if f"{section.name}.{field.name}" not in KEPT
    ]
    file = {name: dict(table) for name, table in TINY.items()}
    line, keys = {}, []
    for section, name, kind in rng.sample(fields, rng.randint(1, 6)):
        value = _value(rng, name, kind)
        keys.append(f"{section}.{name}")
        if rng.random() < 0.5:
            file.setdefault(section, {})[name] = value
        else:
            line[f"{section}.{name}"] = value
    return Case(file, line, keys)


def _fields(section: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    kinds = get_type_hints(section)
    return ((field, kinds[field.name]) for field in dataclasses.fields(section))


def _value(rng: random.Random, name: str, kind: Any) -> Any:
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return rng.choice([*arguments, *arguments, "none of them"])
    if type(None) in arguments:
        kind = next(each for each in arguments if each is not type(None))
    if get_origin(kind) is tuple:
        return [_value(rng, name, get_args(kind)[0]) for _ in range(rng.randint(0, 3))]
    if kind is bool:
        return rng.choice([True, False, True, False, "yes"])
    odd = rng.random() < 0.15
    if kind is int:
        return rng.choice(ODD_COUNTS if odd and name not in SMALL else COUNTS)
    if kind is float:
        return rng.choice(ODD_NUMBERS if odd else NUMBERS)
    return rng.choice(TEXTS)


def run(case: Case, folder: Path) -> Found:
    """Run a case in this process, as train.py would; `folder` holds the cache of all cases."""
    import tomli_w

    import train

    path = folder / "case.toml"
    file = {name: dict(table) for name, table in case.file.items()}
    file["data"]["cache"] = str(folder / "cache")
    path.write_text(tomli_w.dumps(file), encoding="utf-8")
    out = tempfile.mkdtemp(dir=folder)
    arguments = [f"--{key.replace('_', '-')}={_shown(value)}" for key, value in case.line.items()]
    said = io.StringIO()
    argv, sys.argv = sys.argv, ["train.py", str(path), *arguments, "--train.out", out]
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train.main()
    except SystemExit as end:
        words = said.getvalue()
        names = [part for key in case.keys for part in (key, key.replace("_", "-"))]
        if end.code in (1, 2) and any(name in words for name in names):
            return Found("refused", words)
        return Found("refused without a key" if end.code in (1, 2) else f"ended {end.code}", words)
    except UserError as error:
        return Found("an error that was not shown", str(error))
    except TimeoutError:
        return Found("too long", traceback.format_exc())
    except BaseException:
        return Found("traceback", traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    summary = Path(out) / "summary.json"
    return Found("trained" if summary.exists() else "no summary", said.getvalue())


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError


def fails(found: Found) -> bool:
    """Return whether this is an outcome that no case should have."""
    return found.outcome not in ("trained", "refused")


def main() -> None:
    """Reads the command line, runs the cases, and prints the table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--configs", type=int, default=1000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(chosen.configs):
            case = draw(random.Random(f"{chosen.seed}/{number}"))
            found = run(case, Path(temporary))
            counts[found.outcome] += 1
            if fails(found):
                shown = {"number": number, "keys": case.keys, "line": case.line, "file": case.file}
                failures.append({**shown, "outcome": found.outcome, "said": found.said[-1500:]})
                print(json.dumps(failures[-1], default=str, indent=1), flush=True)
            if (number + 1) % 50 == 0:
                print(f"{number + 1}: {dict(counts)}", flush=True)
    rows = [("outcome", "cases"), *((name, str(n)) for name, n in counts.most_common())]
    print(as_markdown(rows))
    print(
        f"{chosen.configs} configs, {len(failures)} failures, {time.perf_counter() - start:.0f} s"
    )
    if chosen.out:
        report = {**machine(), "configs": chosen.configs, "counts": counts, "failures": failures}
        write_atomically(chosen.out, json.dumps(report, indent=1, default=str) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
