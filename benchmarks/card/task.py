"""What every part of a card's examination shares: its command line, its clock and its report.

    python -m benchmarks.card.values --out FOLDER/values.json --seconds 90 [--quick]

A part writes its report after every case, so that one that is stopped leaves what it had. It ends
with the status SKIPPED, after one line that says why, where it cannot run at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdecoder.files import write_atomically

# Several processes share the card, so none may take all of its memory; JAX reads this at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

SKIPPED = 77
CONFIG_PACKAGES = ("pydantic", "tyro", "tomli_w")
"""What a config is read and checked with."""
TRAINING_PACKAGES = (*CONFIG_PACKAGES, "flax", "optax", "orbax.checkpoint", "filelock", "rich")


class Task:
    """A part's work: where its report goes, until when, and whether only for a look."""

    def __init__(self, out: Path, seconds: float, quick: bool = False):
        self.out, self.quick = out, quick
        self.deadline = time.monotonic() + seconds
        self.report: dict[str, Any] = {"tables": []}

    def left(self) -> float:
        """Seconds until the part should have ended."""
        return self.deadline - time.monotonic()

    def row(self, title: str, **cells: Any) -> None:
        """Prints a row, adds it to the table of that title, and writes the report."""
        tables = self.report["tables"]
        table = next((t for t in tables if t["title"] == title), None)
        if table is None:
            table = {"title": title, "columns": list(cells), "rows": []}
            tables.append(table)
        table["rows"].append(list(cells.values()))
        print(f"{title}: {', '.join(f'{k} {shown(v)}' for k, v in cells.items())}", flush=True)
        self.write()

    def write(self, **more: Any) -> None:
        """Adds to the report, and replaces its file."""
        self.report |= more
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out, json.dumps(finite(self.report), indent=1) + "\n")


def part(run: Callable[[Task], None], needs: tuple[str, ...] = ()) -> None:
    """The main function of a part, which `needs` these packages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    missing = [name for name in needs if not installed(name)]
    if missing:
        skip(f"{', '.join(missing)} must be installed")
    run(Task(options.out, options.seconds, options.quick))


def skip(why: str) -> None:
    """Ends a part that cannot run."""
    print(f"skipped: {why}", flush=True)
    sys.exit(SKIPPED)


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def finite(value: Any) -> Any:
    """The same with strings for NaN and the infinities, of which JSON knows nothing."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def shown(value: Any) -> str:
    """A number in few digits; anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def first_line(error: BaseException) -> str:
    """An exception in one line; of a refusal by the operation, its reason alone."""
    (line, *_) = str(error).strip().splitlines() or [""]
    refused = re.search(r"cannot do this, because (.*?)(?:\. These can: .*)?$", line)
    return refused[1] if refused else f"{type(error).__name__}: {line[:300]}"
