"""Training speed on CPUs, next to two peers under `torch.compile`.

    python -m benchmarks.train_cpu [--peer-python .venv-torch/bin/python] [--shapes demo]
        [--optimizers adamw muon]

The peers are GPT-2 of `transformers` and a plain GPT (`torch_gpt.py`) with fused attention. All
train the same shape in float32: forward, backward, clipping and the optimiser, no dropout. Use a
quiet machine: the peers' threads wait for each other more often, so a busy one slows them more.
Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

from benchmarks.turns import Turn, alternate, describe, parser, peer, write

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "batch_size": 12,
        "context_length": 64,
        "n_layers": 4,
        "n_heads": 4,
        "d_model": 128,
        "vocab_size": 65,
    },
    "demo": {
        "batch_size": 8,
        "context_length": 256,
        "n_layers": 4,
        "n_heads": 4,
        "d_model": 128,
        "vocab_size": 1024,
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
GRADIENT_ACCUMULATION = {"small": 1, "demo": 1, "medium": 8}
# Steps in one turn.
STEPS = {"small": 20, "demo": 5, "medium": 1}
PEERS = {"transformers": "train", "plain": "train_plain"}


def ours(
    shape: dict[str, int], accumulation: int, steps: int, optimizer: str, attention: str = "auto"
) -> Turn:
    """Compiles `steps` steps as one call; a turn gives the seconds they took."""
    import jax
    import numpy as np

    from jaxdecoder.config import Config, ModelConfig, OptimizerConfig, TrainConfig
    from jaxdecoder.data.batches import Batch
    from jaxdecoder.training.sharding import (
        batch_sharding,
        known_to_layers,
        make_mesh,
        state_sharding,
    )
    from jaxdecoder.training.step import fuse, init_state, make_step

    shape = dict(shape)
    batch_size = shape.pop("batch_size")
    config = Config(
        model=ModelConfig(**shape, attention_implementation=attention),
        optimizer=OptimizerConfig(name=optimizer, schedule="constant"),
        train=TrainConfig(batch_size=batch_size, gradient_accumulation=accumulation),
    )
    mesh = make_mesh(config)
    state = init_state(config)
    shardings = (
        state_sharding(state, mesh, config.architecture),
        batch_sharding(mesh, leading=1),
    )
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
        with known_to_layers(mesh):
            held[0], metrics = run(held[0], batch)
        jax.block_until_ready((held[0], metrics))
        return time.perf_counter() - start

    turn(steps)
    return turn


def compare(name: str, optimizer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating turns of all sides on one shape."""
    shape, steps = SHAPES[name], STEPS[name]
    accumulation = options.gradient_accumulation or GRADIENT_ACCUMULATION[name]
    mine, versions = ours(shape, accumulation, steps, optimizer, options.attention), {}
    sides = {"jaxdecoder": mine}
    tokens = shape["batch_size"] * shape["context_length"]
    told = {**shape, "optimizer": optimizer}
    with contextlib.ExitStack() as peers:
        for who in options.peers:
            started = peer(options.peer_python, PEERS[who], told, options.threads)
            sides[who], versions = peers.enter_context(started)
        result = alternate(f"{name} {optimizer}", sides, steps, options.rounds, tokens)
    return {
        "shape": {"name": name, **shape},
        "optimizer": optimizer,
        "gradient_accumulation": accumulation,
        "attention": options.attention,
        "versions": versions,
        **result,
    }


def main() -> None:
    """Reads the command line and measures."""
    options = parser(__doc__.split("\n")[0], "train_cpu", SHAPES)
    options.add_argument("--optimizers", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    options.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    options.add_argument("--devices", type=int, default=1, help="CPU devices the cores make up")
    options.add_argument("--gradient-accumulation", type=int, help="instead of the shape's own")
    options.add_argument("--attention", default="auto", help="model.attention_implementation")
    chosen = options.parse_args()
    import jax

    from jaxdecoder.config import Config, TrainConfig
    from jaxdecoder.training.devices import set_up

    jax.config.update("jax_platforms", "cpu")
    set_up(Config(train=TrainConfig(cpu_devices=chosen.devices)))
    described = describe(devices=chosen.devices)
    results = [
        compare(name, optimizer, chosen)
        for name in chosen.shapes
        for optimizer in chosen.optimizers
    ]
    write(chosen.out, {**described, "results": results})


if __name__ == "__main__":
    main()
