"""Pruning on trained runs: what each way costs in loss after recovery, and saves in wall clock.

    python -m benchmarks.compression_pruning [--presets stories shakespeare_small] [--quick]

Runs that are not there are trained first, as runs/PRESET; pruned ones go to runs/pruning/. Every
row recovers for as many steps as the control, which is the dense model trained on for these steps
by the same recipe. Losses are nats a token over the whole validation split. The smaller models and
the dense one take turns at decoding (batch 1) and at forward passes (a training batch). A row is
written as soon as it is there, to benchmarks/results/compression_pruning.json and .md, and one that
is there is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.turns import HERE, Turn, alternate, describe, trained, write
from jaxdecoder.compression.options import PRUNING, Prune
from jaxdecoder.compression.passes import Made, run_pass
from jaxdecoder.compression.pruning import prune, recovery
from jaxdecoder.config import ModelConfig, load
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import Corpus, prepare
from jaxdecoder.layers.serial import n_turns
from jaxdecoder.sampling.generate import encode_prompt, generate, show_sample
from jaxdecoder.training.runs import Model, load_model, read_config

RECOVERY = {"stories": 600, "shakespeare_small": 600}
LEARNING_RATE = {"stories": None, "shakespeare_small": None}
QUICK = (
    *("--model.d-model", "32", "--model.n-layers", "3", "--model.n-heads", "3"),
    *("--model.d-head", "8", "--model.context-length", "32", "--data.tokenizer", "char"),
    *("--data.source", "stories", "--data.stories-bytes", "60000", "--train.steps", "20"),
)


def at_least_a_third(n: int) -> float:
    """The share of n that the fewest make that are a third of them or more."""
    return math.ceil(n / 3) / n


Options = Callable[[ModelConfig], dict[str, Any]]
ROWS: dict[str, Options | None] = {
    "control: as many more steps": None,
    "50% by Wanda": lambda c: {"method": "wanda", "sparsity": 0.5},
    "50% by magnitude, gradual": lambda c: {
        "method": "magnitude",
        "sparsity": 0.5,
        "gradual": True,
    },
    "2:4 by Wanda": lambda c: {"method": "n-m"},
    "half of the neurons": lambda c: {"method": "neurons", "sparsity": 0.5},
    "a third of the heads, or the next": lambda c: {
        "method": "heads",
        "sparsity": at_least_a_third(c.n_heads),
    },
    "a third of the heads, to the nearest": lambda c: {"method": "heads", "sparsity": 1 / 3},
    "a third of the layers, or the next": lambda c: {
        "method": "layers",
        "sparsity": at_least_a_third(n_turns(c)),
    },
    "a third of the layers, to the nearest": lambda c: {"method": "layers", "sparsity": 1 / 3},
}


def pruned(name: str, run: Path, preset: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """A row: the run of that name, made of `run`, and what its summary says."""
    model = read_config(run).model
    steps = 10 if chosen.quick else chosen.recover_steps or RECOVERY[preset]
    rate = chosen.learning_rate or LEARNING_RATE[preset]
    slug = "".join(c if c.isalnum() else "_" for c in name)
    out = Path("runs") / "pruning" / f"{run.name}_{slug}"
    options = Prune(str(run), str(out), recover_steps=steps, learning_rate=rate)
    command = f"python -m benchmarks.compression_pruning # {name}, {steps} steps"
    if (make := ROWS[name]) is None:

        def carry_on(model: Model, corpus: Corpus) -> Made:
            config = dataclasses.replace(
                model.config,
                train=dataclasses.replace(model.config.train, steps=steps),
                optimizer=recovery(options, model.config, steps),
            )
            return Made(config, model.params, {})

        summary = run_pass(str(run), str(out), command, carry_on, sampler=show_sample)
    else:
        asked = make(model)
        summary = prune(PRUNING[asked["method"]](**{**vars(options), **asked}), command)
    told = summary["compression"]
    smaller = read_config(out).model
    shape = {
        key: getattr(smaller, key) for key in ("n_layers", "n_heads", "d_ff") if smaller != model
    }
    before = told["before"]["validation_loss"]
    return {
        "run": run.name,
        "pruned": name,
        "out": str(out),
        "steps": steps,
        "learning_rate": read_config(out).optimizer.learning_rate,
        "before": before,
        "at_once": told["at_once"]["validation_loss"],
        "after": summary["validation_loss"],
        "over_before": summary["validation_loss"] - before,
        "parameters": told["at_once"]["parameters"],
        "zeros": told.get("after", {}).get("zeros", 0),
        "shape": shape,
    }


def decoding(model: Model) -> Turn:
    """Samples so many tokens at batch 1, each turn with another key."""
    prompt = encode_prompt(model.tokenizer, model.config.train.sample_prompt, model.config.data)
    numbers = itertools.count()

    def turn(count: int) -> float:
        start, key = time.perf_counter(), jax.random.key(next(numbers))
        for _ in generate(model.decoder, model.params, [prompt], max_new_tokens=count, key=key):
            pass
        return time.perf_counter() - start

    return turn


def passing(model: Model, inputs: Any) -> Turn:
    """So many forward passes over one batch, logits included."""
    logits = jax.jit(lambda params, tokens: model.decoder.apply({"params": params}, tokens))

    def turn(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            logits(model.params, inputs).block_until_ready()
        return time.perf_counter() - start

    return turn


def measured(row: dict[str, Any], dense: Model, chosen: argparse.Namespace) -> dict[str, Any]:
    """Speeds of a smaller model and the dense one, in turns."""
    smaller = load_model(row["out"])
    corpus = prepare(dense.config.data)
    (batch,) = Feed.of(dense.config, corpus, "validation").fixed(1)
    count = 20 if chosen.quick else chosen.tokens
    kinds = {
        "decode": (decoding, count, 1),
        "forward": (partial(passing, inputs=batch.inputs), 4, batch.inputs.size),
    }
    speeds = {}
    for kind, (turn_of, steps, tokens) in kinds.items():
        sides = {"pruned": turn_of(smaller), "dense": turn_of(dense)}
        for turn in sides.values():
            turn(steps)  # compiles
        speeds[kind] = alternate(kind, sides, steps, chosen.rounds, tokens)
    return speeds


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| run | pruned | steps | before | at once | after | after - before | over the control |"
        " parameters | zeros | decode | forward |",
        "|" + " --- |" * 12,
    ]
    control = {row["run"]: row["after"] for row in rows if row["pruned"].startswith("control")}
    for row in rows:
        shape = ", ".join(f"{key} {value}" for key, value in row["shape"].items())
        speeds = [
            f"{row['speed'][kind]['ratio']:.2f}x" if "speed" in row else "-"
            for kind in ("decode", "forward")
        ]
        over = row["after"] - control.get(row["run"], math.nan)
        lines.append(
            f"| {row['run']} | {row['pruned']}{f' ({shape})' if shape else ''} | {row['steps']} | "
            f"{row['before']:.4f} | {row['at_once']:.4f} | {row['after']:.4f} | "
            f"{row['over_before']:+.4f} | {over:+.4f} | {row['parameters']:,} | {row['zeros']:,} | "
            f"{' | '.join(speeds)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the command line, prunes and measures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=RECOVERY, default=list(RECOVERY))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--recover-steps", type=int, help=f"left out: {RECOVERY}")
    parser.add_argument("--learning-rate", type=float, help="of the recovery; left out: the run's")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=192, help="decoded in one turn")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see it work")
    name = "compression_pruning"
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    chosen = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = json.loads(chosen.out.read_text())["rows"] if chosen.out.exists() else []
    described = describe()
    for preset in chosen.presets:
        run = Path("runs") / (f"quick_{preset}" if chosen.quick else preset)
        quick = QUICK if chosen.quick else ()
        trained(load(f"configs/{preset}.toml", ["--train.out", str(run), *quick]))
        dense = load_model(run)
        for number, row_name in enumerate(chosen.rows):
            if any((row["run"], row["pruned"]) == (run.name, row_name) for row in rows):
                continue
            same = [r for r in chosen.rows[:number] if _asks(r, dense) == _asks(row_name, dense)]
            if same and ROWS[row_name] is not None:
                continue  # a third to the nearest is the next one already
            row = pruned(row_name, run, preset, chosen)
            if row["shape"]:
                row["speed"] = measured(row, dense, chosen)
            rows.append(row)
            write(chosen.out, {**described, "rows": rows})
            chosen.out.with_suffix(".md").write_text(markdown(rows))
            print(
                f"{run.name:20} {row_name:40} {row['before']:.4f} -> {row['at_once']:.4f} -> "
                f"{row['after']:.4f} ({row['over_before']:+.4f})",
                flush=True,
            )
    print(markdown(rows))


def _asks(name: str, dense: Model) -> Any:
    """What a row takes away: the counts for parts, else its name."""
    make = ROWS[name]
    asked = {} if make is None else make(dense.config.model)
    totals = {"heads": dense.config.model.n_heads, "layers": n_turns(dense.config.model)}
    method = asked.get("method", name)
    if method not in totals:
        return name
    return method, math.floor(asked["sparsity"] * totals[method] + 0.5)


if __name__ == "__main__":
    main()
