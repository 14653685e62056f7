"""Where a step's time goes: a trace for Perfetto and TensorBoard, and a page by part."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from jaxdecoder.files import as_page, write_atomically

BEFORE = 2
"""Calls before the one that is traced: the first compiles, the next is not yet steady."""
TEMPLATE = Path(__file__).with_name("profile.html.jinja")
MOST_OPERATIONS = 30

# An instruction of XLA's text: its name, its kind, and the path of what it was made of.
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?([\w.\-]+) = \S.*? ([a-z][a-z0-9\-]*)\(.*?op_name="([^"]*)"', re.MULTILINE
)
_CONTAINERS = ("while", "call", "conditional")
"""Instructions whose time is that of others inside them."""
_WRAPPERS = re.compile(
    r"\(|^(eval_jaxpr|closed_call|checkpoint|rematted_computation|blocks|block_\d+|body|while)$"
)


class Place(NamedTuple):
    """The part of a step that an instruction belongs to."""

    part: str
    """Such as attention/mixing; what no module has made is `loss and residual stream` or, outside
    the decoder, `optimiser`."""
    direction: str
    """forward, backward, recomputed or update"""


class Row(NamedTuple):
    name: str
    milliseconds: float
    share: float


class Profiler:
    """Traces one call of training; `program` gives the text of what is called for (step, count)."""

    def __init__(self, run: Path, program: Callable[[int, int], str]):
        self.folder, self.program = run / "profile", program
        self.calls, self.step = 0, 0

    def passed(self, step: int, state: PyTree) -> str | None:
        """Note a call's end; return what to say when the page is written."""
        self.calls += 1
        if self.calls == BEFORE:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            options.host_tracer_level = 3
            jax.profiler.start_trace(
                self.folder, create_perfetto_trace=True, profiler_options=options
            )
            self.step = step
        if self.calls != BEFORE + 1:
            return None
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        seconds = measured(self.folder)
        steps = step - self.step
        page = summarise(seconds, places(self.program(self.step, steps)), steps)
        path = self.folder / "profile.html"
        write_atomically(path, page)
        return f"steps {self.step + 1:,} to {step:,} are traced: {path} says where a step goes"

    def close(self) -> None:
        """End a trace whose call never came."""
        if self.calls == BEFORE:
            jax.profiler.stop_trace()


def measured(folder: Path) -> Mapping[str, float]:
    """Return the seconds of each instruction in the newest trace of a folder, by its name."""
    path = max(folder.rglob("*.xplane.pb"), key=lambda path: path.as_posix())
    found: dict[str, float] = collections.defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                known = dict(event.stats)
                found[str(known.get("hlo_op", event.name))] += event.duration_ns / 1e9
    return found


def places(program: str) -> dict[str, Place]:
    """Return the place of each instruction of a compiled program, by its name."""
    return {
        name: place(path)
        for name, kind, path in _INSTRUCTION.findall(program)
        if kind not in _CONTAINERS
    }


def place(path: str) -> Place:
    """Return the place of what XLA's metadata gives as its path."""
    names = path.split(";")[0].split("/")
    inside = next((i for i, name in enumerate(names) if "Decoder" in name), None)
    if inside is None:
        return Place("optimiser", "update")
    if any("rematted" in name for name in names):
        direction = "recomputed"
    else:
        direction = "backward" if "transpose(" in path.split(";")[0] else "forward"
    modules = [
        name for name in names[inside + 1 : -1] if "Decoder" not in name and not _wraps(name)
    ]
    return Place("/".join(modules[:2]) or "loss and residual stream", direction)


def _wraps(name: str) -> bool:
    return bool(_WRAPPERS.search(name)) or "," in name


def summarise(seconds: Mapping[str, float], known: Mapping[str, Place], steps: int) -> str:
    """Return the page: milliseconds a step by part and direction, and the longest instructions."""
    spent = {name: taken for name, taken in seconds.items() if name in known}
    total = sum(spent.values())
    by_part: dict[str, float] = collections.defaultdict(float)
    by_direction: dict[str, float] = collections.defaultdict(float)
    by_both: dict[Place, float] = collections.defaultdict(float)
    for name, taken in spent.items():
        by_part[known[name].part] += taken
        by_direction[known[name].direction] += taken
        by_both[known[name]] += taken

    def rows(counter: Mapping[str, float]) -> Iterator[Row]:
        ordered = sorted(counter.items(), key=lambda item: -item[1])
        return (Row(name, 1e3 * t / steps, t / total) for name, t in ordered if total)

    directions = [name for name, *_ in rows(by_direction)]
    parts = [
        (row, [1e3 * by_both[Place(row.name, each)] / steps for each in directions])
        for row in rows(by_part)
    ]
    operations = [(row, known[row.name]) for row in list(rows(spent))[:MOST_OPERATIONS]]
    return as_page(
        TEMPLATE,
        steps=steps,
        total=1e3 * total / steps,
        directions=directions,
        parts=parts,
        operations=operations,
    )
