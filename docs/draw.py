"""Draws the picture of every variant, as docs/variants.md shows them.

    python -m docs.draw [FOLDER] [--format png]

What can be drawn from the code is: masks from the mask algebra, curves from the activations, norms
from what they make of a row of numbers, and placements from how they wire stand-ins of the
branches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline

from docs.diagrams import (
    BLUE,
    FAINT,
    HEIGHT,
    INK,
    ORANGE,
    POINTS,
    STEP,
    Node,
    Place,
    arrow,
    box,
    canvas,
    chain,
    flow,
    width_of,
)
from jaxdecoder.config import ModelConfig, model
from jaxdecoder.kernels import masks
from jaxdecoder.kernels.scores import alibi_slopes, t5_bucket
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.masked import MASKED
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS

FOLDER = Path(__file__).parent / "pictures"
STYLE = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "jaxdecoder",  # the same file every time
    "font.family": "sans-serif",
    "font.size": 9,
    "savefig.transparent": True,
    "text.color": INK,
}

SHOWN = ModelConfig(
    vocab_size=1,
    context_length=16,
    d_model=16,
    n_heads=4,
    attention_window=4,
    attention_dilation=2,
    attention_globals=1,
    attention_block=4,
    position_buckets=6,
    position_max_distance=14,
).resolve()
"""The sizes in the pictures."""
TIME = SHOWN.context_length


# --- Squares: masks and tables -------------------------------------------------------------------

CELL, GAP, MARGIN = 8, 1, 12


def squares(axes: Axes, at: tuple[float, float], shown: np.ndarray, **style: Any) -> None:
    """A square for every true entry of a table, its first row on top, as one path."""
    rows, columns = np.nonzero(shown)
    left = at[0] + columns * CELL
    top = at[1] + (shown.shape[0] - rows) * CELL
    side = CELL - GAP
    corners = np.array([(0, 0), (side, 0), (side, -side), (0, -side), (0, 0)])
    points = np.stack([left, top], axis=1)[:, None] + corners
    codes = [Outline.MOVETO, *3 * [Outline.LINETO], Outline.CLOSEPOLY]
    outline = Outline(points.reshape(-1, 2), codes * len(rows))
    axes.add_patch(PathPatch(outline, linewidth=0, **style))


def table(values: np.ndarray, across: str, down: str, levels: int = 9) -> Figure:
    """A table of numbers from -1 (orange) to 1 (blue), in few shades."""
    rows, columns = values.shape
    figure, axes = canvas(columns * CELL + 2 * MARGIN, rows * CELL + 2 * MARGIN)
    shades = np.round(np.abs(values) * levels) / levels
    for shade in np.unique(shades[~np.isnan(shades)]):
        for colour, sign in ((BLUE, values >= 0), (ORANGE, values < 0)):
            chosen = (shades == shade) & sign
            if chosen.any():
                style = {"color": colour, "alpha": 0.1 + 0.9 * shade}
                squares(axes, (MARGIN, MARGIN), chosen, **style)
    captions(axes, across, down)
    return figure


def captions(axes: Axes, across: str, down: str) -> None:
    """What the columns and the rows are."""
    height = axes.get_ylim()[1]
    axes.text(MARGIN, height - 2, across + " →", va="top", ha="left")
    axes.text(1, height - MARGIN, "← " + down, va="top", ha="left", rotation=90)


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries, down, and of keys, across."""
    return np.arange(TIME)[:, None], np.arange(TIME)[None]


def attention(entry: str) -> Figure:
    """Which keys each query sees."""
    if entry == "linear":
        return linear_attention()
    if entry == "linformer":
        return linformer()
    seen = np.asarray(MASKED[entry].mask(SHOWN)(*grid()))
    side = TIME * CELL + 2 * MARGIN
    figure, axes = canvas(side, side)
    pattern(axes, MARGIN, seen, BLUE)
    captions(axes, "keys", "queries")
    return figure


def pattern(axes: Axes, left: float, seen: np.ndarray, colour: str) -> None:
    """The true entries of a table on a ground that shows its extent."""
    rows, columns = seen.shape
    ground = Rectangle((left, MARGIN), columns * CELL - GAP, rows * CELL, linewidth=0, **FAINT)
    axes.add_patch(ground)
    squares(axes, (left, MARGIN), seen, color=colour)


def linformer() -> Figure:
    """The own block exactly; of every block before it a few keys that stand for all."""
    block, rank = SHOWN.attention_block, 2
    q, k = grid()
    exact = np.asarray((masks.causal() & masks.fixed_blocks(block, 0))(q, k))
    compressed = np.arange(rank * TIME // block)[None] // rank < q // block
    apart = (TIME + 1) * CELL
    figure, axes = canvas(apart + compressed.shape[1] * CELL + 2 * MARGIN, TIME * CELL + 2 * MARGIN)
    pattern(axes, MARGIN, exact, BLUE)
    pattern(axes, MARGIN + apart, compressed, ORANGE)
    captions(axes, "keys", "queries")
    axes.text(MARGIN + apart, axes.get_ylim()[1] - 2, "blocks →", va="top")
    return figure


def position(entry: str) -> Figure:
    """What is added, turned or taken away at each position."""
    if entry == "rope":
        return clocks()
    q, k = grid()
    past = k <= q
    if entry == "learned":
        # What training might find: smooth and different in every coordinate.
        generator = np.random.default_rng(0)
        numbers = np.cumsum(generator.normal(size=(TIME, TIME)), axis=0)
        return table(np.tanh(numbers - numbers.mean(axis=0)), "coordinates", "positions")
    if entry == "sinusoidal":
        embed = POSITIONS[entry].embed(replace(SHOWN, d_model=TIME, rope_base=100.0))
        return table(np.asarray(embed(jnp.arange(TIME)[None])[0]), "coordinates", "positions")
    if entry == "alibi":
        slopes = alibi_slopes(SHOWN.n_heads)[:2]
        steep = [np.where(past, np.exp2(-4 * slope * (q - k)), np.nan) for slope in slopes]
        return table(np.hstack([steep[0], np.full((TIME, 1), np.nan), steep[1]]), "keys", "queries")
    if entry == "t5":
        buckets = np.asarray(t5_bucket(k - q, SHOWN.position_buckets, SHOWN.position_max_distance))
        shades = 1 - 2 * buckets / (SHOWN.position_buckets - 1)
        return table(np.where(past, shades, np.nan), "keys", "queries")
    return table(np.where(past, 0.4, np.nan), "keys", "queries")


def clocks() -> Figure:
    """Three pairs of coordinates of a query at positions from 0 on, as hands that turn."""
    shown, size = 10, 24
    figure, axes = canvas(shown * size + 2 * MARGIN, 3 * size + 2 * MARGIN)
    c = replace(SHOWN, d_head=6, position="rope", rope_base=40.0)
    ones = jnp.concatenate([jnp.zeros((1, shown, 1, 3)), jnp.ones((1, shown, 1, 3))], axis=-1)
    turned = np.asarray(POSITIONS["rope"].rotate(c, ones, -jnp.arange(shown)[None]))[0, :, 0]
    t, pair = (index.ravel() for index in np.indices((shown, 3)))
    middle = np.stack([MARGIN + (t + 0.5) * size, MARGIN + (2.5 - pair) * size], axis=1)
    tip = middle + 9 * np.stack([turned[t, pair], turned[t, pair + 3]], axis=1)
    axes.plot(*middle.T, "o", markersize=20, markeredgewidth=0, **FAINT)
    hands = Outline(np.stack([middle, tip], axis=1).reshape(-1, 2), [1, 2] * len(tip))
    axes.add_patch(PathPatch(hands, color=BLUE, linewidth=1.6))
    axes.plot(*tip.T, "o", markersize=4, markeredgewidth=0, color=BLUE)
    captions(axes, "positions", "pairs")
    return figure


# --- Curves and bars -----------------------------------------------------------------------------


def activation(entry: str) -> Figure:
    """The function; of a gated unit, by its gate, for ups of 1, 1/2, -1/2 and -1."""
    figure = Figure(figsize=(150 / POINTS, 100 / POINTS))
    axes = figure.add_axes((0.03, 0.04, 0.85, 0.92))
    x = np.linspace(-3, 3, 97, dtype=np.float32)
    curve = np.asarray(ACTIVATIONS[entry].function(jnp.asarray(x)))
    axes.axhline(0, linewidth=0.8, color=INK)
    axes.axvline(0, linewidth=0.8, color=INK)
    if ACTIVATIONS[entry].gated:
        for up, colour, name in (
            (1, BLUE, "1"),
            (0.5, BLUE, "½"),
            (-0.5, ORANGE, "−½"),
            (-1, ORANGE, "−1"),
        ):
            axes.plot(x, up * curve, color=colour, linewidth=1.8)
            axes.text(3.1, up * curve[-1], name, va="center_baseline")
    else:
        axes.plot(x, np.maximum(x, 0), linewidth=1, linestyle=(0, (4, 3)), color=INK)
        axes.plot(x, curve, color=BLUE, linewidth=2)
        axes.plot([-0.08, 0.08], [1, 1], linewidth=0.8, color=INK)
        axes.text(-0.2, 1, "1", va="center_baseline", ha="right")
    if entry == "gelu_exact":
        apart = curve - np.asarray(ACTIVATIONS["gelu"].function(jnp.asarray(x)))
        axes.plot(x, 1000 * apart, color=ORANGE, linewidth=1.2)
        axes.text(-3, 1.5, "1000 × what\ngelu lacks", va="bottom", linespacing=1.1)
    axes.set(xlim=(-3, 3), ylim=(-3, 3) if ACTIVATIONS[entry].gated else (-0.7, 3))
    axes.axis("off")
    return figure


ROW = np.array([0.9, 2.6, -0.4, 1.7, 3.1, 0.3, 1.2, 2.2], np.float32)


def norm(entry: str) -> Figure:
    """A row of numbers before and after, with their mean and their standard deviation."""
    module = NORMS[entry].new(SHOWN, jnp.float32)
    row = jnp.asarray(ROW)
    learns = hasattr(module, "init_with_output")
    after = module.init_with_output(jax.random.key(0), row)[0] if learns else module(row)
    figure = Figure(figsize=(220 / POINTS, 90 / POINTS))
    for i, (row, colour) in enumerate(((ROW, INK), (np.asarray(after), BLUE))):
        axes = figure.add_axes((0.02 + 0.54 * i, 0.03, 0.42, 0.94))
        axes.axhspan(row.mean() - row.std(), row.mean() + row.std(), linewidth=0, **FAINT)
        axes.axhline(row.mean(), color=ORANGE, linewidth=1.2, linestyle="--")
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.bar(range(len(row)), row, color=colour, width=0.7)
        axes.set(ylim=(-1.8, 3.4))
        axes.axis("off")
    between = figure.add_axes((0, 0, 1, 1))
    between.set(xlim=(0, 220), ylim=(0, 90))
    between.axis("off")
    arrow(between, (99, 33), (121, 33))
    return figure


# --- Diagrams ------------------------------------------------------------------------------------


def placement(entry: str) -> Figure:
    """One block, as the placement wires it."""
    x = Node("x")
    branches = [
        (name, lambda h, name=name: Node(name.replace("_", "-"), (h,)))
        for name in ("attention", "feed_forward")
    ]

    def add(name: str, stream: Node, branch: Node) -> Node:
        # Branches that are already summed up join the stream in the same sum.
        return Node("+", (stream, *(branch.inputs if branch.label == "+" else (branch,))))

    return flow(PLACEMENTS[entry].wire(x, branches, lambda name: lambda h: Node("norm", (h,)), add))


def layout(entry: str) -> Figure:
    """From the embedding to the head."""
    if entry == "parallel_stacks":
        return parallel_stacks()
    figure, axes = canvas(446, HEIGHT + 12)
    chain(axes, ["embedding", "block", "block", "block", "final norm", "head"], 4, HEIGHT / 2 + 6)
    return figure


def parallel_stacks() -> Figure:
    """Two stacks of layers side by side over one input, whose slices are put in a row."""
    layers, height = 4, 4 * (HEIGHT + 4) + 8
    y = height / 2
    figure, axes = canvas(652, height)
    left, before = 4.0, None

    def put(label: str) -> None:
        nonlocal left, before
        (place,) = chain(axes, [label], left, y)
        if before is not None:
            arrow(axes, before, (left, y))
        left, before = left + place.width + STEP, (left + place.width, y)

    put("embedding")
    for _ in range(2):
        put("norm")
        ys = [y + (i - (layers - 1) / 2) * (HEIGHT + 4) for i in range(layers)]
        place = width_of("layer")
        bar = left + place + STEP
        for level in ys:
            box(axes, Place(left, level, place), "layer")
            arrow(axes, before, (left, level))
            arrow(axes, (left + place, level), (bar, level))
            slice_of_row = (bar, level - HEIGHT / 2 - 1)
            axes.add_patch(
                Rectangle(slice_of_row, 7, HEIGHT + 2, color=BLUE, alpha=0.5, linewidth=0)
            )
        left, before = bar + 7 + STEP, (bar + 7, y)
        put("feed-forward")
        put("norm")
    put("head")
    return figure


def depth(entry: str) -> Figure:
    """The blocks that a token passes."""
    return {"early_exit": early_exit, "mixture_of_depths": mixture_of_depths}.get(
        entry, lambda: layout("serial")
    )()


def early_exit() -> Figure:
    """A confident token leaves for the head between blocks."""
    figure, axes = canvas(400, 84)
    places = chain(axes, ["embedding", "block", "block", "block", "block"], 4, 62)
    head = Place(places[-1].x, 16, places[-1].width)
    box(axes, head, "head")
    for place in places[1:-1]:
        x = place.x + place.width + STEP / 2
        axes.plot([x, x], [62, 16], color=ORANGE, linewidth=1.2, linestyle=(0, (3, 2)))
    first = places[1].x + places[1].width + STEP / 2
    arrow(axes, (first, 16), (head.x, 16), color=ORANGE)
    axes.text(first - 4, 16, "sure of the next token?", ha="right", va="center_baseline")
    arrow(
        axes, (head.x + head.width / 2, 62 - HEIGHT / 2), (head.x + head.width / 2, 16 + HEIGHT / 2)
    )
    return figure


def mixture_of_depths() -> Figure:
    """A router sends some tokens through the block, the others by it."""
    figure, axes = canvas(320, 112)
    block = Place(130, 94, 84)
    box(axes, block, "block", height=28)
    axes.add_patch(Rectangle((32, 6), 20, 72, facecolor=ORANGE, alpha=0.18, linewidth=0))
    axes.add_patch(Rectangle((32, 6), 20, 72, fill=False, edgecolor=ORANGE, linewidth=1.2))
    axes.text(42, 42, "router", rotation=90, ha="center", va="center")
    through = {1: 89, 4: 99}
    for token in range(6):
        y, colour = 12 + 12 * token, BLUE if token in through else INK
        axes.plot([14, 306], [y, y], "o", color=colour, markersize=5, markeredgewidth=0)
        arrow(axes, (18, y), (32, y), color=colour)
        if token in through:
            level, right = through[token], block.x + block.width
            arrow(axes, (52, y), (block.x, level), color=colour)
            arrow(axes, (right, level), (300, y + 1), color=colour)
        else:
            arrow(axes, (52, y), (300, y), color=colour)
    return figure


def linear_attention() -> Figure:
    """A state of fixed size: every token adds to it, then reads it."""
    figure, axes = canvas(336, 96)
    y, gap = 48, 80
    for t, digit in enumerate("₁₂₃₄"):
        x = 32 + t * gap
        box(axes, Place(x, y, HEIGHT), "+", ORANGE)
        arrow(axes, (x - gap + HEIGHT if t else 6, y), (x, y), color=ORANGE)
        arrow(axes, (x + 10, 16), (x + 10, y - HEIGHT / 2))
        axes.text(x + 10, 3, f"φ(k{digit}) v{digit}", ha="center")
        arrow(axes, (x + HEIGHT + 14, y), (x + HEIGHT + 14, 80), color=BLUE)
        axes.text(x + HEIGHT + 14, 84, f"φ(q{digit}) S{digit}", ha="center")
    arrow(axes, (x + HEIGHT, y), (330, y), color=ORANGE)
    return figure


# --- The pictures --------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[Any, Callable[[str], Figure]]] = {
    "position": (model.Position, position),
    "norm": (model.Norm, norm),
    "norm_placement": (model.NormPlacement, placement),
    "activation": (model.Activation, activation),
    "attention": (model.AttentionName, attention),
    "layout": (model.Layout, layout),
    "depth": (model.Depth, depth),
}


def draw(folder: Path, kind: str = "svg") -> None:
    """Writes FIELD_ENTRY.svg for every entry of every field."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if kind == "svg" else None
    with matplotlib.rc_context(STYLE):
        for field, (entries, picture) in FAMILIES.items():
            for entry in get_args(entries):
                path = folder / f"{field}_{entry}.{kind}"
                picture(entry).savefig(path, metadata=metadata, dpi=200)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Draws the picture of every variant.")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--format", default="svg", choices=("svg", "png"))
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.format)


if __name__ == "__main__":
    main()
