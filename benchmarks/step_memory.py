"""The memory and the traffic of one training step, by XLA's own plan, with no array made.

    python -m benchmarks.step_memory configs/parallel_stacks.toml [--model.remat none ...]
    python -m benchmarks.step_memory configs/gpt2_xl.toml --targets h200 --devices 8 \\
        --mesh.data 1 --mesh.fsdp 8

The config's true train step (`jaxdecoder/training/memory.py`) is compiled for this machine's CPU
and, where jax's CUDA packages are installed (a GPU is not needed), for an H200, there in bfloat16.
The rows leave out one by one what the config does to save memory, if it does, or with `--policies`
have each policy of `model.remat`. Each device has, in gigabytes (1e9 bytes):

- peak is what a device must hold at once: arguments and results, which share their memory, and
  temporaries. With `--limit` gigabytes the command fails if the config itself does not fit.
- moved is an estimate of what the step reads from memory and writes to it: the operands and the
  results of every instruction (`hlo.py`). It knows no caches, and of a kernel only what goes in and
  comes out; it compares two programs for one device, and is not a time.

Besides, the floating-point operations of XLA's own matrix products (those of attention kernels are
not among them), their number, and the seconds that tracing and compiling took on this machine.
`--turns 20` also takes steps of each on this CPU, in turns, and gives the median of the processor
time of a step, which other programs disturb less than its duration. Rows go to benchmarks/results/;
`--version before` names them, and leaves those of other versions there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hlo import Program
from benchmarks.turns import HERE, machine, write

# What saves memory -> the overrides that leave it out.
SAVINGS = {
    "recomputed activations": ["--model.remat", "none"],
    "bfloat16 moments": ["--optimizer.state-dtype", "float32"],
}


def rows(path: Path, overrides: list[str], policies: bool = False) -> dict[str, Any]:
    """The config as it is, and without each of its savings; or with each policy."""
    from jaxdecoder.config import ModelConfig, choices, load

    config = load(path, overrides)
    if policies:
        named = choices(ModelConfig, "remat")
        return {name: load(path, [*overrides, "--model.remat", name]) for name in named}
    found = {"as it is": config}
    for name, without in SAVINGS.items():
        changed = load(path, [*overrides, *without])
        if changed != config:
            found[f"without {name}"] = changed
    return found


def measure(config: Any, target: str, devices: int = 1) -> dict[str, float]:
    """One step of the config, whose model knows its vocabulary; sizes in gigabytes (1e9 bytes)."""
    from jaxdecoder.devices import DEVICES
    from jaxdecoder.training.memory import compile_step, peak

    start = time.perf_counter()
    _, compiled = compile_step(config, DEVICES[target], devices, steps=1)
    seconds = time.perf_counter() - start
    plan, program = compiled.memory_analysis(), Program(compiled.as_text())
    figures = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes,
        "shared": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "peak": peak(plan),
        "moved": program.bytes_moved(),
    }
    return {
        **{name: n / 1e9 for name, n in figures.items()},
        "teraflops": program.product_flops() / 1e12,
        "products": program.products(),
        "compile_seconds": seconds,
    }


def milliseconds(configs: dict[str, Any], turns: int) -> dict[str, float]:
    """The median processor time of a step of each on this CPU; they take turns."""
    import jax

    from jaxdecoder.devices import DEVICES
    from jaxdecoder.training.memory import compile_step
    from jaxdecoder.training.step import init_state

    programs, states, batches, found = {}, {}, {}, {name: [] for name in configs}
    for name, config in configs.items():
        lowered, programs[name] = compile_step(config, DEVICES["cpu"], steps=1, run=True)
        states[name] = jax.jit(init_state, static_argnums=0)(config)
        batches[name] = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), lowered.batches)
    for turn in range(turns + 1):
        for name, program in programs.items():
            start = time.process_time()
            states[name], metrics = program(states[name], batches[name], ())
            jax.block_until_ready(metrics)
            if turn:  # the first one warms up
                found[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Prints a row for each target and set of savings."""
    import jax

    from jaxdecoder import analysis
    from jaxdecoder.config import load
    from jaxdecoder.devices import DEVICES
    from jaxdecoder.training import ahead

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--targets", nargs="+", choices=DEVICES)
    parser.add_argument("--devices", type=int, default=1, help="over how many of them")
    parser.add_argument("--turns", type=int, default=0, help="steps of each to time on the CPU")
    parser.add_argument("--policies", action="store_true", help="a row for each of model.remat")
    parser.add_argument("--limit", type=float, help="gigabytes the config itself must fit in")
    parser.add_argument("--version", default="now", help="a name for these rows")
    parser.add_argument("--out", type=Path)
    options, overrides = parser.parse_known_args()
    if options.turns and options.targets and "cpu" not in options.targets:
        parser.error("--turns are timed on the CPU, which --targets leaves out")
    jax.config.update("jax_platforms", "cpu")  # it compiles, and runs nothing
    if options.devices > 1:
        jax.config.update("jax_num_cpu_devices", options.devices)
    targets = options.targets or ["cpu", *(["h200"] if ahead.can_compile() else [])]
    ahead.find_compilers()
    config = load(options.config, overrides)
    parameters = analysis.parameters(analysis.with_vocab_size(config, str(options.config)))
    print(f"{options.config}: {parameters['total']:,} parameters, jax {jax.__version__}")
    found: list[dict[str, Any]] = []
    for target in targets:
        for name, changed in rows(options.config, overrides, options.policies).items():
            figures = measure(changed, target, options.devices)
            if not found:
                print(f"| for | config | {' | '.join(figures)} |")
                print("| --- " * (2 + len(figures)) + "|")
            cells = " | ".join(f"{value:.2f}" for value in figures.values())
            print(f"| {target} | {name} | {cells} |", flush=True)
            about = {"version": options.version, "target": target, "devices": options.devices}
            about |= {"config": name}
            found.append({**about, "jax": jax.__version__, **figures})
    if options.turns:
        configs = rows(options.config, overrides, options.policies)
        for name, median in milliseconds(configs, options.turns).items():
            print(f"{name}: {median:.0f} ms of processor time a step")
            row = next(r for r in found if (r["target"], r["config"]) == ("cpu", name))
            row["milliseconds"] = median
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
