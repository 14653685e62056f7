"""Plot the losses of models against their costs: one chart of many runs, with its table.

Losses are over the whole validation split, in nats per token, or in bits per byte if the runs do
not share a tokenizer. A run is on the Pareto front of a cost if no other run is both cheaper and
better.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxdecoder import analysis
from jaxdecoder.compression.options import Chart
from jaxdecoder.compression.passes import corpus_of, sizes
from jaxdecoder.data import tokenizers
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.files import (
    as_label,
    as_markdown,
    as_page,
    as_png,
    make_room,
    write_atomically,
    write_csv,
)
from jaxdecoder.sampling.generate import encode_prompt, generate
from jaxdecoder.training.evaluation import bits_per_byte, decoded_losses, make_evaluator, predicted
from jaxdecoder.training.runs import Model, load_model
from jaxdecoder.training.step import make_decoder

ROUNDS = 7
"""Rounds of sampling. In each round every model samples once, one after another."""


class Point(NamedTuple):
    """One model on the chart."""

    name: str
    loss: float
    """Nats per token."""
    bits_per_byte: float
    bytes: int
    """Bytes of the weights on disk and in memory, zeros included."""
    parameters: int
    """Weights that are not zero."""
    flops: float
    """FLOPs of decoding one token at the end of the context; products with zeros count too."""
    tokens_per_second: float
    """Speed of sampling at batch 1, the median of `ROUNDS` rounds."""


class Cost(NamedTuple):
    """An axis: `better` is 1 if more is better, -1 if less is better."""

    title: str
    better: int


UNITS = {"loss": "nats a token", "bits_per_byte": "bits a byte"}

COSTS = {
    "bytes": Cost("bytes of weights", -1),
    "parameters": Cost("weights that are not zero", -1),
    "flops": Cost("FLOPs a decoded token", -1),
    "tokens_per_second": Cost("tokens/s, batch 1", 1),
}


class _Subject(NamedTuple):
    """A model to measure; a model with early exits makes several."""

    name: str
    model: Model
    corpus: Corpus
    threshold: float | None


def chart(options: Chart, command: str) -> list[Point]:
    """Measure the runs, draw them, and write .html, .md, .csv and .png; return the points."""
    if not options.runs:
        raise UserError("chart: which runs? Give a run folder or several, such as runs/stories")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: must be at least 1")
    if Path(options.out).suffix != ".html":
        raise UserError(f"--out {options.out}: must be the name of an .html file")
    make_room(Path(options.out))
    subjects = [s for run in options.runs for s in _subjects(run, options.exit_thresholds)]
    speeds = _tokens_per_second(subjects, options.tokens)
    points = list(map(_measure, track(subjects, description="validation losses"), speeds))
    shared = len({tokenizers.load(Path(run) / "tokenizer.json") for run in options.runs}) == 1
    loss = "loss" if shared else "bits_per_byte"
    write(Path(options.out), points, loss, command)
    heading, *body = rows(points, loss)
    table = Table(*heading)
    for cells in body:
        table.add_row(*cells)
    Console(markup=False, emoji=False).print(table)
    print(f"{options.out} shows it")
    return points


def front(points: Sequence[Point], cost: str, loss: str = "loss") -> list[Point]:
    """Return the points that no other point beats in both cost and loss, the cheapest first."""
    sign = COSTS[cost].better

    def place(point: Point) -> tuple[float, float]:
        return -sign * float(getattr(point, cost)), getattr(point, loss)

    def beaten(mine: tuple[float, float]) -> bool:
        others = (theirs for theirs in map(place, points) if theirs != mine)
        return any(price <= mine[0] and lost <= mine[1] for price, lost in others)

    return sorted((point for point in points if not beaten(place(point))), key=place)


# --- Measuring ------------------------------------------------------------------------------------


def _subjects(run: str, thresholds: Sequence[float]) -> list[_Subject]:
    model = load_model(run)
    config, corpus = corpus_of(model, Path(run))
    model = model._replace(config=config)
    name, subjects = Path(run).name, []
    if config.model.depth != "early_exit":
        return [_Subject(name, model, corpus, None)]
    for threshold in thresholds or (1.0, config.model.exit_threshold):
        own = replace(config, model=replace(config.model, exit_threshold=threshold))
        changed = model._replace(config=own, decoder=make_decoder(own))
        subjects.append(_Subject(f"{name} at {threshold:g}", changed, corpus, threshold))
    return subjects


def _measure(subject: _Subject, tokens_per_second: float) -> Point:
    config, corpus, params = subject.model.config, subject.corpus, subject.model.params
    start = config.model.context_length - 1
    if subject.threshold is None:
        evaluate = make_evaluator(subject.model.decoder)
        loss = evaluate(params, Feed.of(config, corpus, "validation").fixed(None))
        flops = analysis.flops_per_token(config.model).decode["total"]
    else:
        # As the model is used: each token stops at its own depth.
        loss, depth = _decoded(subject)
        flops = analysis.early_exit_flops(config.model, depth, start=start)["total"]
    size = sizes(params)
    targets = predicted(config, corpus.validation)
    return Point(
        subject.name,
        loss,
        bits_per_byte(loss, targets, corpus.validation.n_bytes),
        size["bytes"],
        size["nonzero"],
        flops,
        tokens_per_second,
    )


def _decoded(subject: _Subject) -> tuple[float, float]:
    """Return the mean loss and depth of validation text that is decoded token by token."""
    total = weight = depth = 0.0
    for batch in Feed.of(subject.model.config, subject.corpus, "validation").fixed(4):
        losses, depths = decoded_losses(subject.model.decoder, subject.model.params, batch)
        total += float(np.sum(losses * batch.weights))
        depth += float(np.sum(depths * batch.weights))
        weight += float(np.sum(batch.weights))
    return total / weight, depth / weight


def _tokens_per_second(subjects: Sequence[_Subject], tokens: int) -> list[float]:
    """Return the median speed of each model; the models take turns in every round."""

    def seconds(model: Model, number: int) -> float:
        prompt = encode_prompt(model.tokenizer, model.config.train.sample_prompt, model.config.data)
        start, key = time.perf_counter(), jax.random.key(number)
        for _ in generate(model.decoder, model.params, [prompt], max_new_tokens=tokens, key=key):
            pass
        return time.perf_counter() - start

    for subject in subjects:
        seconds(subject.model, 0)  # compiles
    rounds = track(range(ROUNDS), description="tokens/s")
    times = [[seconds(subject.model, number) for subject in subjects] for number in rounds]
    return [tokens / statistics.median(own) for own in zip(*times, strict=True)]


# --- Writing --------------------------------------------------------------------------------------


def write(out: Path, points: Sequence[Point], loss: str, command: str) -> None:
    """Write the chart, and its table beside it."""
    picture, note = draw(points, loss), f"\n{NOTE}\n"
    write_atomically(out.with_suffix(".png"), picture)
    write_atomically(out.with_suffix(".md"), as_markdown(rows(points, loss)) + note)
    write_csv(out.with_suffix(".csv"), [Point._fields, *points])
    write_atomically(out, as_html(points, loss, picture, command))


def ranked(points: Sequence[Point], loss: str) -> list[Point]:
    """Sort points by loss, lowest first: the order of the table and the numbers of the picture."""
    return sorted(points, key=lambda point: float(getattr(point, loss)))


def rows(points: Sequence[Point], loss: str) -> list[list[str]]:
    """Return the cells of the table, its heading first; a star marks points on a cost's front."""
    fronts = {cost: front(points, cost, loss) for cost in COSTS}
    table = [
        ["model", f"validation loss ({UNITS[loss]})", *(cost.title for cost in COSTS.values())]
    ]
    for point in ranked(points, loss):
        cells = [point.name, f"{getattr(point, loss):.4f}"]
        for cost in COSTS:
            star = " *" if point in fronts[cost] else ""
            cells.append(f"{getattr(point, cost):,.0f}{star}")
        table.append(cells)
    return table


NOTE = "A star: no other model here is both better in this and lower in loss."


def as_html(points: Sequence[Point], loss: str, picture: bytes, command: str) -> str:
    """Return one self-contained page."""
    heading, *body = rows(points, loss)
    return as_page(
        Path(__file__).with_name("chart.html.jinja"),
        picture=picture,
        headings=heading,
        rows=body,
        note=NOTE,
        command=command,
    )


def draw(points: Sequence[Point], loss: str) -> bytes:
    """Draw a panel for each cost, with its front. Models have numbers, the lowest loss first."""
    from matplotlib import ticker
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    numbered = list(enumerate(ranked(points, loss), start=1))
    for axes, (cost, kind) in zip(panels.flat, COSTS.items(), strict=True):
        best = front(points, cost, loss)
        line = [getattr(p, cost) for p in best], [getattr(p, loss) for p in best]
        axes.plot(*line, color="tab:orange")
        for number, point in numbered:
            at = getattr(point, cost), getattr(point, loss)
            axes.plot(*at, "o", color="tab:orange" if point in best else "tab:blue")
            # Models next to each other in loss may have equal costs: put their numbers on
            # opposite sides.
            side = 1 if number % 2 else -1
            place = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
            axes.annotate(str(number), at, (9 * side, 0), **place)
        axes.set(xscale="log", xlabel=kind.title, ylabel=f"validation loss ({UNITS[loss]})")
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5)))
        axes.xaxis.set_minor_formatter(ticker.EngFormatter(sep=""))
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.margins(0.1)
        axes.grid(alpha=0.3)
    names = [
        Line2D([], [], ls="", marker=f"${number}$", color="black", label=as_label(point.name))
        for number, point in numbered
    ]
    lines = [Line2D([], [], color="tab:orange", label="Pareto front"), *names]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=8)
    return as_png(figure)
