"""What the passes of compress.py can be told. Read without JAX, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Prune:
    """Removes weights, or whole parts, of a run's model."""

    run: tyro.conf.Positional[str]
    """Run folder to start from."""
    new_run: tyro.conf.Positional[str]
    """Run folder to make."""


@dataclass(frozen=True)
class Distill:
    """Trains a student to give a teacher's answers."""

    teacher: tyro.conf.Positional[str]
    """Run folder of the teacher."""
    student: tyro.conf.Positional[str]
    """The student: a config file, or a run folder whose weights it starts from."""
    new_run: tyro.conf.Positional[str]
    """Run folder to make."""


@dataclass(frozen=True)
class Quantize:
    """Stores the weights of a run's model in fewer bits."""

    run: tyro.conf.Positional[str]
    """Run folder to start from."""
    new_run: tyro.conf.Positional[str]
    """Run folder to make."""


@dataclass(frozen=True)
class Chart:
    """Draws what runs cost against what they lose."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    out: str = "chart.html"
    """Where to; the table goes beside it, as .md and .csv, and the picture as .png."""
    exit_thresholds: tuple[float, ...] = ()
    """For models with early exits, a point each. Left out: never early, and the run's own."""
    tokens: int = 200
    """Tokens sampled in each turn of measuring the speed."""
