"""Fuzz configs, command lines, and the files that are read back.

    python -m benchmarks.fuzz [--configs 1000] [--files 200] [--seed 0] [--out FILE.json]

A few fields of a tiny config are given other values, likely and unlikely ones, in the file or on
the command line. A traceback of ours, a message that names none of the given keys, and a case that
takes longer than its limit are failures: each must train two steps, or be refused.

Then one file of a finished run or of its cache is damaged, and train.py is to go on with the run,
and sample.py to sample it. Each must do so, or refuse with a message that names the file or its
folder; what it says may not be a traceback, and a model must not change without a word.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import math
import random
import shutil
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
    """Run a case as train.py would; `folder` holds the cache of all cases."""
    import tomli_w

    path = folder / "case.toml"
    file = {name: dict(table) for name, table in case.file.items()}
    file["data"]["cache"] = str(folder / "cache")
    path.write_text(tomli_w.dumps(file), encoding="utf-8")
    out = tempfile.mkdtemp(dir=folder)
    arguments = [f"--{key.replace('_', '-')}={_shown(value)}" for key, value in case.line.items()]
    code, words = script("train", str(path), *arguments, "--train.out", out)
    if code in (1, 2):
        names = [part for key in case.keys for part in (key, key.replace("_", "-"))]
        named = any(name in words for name in names)
        return Found("refused" if named else "refused without a key", words)
    if code:
        return Found("too long" if "TimeoutError" in words else "traceback", words)
    return Found("trained" if (Path(out) / "summary.json").exists() else "no summary", words)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError


# --- Damaged files --------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A finished run of a tiny config, with its cache; and what it samples."""

    folder: Path
    text: str


def subject(folder: Path) -> Subject:
    """Train the run whose files are damaged."""
    folder.mkdir()
    (folder / "tiny.toml").write_text(_config(folder), encoding="utf-8")
    trained = script("train", str(folder / "tiny.toml"))
    assert not trained.code, trained.said
    return Subject(folder, script("sample", *_sampling(folder)).said)


def _config(folder: Path) -> str:
    import tomli_w

    tables = {name: dict(table) for name, table in TINY.items()}
    tables["data"]["cache"] = str(folder / "cache")
    tables["train"] |= {"out": str(folder / "run"), "steps": 4, "checkpoint_every": 2}
    return tomli_w.dumps(tables)


def _sampling(folder: Path) -> list[str]:
    return [str(folder / "run"), "--prompt", "Once", "--max-new-tokens", "8", "--temperature", "0"]


def files_of(folder: Path) -> list[Path]:
    """Return the files that are read back, each with content."""
    found = [path for name in ("run", "cache") for path in (folder / name).rglob("*")]
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def damage(whole: Subject, folder: Path, rng: random.Random) -> tuple[str, str, list[Found]]:
    """Damage a copy of the subject; return the file, the damage, and what the scripts did."""
    from tests.mutations import KINDS, damaged

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole.folder, folder)
    (folder / "tiny.toml").write_text(_config(folder), encoding="utf-8")
    # Paths are absolute in a run's config.
    config = folder / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(whole.folder), str(folder)))
    groups: dict[str, list[Path]] = {}
    for path in files_of(folder):
        names = path.relative_to(folder).parts
        groups.setdefault("/".join(names[:3]) if "checkpoints" in names else names[-1], []).append(
            path
        )
    path = rng.choice(groups[rng.choice(sorted(groups))])
    kind = rng.choice(sorted(KINDS))
    path.write_bytes(damaged(path.read_bytes(), kind, rng.randrange(2**32)))
    found = []
    for name, arguments in (
        ("sample", _sampling(folder)),
        ("train", [str(folder / "tiny.toml"), "--train.steps", "6"]),
    ):
        done = script(name, *arguments)
        known = path.name in done.said or path.parent.name in done.said or str(folder) in done.said
        if done.code in (1, 2):
            found.append(Found("refused" if known else "refused without a name", done.said))
        elif done.code:
            found.append(Found("traceback", done.said))
        elif name == "sample" and done.said != whole.text and "cannot be read" not in done.said:
            found.append(Found("another text without a word", done.said))
        else:
            found.append(Found("goes on", done.said))
    return str(path.relative_to(folder)), kind, found


class Done(NamedTuple):
    """The status of a script, and all that it said; the status is -1 for a traceback."""

    code: int
    said: str


def script(name: str, *arguments: str) -> Done:
    """Run one of the scripts in this process."""
    said = io.StringIO()
    argv, sys.argv = sys.argv, [f"{name}.py", *arguments]
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module(name).main()
    except SystemExit as end:
        return Done(end.code if isinstance(end.code, int) else 1, said.getvalue())
    except BaseException:
        return Done(-1, said.getvalue() + traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    return Done(0, said.getvalue())


def fails(found: Found) -> bool:
    """Return whether this is an outcome that no case should have."""
    return found.outcome not in ("trained", "refused", "goes on")


def main() -> None:
    """Reads the command line, runs the cases, and prints the table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--configs", type=int, default=1000)
    options.add_argument("--files", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    of_files: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: list[dict[str, Any]] = []
    start = time.perf_counter()

    def note(outcome: str, said: str, **what: Any) -> None:
        failures.append({**what, "outcome": outcome, "said": said[-1500:]})
        print(json.dumps(failures[-1], default=str, indent=1), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        for number in range(chosen.configs):
            case = draw(random.Random(f"{chosen.seed}/{number}"))
            found = run(case, base)
            counts[found.outcome] += 1
            if fails(found):
                note(*found, number=number, **case._asdict())
            if (number + 1) % 50 == 0:
                print(f"{number + 1} configs: {dict(counts)}", flush=True)
        whole = subject(base / "whole") if chosen.files else None
        for number in range(chosen.files):
            assert whole is not None
            rng = random.Random(f"{chosen.seed}/file {number}")
            path, kind, both = damage(whole, base / "damaged", rng)
            for name, found in zip(("sample.py", "train.py"), both, strict=True):
                of_files[name, found.outcome] += 1
                if fails(found):
                    note(*found, number=number, script=name, file=path, damage=kind)
    rows = [("what", "outcome", "cases")]
    rows += [("configs", name, str(n)) for name, n in counts.most_common()]
    rows += [
        (f"damaged files, {name}", what, str(n)) for (name, what), n in sorted(of_files.items())
    ]
    print(as_markdown(rows))
    print(
        f"{chosen.configs} configs and {chosen.files} damaged files, {len(failures)} failures, "
        f"{time.perf_counter() - start:.0f} s"
    )
    if chosen.out:
        report = {**machine(), "rows": rows, "failures": failures}
        write_atomically(chosen.out, json.dumps(report, indent=1, default=str) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
