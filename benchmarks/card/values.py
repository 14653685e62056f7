"""Whether every implementation of attention gives the right numbers on this card, and the same
ones each time: outputs and gradients against the formula in float64.

Processes go through the cases side by side, a few for each implementation. One that hangs or
crashes is started again after the case that it stopped at. Errors are relative, in the norm of the
whole array, and are held against those of the plain softmax in the same type.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.card import cases
from benchmarks.card.cases import CASES, DECODING, Case
from benchmarks.card.task import Task, first_line, part

# Processes for each implementation: the more, the longer its kernels compile.
PROCESSES = {"reference": 1, "chunked": 1, "portable": 3, "hopper": 4, "cudnn": 1}
PROCESSES |= {"decoding, reference": 1, "decoding, kernel": 1}
# Of the plain softmax's error, or of the type's own precision, an implementation may make so many.
TIMES_AS_LARGE = 4
PRECISION = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-22}
NAMES = ("out", "dq", "dk", "dv", "dscore")
RUNS = 3
CASE_SECONDS = 45.0
DEAD = 3
"""The status of a process whose device no longer answers."""


class Job(NamedTuple):
    """One implementation's work on one case."""

    implementation: str
    case: Case


def cases_for(implementation: str) -> tuple[Case, ...]:
    return DECODING if implementation.startswith("decoding") else CASES


def jobs_of(quick: bool) -> list[list[Job]]:
    """The jobs of each process."""
    if quick:
        chosen = [Job(n, cases.quick(case)) for n in PROCESSES for case in cases_for(n)[2:4]]
        return [chosen[::2], chosen[1::2]]
    return [
        [Job(name, case) for case in cases_for(name)[first::count]]
        for name, count in PROCESSES.items()
        for first in range(count)
    ]


# --- In a process of its own -------------------------------------------------------------------


def attended(job: Job, made: cases.Made) -> Any:
    """A compiled function without arguments, that gives the output and the gradients by name."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.kernels import flash_attention
    from jaxdecoder.kernels.decode import decode_attention

    case, decoding = job.case, job.implementation.startswith("decoding")
    _, _, implementation = job.implementation.rpartition(" ")
    qkv, slopes = [jnp.asarray(x) for x in made[:3]], jnp.asarray(made.slopes)

    def decode(q: Any, k: Any, v: Any, allowed: Any) -> Any:
        score = cases.our_score(case, slopes)
        scale = case.width**-0.5
        return decode_attention(
            q, k, v, allowed, scale=scale, score=score, implementation=implementation
        )

    def attend(q: Any, k: Any, v: Any, slopes: Any, segments: Any) -> Any:
        return flash_attention(
            *(q, k, v),
            mask=cases.our_mask(case),
            score=cases.our_score(case, slopes),
            segment_ids=segments,
            dropout_rate=case.rate,
            dropout_seed=jnp.uint32(cases.DROPOUT_SEED),
            implementation=implementation,
        )

    def both(dout: Any, segments: Any, *learned: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: attend(*arrays, segments), *learned)
        return out, *pull(dout)

    if decoding:
        allowed = jnp.asarray(cases.allowed(case))[None, None]
        arguments: tuple[Any, ...] = (*qkv, allowed)
        function = jax.jit(lambda *arrays: (decode(*arrays),))
    else:
        segments = None if made.segments is None else jnp.asarray(made.segments)
        arguments = (jnp.asarray(made.dout), segments, *qkv, slopes)
        function = jax.jit(both)
    compiled = function.lower(*arguments).compile()
    return lambda: dict(zip(NAMES, jax.device_get(compiled(*arguments)), strict=False))


def examine(job: Job) -> dict[str, Any]:
    """Errors, NaNs and whether the runs agree to the bit."""
    import numpy as np

    start = time.perf_counter()
    made = cases.make(job.case)
    call = attended(job, made)
    seconds = time.perf_counter() - start
    first, *others = [call() for _ in range(RUNS)]
    exact = cases.expected(job.case, made)
    found: dict[str, Any] = {"errors": {}, "nan": {}, "compiled_in": seconds}
    for name, wanted in exact.items():
        array = np.asarray(first[name], np.float64)
        found["nan"][name] = int(np.count_nonzero(~np.isfinite(array)))
        found["errors"][name] = float(np.linalg.norm(array - wanted) / np.linalg.norm(wanted))
    found["repeats"] = all(
        first[name].tobytes() == other[name].tobytes() for other in others for name in exact
    )
    return found


def work(jobs: list[Job], path: Path) -> None:
    """Does the jobs, a line in the file when one begins and one when it has ended."""
    from jaxdecoder.errors import UserError

    with path.open("a") as file:

        def say(job: Job, **found: Any) -> None:
            file.write(json.dumps({"job": job, **found}) + "\n")
            file.flush()

        for job in jobs:
            say(job)
            try:
                say(job, found=examine(job))
            except UserError as error:
                say(job, found={"cannot": first_line(error)})
            except Exception as error:
                say(job, found={"failed": first_line(error)})
                if not answers():
                    sys.exit(DEAD)


def answers() -> bool:
    """Whether the device still computes: after a fault in a kernel it does not."""
    import jax.numpy as jnp

    try:
        return float(jnp.ones(8).sum()) == 8
    except Exception:
        return False


# --- In the process that watches them ----------------------------------------------------------


class Worker:
    """A process at its jobs; it is started again after a job that hangs or that it dies of."""

    def __init__(self, jobs: list[Job], path: Path):
        self.jobs, self.path = jobs, path
        self.process: subprocess.Popen[bytes] | None = None
        self.read = 0
        self.start()

    def start(self) -> None:
        """Starts a process for the jobs left, if there are any."""
        self.process, self.heard = None, time.monotonic()
        if self.jobs:
            command = [sys.executable, "-m", "benchmarks.card.values", str(self.path)]
            # The formula is NumPy's work, of many processes at once.
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
            self.process = subprocess.Popen([*command, json.dumps(self.jobs)], env=environment)

    def look(self, most: float = CASE_SECONDS) -> list[tuple[Job, dict[str, Any]]]:
        """What it has found since the last look; a job may be silent for so many seconds."""
        if self.process is None:
            return []
        ended = self.process.poll() is not None
        found = self._new_lines()
        if not ended and time.monotonic() - self.heard <= most:
            return found
        self.stop()
        if self.jobs:  # the first of them is the one it stopped at
            why = f"it ended with status {self.process.returncode}" if ended else "it hung"
            # After a failure that was told of, the device is dead and the job is not.
            if self.process.returncode != DEAD:
                found.append((self.jobs.pop(0), {"failed": why}))
        self.start()
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _new_lines(self) -> list[tuple[Job, dict[str, Any]]]:
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
                if "found" in told:
                    job = job_of(told["job"])
                    self.jobs.remove(job)
                    found.append((job, told["found"]))
        return found


def job_of(told: list[Any]) -> Job:
    """A job as it comes back from JSON."""
    name, case = told
    return Job(name, Case(*case))


Results = dict[str, dict[str, dict[str, Any]]]
"""By case and implementation."""


NOT_TO_THE_BIT = "good, but not the same bits each time"
KINDS = ("good", NOT_TO_THE_BIT, "cannot", "other")
"""What a case may come to."""


def verdict(case: Case, found: dict[str, Any], plain: dict[str, Any] | None) -> str:
    """In a word or two, what became of a case."""
    if "cannot" in found or "failed" in found:
        return found.get("failed") or f"cannot: {found['cannot']}"
    if any(found["nan"].values()):
        return "NaN"
    least = PRECISION[case.dtype]
    of_plain = (plain or {}).get("errors", {})
    for name, error in found["errors"].items():
        if not error <= TIMES_AS_LARGE * max(least, of_plain.get(name, 0.0)):
            return f"{name} is far"
    return "good" if found["repeats"] else NOT_TO_THE_BIT


def tables(results: Results, known: dict[str, Case]) -> list[dict[str, Any]]:
    """The results a line each, after what they come to for each implementation."""
    columns = ["case", "implementation", "verdict", *NAMES]
    rows, counts = [], {name: dict.fromkeys(KINDS, 0) for name in PROCESSES}
    for title, by_name in results.items():
        plain = by_name.get("reference") or by_name.get("decoding, reference")
        for name, found in by_name.items():
            said = verdict(known[title], found, plain)
            kind = said.partition(":")[0]
            counts[name][kind if kind in KINDS else "other"] += 1
            errors = found.get("errors", {})
            rows.append([title, name, said, *(errors.get(name) for name in NAMES)])
    summary = [[name, *count.values()] for name, count in counts.items() if any(count.values())]
    return [
        {"title": "cases", "columns": ["implementation", *KINDS], "rows": summary},
        {"title": "errors, relative", "columns": columns, "rows": rows},
    ]


def run(task: Task) -> None:
    folder = task.out.parent / "values"
    folder.mkdir(parents=True, exist_ok=True)
    workers = []
    for number, jobs in enumerate(jobs_of(task.quick)):
        path = folder / f"{number}.jsonl"
        path.write_text("")
        workers.append(Worker(jobs, path))
    results: Results = {}
    known: dict[str, Case] = {}
    try:
        while any(w.process is not None for w in workers) and task.left() > 0:
            time.sleep(0.2)
            for job, found in [pair for worker in workers for pair in worker.look()]:
                known[str(job.case)] = job.case
                results.setdefault(str(job.case), {})[job.implementation] = found
                print(f"{job.implementation}: {job.case}: {found}", flush=True)
                task.write(results=results, tables=tables(results, known))
    finally:
        for worker in workers:
            worker.stop()
    left = [f"{job.implementation}: {job.case}" for worker in workers for job in worker.jobs]
    task.write(results=results, tables=tables(results, known), not_reached=left)
    bad = sum(row[-1] for row in tables(results, known)[0]["rows"])
    print(f"{bad} cases are not good; {len(left)} were not reached")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work([job_of(job) for job in json.loads(sys.argv[2])], Path(sys.argv[1]))
    else:
        part(run)
