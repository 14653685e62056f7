"""Low loss after 100 steps: what the published mask of the parallel stacks does.

    python -m benchmarks.upper_triangle [--steps 1000]

That mask keeps the upper triangle: a token sees itself and the future, so the token that it is to
tell is in view. Three models train on the same batches from the same seed: parallel stacks with
that mask, with a causal one, and a serial decoder with as many parameters (within 1%). No config
can ask for the upper triangle, since a decoder that sees the future is none: it is put in place
here, around the calls of the attention. Curves go to docs/, numbers to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.turns import HERE, machine, write

ROOT = HERE.parent
PRESET = ROOT / "configs" / "parallel_stacks_small.toml"
SERIAL = {"layout": "serial", "layers_per_stack": None, "n_layers": 5, "d_model": 128}
PUBLISHED = {100: 0.37, 2700: 0.07}  # after so many steps


def serial_of_equal_size(model: Any) -> Any:
    """The serial decoder of the same components whose parameters are nearest in number."""
    from jaxdecoder import analysis

    wanted = analysis.parameters(model)["total"]
    candidates = [dataclasses.replace(model, **SERIAL, d_ff=d_ff) for d_ff in range(256, 1024, 2)]

    def distance(candidate: Any) -> int:
        return abs(analysis.parameters(candidate)["total"] - wanted)

    nearest = min(candidates, key=distance)
    assert distance(nearest) < 0.01 * wanted
    return nearest


@contextlib.contextmanager
def upper_triangle() -> Any:
    """Whatever is traced inside attends to itself and to the future."""
    import flax.linen as nn

    from jaxdecoder.kernels import masks
    from jaxdecoder.layers.masked import MaskedMixing

    def flip(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        mixing = context.module
        if not isinstance(mixing, MaskedMixing) or mixing.mask == masks.future():
            return call(*args, **kwargs)
        flipped = MaskedMixing(mixing.config, masks.future(), mixing.slots, parent=None)
        return flipped.apply({}, *args, **kwargs)

    with nn.intercept_methods(flip):
        yield


def train(config: Any, corpus: Any, seeing: Any, every: int) -> dict[str, Any]:
    """Train and validation losses by step; the last with a causal mask as well."""
    import jax
    import numpy as np

    from jaxdecoder.data.batches import Feed
    from jaxdecoder.training.evaluation import make_evaluator
    from jaxdecoder.training.step import fuse, init_state, make_decoder, make_step

    feed = Feed.of(config, corpus, "train")

    def validation() -> Any:
        return Feed.of(config, corpus, "validation").fixed(config.train.evaluation_batches)

    step = jax.jit(fuse(make_step(config)), donate_argnums=0)
    state = jax.jit(lambda: init_state(config))()
    train_losses: list[float] = []
    validation_losses: dict[int, float] = {}
    with seeing():
        evaluate = make_evaluator(make_decoder(config))
        for start in range(0, config.train.steps, every):
            state, metrics = step(state, feed.at(start, every))
            train_losses += np.asarray(metrics.train_loss).tolist()
            validation_losses[start + every] = evaluate(state.params, validation())
    causal = make_evaluator(make_decoder(config))(state.params, validation())
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "train": train_losses,
        "validation": validation_losses,
        "validation_under_a_causal_mask": causal,
    }


def draw(arms: dict[str, Any], path: Path) -> None:
    """The training losses, smoothed over 10 steps, and the validation losses."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for colour, (name, arm) in zip(("C3", "C0", "C2"), arms.items(), strict=True):
        smooth = np.convolve(arm["train"], np.ones(10) / 10, mode="valid")
        label = f"{name} ({arm['parameters']:,} parameters)"
        axes.plot(np.arange(len(smooth)) + 10, smooth, color=colour, label=label, linewidth=1)
        axes.plot(*zip(*arm["validation"].items(), strict=True), "o", color=colour, markersize=3)
    axes.axvline(100, color="grey", linewidth=0.5)
    axes.set(xlabel="step", ylabel="loss (nats a character); dots: validation", xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains the three and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "upper_triangle.png")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "upper_triangle.json")
    options = parser.parse_args()
    import jax

    from jaxdecoder.config import load
    from jaxdecoder.data.tokens import prepare
    from jaxdecoder.training.runs import complete

    config = load(PRESET, ["--train.steps", str(options.steps)])
    corpus = prepare(config.data)
    stacks = complete(config, corpus)
    serial = dataclasses.replace(stacks, model=serial_of_equal_size(stacks.model))
    cases = {
        "parallel stacks, upper triangle": (stacks, upper_triangle),
        "parallel stacks, causal": (stacks, contextlib.nullcontext),
        "serial, causal": (serial, contextlib.nullcontext),
    }
    arms = {}
    for name, (one, seeing) in cases.items():
        arms[name] = arm = train(one, corpus, seeing, options.every)
        after = {n: loss for n, loss in arm["validation"].items() if n in (100, options.steps)}
        told = ", ".join(f"{loss:.3f} after {n} steps" for n, loss in after.items())
        print(
            f"{name:32} {arm['parameters']:>9,} parameters  validation {told}; "
            f"then with a causal mask {arm['validation_under_a_causal_mask']:.3f}",
            flush=True,
        )
    draw(arms, options.picture)
    about = {"preset": PRESET.name, "steps": options.steps, "jax": jax.__version__}
    write(options.out, {**machine(), **about, "published": PUBLISHED, "arms": arms})


if __name__ == "__main__":
    main()
