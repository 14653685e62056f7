"""Many runs as one program against the same runs one after another.

    python -m benchmarks.population                 # 32 members of shakespeare_nano against 32 runs
    python -m benchmarks.population --solo 4        # with 4 of the runs timed, for all of them
    python -m benchmarks.population --steps 500     # shorter
    python -m benchmarks.population --mappings      # how a device should work through its members

The first compares commands as one gives them, start-up and compilation included: `ablate.py` with
a seed for each member, and `train.py` once for each seed; half of the solo runs come before the
ablation and half after it, so that a machine that changes its pace does so for both. Next to the
whole time stands that of the training alone, from the runs' own summaries, and on a GPU, where the
question is another, the time of all members as a multiple of one run's.

The second times a training step of one member, in one process for each way: a run on all cores,
members at once (`vmap`), members one after another on a device each core, and the same in a process
each core, which is what ablations do on a CPU. Ways take turns.

Writes benchmarks/results/population.json, or population_mappings.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.turns import HERE, describe, write
from jaxdecoder.ablation.population import Program, arrays_of
from jaxdecoder.config import load
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import prepare
from jaxdecoder.training.devices import cores, one_device_a_core, stay_on
from jaxdecoder.training.runs import complete
from jaxdecoder.training.step import fuse, init_state, make_step

ROOT = HERE.parent
PRESET = ROOT / "configs" / "shakespeare_nano.toml"
ABLATION = """
base = "{base}"
seeds = {seeds}
{overrides}
[[arms]]
model.n_layers = 4
"""
WAYS = ("one_run", "vmap", "one_after_another", "process_a_core")


# --- Whole commands -------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all members in one command, and of the same runs one after another."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = [solo(options, folder, seed) for seed in range(options.solo // 2)]
        together = population(options, folder)
        after = [solo(options, folder, seed) for seed in range(options.solo // 2, options.solo)]
        alone, times = before + after, options.members / options.solo
        inside = {
            "population": sum(seconds_of(run) for run in (folder / "out" / "members").iterdir()),
            "solo": times * sum(seconds_of(folder / f"solo_{i}") for i in range(options.solo)),
        }
    every = times * sum(alone)
    result = {
        "members": options.members,
        "steps": options.steps or load(PRESET).train.steps,
        "solo_runs_timed": options.solo,
        "population_seconds": together,
        "solo_seconds": every,
        "one_solo_seconds": statistics.median(alone),
        "ratio": together / every,
        "of_one_run": together / statistics.median(alone),
        "training_alone": {**inside, "ratio": inside["population"] / inside["solo"]},
    }
    print(
        f"{options.members} members together {together:.1f} s, one after another "
        f"{every:.1f} s: ratio {result['ratio']:.3f} (training alone "
        f"{result['training_alone']['ratio']:.3f}); {result['of_one_run']:.2f} times one run"
    )
    return result


def solo(options: argparse.Namespace, folder: Path, seed: int) -> float:
    """Seconds of one run of train.py."""
    out = folder / f"solo_{seed}"
    arguments = ["--train.seed", str(seed), "--train.out", str(out)]
    if options.steps:
        arguments += ["--train.steps", str(options.steps)]
    return timed([sys.executable, "train.py", str(PRESET), *arguments])


def population(options: argparse.Namespace, folder: Path) -> float:
    """Seconds of one run of ablate.py with all members."""
    path = folder / "population.toml"
    steps = f"[overrides]\ntrain.steps = {options.steps}" if options.steps else ""
    path.write_text(ABLATION.format(base=PRESET, seeds=options.members, overrides=steps))
    return timed([sys.executable, "ablate.py", str(path), "--out", str(folder / "out")])


def timed(command: list[str]) -> float:
    """Seconds that a command takes; its output is shown only if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    seconds = time.perf_counter() - start
    print(f"{seconds:7.1f} s  {Path(command[1]).name} {command[-1]}", flush=True)
    return seconds


def seconds_of(run: Path) -> float:
    """What a run's summary says of its training."""
    return float(json.loads((run / "summary.json").read_text())["seconds"])


# --- Ways through the members ---------------------------------------------------------------------


def mappings(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds that a step of one member takes, each way, medians over the rounds."""
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.population", "--measure", way]
            command += ["--members", str(options.members)]
            bound_to = cores() if way == "process_a_core" else [-1]
            beside = [
                subprocess.Popen(
                    [*command, "--core", str(core)], cwd=ROOT, stdout=subprocess.PIPE, text=True
                )
                for core in bound_to
            ]
            said = [process.communicate()[0] for process in beside]
            if any(process.returncode for process in beside):
                raise SystemExit(f"{' '.join(command)} failed")
            each = [float(text.split()[-1]) for text in said]
            measured[way].append(statistics.mean(each) / len(bound_to))
            print(f"{way:18} {measured[way][-1]:8.3f} ms a step of one member", flush=True)
    return {way: statistics.median(values) for way, values in measured.items()}


def measure(way: str, members: int, core: int, steps: int = 100) -> float:
    """Milliseconds a step of one member takes, this way, in this process, bound to a `core`."""
    if core >= 0:
        stay_on(core)
    if way == "one_after_another":
        one_device_a_core()
    config = load(PRESET)
    corpus = prepare(config.data)
    config = complete(config, corpus)
    batch = Feed.of(config, corpus, "train").at(0, steps)
    state = jax.jit(lambda: init_state(config))()
    if way == "one_run":
        members, arguments = 1, (state, batch)
        call: Any = jax.jit(fuse(make_step(config)), donate_argnums=0)
    else:
        mapping = "gpu" if way == "vmap" else "cpu"
        program = Program(config, jax.devices(), mapping=mapping)
        each = jax.tree.map(
            lambda x: np.stack([np.asarray(x)] * members), (state, arrays_of(config), batch)
        )
        arguments, call = jax.device_put(each, program.sharding), program.advance
    state, *rest = arguments
    state, metrics = call(state, *rest)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    state, metrics = call(state, *rest)
    jax.block_until_ready((state, metrics))
    return 1e3 * (time.perf_counter() - start) / steps / members


def main() -> None:
    """Reads the command line and measures."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--members", type=int, default=32)
    options.add_argument("--solo", type=int, help="runs of train.py to time; all, if left out")
    options.add_argument("--steps", type=int, default=0, help="of each run; 0: the preset's")
    options.add_argument("--mappings", action="store_true")
    options.add_argument("--rounds", type=int, default=5, help="of --mappings")
    options.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options.add_argument("--core", type=int, default=-1, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    chosen.solo = chosen.solo or chosen.members
    if chosen.measure:
        print(measure(chosen.measure, chosen.members, chosen.core))
        return
    name = "population_mappings" if chosen.mappings else "population"
    described = describe()
    results = mappings(chosen) if chosen.mappings else compare(chosen)
    write(HERE / "results" / f"{name}.json", {**described, "results": results})


if __name__ == "__main__":
    main()
