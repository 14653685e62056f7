"""The memory of a training step, by XLA's own count, with no array made.

    python -m benchmarks.step_memory configs/parallel_stacks.toml [--model.no-remat ...]

The config's true train step, its state donated, is compiled for this machine's CPU and, where jax's
CUDA packages are installed (a GPU is not needed), for an H200, there in bfloat16. The rows leave
out one by one what the config does to save memory, if it does. The peak is what a device must hold
at once: arguments and results, which share their memory, and temporaries. With `--limit` gigabytes
the command fails if the config itself does not fit. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.turns import HERE, machine, write

# What saves memory -> the overrides that leave it out.
SAVINGS = {
    "recomputed activations": ["--model.no-remat"],
    "bfloat16 moments": ["--optimizer.state-dtype", "float32"],
}


def rows(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The config as it is, and without each of its savings."""
    from jaxdecoder.config import load

    config = load(path, overrides)
    found = {"as it is": config}
    for name, without in SAVINGS.items():
        changed = load(path, [*overrides, *without])
        if changed != config:
            found[f"without {name}"] = changed
    return found


def compiled(config: Any, target: str) -> Any:
    """XLA's memory analysis of one call of the training loop."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.data.batches import Batch
    from jaxdecoder.training.step import fuse, init_state, make_step

    dtype = {"cpu": "float32", "h200": "bfloat16"}[target]
    train = dataclasses.replace(config.train, compute_dtype=dtype)
    config = dataclasses.replace(config, train=train)
    shape = (train.steps_per_call, train.batch_size, config.model.context_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.float32))
    state = jax.eval_shape(partial(init_state, config))
    step = fuse(make_step(config))
    if target == "cpu":
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    from gpu_compile import compile_for_h200

    return compile_for_h200(step, state, batch, donate_argnums=0).memory


def measure(config: Any, target: str) -> dict[str, float]:
    """Gigabytes (1e9 bytes)."""
    start = time.perf_counter()
    memory = compiled(config, target)
    figures = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "shared": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    figures["peak"] = (
        figures["arguments"] + figures["results"] - figures["shared"] + figures["temporaries"]
    )
    seconds = time.perf_counter() - start
    return {**{name: n / 1e9 for name, n in figures.items()}, "seconds": seconds}


def main() -> None:
    """Prints a row for each target and set of savings."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import jax

    jax.config.update("jax_platforms", "cpu")  # it compiles, and runs nothing
    from gpu_compile import has_cuda_packages

    from jaxdecoder import analysis
    from jaxdecoder.config import load

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--targets", nargs="+", choices=("cpu", "h200"))
    parser.add_argument("--limit", type=float, help="gigabytes the config itself must fit in")
    parser.add_argument("--out", type=Path)
    options, overrides = parser.parse_known_args()
    targets = options.targets or ["cpu", *(["h200"] if has_cuda_packages() else [])]
    config = load(options.config, overrides)
    parameters = analysis.parameters(analysis.with_vocab_size(config, str(options.config)))
    print(f"{options.config}: {parameters['total']:,} parameters, jax {jax.__version__}, GB")
    print("| for | config | arguments | results | shared | temporaries | peak |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    found = []
    for target in targets:
        for name, changed in rows(options.config, overrides).items():
            figures = measure(changed, target)
            cells = " | ".join(f"{value:.2f}" for key, value in figures.items() if key != "seconds")
            print(f"| {target} | {name} | {cells} |", flush=True)
            found.append({"target": target, "config": name, **figures})
    out = options.out or HERE / "results" / f"step_memory_{options.config.stem}.json"
    about = {"config": str(options.config), "overrides": overrides, "jax": jax.__version__}
    write(out, {**machine(), **about, "parameters": parameters["total"], "rows": found})
    if options.limit is not None:
        over = [r for r in found if r["config"] == "as it is" and r["peak"] > options.limit]
        if over:
            raise SystemExit(f"it does not fit in {options.limit} GB")


if __name__ == "__main__":
    main()
