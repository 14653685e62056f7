"""Losses and bytes on every kind of mesh, beside those of one device: python -m benchmarks.meshes.

Eight devices are simulated on the CPU. A small model of every attention mechanism, in every layout,
takes the same steps on one device and on each mesh. The table says how far apart the losses ever
are, and how many bytes of training state (parameters and AdamW's moments) a device holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jaxdecoder.config import Config, ModelConfig
from jaxdecoder.config.sections import DataConfig, MeshConfig, OptimizerConfig, TrainConfig

DEVICES = 8
STEPS = 20

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 8": MeshConfig(data=1, tensor=8),
    "context 8": MeshConfig(data=1, context=8),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 2, context 2, tensor 2": MeshConfig(data=2, context=2, tensor=2),
    "fsdp 2, context 4": MeshConfig(data=1, fsdp=2, context=4),
}


def config(attention: str, layout: str, folder: Path) -> Config:
    """Return a small model with rotary positions, grouped keys, and dropout."""
    model = ModelConfig(
        context_length=64,
        d_model=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=2,
        d_ff=128,
        attention=attention,
        attention_window=24,
        attention_block=16,
        layout=layout,
        position="rope",
        dropout=0.1,
    )
    return Config(
        model=model,
        data=DataConfig(stories_bytes=100_000, cache=str(folder)),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(
            steps=STEPS, steps_per_call=STEPS, batch_size=8, evaluate_every=STEPS, out=str(folder)
        ),
    )


def losses(config: Config, devices: Sequence[Any]) -> tuple[list[float], int]:
    """Return the losses of all steps and one validation loss, and the bytes that a device holds."""
    import jax

    from jaxdecoder.data.tokens import prepare
    from jaxdecoder.training import runs
    from jaxdecoder.training.single import Alone
    from jaxdecoder.training.step import next_token

    corpus = prepare(config.data)
    config = runs.complete(config, corpus)
    alone = Alone(config, corpus, next_token(config), devices)
    state = alone.start(None)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    state, metrics = alone.advance(state, alone.batches(0, STEPS))
    return [*map(float, metrics.train_loss), *alone.losses(state, "validation", 1)], held


class Row(TypedDict):
    """What one mesh does to one model."""

    layout: str
    attention: str
    mesh: str
    apart: float
    """The largest difference of a loss, in nats a token."""
    bytes: int
    """Of the training state, on a device."""
    share: float
    """Of what one device would hold."""


def rows(
    attentions: Sequence[str],
    layouts: Sequence[str],
    folder: Path,
    chosen: Mapping[str, MeshConfig],
) -> Iterator[Row]:
    """Yield a row for each layout, mechanism and mesh."""
    import jax

    devices = jax.devices()
    for layout in layouts:
        for attention in attentions:
            own = config(attention, layout, folder)
            one, whole = losses(own, devices[:1])
            for name, mesh in chosen.items():
                found, held = losses(dataclasses.replace(own, mesh=mesh), devices)
                apart = max(abs(a - b) for a, b in zip(one, found, strict=True))
                yield Row(
                    layout=layout,
                    attention=attention,
                    mesh=name,
                    apart=apart,
                    bytes=held,
                    share=held / whole,
                )


def main() -> None:
    """Print the table, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", nargs="*", default=[], help="mechanisms; left out: all")
    parser.add_argument("--layout", nargs="*", default=[], help="layouts; left out: all")
    parser.add_argument("--mesh", nargs="*", default=[], choices=MESHES, help="left out: all")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    given = parser.parse_args()
    # What is compiled takes a second to run, and minutes to compile well.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    from jaxdecoder.decoder import LAYOUTS
    from jaxdecoder.layers.attention import ATTENTIONS

    attentions, layouts = given.attention or list(ATTENTIONS), given.layout or list(LAYOUTS)
    print("| layout | attention | mesh | largest difference of a loss | bytes a device | share |")
    print("| --- | --- | --- | --- | --- | --- |")
    found, chosen = [], {name: MESHES[name] for name in given.mesh or MESHES}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(attentions, layouts, Path(folder), chosen):
            found.append(row)
            print(
                f"| {row['layout']} | {row['attention']} | {row['mesh']} | {row['apart']:.1e} "
                f"| {row['bytes']:,} | {row['share']:.2f} |",
                flush=True,
            )
            if given.out:
                given.out.write_text(json.dumps({"steps": STEPS, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
