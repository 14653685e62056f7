"""Shows that the default tests catch a broken line: five properties of every room.

    python -m benchmarks.broken_lines [--room kernels] [--workers 2]

An entry of broken_lines.toml breaks one line in a copy of the tracked files and names tests that
should then fail. Those marked slow are left out, as in `make test`. What the tests say of the
unbroken tree is not asked here: run them first.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.turns import HERE

ROOT = HERE.parent
LONGEST = 600
"""Seconds that the tests of one entry may take."""


class Broken(NamedTuple):
    """A fault, and the tests that should catch it."""

    room: str
    file: str
    was: str
    """Occurs once in the file."""
    becomes: str
    tests: str
    """Arguments of pytest."""
    property: str
    """What no longer holds."""


def entries() -> list[Broken]:
    """All faults of broken_lines.toml, in its order."""
    tables = tomllib.loads((HERE / "broken_lines.toml").read_text(encoding="utf-8"))
    return [Broken(**table) for table in tables["broken"]]


def broken_text(entry: Broken) -> str:
    """The text of the entry's file with the fault in it."""
    text = (ROOT / entry.file).read_text(encoding="utf-8")
    if (count := text.count(entry.was)) != 1:
        raise SystemExit(f"{entry.file}: {entry.was!r} occurs {count} times, and must once")
    return text.replace(entry.was, entry.becomes)


def copy_tree(folder: Path) -> None:
    """Copies the tracked files as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def caught(entry: Broken) -> tuple[bool, float]:
    """Whether a test fails in a copy that has the fault, and the seconds it took to know."""
    with tempfile.TemporaryDirectory(prefix="broken-line-") as name:
        folder = Path(name)
        copy_tree(folder)
        (folder / entry.file).write_text(broken_text(entry), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        begun = time.perf_counter()
        try:
            run = subprocess.run(
                command + shlex.split(entry.tests),
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            return False, LONGEST
        seconds = time.perf_counter() - begun
    if run.returncode not in (0, 1):  # no test was found, or none could be run
        raise SystemExit(f"{entry.file}: {entry.tests}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 1, seconds


def main() -> None:
    """Prints a line for each entry, and how many were caught."""
    every = entries()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--room", choices=dict.fromkeys(entry.room for entry in every))
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    asked = [entry for entry in every if chosen.room in (None, entry.room)]
    count = 0
    with ThreadPoolExecutor(chosen.workers) as pool:
        for entry, (found, seconds) in zip(asked, pool.map(caught, asked), strict=True):
            count += found
            told = "caught" if found else "MISSED"
            print(f"{entry.room:12} {entry.property:80} {told} {seconds:6.1f} s", flush=True)
    print(f"{count} of {len(asked)} caught")
    raise SystemExit(count < len(asked))


if __name__ == "__main__":
    main()
