"""Attention on the CPU: time and peak memory of each implementation, forward and backward.

    python -m benchmarks.attention_cpu [--times 256 1024 4096] [--rounds 7] [--json out.json]

Implementations take turns, so that a noisy machine is unfair to none, and the median counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.kernels import flash_attention, masks

# Masks, and into how many segments the tokens of a row are packed (`segment_ids`, if more than 1).
CASES = {
    "causal": (masks.causal(), 1),
    "window 256": (masks.causal() & masks.sliding_window(256), 1),
    "causal, 8 segments": (masks.causal(), 8),
}
IMPLEMENTATIONS = ("reference", "rows", "chunked")


def compiled(shape: tuple[int, ...], case: str, implementation: str) -> Any:
    mask, n_segments = CASES[case]

    def summed(q: Any, k: Any, v: Any, weights: Any, segments: Any) -> Any:
        segment_ids = segments if n_segments > 1 else None
        out = flash_attention(
            q, k, v, mask=mask, segment_ids=segment_ids, implementation=implementation
        )
        return jnp.sum(out * weights)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 4
    arrays.append(jax.ShapeDtypeStruct(shape[:2], jnp.int32))
    return jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2))).lower(*arrays).compile()


def seconds(function: Any, arrays: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    return time.perf_counter() - start


def compare(shape: tuple[int, ...], case: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and mebibytes of each implementation."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, jnp.float32) for key in keys]
    batch, length = shape[:2]
    segments = jnp.arange(length, dtype=jnp.int32) * CASES[case][1] // length
    arrays.append(jnp.broadcast_to(segments, (batch, length)))
    functions = {name: compiled(shape, case, name) for name in IMPLEMENTATIONS}
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        seconds(function, arrays)
    for _ in range(rounds):
        for name, function in functions.items():
            taken[name].append(seconds(function, arrays))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(taken[name]),
            "mebibytes": function.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, function in functions.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=4096, help="batch x time, at least")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32, forward and backward")
    print("| mask | batch, time, heads, width | " + " | ".join(IMPLEMENTATIONS) + " | faster |")
    print("| --- | --- | " + "--- | " * len(IMPLEMENTATIONS) + "--- |")
    rows = []
    for length, name in itertools.product(options.times, options.cases):
        batch = max(1, options.tokens // length)
        shape = (batch, length, options.heads, options.width)
        found = compare(shape, name, options.rounds)
        cells = [f"{x['milliseconds']:.1f} ms, {x['mebibytes']:.0f} MiB" for x in found.values()]
        reference, *others = (found[name]["milliseconds"] for name in IMPLEMENTATIONS)
        faster = f"{reference / min(others):.2f} x"
        print(
            f"| {name} | {', '.join(map(str, shape))} | {' | '.join(cells)} | {faster} |",
            flush=True,
        )
        rows.append({"mask": name, "shape": shape, **found})
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
