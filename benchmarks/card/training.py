"""How fast a training step is, beside a plain GPT in PyTorch: tokens/s, MFU, seconds to compile.

Each of our variants and each peer is a process of its own (`sides.py`). All start at once and trace
side by side; then ours compile one after another, so that XLA's choice among products is not
disturbed, and each takes turns with the peer of its shape. Last, the first variant of each shape
compiles in a second process, from what the first one kept.

MFU is by `jaxdecoder.analysis`, which counts only the pairs that the mask allows.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.card.sides import Gone, Side, answering, turns
from benchmarks.card.task import TRAINING_PACKAGES, Task, installed, part

PEAK = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s, of the cards on SXM modules."""
SLOWER = {"PCIe", "NVL"}
COMPILE_SECONDS = 150.0

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "batch_size": 16,
        "context_length": 1024,
        "vocab_size": 50_304,
        "d_model": 768,
        "n_layers": 12,
        "n_heads": 12,
        "tie_embeddings": True,
    },
    "baby": {
        "batch_size": 64,
        "context_length": 256,
        "vocab_size": 65,
        "d_model": 384,
        "n_layers": 6,
        "n_heads": 6,
    },
}
QUICK_CHANGES = {"batch_size": 2, "context_length": 32, "d_model": 32, "n_layers": 1, "n_heads": 2}
STEPS = {"gpt2": 10, "baby": 50}
"""in one turn"""


class Variant(NamedTuple):
    """How one of our own sides trains."""

    shape: str
    attention: str
    steps_per_call: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.attention}, {self.steps_per_call} steps a call"


VARIANTS = [
    Variant("gpt2", "auto", 1),
    Variant("baby", "auto", 10),
    Variant("gpt2", "hopper", 1),
    Variant("baby", "hopper", 10),
    Variant("baby", "auto", 50),
    Variant("baby", "auto", 1),
]
QUICK_VARIANTS = [Variant("baby", "auto", 10), Variant("baby", "hopper", 10)]


def shape_of(name: str, quick: bool) -> dict[str, Any]:
    return SHAPES[name] | (QUICK_CHANGES if quick else {})


# --- One of our own sides ----------------------------------------------------------------------


def our_step(shape: dict[str, Any], variant: Variant) -> tuple[Any, Any, Any]:
    """A call's compiler, its state and its batches."""
    import jax
    import numpy as np

    from jaxdecoder.config import Config, ModelConfig, OptimizerConfig, TrainConfig
    from jaxdecoder.data.batches import Batch
    from jaxdecoder.training.step import fuse, init_state, make_step

    shape = dict(shape)
    batch_size = shape.pop("batch_size")
    config = Config(
        model=ModelConfig(**shape),
        optimizer=OptimizerConfig(schedule="constant"),
        train=TrainConfig(batch_size=batch_size),
    )
    chosen = replace(config.model, attention_implementation=variant.attention)
    size = (variant.steps_per_call, batch_size, shape["context_length"] + 1)
    tokens = np.random.default_rng(0).integers(shape["vocab_size"], size=size, dtype=np.int32)
    weights = np.ones(tokens[..., 1:].shape, np.float32)
    batch = jax.device_put(Batch(tokens[..., :-1], tokens[..., 1:], weights))
    state = jax.jit(lambda: init_state(config))()
    step = fuse(make_step(replace(config, model=chosen)))
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile, state, batch


def be_a_side(shape: dict[str, Any], variant: Variant) -> None:
    """Traces, waits for leave to compile, then does turns."""
    import jax

    with answering() as answer:
        start = time.perf_counter()
        compiler, state, batch = our_step(shape, variant)
        answer(prepare_seconds=time.perf_counter() - start)
        sys.stdin.readline()
        start = time.perf_counter()
        call = compiler()
        compiled = time.perf_counter() - start
        memory = call.memory_analysis()
        state, metrics = call(state, batch)
        jax.block_until_ready(metrics)
        device = jax.devices()[0].device_kind
        gigabytes = memory.temp_size_in_bytes / 1e9 if memory else None
        answer(compile_seconds=compiled, temporaries_gb=gigabytes, device=device)
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line) // variant.steps_per_call):
                state, metrics = call(state, batch)
            jax.block_until_ready((state, metrics))
            taken = time.perf_counter() - start
            answer(seconds=taken, loss=float(metrics.train_loss[-1]))


# --- The comparison ----------------------------------------------------------------------------


def peak(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a card by its name, if it is known."""
    words = set(re.split(r"\W+", device))
    rates = [rate for name, rate in PEAK.items() if name in words and not words & SLOWER]
    return rates[0] if rates else None


def flops_per_token(shape: dict[str, Any]) -> float:
    from jaxdecoder.analysis import flops_per_token as counted
    from jaxdecoder.config import ModelConfig

    model = {key: value for key, value in shape.items() if key != "batch_size"}
    return counted(ModelConfig(**model)).train["total"]


class Comparison:
    """All sides, and what is known of them so far."""

    def __init__(self, task: Task):
        self.task, self.steps = task, {"baby": 10} if task.quick else STEPS
        self.variants = QUICK_VARIANTS if task.quick else VARIANTS
        names = dict.fromkeys(variant.shape for variant in self.variants)
        self.shapes = {name: shape_of(name, task.quick) for name in names}
        self.ours = {variant: self.side(variant) for variant in self.variants}
        self.peers: dict[str, Side | None] = {}
        self.ready: dict[str, bool] = {}
        for name in names:
            self.start_peer(name)

    def side(self, variant: Variant) -> Side:
        """A process of ours, that traces."""
        told = json.dumps([self.shapes[variant.shape], variant])
        return Side([sys.executable, "-m", "benchmarks.card.training", told])

    def start_peer(self, name: str) -> None:
        """A process of PyTorch's, which compiles at once: that is the processor's work."""
        self.peers[name], self.ready[name] = None, False
        if installed("torch"):
            told = json.dumps(self.shapes[name])
            self.peers[name] = Side([sys.executable, "-m", "benchmarks.torch_gpt", told])
        else:
            self.note(f"{name}, PyTorch", "PyTorch is not installed")

    def note(self, who: str, why: str) -> None:
        self.task.row("what cannot be", who=who, why=why)

    def get_ready(self, variant: Variant) -> dict[str, Any] | None:
        """Compiles it: what it says of that."""
        side, left = self.ours[variant], self.task.left()
        try:
            traced = side.answer(min(COMPILE_SECONDS, left))
            side.tell("compile")
            return traced | side.answer(min(COMPILE_SECONDS, self.task.left()))
        except Gone as error:
            self.note(str(variant), str(error))
            side.stop()
            return None

    def may_measure(self, variant: Variant) -> bool:
        """Whether its peer need not be waited for."""
        peer = self.peers[variant.shape]
        return peer is None or self.ready[variant.shape] or peer.has_answered()

    def peer_of(self, name: str) -> Side | None:
        """The peer of a shape, waited for if it has not yet compiled."""
        peer = self.peers[name]
        if peer is not None and not self.ready[name]:
            try:
                told = peer.answer(min(COMPILE_SECONDS, self.task.left() - 5))
                self.task.row("compiling PyTorch", shape=name, seconds=told["compile_seconds"])
                self.ready[name] = True
            except Gone as error:
                self.note(f"{name}, PyTorch", str(error))
                peer.stop()
                self.peers[name] = peer = None
        return peer

    def seconds(self) -> float:
        """How long the turns of one variant may take."""
        return max(1.0, min(8.0, self.task.left()))

    def measure(self, variant: Variant, told: dict[str, Any]) -> None:
        """Turns of ours and its peer, and a row."""
        shape, count = self.shapes[variant.shape], self.steps[variant.shape]
        count = max(count, variant.steps_per_call)
        sides = {"ours": self.ours[variant]}
        if (peer := self.peer_of(variant.shape)) is not None:
            sides["peer"] = peer
        taken = turns(sides, count, 3 if self.task.quick else 7, self.seconds())
        if peer is not None and "peer" not in taken:  # it is asked no more
            peer.stop()
            self.peers[variant.shape] = None
        if not taken.get("ours"):
            self.note(str(variant), "it stopped during its turns")
            return
        tokens = shape["batch_size"] * shape["context_length"]
        a_step = {name: statistics.median(t) / count for name, t in taken.items() if t}
        rates = {name: tokens / seconds for name, seconds in a_step.items()}
        fastest, flops = peak(told["device"]), flops_per_token(shape)
        share = {name: rate * flops / fastest if fastest else None for name, rate in rates.items()}
        theirs = rates.get("peer")
        self.task.row(
            "steps",
            variant=str(variant),
            tokens_per_second=rates["ours"],
            milliseconds=1e3 * a_step["ours"],
            mfu=share["ours"],
            pytorch_tokens_per_second=theirs,
            pytorch_mfu=share.get("peer"),
            ratio=rates["ours"] / theirs if theirs else None,
            prepare_seconds=told["prepare_seconds"],
            compile_seconds=told["compile_seconds"],
            temporaries_gb=told["temporaries_gb"],
        )
        self.task.write(turns={**self.task.report.get("turns", {}), str(variant): taken})

    def compile_again(self, cold: dict[Variant, dict[str, Any]]) -> None:
        """The first variant of each shape in a second process."""
        firsts = {variant.shape: variant for variant in reversed(cold)}
        for variant in reversed(firsts.values()):
            if self.task.left() < 15 and not self.task.quick:
                break
            first = cold[variant]
            self.ours[variant] = self.side(variant)
            told = self.get_ready(variant)
            if told is not None:
                self.task.row(
                    "seconds to start, cold and warm",
                    variant=str(variant),
                    prepare_cold=first["prepare_seconds"],
                    compile_cold=first["compile_seconds"],
                    prepare_warm=told["prepare_seconds"],
                    compile_warm=told["compile_seconds"],
                )
            self.ours[variant].stop()

    def stop(self) -> None:
        for side in (*self.ours.values(), *self.peers.values()):
            if side is not None:
                side.stop()


def run(task: Task) -> None:
    comparison = Comparison(task)
    cold: dict[Variant, dict[str, Any]] = {}
    waiting: list[Variant] = []

    def measure(variants: list[Variant]) -> None:
        for variant in variants:
            waiting.remove(variant)
            comparison.measure(variant, cold[variant])
            # What has been measured need not share the card's memory.
            comparison.ours[variant].stop()

    try:
        for variant in comparison.variants:
            told = comparison.get_ready(variant) if task.left() > 0 else None
            if told is not None:
                cold[variant] = told
                waiting.append(variant)
            # While a peer compiles, so does the next of ours.
            measure([variant for variant in waiting if comparison.may_measure(variant)])
        measure(list(waiting))
        comparison.compile_again(cold)
    finally:
        comparison.stop()
    print(f"{len(cold)} of {len(comparison.variants)} variants were measured")


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        shape, variant = json.loads(sys.argv[1])
        be_a_side(shape, Variant(*variant))
    else:
        part(run, needs=TRAINING_PACKAGES)


if __name__ == "__main__":
    main()
