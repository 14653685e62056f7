"""Processes that take turns on one card: each prints a line of JSON when asked by a line."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.card.task import first_line


class Gone(Exception):
    """A side that ended, or gave no answer in time."""


class Side:
    """A process, and how to ask it."""

    def __init__(self, command: Sequence[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def tell(self, line: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # that it ended is seen when it should answer
            self.process.stdin.write(f"{line}\n")

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            Gone: if there is none in time, or it says that it cannot.
        """
        try:
            line = self.lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise Gone(f"no answer in {seconds:.0f} s") from None
        if line is None:
            self.lines.put(None)
            raise Gone(f"it ended with status {self.process.wait()}")
        found = json.loads(line)
        if "cannot" in found:
            raise Gone(found["cannot"])
        return found

    def has_answered(self) -> bool:
        """Whether `answer` would not wait."""
        return not self.lines.empty()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def answering() -> Iterator[Callable[..., None]]:
    """In such a process: what answers. All else that is printed goes where errors go.

    An exception is an answer too.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def answer(**found: Any) -> None:
            print(json.dumps(found), file=out, flush=True)

        try:
            yield answer
        except Exception as error:
            answer(cannot=first_line(error))
            raise


def turns(
    sides: dict[str, Side], count: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each side's turns of `count` steps, one after another.

    It stops after the round in which the `seconds` are over. A side that goes is left out.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    until = time.monotonic() + seconds
    for _ in range(rounds):
        for name in list(taken):
            try:
                sides[name].tell(count)
                taken[name].append(sides[name].answer(max(30.0, seconds))["seconds"])
            except Gone as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                del taken[name]
        if time.monotonic() > until:
            break
    return taken
