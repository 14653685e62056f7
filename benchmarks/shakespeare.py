"""Trains the Tiny Shakespeare presets and sets their losses beside the published ones.

    python benchmarks/shakespeare.py [--presets shakespeare_nano ...] [--seeds 0 1 2] [--jobs 2]

Runs are under runs/shakespeare/; one that is finished is not trained again, and one that was
stopped goes on. Losses are nats a character: `train` over 200 fixed batches, `validation` over
the whole split. With several jobs each has one thread. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from turns import HERE, describe, write

ROOT = HERE.parent
# Preset -> what is published of its shape (train, validation), and our own bound and goal.
PUBLISHED = {
    "shakespeare_nano": {"train": 1.6658, "validation": 1.8275},
    "shakespeare_small": {"train": 1.5228, "validation": 1.7088},
    "shakespeare_nano_best": {"at most": 1.58, "goal": 1.55},
    "shakespeare_small_best": {"at most": 1.56, "goal": 1.50},
}


def train(preset: str, seed: int, jobs: int) -> dict[str, Any]:
    """The summary of one run."""
    out = Path("runs") / "shakespeare" / f"{preset}_{seed}"
    environment = dict(os.environ)
    if jobs > 1:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, "train.py", f"configs/{preset}.toml"]
    command += ["--train.out", str(out), "--train.seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    summary = json.loads((ROOT / out / "summary.json").read_text())
    print(f"{preset} seed {seed}: validation {summary['validation_loss']:.4f}", flush=True)
    return {"preset": preset, "seed": seed, **summary}


def main() -> None:
    """Trains, then prints a row a preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "shakespeare.json")
    chosen = parser.parse_args()
    described = describe()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        waiting = [
            pool.submit(train, preset, seed, chosen.jobs)
            for preset in chosen.presets
            for seed in chosen.seeds
        ]
        summaries = [future.result() for future in waiting]
    rows = []
    for preset in chosen.presets:
        of = [summary for summary in summaries if summary["preset"] == preset]
        row = {
            "preset": preset,
            "parameters": of[0]["parameters"],
            "tokens": of[0]["tokens"],
            "train": statistics.mean(summary["train_loss"] for summary in of),
            "validation": statistics.mean(summary["validation_loss"] for summary in of),
            "seeds": len(of),
            "published": PUBLISHED[preset],
        }
        rows.append(row)
        print(
            f"{preset:24} {row['parameters']:>10,} parameters  {row['tokens']:>10,} tokens  "
            f"train {row['train']:.4f}  validation {row['validation']:.4f}  "
            f"({len(of)} seeds; {PUBLISHED[preset]})"
        )
    write(chosen.out, {**described, "rows": rows, "runs": summaries})


if __name__ == "__main__":
    main()
