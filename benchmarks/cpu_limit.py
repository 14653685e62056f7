"""What limits a training step on a CPU: each of its products alone, and the traffic of the rest.

    python -m benchmarks.cpu_limit [--shape demo] [--passes 1 2 4] [--core 0]

For each product of a step of `train_cpu.py` (forward, gradient of the input, gradient of the
weights) it measures the rate when that product runs alone, with its arrays as warm as they get. For
all else it counts the bytes that must be read and written at least once, and divides by the
measured rate of a sweep over memory. The sum is the time of a step without any overhead. `--core`
binds the process to one core; left out, it has all of them. Compare runs of one machine only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.train_cpu import SHAPES, STEPS, ours
from benchmarks.turns import describe, write
from jaxdecoder.kernels.product import product as linear
from jaxdecoder.training.devices import stay_on

FLOAT = 4


class Product(NamedTuple):
    """A product of a step: (batch, rows, inner) x (batch, inner, columns), `count` times."""

    name: str
    count: int
    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Floating-point operations of all of them, forward."""
        return 2 * self.count * self.batch * self.rows * self.inner * self.columns


def products(shape: dict[str, int], passes: int) -> list[Product]:
    """The products of a step of a plain GPT in so many passes; half of all pairs attend."""
    layers, width, time_ = shape["n_layers"], shape["d_model"], shape["context_length"]
    sequences = shape["batch_size"] // passes
    tokens, heads = sequences * time_, shape["n_heads"] * sequences
    blocks = passes * layers
    return [
        Product("query, key, value, out", 4 * blocks, 1, tokens, width, width),
        Product("up", blocks, 1, tokens, width, 4 * width),
        Product("down", blocks, 1, tokens, 4 * width, width),
        # A causal mask leaves half of the keys to a query, on average.
        Product("scores", blocks, heads, time_, width // shape["n_heads"], time_ // 2),
        Product("mixing", blocks, heads, time_, time_ // 2, width // shape["n_heads"]),
        Product("head", passes, 1, tokens, width, shape["vocab_size"]),
    ]


def seconds(function: Callable[..., Any], *arguments: Any, least: float = 0.2) -> float:
    """The median time of a call, over `least` seconds of them."""
    jax.block_until_ready(function(*arguments))
    taken: list[float] = []
    while sum(taken) < least or len(taken) < 5:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(product: Product) -> dict[str, float]:
    """GFLOP/s of a product and of its two gradients, alone."""
    draw = np.random.default_rng(0)

    def array(*sizes: int) -> jax.Array:
        sizes = sizes if product.batch == 1 else (product.batch, *sizes)
        return jnp.asarray(draw.normal(size=sizes), jnp.float32)

    x = array(product.rows, product.inner)
    w = array(product.inner, product.columns)
    y = array(product.rows, product.columns)
    forward = linear if product.batch == 1 else jnp.matmul
    ways = {
        "forward": jax.jit(forward),
        "of_input": jax.jit(lambda x, w, y: jax.vjp(lambda x: forward(x, w), x)[1](y)),
        "of_weights": jax.jit(lambda x, w, y: jax.vjp(lambda w: forward(x, w), w)[1](y)),
    }
    flops = product.flops / product.count
    return {
        name: flops / seconds(way, *((x, w) if name == "forward" else (x, w, y))) / 1e9
        for name, way in ways.items()
    }


def traffic(shape: dict[str, int], passes: int) -> dict[str, float]:
    """Bytes that the rest of a step reads and writes at least once, by what they are for."""
    width, layers, time_ = shape["d_model"], shape["n_layers"], shape["context_length"]
    tokens = shape["batch_size"] * time_
    stream, hidden = FLOAT * tokens * width, FLOAT * tokens * 4 * width
    weights = FLOAT * shape["batch_size"] * shape["n_heads"] * time_ * time_ // 2
    parameters = FLOAT * (12 * layers * width**2 + 2 * shape["vocab_size"] * width)
    return {
        # Each norm reads the stream and writes its result, and reads both again on the way back.
        "norms": layers * 2 * 5 * stream,
        "residual sums": layers * 2 * 3 * stream,
        "activation": layers * 5 * hidden,
        # Scores are read, weights written; weights and their gradients are read on the way back.
        "softmax": layers * 5 * weights,
        "loss": 4 * FLOAT * tokens * shape["vocab_size"],
        # Parameter, gradient and two moments are read; parameter and moments are written.
        "optimiser": 7 * parameters,
        "sums over passes": (passes - 1) * 3 * parameters,
    }


def sweep() -> float:
    """Bytes a second of c = a + b over arrays that leave the caches."""
    a, b = (jnp.ones(2**24, jnp.float32) for _ in range(2))
    return 3 * FLOAT * 2**24 / seconds(jax.jit(jnp.add), a, b)


def limit(name: str, passes: int) -> dict[str, Any]:
    """The products, the traffic and the step of a shape; printed."""
    shape, rates, total = SHAPES[name], {}, 0.0
    for product in products(shape, passes):
        rates[product.name] = measure(product)
        spent = [product.flops / rate / 1e6 for rate in rates[product.name].values()]
        total += sum(spent)
        told = ", ".join(f"{way} {rate:.0f}" for way, rate in rates[product.name].items())
        print(f"  {product.name:24} {told} GFLOP/s: {sum(spent):8.2f} ms a step")
    bandwidth = sweep()
    moved = traffic(shape, passes)
    rest = 1e3 * sum(moved.values()) / bandwidth
    turn, steps = ours(shape, passes, STEPS[name], "adamw"), STEPS[name]
    step = 1e3 * statistics.median(turn(steps) / steps for _ in range(5))
    print(
        f"{name} in {passes}: products {total:.1f} ms, the rest {rest:.1f} ms "
        f"({sum(moved.values()) / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s), together "
        f"{total + rest:.1f} ms; a step takes {step:.1f}, {step / (total + rest):.2f} times that",
        flush=True,
    )
    return {
        "shape": name,
        "passes": passes,
        "gigaflops": rates,
        "product_milliseconds": total,
        "bytes": moved,
        "bytes_per_second": bandwidth,
        "rest_milliseconds": rest,
        "step_milliseconds": step,
    }


def main() -> None:
    """Reads the command line and measures."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--shape", choices=SHAPES, default="demo")
    options.add_argument("--passes", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--core", type=int, help="bind the process to this core")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if chosen.core is not None:
        stay_on(chosen.core)
    described = describe(bound_to_one_core=chosen.core is not None)
    report = {**described, "results": [limit(chosen.shape, n) for n in chosen.passes]}
    if chosen.out is not None:
        write(chosen.out, report)
    else:
        print(json.dumps(report["versions"]))


if __name__ == "__main__":
    main()
