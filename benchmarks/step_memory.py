"""The memory and the traffic of one training step, by XLA's own plan, with no array made.

    python -m benchmarks.step_memory configs/parallel_stacks.toml [--model.no-remat ...]

The config's true train step, its state donated, is compiled for this machine's CPU and, where jax's
CUDA packages are installed (a GPU is not needed), for an H200, there in bfloat16. The rows leave
out one by one what the config does to save memory, if it does. In gigabytes (1e9 bytes):

- peak is what a device must hold at once: arguments and results, which share their memory, and
  temporaries. With `--limit` gigabytes the command fails if the config itself does not fit.
- moved is an estimate of what the step reads from memory and writes to it: the operands and the
  results of every instruction (`hlo.py`). It knows no caches, and of a kernel only what goes in and
  comes out; it compares two programs for one device, and is not a time.

Besides, the floating-point operations of XLA's own matrix products (those of attention kernels are
not among them), their number, and the seconds that compiling took on this machine. Rows go to
benchmarks/results/; `--version before` names them, and leaves those of other versions there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.hlo import Program
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


def compiled(config: Any, target: str) -> tuple[Any, Program, float]:
    """XLA's memory analysis of one step, the program, and the seconds that compiling took."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.data.batches import Batch
    from jaxdecoder.training.step import init_state, make_step

    dtype = {"cpu": "float32", "h200": "bfloat16"}[target]
    train = dataclasses.replace(config.train, compute_dtype=dtype)
    config = dataclasses.replace(config, train=train)
    shape = (train.batch_size, config.model.context_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.float32))
    state = jax.eval_shape(partial(init_state, config))
    step = make_step(config)
    if target == "cpu":
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
        start = time.perf_counter()
        program = lowered.compile()
        seconds = time.perf_counter() - start
        return program.memory_analysis(), Program(program.as_text()), seconds
    from gpu_compile import compile_for_h200

    record = compile_for_h200(step, state, batch, donate_argnums=0)
    return record.memory, Program(record.hlo), record.seconds


def measure(config: Any, target: str) -> dict[str, float]:
    """One step of the config, whose model knows its vocabulary; sizes in gigabytes (1e9 bytes)."""
    memory, program, seconds = compiled(config, target)
    figures = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "shared": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    figures["peak"] = (
        figures["arguments"] + figures["results"] - figures["shared"] + figures["temporaries"]
    )
    figures["moved"] = program.bytes_moved()
    return {
        **{name: n / 1e9 for name, n in figures.items()},
        "teraflops": program.product_flops() / 1e12,
        "products": program.products(),
        "compile_seconds": seconds,
    }


def main() -> None:
    """Prints a row for each target and set of savings."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import jax

    jax.config.update("jax_platforms", "cpu")  # it compiles, and runs nothing
    from gpu_compile import CUDA_PACKAGES

    from jaxdecoder import analysis
    from jaxdecoder.config import load

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--targets", nargs="+", choices=("cpu", "h200"))
    parser.add_argument("--limit", type=float, help="gigabytes the config itself must fit in")
    parser.add_argument("--version", default="now", help="a name for these rows")
    parser.add_argument("--out", type=Path)
    options, overrides = parser.parse_known_args()
    targets = options.targets or ["cpu", *(["h200"] if CUDA_PACKAGES else [])]
    config = load(options.config, overrides)
    parameters = analysis.parameters(analysis.with_vocab_size(config, str(options.config)))
    print(f"{options.config}: {parameters['total']:,} parameters, jax {jax.__version__}")
    found: list[dict[str, Any]] = []
    for target in targets:
        for name, changed in rows(options.config, overrides).items():
            figures = measure(changed, target)
            if not found:
                print(f"| for | config | {' | '.join(figures)} |")
                print("| --- " * (2 + len(figures)) + "|")
            cells = " | ".join(f"{value:.2f}" for value in figures.values())
            print(f"| {target} | {name} | {cells} |", flush=True)
            about = {"version": options.version, "target": target, "config": name}
            found.append({**about, "jax": jax.__version__, **figures})
    out = options.out or HERE / "results" / f"step_memory_{options.config.stem}.json"
    held = json.loads(out.read_text())["rows"] if out.exists() else []
    others = [row for row in held if row.get("version", "now") != options.version]
    about = {"config": str(options.config), "overrides": overrides}
    everything = {**about, "parameters": parameters["total"], "rows": [*others, *found]}
    write(out, {**machine(), **everything})
    if options.limit is not None:
        over = [r for r in found if r["config"] == "as it is" and r["peak"] > options.limit]
        if over:
            raise SystemExit(f"it does not fit in {options.limit} GB")


if __name__ == "__main__":
    main()
