"""Training speed on CPUs, next to GPT-2 of `transformers` under `torch.compile`.

    python benchmarks/train_cpu.py [--peer-python .venv-torch/bin/python] [--shapes small medium]

Both train the same shape in float32: forward, backward, clipping and AdamW, no dropout. They take
turns, so that whatever else the machine does slows both, and medians are compared. Still, use a
quiet machine: the peer's threads wait for each other more often, so a busy one slows it more. The
peer has a Python of its own, with torch and transformers. Results go to benchmarks/results/.
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "batch_size": 12,
        "context_length": 64,
        "n_layers": 4,
        "n_heads": 4,
        "d_model": 128,
        "vocab_size": 65,
    },
    "medium": {
        "batch_size": 64,
        "context_length": 256,
        "n_layers": 6,
        "n_heads": 6,
        "d_model": 384,
        "vocab_size": 65,
    },
}
# How each shape is trained here; the arithmetic of a step is the same. Passes of a few sequences
# keep the activations of the larger one in the caches.
GRADIENT_ACCUMULATION = {"small": 1, "medium": 8}
# Steps in one turn.
STEPS = {"small": 20, "medium": 1}

Turn = Callable[[int], float]


def ours(shape: dict[str, int], accumulation: int, steps: int) -> Turn:
    """Compiles `steps` steps as one call; a turn gives the seconds they took."""
    import jax
    import numpy as np

    from jaxdecoder.config import Config, ModelConfig, OptimizerConfig, TrainConfig
    from jaxdecoder.data.batches import Batch
    from jaxdecoder.training.sharding import batch_sharding, make_mesh, state_sharding
    from jaxdecoder.training.step import fuse, init_state, make_step

    shape = dict(shape)
    batch_size = shape.pop("batch_size")
    config = Config(
        model=ModelConfig(**shape),
        optimizer=OptimizerConfig(schedule="constant"),
        train=TrainConfig(batch_size=batch_size, gradient_accumulation=accumulation),
    )
    mesh = make_mesh(config)
    state = init_state(config)
    shardings = state_sharding(state, mesh, fsdp=False), batch_sharding(mesh, leading=1)
    run = jax.jit(
        fuse(make_step(config)),
        in_shardings=shardings,
        out_shardings=(shardings[0], None),
        donate_argnums=0,
    )
    size = (steps, batch_size, shape["context_length"] + 1)
    tokens = np.random.default_rng(0).integers(shape["vocab_size"], size=size, dtype=np.int32)
    weights = np.ones(tokens[..., 1:].shape, np.float32)
    batch = jax.device_put(Batch(tokens[..., :-1], tokens[..., 1:], weights), shardings[1])
    held = [jax.device_put(state, shardings[0])]

    def turn(count: int) -> float:
        assert count == steps
        start = time.perf_counter()
        held[0], metrics = run(held[0], batch)
        jax.block_until_ready((held[0], metrics))
        return time.perf_counter() - start

    turn(steps)
    return turn


@contextlib.contextmanager
def peer(python: str, shape: dict[str, int], threads: int) -> Iterator[tuple[Turn, dict[str, str]]]:
    """A child process that trains the same shape with PyTorch, and its versions."""
    command = [python, str(HERE / "torch_peer.py"), json.dumps({**shape, "threads": threads})]
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


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating turns of both on one shape."""
    shape, steps = SHAPES[name], STEPS[name]
    accumulation = options.gradient_accumulation or GRADIENT_ACCUMULATION[name]
    mine = ours(shape, accumulation, steps)
    with peer(options.peer_python, shape, options.threads) as (theirs, versions):
        seconds: dict[str, list[float]] = {"jaxdecoder": [], "torch": []}
        for _ in range(options.rounds):
            for who, turn in zip(seconds, (mine, theirs), strict=True):
                seconds[who].append(turn(steps) / steps)
    tokens = shape["batch_size"] * shape["context_length"]
    result: dict[str, Any] = {
        "shape": {"name": name, **shape},
        "gradient_accumulation": accumulation,
        "versions": versions,
    }
    for who, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        result[who] = {
            "milliseconds": {
                "lower_quartile": 1e3 * low,
                "median": 1e3 * median,
                "upper_quartile": 1e3 * high,
            },
            "tokens_per_second": tokens / median,
        }
        print(
            f"{name:8} {who:11} {1e3 * median:9.1f} ms a step "
            f"({1e3 * low:.1f} to {1e3 * high:.1f}), {tokens / median:9,.0f} tokens/s"
        )
    ratio = result["jaxdecoder"]["tokens_per_second"] / result["torch"]["tokens_per_second"]
    result["ratio"] = ratio
    print(f"{name:8} ratio       {ratio:9.2f}", flush=True)
    return result


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {"cpu": model, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]}


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=".venv-torch/bin/python")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices the cores make up")
    parser.add_argument("--gradient-accumulation", type=int, help="instead of the shape's own")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train_cpu.json")
    options = parser.parse_args()
    if options.devices > 1:
        # A device is then a core: its products must not spread over the others.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"

    import flax
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    versions["flax"] = flax.__version__
    described = {**machine(), "versions": versions, "devices": options.devices}
    print(described, flush=True)
    if described["load_before"] > 0.5:
        print("warning: other processes are running, so the ratio means little", flush=True)
    results = [compare(name, options) for name in options.shapes]
    report = {**described, "results": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
