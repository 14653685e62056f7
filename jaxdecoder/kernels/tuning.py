"""Block sizes measured on cards: `tuned.json`, which `benchmarks/tune_attention.py` writes.

A row holds for one implementation, card, type, width and kind of mask. Where there is none, the
implementation takes default sizes, which compile everywhere.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdecoder.kernels import masks
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.problem import Operands, Problem

PATH = Path(__file__).with_name("tuned.json")
SMALLEST_WIDTH = 64
BLOCK = 128


class Key(NamedTuple):
    """What the quickest sizes depend on."""

    implementation: str
    card: str
    dtype: str
    width: int
    mask: str


Table = dict[Key, dict[str, list[Any]]]
"""For each key, the sizes of each of the implementation's kernels, by the kernel's name."""


def key(implementation: str, problem: Problem, operands: Operands) -> Key:
    """Return the key of a problem on the current device."""
    _, q_time, _, width = operands.q.shape
    return Key(
        implementation,
        current_device().kind,
        jnp.dtype(operands.q.dtype).name,
        max(SMALLEST_WIDTH, 1 << (width - 1).bit_length()),
        mask_kind(problem, q_time, operands.k.shape[1]),
    )


def mask_kind(problem: Problem, q_time: int, k_time: int) -> str:
    """Return "full" if most blocks with work need no check, else "partial"."""
    states = problem.states(q_time, k_time, BLOCK, BLOCK)
    full, partial = (np.count_nonzero(states == state) for state in (masks.FULL, masks.PARTIAL))
    return "full" if full >= partial else "partial"


@functools.cache
def table(path: Path = PATH) -> Table:
    """Read the sizes that have been measured."""
    rows = json.loads(path.read_text())
    return {Key(**{name: row[name] for name in Key._fields}): row["sizes"] for row in rows}


def write(tuned: Table, path: Path = PATH) -> None:
    """Replace the file, one line for each row."""
    rows = [json.dumps({**key._asdict(), "sizes": sizes}) for key, sizes in sorted(tuned.items())]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n" if rows else "[]\n")
