"""Interrupt training at random moments and count what is lost.

    python -m benchmarks.interruptions [--signals 200] [--seed 0] [--out FILE.json]

A run, an ablation and a pruning pass with recovery are started, interrupted by Ctrl-C, SIGTERM or
kill -9 at a random moment, and started again by the same command, until they end. Then their
weights and losses must be those of undisturbed ones, to the bit. Whatever cannot go on, hangs or
ends with other bits counts as lost. All of it is tiny, so that every phase is hit: the moment is
named by what the folder holds when the signal is sent.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.turns import machine
from jaxdecoder.files import as_markdown, write_atomically

ROOT = Path(__file__).parent.parent
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}
PATIENCE = 120.0
"""Seconds after which a process that was asked to stop counts as hanging."""
LONGEST = 14.0
"""Seconds within which a signal is sent; a start takes about five of them."""

CONFIG = """
[model]
context_length = 32
d_model = 32
n_layers = 2
n_heads = 2
dropout = 0.1
[data]
tokenizer = "bpe"
vocab_size = 300
stories_bytes = 300000
cache = "{folder}/cache"
[train]
steps = {steps}
batch_size = 8
checkpoint_every = 100
evaluate_every = 100
evaluation_batches = 4
keep = 3
out = "{folder}/run"
"""
ABLATION = """
base = "config.toml"
seeds = 2
learning_rates = [1e-3]
claims = ["norm=layernorm beats norm=none"]
[overrides]
train.steps = 600
[factors]
model.norm = ["layernorm", "none"]
"""


class Kind(NamedTuple):
    """Something that can be interrupted."""

    command: Callable[[Path], list[str]]
    runs: Callable[[Path], Iterator[Path]]
    """The run folders that it leaves."""


def _prune(folder: Path) -> list[str]:
    source, made = folder.parent / "source" / "run", folder / "run"
    options = ["--method", "magnitude", "--sparsity", "0.5", "--recover-steps", "600"]
    return ["compress.py", "prune", str(source), str(made), *options]


KINDS = {
    "run": Kind(
        lambda folder: ["train.py", str(folder / "config.toml")],
        lambda folder: iter([folder / "run"]),
    ),
    "ablation": Kind(
        lambda folder: ["ablate.py", str(folder / "x.toml"), "--out", str(folder / "out")],
        lambda folder: (folder / "out" / "members").iterdir(),
    ),
    "pass": Kind(_prune, lambda folder: iter([folder / "run"])),
}
SHARES = {"run": 0.6, "ablation": 0.2, "pass": 0.2}


def prepare(folder: Path, steps: int = 1500) -> None:
    """Make the folder anew, with configs alone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder, steps=steps))
    (folder / "x.toml").write_text(ABLATION)


def start(kind: str, folder: Path) -> subprocess.Popen[str]:
    """Start the kind's command, or what is left of it."""
    return subprocess.Popen(
        [sys.executable, *KINDS[kind].command(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        start_new_session=True,
    )


def result(kind: str, folder: Path) -> dict[str, Any]:
    """Return the weights, the losses and the summary of each run that a finished command left."""
    from jaxdecoder.training.runs import load_model

    found = {}
    for run in KINDS[kind].runs(folder):
        params = load_model(run, "last").params
        import jax

        leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [
            (line["step"], name, line[name])
            for line in lines
            for name in ("train_loss", "validation_loss")
            if name in line
        ]
        summary = json.loads((run / "summary.json").read_text())
        ends = {name: summary[name] for name in ("steps", "train_loss", "validation_loss")}
        found[run.name] = (leaves, losses, ends)
    return found


def moment(folder: Path) -> str:
    """Name what a command is doing, by what it has written."""
    if any(folder.rglob("*.orbax-checkpoint-tmp*")):
        return "saving"
    metrics = [path for path in folder.rglob("metrics.jsonl") if path.stat().st_size]
    if metrics:
        done = [path.with_name("summary.json").exists() for path in metrics]
        ended = [_last_step(path) == _steps(path.parent) for path in metrics]
        return "evaluating, or at its end" if all(ended) or all(done) else "stepping"
    if any(folder.rglob("corpus_key")):
        return "compiling"
    return "tokenising" if (folder / "cache").exists() else "importing"


def _last_step(path: Path) -> int:
    lines = path.read_text().splitlines()
    return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)


def _steps(run: Path) -> int:
    return int(tomllib.loads((run / "config.toml").read_text())["train"]["steps"])


def interrupt(kind: str, folder: Path, draw: random.Random) -> tuple[str, str, str | None]:
    """Start, and interrupt; return the signal, the moment, and what went wrong, if anything.

    The signal is empty if the command had ended before it.
    """
    name = draw.choice(list(SIGNALS))
    process = start(kind, folder)
    time.sleep(draw.uniform(0.0, LONGEST))
    if process.poll() is not None:
        said = process.communicate()[0]
        return "", "", None if process.returncode == 0 else said
    when = moment(folder)
    # A terminal sends Ctrl-C to all processes of the command.
    to = os.killpg if name == "Ctrl-C" else os.kill
    to(process.pid, SIGNALS[name])
    try:
        said = process.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return name, when, "it did not end"
    # An interpreter that is still importing ends as any does.
    expected = (0, 130, -SIGNALS[name])
    return name, when, None if process.returncode in expected else said


def main() -> None:
    """Reads the command line, interrupts, and prints the table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--signals", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    draw = random.Random(chosen.seed)
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    lost: list[str] = []
    ends: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        prepare(base / "source")
        subprocess.run(
            [sys.executable, "train.py", str(base / "source" / "config.toml")],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for kind, share in SHARES.items():
            prepare(base / "whole")
            process = start(kind, base / "whole")
            said = process.communicate()[0]
            assert process.returncode == 0, said
            expected = result(kind, base / "whole")
            left, folder = round(chosen.signals * share), base / kind
            prepare(folder)
            while True:
                # When there are enough, the last one may end.
                if left > 0:
                    name, when, wrong = interrupt(kind, folder, draw)
                else:
                    process = start(kind, folder)
                    said = process.communicate()[0]
                    name, when, wrong = "", "", said if process.returncode else None
                if wrong is not None:
                    lost.append(f"{kind}, {name or 'going on'}, {when}: {wrong[-2000:]}")
                    prepare(folder)
                    if left <= 0:
                        break
                    continue
                if name:
                    left -= 1
                    counts[kind, name, when] += 1
                    print(f"{kind}: {name} while {when}", flush=True)
                    continue
                ends[kind] += 1
                if result(kind, folder) != expected:
                    lost.append(f"{kind}: ended with other bits")
                print(f"{kind}: at its end; {len(lost)} lost so far", flush=True)
                if left <= 0:
                    break
                prepare(folder)
    whens = sorted({when for _, _, when in counts})
    rows = [("what", "signal", *whens, "ended", "lost")]
    for kind in KINDS:
        for name in SIGNALS:
            each = [str(counts[kind, name, when]) for when in whens]
            gone = sum(text.startswith(f"{kind}, {name}") for text in lost)
            rows.append((kind, name, *each, str(ends[kind]), str(gone)))
    print(as_markdown(rows))
    print(f"{sum(counts.values())} interruptions, {len(lost)} lost")
    print("\n".join(lost))
    if chosen.out:
        report = {**machine(), "rows": rows, "lost": lost, "interruptions": sum(counts.values())}
        write_atomically(chosen.out, json.dumps(report, indent=1) + "\n")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
