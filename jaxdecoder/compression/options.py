"""What compress.py can be told. Read without JAX, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

import tyro


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
