"""What the CPU benchmarks share: programs that take turns on one machine, and trained runs.

Turns alternate, so that whatever else the machine does slows both, and medians are compared. The
peer has a Python of its own, with torch and transformers (`make bench` makes it).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # benchmarks run from a clone, nothing is installed

Turn = Callable[[int], float]
"""Does that many steps, or tokens, and says how many seconds they took."""


def parser(description: str, name: str, shapes: dict[str, Any]) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--peer-python", default=".venv-torch/bin/python")
    options.add_argument("--shapes", nargs="+", choices=shapes, default=list(shapes))
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer")
    options.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return options


@contextlib.contextmanager
def peer(
    python: str, task: str, shape: dict[str, Any], threads: int
) -> Iterator[tuple[Turn, dict[str, str]]]:
    """A child process that does the same `task` with PyTorch, and its versions."""
    told = json.dumps({**shape, "threads": threads})
    command = [python, str(HERE / "torch_peer.py"), task, told]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        sent, received = process.stdin, process.stdout

        def answer() -> Any:
            line = received.readline()
            if not line:
                raise SystemExit(f"the peer stopped: {' '.join(command)}")
            return json.loads(line)

        def turn(count: int) -> float:
            sent.write(f"{count}\n")
            return float(answer())

        yield turn, answer()
        sent.close()


def alternate(name: str, sides: dict[str, Turn], count: int, rounds: int, tokens: int) -> Any:
    """Alternating turns of `count` on each side; `tokens` are those of one step.

    Prints and returns medians, quartiles, tokens/s and the ratio of the first side to the fastest
    of the others.
    """
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(rounds):
        for who, turn in sides.items():
            seconds[who].append(turn(count) / count)
    result: dict[str, Any] = {}
    for who, times in seconds.items():
        low, median, high = (1e3 * t for t in statistics.quantiles(times, n=4))
        result[who] = {
            "milliseconds": {"lower_quartile": low, "median": median, "upper_quartile": high},
            "tokens_per_second": 1e3 * tokens / median,
        }
        print(
            f"{name:10} {who:12} {median:9.2f} ms a step ({low:.2f} to {high:.2f}), "
            f"{1e3 * tokens / median:9,.0f} tokens/s"
        )
    first, *others = (result[who]["tokens_per_second"] for who in sides)
    result["ratio"] = first / max(others)
    print(f"{name:10} ratio        {result['ratio']:9.2f}", flush=True)
    return result


def describe(**more: Any) -> dict[str, Any]:
    """The machine, the versions and the load, printed; a busy machine is warned of."""
    import flax
    import jax

    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }
    described = {**machine(), "versions": versions, **more}
    print(described, flush=True)
    if described["load_before"] > 0.5:
        print("warning: other processes are running, so the ratio means little", flush=True)
    return described


def trained(config: Any) -> dict[str, Any]:
    """The summary of a config's run, which is trained if it is not there or not finished."""
    from jaxdecoder.training.single import train

    path = Path(config.train.out) / "summary.json"
    return json.loads(path.read_text()) if path.exists() else train(config)


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes the report as JSON, whole or not at all."""
    from jaxdecoder.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from jaxdecoder.training.devices import processor

    return {"cpu": processor(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
