"""Train for hours, and see that memory and step time stay flat.

    python -m benchmarks.soak [--minutes 120] [--out benchmarks/results/soak.json]

A small run trains, evaluates, saves and samples until it is stopped with SIGTERM. Memory and speed
are those of its metrics.jsonl; the first tenth, in which programs compile and caches fill, does not
count. The table compares the next tenth with the last, and a picture beside the result shows both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import machine
from jaxdecoder.files import as_markdown, as_png, write_atomically
from jaxdecoder.training.logging import read_metrics

ROOT = Path(__file__).parent.parent
CONFIG = """
[model]
context_length = 64
d_model = 64
n_layers = 2
n_heads = 4
dropout = 0.1
[data]
tokenizer = "bpe"
vocab_size = 512
stories_bytes = 1000000
cache = "{folder}/cache"
[optimizer]
schedule = "constant"
[train]
steps = 1000000000
batch_size = 8
evaluate_every = 1000
evaluation_batches = 4
checkpoint_every = 2000
sample_every = 10000
log_every = 100
tune = false
out = "{folder}/run"
"""


def soak(minutes: float) -> list[dict[str, Any]]:
    """Train for so long, stop the run, and return its metrics."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "soak.toml").write_text(CONFIG.format(folder=folder))
        process = subprocess.Popen(
            [sys.executable, "train.py", str(folder / "soak.toml")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        time.sleep(60 * minutes)
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
        if status:
            raise SystemExit(f"the run ended with status {status}")
        return read_metrics(folder / "run")


def tenths(values: list[float]) -> tuple[float, float]:
    """Return the medians of the second and of the last tenth."""
    n = max(1, len(values) // 10)
    return statistics.median(values[n : 2 * n]), statistics.median(values[-n:])


def picture(metrics: list[dict[str, Any]]) -> bytes:
    """Draw memory and speed by the hour."""
    from matplotlib.figure import Figure

    timed = [m for m in metrics if "memory_bytes" in m]
    hours = [m["seconds"] / 3600 for m in timed]
    steps = [m["step"] for m in timed]
    pace = [
        (b["step_seconds"] - a["step_seconds"]) / (b["step"] - a["step"]) * 1e3
        for a, b in itertools.pairwise(timed)
    ]
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(hours, [m["memory_bytes"] / 2**20 for m in timed])
    above.set(ylabel="memory (MiB)", ylim=(0, None), title=f"{steps[-1]:,} steps")
    below.plot(hours[1:], pace, lw=0.7)
    below.set(ylabel="ms a step", xlabel="hours", ylim=(0, None))
    return as_png(figure)


def main() -> None:
    """Reads the command line, trains, and prints the table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--minutes", type=float, default=120)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    chosen = options.parse_args()
    told = machine()
    metrics = soak(chosen.minutes)
    memory = tenths([m["memory_bytes"] / 2**20 for m in metrics if "memory_bytes" in m])
    speed = tenths([m["tokens_per_second"] for m in metrics if "tokens_per_second" in m])
    rows = [
        ("", "second tenth", "last tenth", "ratio"),
        ("memory (MiB)", *(f"{x:.1f}" for x in memory), f"{memory[1] / memory[0]:.3f}"),
        ("tokens/s", *(f"{x:,.0f}" for x in speed), f"{speed[1] / speed[0]:.3f}"),
    ]
    print(f"{chosen.minutes:g} minutes, {metrics[-1]['step']:,} steps\n{as_markdown(rows)}")
    report = {**told, "minutes": chosen.minutes, "steps": metrics[-1]["step"], "rows": rows}
    write_atomically(chosen.out, json.dumps(report, indent=1) + "\n")
    write_atomically(chosen.out.with_suffix(".png"), picture(metrics))


if __name__ == "__main__":
    main()
