"""Boxes, arrows and what they flow through: the plain parts of the pictures.

Colours are of middle brightness, readable on white and on black; lengths are points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

INK, BLUE, ORANGE = "#7f8790", "#3f8ae0", "#e8833a"
FAINT = {"color": INK, "alpha": 0.2}
POINTS = 72  # in an inch


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A bare figure of so many points, and its axes in points."""
    figure = Figure(figsize=(width / POINTS, height / POINTS))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


class Node(NamedTuple):
    """A box of a diagram, and what flows into it."""

    label: str
    inputs: tuple[Any, ...] = ()

    def __add__(self, other: Node) -> Node:
        return Node("+", (self, other))


class Place(NamedTuple):
    """Where a box is."""

    x: float
    y: float
    width: float


HEIGHT, STEP, ROUNDING = 20, 16, 4


def arrow(axes: Axes, start: Any, end: Any, bend: float = 0.0, **style: Any) -> None:
    """An arrow; a bent one leaves upwards and arrives downwards, `bend` points above its start."""
    if bend:
        top = start[1] + bend
        across = ([start[0], start[0], end[0]], [start[1], top, top])
        axes.plot(*across, color=INK, linewidth=1, solid_joinstyle="round")
        start = (end[0], top)
    head = "-|>,head_length=3.2,head_width=1.8"
    style = {"color": INK, "arrowstyle": head, "shrinkA": 0, "shrinkB": 0, **style}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def box(axes: Axes, place: Place, label: str, colour: str = BLUE, height: float = HEIGHT) -> None:
    """A rounded box around its label; a sum is a circle."""
    x, y, width = place
    style = {"edgecolor": colour, "linewidth": 1.2}
    style["facecolor"] = (*to_rgb(colour), 0.18)
    if label == "+":
        axes.add_patch(Circle((x + width / 2, y), width / 2, **style))
    else:
        rounded = f"round,pad=0,rounding_size={ROUNDING}"
        corner = (x, y - height / 2)
        axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=rounded, **style))
    axes.text(x + width / 2, y, label, ha="center", va="center_baseline")


def width_of(label: str) -> float:
    return HEIGHT if label == "+" else 5.2 * len(label) + 12


COLOURS = {"norm": ORANGE, "final norm": ORANGE, "+": INK}


def flow(end: Node) -> Figure:
    """The nodes that lead to this one from left to right; what skips some passes above them."""
    nodes: list[Node] = []
    column: dict[int, int] = {}

    def visit(node: Node) -> None:
        if id(node) not in column:
            for source in node.inputs:
                visit(source)
            column[id(node)] = 1 + max((column[id(n)] for n in node.inputs), default=-1)
            nodes.append(node)

    visit(end)
    columns = [
        [node for node in nodes if column[id(node)] == i] for i in range(column[id(end)] + 1)
    ]
    tallest = max(map(len, columns))
    middle = 6 + tallest * (HEIGHT + 6) / 2
    places: dict[int, Place] = {}
    left = 4.0
    for held in columns:
        widest = max(width_of(node.label) if node.inputs else 8 for node in held)
        for i, node in enumerate(held):
            y = middle + ((len(held) - 1) / 2 - i) * (HEIGHT + 6)
            places[id(node)] = Place(left, y, widest)
        left += widest + STEP
    figure, axes = canvas(left + 4, 2 * middle + 14)
    for node in nodes:
        place = places[id(node)]
        if node.inputs:
            box(axes, place, node.label, COLOURS.get(node.label, BLUE))
        else:
            axes.text(place.x, place.y, node.label, va="center_baseline")
        for source in node.inputs:
            start = places[id(source)]
            right = start.x + start.width
            if column[id(source)] + 1 == column[id(node)]:
                arrow(axes, (right, start.y), (place.x, place.y))
            else:
                bend = middle + 7 + HEIGHT / 2 - start.y + (tallest - 1) * (HEIGHT + 6) / 2
                end_of_arrow = (place.x + place.width / 2, place.y + HEIGHT / 2)
                arrow(axes, (right + STEP / 2, start.y), end_of_arrow, bend=bend)
    last = places[id(end)]
    arrow(axes, (last.x + last.width, last.y), (left + 2, last.y))
    return figure


def chain(axes: Axes, labels: list[str], left: float, y: float) -> list[Place]:
    """Boxes in a row, each leading to the next."""
    places: list[Place] = []
    for label in labels:
        place = Place(left, y, width_of(label))
        box(axes, place, label, COLOURS.get(label, BLUE))
        if places:
            arrow(axes, (places[-1].x + places[-1].width, y), (left, y))
        places.append(place)
        left += place.width + STEP
    return places
