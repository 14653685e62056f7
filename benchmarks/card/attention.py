"""Attention against cuDNN, PyTorch's own and its compiled FlexAttention: `benchmarks.attention`,
its first cases, as many as there is time for, and what we aim at as ratios.

A process goes through them. If one of those that take part hangs or breaks the card, the case is
begun again without it, and it sits out the rest.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.card.task import Task, first_line, part
from benchmarks.card.workers import DEAD, Lines, Worker, device_answers

CASE_SECONDS = 60.0
"""How long one of those that take part may compile and run for the first time."""
LEAST_SECONDS = 10.0
"""What a case takes, about; with less left none is awaited."""
QUICK = ("--quick", "--masks", "causal", "window")


class Job(NamedTuple):
    """A case by its place in the list, and who sits it out."""

    number: int
    banned: tuple[str, ...]
    quick: bool


def job_of(told: list[Any]) -> Job:
    """A job as it comes back from JSON."""
    number, banned, quick = told
    return Job(number, tuple(banned), quick)


def work(jobs: list[Job], lines: Lines) -> None:
    """Measures the cases, and tells who is at it."""
    import jax

    from benchmarks import attention

    on_cpu = jax.devices()[0].platform == "cpu"
    for job in jobs:
        options = attention.options_of(list(QUICK) if job.quick else [])
        found = attention.cases_of(options, "float32" if on_cpu else "bfloat16")
        case, names = found[job.number]

        def begin(name: str, job: Job = job) -> None:
            if not device_answers():  # whoever came before has broken it
                sys.exit(DEAD)
            lines.say(job, at=name)

        lines.say(job)
        names = [name for name in names if name not in job.banned]
        try:
            results = attention.measure(case, names, options.rounds, options.seconds, begin)
        except Exception as error:
            lines.say(job, found={"failed": first_line(error)})
        else:
            lines.say(job, found={**case._asdict(), "name": str(case), "results": results})


class Attention(Worker):
    """The worker here, which bans whoever it dies of."""

    def died(self, job: Job, why: str) -> list[tuple[Job, dict[str, Any]]]:
        if self.at is None:
            return super().died(job, why)
        banned = (*job.banned, self.at)
        self.jobs[:] = [left._replace(banned=banned) for left in (job, *self.jobs)]
        return [(job, {"banned": self.at, "why": why})]


def run(task: Task) -> None:
    from benchmarks import attention

    options = attention.options_of(list(QUICK) if task.quick else [])
    count = len(attention.cases_of(options, ""))
    jobs = [Job(number, (), task.quick) for number in range(count)]
    path = task.out.parent / "attention/lines.jsonl"
    worker = Attention("benchmarks.card.attention", jobs, path, job_of)
    rows: list[dict[str, Any]] = []
    try:
        while worker.process is not None and task.left() > (0 if task.quick else LEAST_SECONDS):
            time.sleep(0.2)
            for _, found in worker.look(CASE_SECONDS):
                if "results" in found:
                    rows.append(found)
                    tell(task, found)
                    task.write(rows=rows, goals=attention.goals(rows))
                else:
                    task.row("what went wrong", **found)
    finally:
        worker.stop()
    for name, ratio in task.report.get("goals", {}).items():
        task.row("ratios", of=name, ratio=ratio)
    print(f"{len(rows)} of {count} cases")


def tell(task: Task, found: dict[str, Any]) -> None:
    """A row for each that took part in a case."""
    for who, result in found["results"].items():
        task.row(
            "cases",
            case=found["name"],
            who=who,
            milliseconds=result.get("milliseconds"),
            tflops=result.get("tflops"),
            spread=result.get("spread"),
            error=result.get("error"),
            cannot=result.get("cannot"),
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work([job_of(job) for job in json.loads(sys.argv[2])], Lines(Path(sys.argv[1])))
    else:
        part(run)
