"""Prune one layer at a time and measure how much the loss grows: a scan, its picture, its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxdecoder.compression.calibration import calibration_batches
from jaxdecoder.compression.importance import by_gates
from jaxdecoder.compression.options import Sensitivity
from jaxdecoder.compression.parts import PARTS
from jaxdecoder.compression.passes import corpus_of
from jaxdecoder.compression.sparsity import apply, mask, scores_by
from jaxdecoder.config import ModelConfig
from jaxdecoder.config.fields import check_seed
from jaxdecoder.data.batches import Batch, Feed
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.files import as_label, as_markdown, as_png, make_room, write_atomically, write_csv
from jaxdecoder.layers import tree
from jaxdecoder.layers.serial import n_turns, turn
from jaxdecoder.layers.tree import Matrices, body_matrices, replaced
from jaxdecoder.training.devices import set_up
from jaxdecoder.training.evaluation import make_evaluator
from jaxdecoder.training.runs import Model, load_model, read_config
from jaxdecoder.training.sparsity import count_of
from jaxdecoder.typing import Params

WHOLE = "whole"
"""The name of the part that is a whole layer."""


class Effect(NamedTuple):
    """The effect of pruning one thing alone: a row of the table."""

    layer: str
    part: str
    """A kind of matrix, heads, neurons, or whole: the layer is skipped."""
    sparsity: float
    loss: float
    """Nats per token, over the same batches of validation text for every row."""
    increase: float
    """Difference from the loss of the unpruned model."""


Variant = tuple[str, str, float, Callable[[], Params]]
"""(layer, part, sparsity, the weights of a model with this alone pruned)"""


def sensitivity(options: Sensitivity, command: str) -> list[Effect]:
    """Scan a run, and write the picture, .csv and .md; return the rows of the table.

    Raises:
        UserError: for impossible options.
    """
    out = Path(options.out)
    if out.suffix != ".png":
        raise UserError(f"--out {options.out}: must be the name of a .png file")
    if not options.sparsities or not all(0 < share < 1 for share in options.sparsities):
        shown = " ".join(map(str, options.sparsities))
        raise UserError(f"--sparsities {shown}: each must be between 0 and 1, such as 0.5")
    if options.batches < 1:
        raise UserError(f"--batches {options.batches}: must be 1 or more")
    check_seed("--seed", options.seed)
    make_room(out)
    set_up(read_config(Path(options.run)))
    model = load_model(options.run)
    config, corpus = corpus_of(model, Path(options.run))
    rows = scan(options, model._replace(config=config), corpus)
    write_atomically(out, draw(rows, options))
    write_csv(out.with_suffix(".csv"), [Effect._fields, *rows])
    write_atomically(out.with_suffix(".md"), markdown(rows, command))
    worst = max(rows, key=lambda row: row.increase)
    print(
        f"{out} shows it; the loss minds {worst.part} of layer {worst.layer} most: "
        f"{worst.increase:+.4f} nats a token without {worst.sparsity:.0%}"
    )
    return rows


def scan(options: Sensitivity, model: Model, corpus: Corpus) -> list[Effect]:
    """Measure every layer, part and sparsity."""
    text = list(Feed.of(model.config, corpus, "validation").fixed(options.batches))
    evaluate = make_evaluator(model.decoder)
    base = evaluate(model.params, text)
    print(f"{options.run}: {base:.4f} nats a token over {len(text)} batches")
    variants = [*of_matrices(options, model, corpus), *of_parts(options, model, corpus)]
    rows = []
    for layer, part, share, params in track(variants, description="sensitivity"):
        loss = evaluate(params(), text)
        rows.append(Effect(layer, part, share, loss, loss - base))
    return rows + without_a_layer(model, text, base)


def of_matrices(options: Sensitivity, model: Model, corpus: Corpus) -> Iterator[Variant]:
    """Yield models in which one matrix of one layer has some of its weights set to zero."""
    matrices = body_matrices(model.params)

    def params(path: tree.Path, place: tuple[int, ...], cut: Matrices) -> Params:
        one = matrices[path].at[place].set(cut[path][place])
        return replaced(model.params, {path: one})

    scores = scores_by(options.criterion, options, matrices, model, corpus)
    for share in options.sparsities:
        cut = apply(matrices, mask(matrices, scores, share, options.scope))
        for path, whole in matrices.items():
            for place in np.ndindex(whole.shape[:-2]):
                layer = _layer_name(path, place, model.config.model)
                yield layer, path[-2], share, partial(params, path, place, cut)


def of_parts(options: Sensitivity, model: Model, corpus: Corpus) -> Iterator[Variant]:
    """Yield models in which gates close the least important heads, or neurons, of one layer."""
    config = model.config.architecture
    for name in ("heads", "neurons"):
        part = PARTS[name]
        if part.refusal(config):
            continue
        text = calibration_batches(model.config, corpus, options.calibration_tokens)
        scores = by_gates(model, part, text, options.importance)
        ones, done = part.ones(model.params, config), set()
        for share in options.sparsities:
            for path, gate in ones.items():
                count = count_of(share, gate.shape[-1])
                if (path, count) in done or not 0 < count < gate.shape[-1]:
                    continue
                done.add((path, count))
                for place in np.ndindex(gate.shape[:-1]):
                    least = jnp.argsort(scores[path][place])[:count]
                    closed = {**ones, path: gate.at[*place, least].set(0.0)}
                    params = partial(part.gated, model.params, config, closed)
                    layer = _layer_name(path, place, config)
                    yield layer, name, count / gate.shape[-1], params


def without_a_layer(model: Model, text: Sequence[Batch], base: float) -> list[Effect]:
    """Measure the model without each of its layers, or turns of its layers' pattern."""
    config, part = model.config.architecture, PARTS["layers"]
    if part.refusal(config) or n_turns(config) < 2:
        return []
    rows, evaluate = [], None
    for gone in track(range(n_turns(config)), description="without a layer"):
        keep = np.delete(np.arange(n_turns(config)), gone)
        params, smaller = part.remove(model.params, config, {tree.SERIAL: keep})
        evaluate = evaluate or make_evaluator(model.decoder.clone(config=smaller))
        loss = evaluate(params, text)
        first, length = gone * len(turn(config)), len(turn(config))
        name = str(first) if length == 1 else f"{first} to {first + length - 1}"
        rows.append(Effect(name, WHOLE, 1.0, loss, loss - base))
    return rows


def _layer_name(path: tree.Path, place: tuple[int, ...], config: ModelConfig) -> str:
    pattern = turn(config) if config.layout == "serial" else config.attention_pattern
    return tree.layer_name(path, place[0] if place else 0, len(pattern))


# --- Writing --------------------------------------------------------------------------------------


def markdown(rows: Sequence[Effect], command: str) -> str:
    """Return the table as Markdown, the greatest increase of the loss first."""
    cells = [
        [r.layer, r.part, f"{r.sparsity:.0%}", f"{r.loss:.4f}", f"{r.increase:+.4f}"]
        for r in sorted(rows, key=lambda row: -row.increase)
    ]
    return f"`{command}`\n\n{as_markdown([Effect._fields, *cells])}"


def draw(rows: Sequence[Effect], options: Sensitivity) -> bytes:
    """Draw a panel per sparsity, layers by parts, and one for whole layers; darker is worse."""
    from matplotlib.figure import Figure

    panels = [
        (f"{share:.0%} of each", [r for r in rows if r.part != WHOLE and _nearest(r, options) == i])
        for i, share in enumerate(options.sparsities)
    ]
    panels.append(("passed by", [row for row in rows if row.part == WHOLE]))
    panels = [(title, of) for title, of in panels if of]
    widths = [len({row.part for row in of}) + 1.0 for _, of in panels]
    tallest = max(len({row.layer for row in of}) for _, of in panels)
    size = 2.5 + 0.6 * sum(widths), 1.8 + 0.4 * tallest
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), width_ratios=widths, squeeze=False)
    for axis, (title, of) in zip(axes[0], panels, strict=True):
        layers, parts = (
            [*dict.fromkeys(getattr(r, name) for r in of)] for name in Effect._fields[:2]
        )
        table = np.full((len(layers), len(parts)), np.nan)
        for row in of:
            table[layers.index(row.layer), parts.index(row.part)] = row.increase
        # Each panel has its own colours: a removed layer would make everything else pale.
        axis.imshow(table, cmap="OrRd", vmin=0.0, vmax=max(1e-9, np.nanmax(table)), aspect="auto")
        for (y, x), value in np.ndenumerate(table):
            if not np.isnan(value):
                dark = value > 0.6 * np.nanmax(table)
                colour = "white" if dark else "black"
                axis.text(x, y, f"{value:.3f}", ha="center", va="center", fontsize=6, color=colour)
        axis.set_xticks(range(len(parts)), parts, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(layers)), layers, fontsize=7)
        axis.set_title(title, fontsize=8)
    axes[0][0].set_ylabel("layer", fontsize=8)
    title = f"{as_label(Path(options.run).name)}: nats a token more, pruned alone"
    figure.suptitle(title, fontsize=9)
    return as_png(figure, dpi=130)


def _nearest(row: Effect, options: Sensitivity) -> int:
    """Return the number of the requested sparsity that is nearest to that of a row."""
    return int(np.argmin([abs(row.sparsity - share) for share in options.sparsities]))
