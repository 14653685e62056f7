"""What each attention mechanism costs as the context grows, on the CPU: time and memory.

    python -m benchmarks.attention_cost [--contexts 256 ... 8192] [--attentions full linear ...]

Measures one attention layer (projections included) of a fixed width, by itself:

- a training step, forward and backward: its time, and XLA's own count of temporary bytes;
- decoding one token at the end of a full context: its time, and the bytes of the cache.

Time is processor time, summed over the threads of this process, which other processes disturb less
than the clock on the wall; mechanisms take turns, and medians count. Growth is the slope of a line
through the logarithms: 1 is linear, 2 is the square. Windows, blocks and ranks stay as they are
while the context grows; linformer's rank r and block b are such that its compressed pairs, which
grow with the square, reach the number of its exact ones at T = b^2 / r = 8192, the end of what is
measured. Writes benchmarks/results/attention_cost.json and docs/attention_cost.png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.turns import describe, write
from jaxdecoder import analysis
from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.attention import ATTENTIONS, Attention
from jaxdecoder.layers.cache import Cursor

ROOT = Path(__file__).resolve().parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 1,
    "d_model": 128,
    "n_layers": 1,
    "n_heads": 4,
    "position": "rope",
    "attention_window": 128,
    "attention_block": 128,
    "attention_rank": 2,
    "attention_globals": 1,
}
DECODED = 32
"""Tokens in one turn of decoding."""
MEASURES = {
    "train_milliseconds": "training step, ms of processor time",
    "train_bytes": "training step, temporary bytes",
    "decode_milliseconds": "decoding a token, ms of processor time",
    "cache_bytes": "cache, bytes",
}


def training_step(config: ModelConfig, attention: str) -> tuple[Callable[[], Any], int]:
    """Gradients of one layer by its input and parameters, and the temporary bytes it takes."""
    layer, x, positions = _layer(config, attention, config.context_length)

    def loss(params: Any, x: Any, weights: Any) -> Any:
        return jnp.sum(layer.apply(params, x, positions)[0] * weights)

    params = layer.init(jax.random.key(0), x[:, :2], positions[:, :2])
    arguments = (params, x, x[:, ::-1])
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return partial(compiled, *arguments), compiled.memory_analysis().temp_size_in_bytes


def decoding(config: ModelConfig, attention: str) -> tuple[Callable[[], Any], int]:
    """Tokens one after another at the end of a full context, and the bytes of the cache."""
    layer, x, _ = _layer(config, attention, DECODED)
    cache = ATTENTIONS[attention].empty_cache(config, 1, jnp.float32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert size == analysis.cache_bytes(config)

    def decode(params: Any, cache: Any, x: Any) -> Any:
        def step(carry: Any, token: Any) -> Any:
            cache, length = carry
            cursor = Cursor(length, jnp.zeros(1, jnp.int32))
            token = token[None, None]
            out, cache = layer.apply(params, token, cursor.query_positions(1), cache, cursor)
            return (cache, length + 1), out

        begun = jnp.asarray(config.context_length - DECODED)
        return jax.lax.scan(step, (cache, begun), x[0])

    params = layer.init(jax.random.key(0), x, jnp.arange(DECODED)[None])
    return partial(jax.jit(decode), params, cache, x), size


def _layer(config: ModelConfig, attention: str, time: int) -> tuple[Attention, Any, Any]:
    x = jax.random.normal(jax.random.key(1), (1, time, config.d_model))
    return Attention(config, attention), x, jnp.arange(time)[None]


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def measure(context: int, attentions: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each mechanism at one context length."""
    rows, turns = [], []
    for attention in attentions:
        config = ModelConfig(**SHAPE, context_length=context, attention=attention).resolve()  # type: ignore[arg-type]
        train, train_bytes = training_step(config, attention)
        decode, cache_bytes = decoding(config, attention)
        flops = analysis.forward_flops(config, context)["attention"]
        memory = {"train_bytes": train_bytes, "cache_bytes": cache_bytes}
        rows.append({"attention": attention, "context": context, "flops": flops, **memory})
        turns.append((train, decode))
        seconds(train), seconds(decode)
    taken: list[Any] = [([], []) for _ in rows]
    for _ in range(rounds):
        for (train, decode), (training, decoded) in zip(turns, taken, strict=True):
            training.append(1e3 * seconds(train))
            decoded.append(1e3 * seconds(decode) / DECODED)
    for row, (training, decoded) in zip(rows, taken, strict=True):
        row["train_milliseconds"] = statistics.median(training)
        row["decode_milliseconds"] = statistics.median(decoded)
        print(
            f"{row['attention']:15} {context:6} {row['train_milliseconds']:10.2f} ms, "
            f"{row['train_bytes'] / 2**20:8.1f} MiB training; "
            f"{row['decode_milliseconds']:8.4f} ms a token, "
            f"{row['cache_bytes'] / 2**10:9.1f} KiB cache",
            flush=True,
        )
    return rows


def growth(rows: list[dict[str, Any]], attention: str, measured: str) -> float:
    """The exponent of the context length that fits best."""
    own = [row for row in rows if row["attention"] == attention]
    logs = (np.log([row[name] for row in own]) for name in ("context", measured))
    return float(np.polyfit(*logs, 1)[0])


def draw(rows: list[dict[str, Any]], attentions: list[str], path: Path) -> None:
    """Four panels, logarithmic in both directions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 8), sharex=True, layout="constrained")
    for panel, (measured, title) in zip(panels.flat, MEASURES.items(), strict=True):
        for number, attention in enumerate(attentions):
            own = [row for row in rows if row["attention"] == attention]
            panel.loglog(
                [row["context"] for row in own],
                [row[measured] for row in own],
                marker="osv^Dx+"[number % 7],
                label=f"{attention}, {growth(rows, attention, measured):.2f}",
            )
        panel.set_title(title)
        panel.legend(fontsize="small", title="growth: exponent of T")
        panel.grid(alpha=0.3, which="both")
        panel.set_xticks([row["context"] for row in rows], minor=False)
        panel.set_xticklabels([str(row["context"]) for row in rows])
        panel.minorticks_off()
    for panel in panels[1]:
        panel.set_xlabel("context length T, tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192]
    )
    names = list(ATTENTIONS)
    parser.add_argument("--attentions", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "attention_cost.json"
    )
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "attention_cost.png")
    options = parser.parse_args()

    described = describe(shape=SHAPE, rounds=options.rounds)
    rows = [
        row
        for context in options.contexts
        for row in measure(context, options.attentions, options.rounds)
    ]
    grown = {
        attention: {name: growth(rows, attention, name) for name in ("flops", *MEASURES)}
        for attention in options.attentions
    }
    print(f"\n{'exponent of T':15} " + " ".join(f"{name:>20}" for name in ("flops", *MEASURES)))
    for attention, exponents in grown.items():
        print(f"{attention:15} " + " ".join(f"{value:20.2f}" for value in exponents.values()))
    write(options.out, {**described, "growth": grown, "results": rows})
    draw(rows, options.attentions, options.picture)


if __name__ == "__main__":
    main()
