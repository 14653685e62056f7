"""Early exits: what stopping early costs in loss and saves in time, over thresholds.

    python train.py configs/stories_early_exit.toml
    python -m benchmarks.early_exit runs/stories_early_exit

For each threshold: the loss of validation text decoded token by token, the mean depth at which its
tokens stop, and tokens/s of sampling at batch 1 next to the same weights at full depth without any
exits, the two taking turns. Writes a table, benchmarks/results/early_exit.json and
docs/early_exit.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from benchmarks.turns import HERE, Turn, alternate, describe, write
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import prepare
from jaxdecoder.sampling.generate import encode_prompt, generate
from jaxdecoder.training.evaluation import decoded_losses
from jaxdecoder.training.runs import Model, load_model

THRESHOLDS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9, 0.8, 0.6)
# The seconds of this process's own work are nearly the same on a machine that others use too.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def sampling(model: Model, decoder: Any, options: argparse.Namespace) -> Turn:
    """Draws so many tokens at temperature 1, each turn with another key."""
    prompt = encode_prompt(model.tokenizer, model.config.train.sample_prompt, model.config.data)
    clock, turns = CLOCKS[options.clock], itertools.count()

    def turn(count: int) -> float:
        key = jax.random.key(next(turns))
        start = clock()
        chunks = generate(decoder, model.params, [prompt], max_new_tokens=count, key=key)
        assert sum(len(row) for (row,) in chunks) == count
        return clock() - start

    turn(options.tokens)
    return turn


def sweep(model: Model, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each threshold."""
    data, config = model.config.data, model.config.model
    corpus = prepare(data)
    end = corpus.tokenizer.end_token
    feed = Feed(corpus.validation, data, options.texts, config.context_length, 0, end)
    (batch,) = feed.fixed(1)

    def side(**changes: Any) -> Any:
        return model.decoder.clone(config=dataclasses.replace(config, **changes))

    def mean_loss(decoder: Any) -> tuple[float, float]:
        losses, depths = decoded_losses(decoder, model.params, batch)
        total = np.sum(batch.weights)
        return tuple(float(np.sum(x * batch.weights) / total) for x in (losses, depths))

    full, _ = mean_loss(side(depth="fixed"))
    turn_of_full = sampling(model, side(depth="fixed"), options)
    rows = []
    for threshold in options.thresholds:
        early = side(exit_threshold=threshold, exit_confidence=options.confidence)
        loss, depth = mean_loss(early)
        sides = {"early exit": sampling(model, early, options), "full depth": turn_of_full}
        speed = alternate(f"{threshold:g}", sides, options.tokens, options.rounds, 1)
        rows.append(
            {
                "threshold": threshold,
                "loss": loss,
                "loss_over_full_depth": loss - full,
                "mean_depth": depth,
                "speed": speed,
            }
        )
        print(f"{threshold:10g} loss {loss:.4f} ({loss - full:+.4f}), mean depth {depth:.2f}\n")
    return rows


def draw(rows: list[dict[str, Any]], layers: int, path: Path) -> None:
    """Loss against mean depth, and against speed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    loss = [row["loss_over_full_depth"] for row in rows]
    axes[0].plot([row["mean_depth"] for row in rows], loss, "o-")
    axes[0].set(xlabel=f"mean depth, of {layers} blocks", ylabel="nats a token over full depth")
    axes[1].plot([row["speed"]["ratio"] for row in rows], loss, "o-")
    axes[1].set(xlabel="tokens/s, of those at full depth")
    for axis in axes:
        axis.axhline(0.02, color="grey", linewidth=0.8, linestyle="--")
        axis.grid(alpha=0.3)
    for row in rows:
        at = (row["speed"]["ratio"], row["loss_over_full_depth"])
        axes[1].annotate(f" {row['threshold']:g}", at, fontsize=7, va="top")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Reads the command line and measures."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("run", help="folder of a run with model.depth = early_exit")
    options.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    options.add_argument("--confidence", choices=["probability", "margin"], default="probability")
    options.add_argument("--texts", type=int, default=48, help="validation texts of a context each")
    options.add_argument("--tokens", type=int, default=192, help="sampled in one turn")
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--out", type=Path, default=HERE / "results" / "early_exit.json")
    options.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "early_exit.png")
    chosen = options.parse_args()
    jax.config.update("jax_platforms", "cpu")
    model = load_model(chosen.run)
    if model.config.model.depth != "early_exit":
        raise SystemExit(f"{chosen.run}: its model.depth is {model.config.model.depth}")
    described = describe(confidence=chosen.confidence, clock=chosen.clock, step=model.step)
    rows = sweep(model, chosen)
    write(chosen.out, {**described, "run": dataclasses.asdict(model.config), "results": rows})
    draw(rows, model.config.model.n_layers, chosen.figure)


if __name__ == "__main__":
    main()
