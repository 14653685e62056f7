"""Processes that go through a list of jobs, and are started again after one that hangs or kills.

A worker is `python -m MODULE FILE JOBS`, with its jobs as JSON. It appends lines of JSON to the
file (`Lines`): one when it begins a job, others on the way if it likes, and one with what it found.
What it and its compilers print is in the log beside the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # Many of them do NumPy's work at once.
    "OPENBLAS_NUM_THREADS": "2",
    # What ptxas says of Mosaic's kernels.
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}
DEAD = 3
"""The status of a worker whose device no longer answers, after a failure that it told of."""


class Lines:
    """The worker's side."""

    def __init__(self, path: Path):
        self.file = path.open("a")

    def say(self, job: Any, **more: Any) -> None:
        self.file.write(json.dumps({"job": job, **more}) + "\n")
        self.file.flush()


def device_answers() -> bool:
    """Whether the device still computes: after a fault in a kernel it does not."""
    import jax.numpy as jnp

    try:
        return float(jnp.ones(8).sum()) == 8
    except Exception:
        return False


class Worker:
    """The other side: a process, and the jobs it has left, the one it is at first."""

    def __init__(self, module: str, jobs: list[Any], path: Path, job_of: Callable[[Any], Any]):
        self.module, self.jobs, self.path, self.job_of = module, jobs, path, job_of
        self.process: subprocess.Popen[bytes] | None = None
        self.read, self.at = 0, None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.with_suffix(".log").write_text("")
        self.start()

    def start(self) -> None:
        """Starts a process for the jobs left, if there are any."""
        self.process, self.heard, self.at = None, time.monotonic(), None
        if self.jobs:
            command = [sys.executable, "-m", self.module, str(self.path), json.dumps(self.jobs)]
            with self.path.with_suffix(".log").open("ab") as log:
                self.process = subprocess.Popen(
                    command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT
                )

    def look(self, most: float) -> list[tuple[Any, dict[str, Any]]]:
        """What it has found since the last look; it may be silent for so many seconds."""
        if self.process is None:
            return []
        ended = self.process.poll() is not None
        found = self._new_lines()
        if not ended and time.monotonic() - self.heard <= most:
            return found
        self.stop()
        status = self.process.returncode
        if self.jobs and (status != DEAD or self.at is not None):
            why = f"it ended with status {status}" if ended else "it hung"
            found += self.died(self.jobs.pop(0), why)
        self.start()
        return found

    def died(self, job: Any, why: str) -> list[tuple[Any, dict[str, Any]]]:
        """What is to be said of a job that the process died at; it goes on with those left."""
        return [(job, {"failed": why})]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _new_lines(self) -> list[tuple[Any, dict[str, Any]]]:
        """Whole lines written since; takes the jobs that have ended off the list."""
        found = []
        with self.path.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                self.heard = time.monotonic()
                told = json.loads(line)
                self.at = told.get("at")
                if "found" in told:
                    job = self.job_of(told["job"])
                    self.jobs.remove(job)
                    found.append((job, told["found"]))
        return found
