"""`shakespeare_baby_gpt` as a user trains it: 5,000 steps of the true loop, with evaluations and
checkpoints; seconds in all and without what is compiled, and the validation losses.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.card.task import TRAINING_PACKAGES, Task, part, skip
from benchmarks.turns import HERE

ROOT = HERE.parent
CORPUS = ROOT / ".cache" / "tinyshakespeare.txt"
QUICK = (
    *("--train.steps", "30", "--train.batch-size", "2", "--train.evaluate-every", "10"),
    *("--train.evaluation-batches", "1", "--model.n-layers", "1", "--model.d-model", "32"),
    *("--model.n-heads", "2", "--model.context-length", "64", "--data.train-fraction", "0.1"),
)
KEPT = ("metrics.jsonl", "summary.json", "config.toml", "samples.txt", "loss.png")


def lines(path: Path) -> list[dict[str, Any]]:
    """Those of metrics.jsonl that are whole."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def without_compilation(evaluations: list[dict[str, Any]]) -> float | None:
    """Seconds that all steps take at the pace between the first evaluation and the last."""
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    pace = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return pace * last["step"]


def run(task: Task) -> None:
    if not CORPUS.exists():
        skip(f"{CORPUS.relative_to(ROOT)} is not there")
    told = task.out.with_suffix("")
    told.mkdir(exist_ok=True)
    start, shown = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = ["train.py", "configs/shakespeare_baby_gpt.toml", "--train.out", str(folder)]
        command += QUICK if task.quick else ()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        while process.poll() is None and task.left() > 0:
            time.sleep(0.5)
            shown = show(task, folder, shown)
        whole = process.poll() == 0
        process.kill()
        process.wait()
        show(task, folder, shown)
        for name in KEPT:
            if (folder / name).exists():
                shutil.copy(folder / name, told / name)
        summary = folder / "summary.json"
        task.write(summary=json.loads(summary.read_text()) if summary.exists() else None)
    metrics = lines(told / "metrics.jsonl")
    evaluations = [line for line in metrics if "validation_loss" in line]
    speeds = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    task.row(
        "the run",
        whole=whole,
        steps=metrics[-1]["step"] if metrics else 0,
        seconds=time.monotonic() - start,
        seconds_without_compilation=without_compilation(evaluations),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        best_validation_loss=min((e["validation_loss"] for e in evaluations), default=None),
    )
    if not whole:
        sys.exit("train.py did not end well" if task.left() > 0 else "the time was over")


def show(task: Task, folder: Path, shown: int) -> int:
    """Adds a row for each evaluation after the first `shown`; how many there are now."""
    found = [e for e in lines(folder / "metrics.jsonl") if "validation_loss" in e]
    for e in found[shown:]:
        task.row("validation", step=e["step"], loss=e["validation_loss"], seconds=e["seconds"])
    return len(found)


if __name__ == "__main__":
    part(run, needs=TRAINING_PACKAGES)
