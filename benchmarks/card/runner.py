"""Runs the parts of a card's examination, each in a process group of its own, by the clock.

A part that hangs, crashes or writes half a report costs no other part more than the time that is
its own. After each, `card.json` and `card.md` say how it ended, and hold what it found.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.card.task import SKIPPED, shown
from jaxdecoder.files import write_atomically

# How long before it would be killed a part is told to end, at most, and as a share of its time.
GRACE, GRACE_SHARE = 8.0, 0.15


class Part(NamedTuple):
    """One question to the card."""

    name: str
    share: float
    """of the minutes"""
    command: tuple[str, ...]
    """It is given --out FILE, --seconds N and perhaps --quick."""


class Ended(NamedTuple):
    """How a part ended."""

    name: str
    outcome: str
    """ended, skipped, failed, or ran out of time"""
    seconds: float
    limit: float
    said: str
    """The last line of its log."""
    report: dict[str, Any] | None


def run_part(
    part: Part, folder: Path, limit: float, more: Sequence[str], environment: Mapping[str, str]
) -> Ended:
    """Runs it for so many seconds at most; then its whole process group is killed."""
    report, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    for old in (report, log):
        old.unlink(missing_ok=True)
    told = limit - min(GRACE, GRACE_SHARE * limit)
    command = [*part.command, "--out", str(report), "--seconds", f"{told:.1f}", *more]
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # What it started may outlive it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = {None: "ran out of time", 0: "ended", SKIPPED: "skipped"}.get(status, "failed")
    seconds = time.monotonic() - start
    return Ended(part.name, outcome, seconds, limit, last_line(log), read(report))


def run_all(
    parts: Sequence[Part],
    folder: Path,
    minutes: float,
    more: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    machine: dict[str, Any] | None = None,
) -> list[Ended]:
    """Runs the parts in turn; what one leaves of its time goes to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ if environment is None else environment
    start, whole, due = time.monotonic(), sum(part.share for part in parts), 0.0
    found: list[Ended] = []
    for part in parts:
        due += 60 * minutes * part.share / whole
        limit = start + due - time.monotonic()
        print(f"--- {part.name}: up to {limit:.0f} s", flush=True)
        ended = run_part(part, folder, limit, more, environment)
        print(f"    {ended.outcome} after {ended.seconds:.0f} s: {ended.said}", flush=True)
        found.append(ended)
        summarise(folder, minutes, machine, found)
    return found


def summarise(
    folder: Path, minutes: float, machine: dict[str, Any] | None, found: Sequence[Ended]
) -> None:
    """Writes card.json and card.md."""
    summary = {"minutes": minutes, "machine": machine, "parts": [e._asdict() for e in found]}
    write_atomically(folder / "card.json", json.dumps(summary, indent=1) + "\n")
    lines = ["# What the card said", ""]
    for name, value in (machine or {}).items():
        if name != "tables":
            lines.append(f"- {name.replace('_', ' ')}: {json.dumps(value)}")
    header = ("part", "outcome", "seconds", "limit", "last line")
    rows = [(e.name, e.outcome, e.seconds, e.limit, e.said) for e in found]
    lines += ["", *markdown(header, rows)]
    for ended in found:
        for table in (ended.report or {}).get("tables", []):
            lines += ["", f"## {ended.name}: {table['title']}", ""]
            lines += markdown(table["columns"], table["rows"])
    write_atomically(folder / "card.md", "\n".join(lines) + "\n")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table, a line a row."""
    cells = [[shown(cell).replace("|", "/") for cell in row] for row in rows]
    ruled = ["| " + " | ".join(["---"] * len(columns)) + " |"]
    head, *body = ["| " + " | ".join(row) + " |" for row in [list(columns), *cells]]
    return [head, *ruled, *body]


def last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def read(report: Path) -> dict[str, Any] | None:
    """A part's report, if it wrote a whole one."""
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def module(name: str) -> tuple[str, ...]:
    """The command of a part that is a module here."""
    return (sys.executable, "-m", f"benchmarks.card.{name}")
