"""Whether every implementation of attention gives the right numbers on this card, and the same
ones each time: outputs and gradients against the formula in float64.

Processes go through the cases side by side, a few for each implementation. One that hangs or
crashes is started again after the case that it stopped at. Errors are relative, in the norm of the
whole array, and are held against those of the plain softmax in the same type.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.card import cases
from benchmarks.card.cases import CASES, DECODING, OF_VARIANTS, Case
from benchmarks.card.task import Task, first_line, part
from benchmarks.card.workers import DEAD, Lines, Worker, device_answers

# Processes for each implementation: the more, the longer its kernels compile.
PROCESSES = {"reference": 1, "chunked": 1, "portable": 3, "hopper": 6, "cudnn": 1}
PROCESSES |= {"decoding, reference": 1, "decoding, kernel": 1}
# Other ways to order the Hopper kernels (`hopper.launch.Sizes`), or one kernel for all gradients.
VARIANTS: dict[str, dict[str, Any]] = {
    "hopper, rotated": {"rotated": True, "turns": "early"},
    "hopper, early": {"turns": "early"},
    "hopper, three": {"consumers": 3, "turns": "none"},
    "hopper, whole": {},
}
PROCESSES |= dict.fromkeys(VARIANTS, 1)
# Of the plain softmax's error, or of the type's own precision, an implementation may make so many;
# but no more than is ever right, or a fault that all have in common would be permitted. Products of
# float32 may be rounded to TF32.
TIMES_AS_LARGE = 4
PRECISION = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-22}
LARGEST = {"bfloat16": 2**-6, "float16": 2**-8, "float32": 2**-8}
NAMES = ("out", "dq", "dk", "dv", "dscore")
RUNS = 3
CASE_SECONDS = 50.0


class Job(NamedTuple):
    """One implementation's work on one case."""

    implementation: str
    case: Case


def cases_for(implementation: str) -> tuple[Case, ...]:
    if implementation in VARIANTS:
        return OF_VARIANTS
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


def order_hopper(variant: str) -> None:
    """Makes the Hopper kernels do as a name in VARIANTS says, or as they do by default."""
    from jaxdecoder.kernels import hopper
    from jaxdecoder.kernels.hopper.launch import Sizes

    default = getattr(hopper.sizes, "__wrapped__", hopper.sizes)

    @functools.wraps(default)
    def sizes(problem: Any, operands: Any) -> dict[str, Any]:
        found = default(problem, operands)
        if variant == "hopper, whole" and operands.q.shape[-1] == 128 and not any(problem.learned):
            return {"forward": found["forward"], "qkv": Sizes(64, 2)}
        changes = VARIANTS.get(variant, {})
        return {name: chosen._replace(**changes) for name, chosen in found.items()}

    hopper.sizes = sizes


def attended(job: Job, made: cases.Made) -> Any:
    """A compiled function without arguments, that gives the output and the gradients by name."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.kernels import flash_attention
    from jaxdecoder.kernels.decode import decode_attention

    case, decoding = job.case, job.implementation.startswith("decoding")
    implementation = job.implementation.removeprefix("decoding, ").partition(",")[0]
    order_hopper(job.implementation)
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


def work(jobs: list[Job], lines: Lines) -> None:
    """Does the jobs, and tells of each as it begins and as it ends."""
    from jaxdecoder.errors import UserError

    for job in jobs:
        lines.say(job)
        try:
            lines.say(job, found=examine(job))
        except UserError as error:
            lines.say(job, found={"cannot": first_line(error)})
        except Exception as error:
            lines.say(job, found={"failed": first_line(error)})
            if not device_answers():
                sys.exit(DEAD)


# --- In the process that watches them ----------------------------------------------------------


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
    least, most = PRECISION[case.dtype], LARGEST[case.dtype]
    of_plain = (plain or {}).get("errors", {})
    for name, error in found["errors"].items():
        if not error <= min(most, TIMES_AS_LARGE * max(least, of_plain.get(name, 0.0))):
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


def complaints(log: str) -> dict[str, int]:
    """What ptxas says against Mosaic's kernels, and how often."""
    spilled = sum(int(size) > 0 for size in re.findall(r"(\d+) bytes spill stores", log))
    found = Counter(
        line.strip()[:200]
        for line in log.splitlines()
        if re.search(r"C7510|serialized|setmaxnreg.*ignored", line)
    )
    return {**found, **({"kernels that spill registers": spilled} if spilled else {})}


def run(task: Task) -> None:
    workers = [
        Worker("benchmarks.card.values", jobs, task.out.parent / f"values/{number}.jsonl", job_of)
        for number, jobs in enumerate(jobs_of(task.quick))
    ]
    results: Results = {}
    known: dict[str, Case] = {}
    try:
        while any(w.process is not None for w in workers) and task.left() > 0:
            time.sleep(0.2)
            for job, found in [pair for worker in workers for pair in worker.look(CASE_SECONDS)]:
                known[str(job.case)] = job.case
                results.setdefault(str(job.case), {})[job.implementation] = found
                print(f"{job.implementation}: {job.case}: {found}", flush=True)
                task.write(results=results, tables=tables(results, known))
    finally:
        for worker in workers:
            worker.stop()
    left = [f"{job.implementation}: {job.case}" for worker in workers for job in worker.jobs]
    task.write(results=results, tables=tables(results, known), not_reached=left)
    logs = (worker.path.with_suffix(".log").read_text(errors="replace") for worker in workers)
    for said, times in complaints("\n".join(logs)).items():
        task.row("what ptxas says", said=said, times=times)
    bad = sum(row[-1] for row in tables(results, known)[0]["rows"])
    print(f"{bad} cases are not good; {len(left)} were not reached")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work([job_of(job) for job in json.loads(sys.argv[2])], Lines(Path(sys.argv[1])))
    else:
        part(run)
