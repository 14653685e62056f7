"""What compress.py can be told. Read without JAX, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from jaxdecoder.config.sections import Teaching

PruningMethod = Literal[
    "magnitude", "wanda", "random", "n-m", "heads", "neurons", "width", "layers"
]


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


@dataclass(frozen=True)
class Prune:
    """Makes a run of a run without the weights, or the parts, that matter least."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    out: tyro.conf.Positional[str]
    """Folder of the new run."""
    method: PruningMethod = "wanda"
    """magnitude, wanda, random: single weights become zero, by the size of each, by that times the
    size of its input, or by lot; n-m: n of every m weights stay. heads, neurons (of the
    feed-forward), width (features of the residual stream), layers: parts are removed, and the model
    is smaller."""
    sparsity: float | None = None
    """Share that goes: of the weights that are not zero yet, or of each layer's parts. Needed by
    all methods but n-m."""
    scope: Literal["matrix", "output", "global"] | None = None
    """For single weights: those that compare with one another are each matrix's, each output
    unit's, or all. Left out: output for wanda, as in the paper, else matrix."""
    n: int | None = None
    """For n-m: weights that stay of every m. Left out: 2."""
    m: int | None = None
    """For n-m: weights in a group. Left out: 4."""
    criterion: Literal["magnitude", "wanda", "random"] | None = None
    """For n-m: by what the weights of a group compare. Left out: wanda."""
    importance: Literal["taylor", "gates"] | None = None
    """For heads, neurons, width: what the loss would change by without the part, to the first
    order: its mean square over texts (taylor, the default), or its mean size (gates)."""
    head: bool = False
    """For single weights: prune the matrix of an untied output head as well."""
    calibration_tokens: int = 32768
    """Tokens of the training text from which inputs and importance are measured."""
    seed: int = 0
    """For random: another seed gives another lot."""
    recover_steps: int | None = None
    """Steps to train on from there. Left out: 0; with --rewind what the run's own steps leave."""
    learning_rate: float | None = None
    """Peak learning rate of these steps. Left out: the run's own."""
    gradual: bool = False
    """For magnitude: starts dense, and training makes the zeros by a cubic schedule."""
    gradual_share: float = 0.6
    """For --gradual: share of the steps after which the sparsity is reached."""
    gradual_every: int = 10
    """For --gradual: steps between two rounds of making zeros."""
    rewind: int | None = None
    """For single weights: those that stay go back to what they were at this step, as of lottery
    tickets; 0: as they were drawn."""
    rewind_run: str = ""
    """For --rewind: the run whose step that is. Left out: RUN."""


@dataclass(frozen=True)
class Sensitivity:
    """Draws how much the loss minds each layer's pruning, alone."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    out: str = "sensitivity.png"
    """The picture; the table goes beside it, as .csv and .md."""
    criterion: Literal["magnitude", "wanda", "random"] = "wanda"
    """By what single weights go."""
    scope: Literal["matrix", "output"] = "output"
    """Which weights compare with one another: each matrix's, or each output unit's."""
    importance: Literal["taylor", "gates"] = "taylor"
    """By what heads and neurons go."""
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares that go, one picture each."""
    calibration_tokens: int = 32768
    """Tokens of the training text from which inputs and importance are measured."""
    batches: int = 8
    """Batches of validation text for each loss."""
    seed: int = 0
    """For random: another seed gives another lot."""


@dataclass(frozen=True)
class Quantize:
    """Stores the weights of a run's linear layers in few bits, as a new run."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    new_run: tyro.conf.Positional[str]
    """Folder of the new run."""
    bits: Literal[8, 4] = 8
    """Bits a weight."""
    format: Literal["int", "float8_e4m3fn", "float8_e5m2"] = "int"
    """Whole numbers, or floats of 8 bits."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: all of a kernel's, a column's, or group_size of a column's."""
    group_size: int = 64
    """For group: inputs that share a scale; it must divide those of every layer."""
    symmetric: bool = True
    """Without a zero point: levels on both sides of zero alike."""
    activations: Literal[16, 8] = 16
    """Bits of what the weights are multiplied with: 16 leaves it as it is, 8 rounds each token's
    to int8 on the way."""
    method: Literal["nearest", "gptq"] = "nearest"
    """Round each weight to the nearest level, or correct its error by those that follow (GPTQ)."""
    calibration_tokens: int = 32768
    """For gptq: tokens of the training text that show what the weights are multiplied with."""
    include_head: bool = False
    """The head and the token embedding too, which are left alone otherwise."""
    fine_tune_steps: int = 0
    """Train so many steps through the rounding first, in a run beside the new one."""
    learning_rate: float | None = None
    """Of those steps, its peak. Left out: a tenth of the run's."""


@dataclass(frozen=True)
class Dequantize:
    """Makes floats of a quantized run's weights again, as a new run, which can train."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    new_run: tyro.conf.Positional[str]
    """Folder of the new run."""


@dataclass(frozen=True)
class Distill:
    """Trains a student on what a teacher says of every next token."""

    teacher: tyro.conf.Positional[str]
    """Run folder of the teacher."""
    student: tyro.conf.Positional[str]
    """A config, whose data section may be left out (the teacher's is taken), or a run folder,
    whose weights the student starts from: a pruned run stays as sparse as it is."""
    new_run: tyro.conf.Positional[str]
    """Folder of the run to make; the same command goes on with it."""
    how: tyro.conf.OmitArgPrefixes[Teaching] = field(default_factory=Teaching)
    """How the student learns."""
    start_from_teacher: bool = False
    """Start from evenly spaced layers of the teacher; the student's config may differ from the
    teacher's in its depth alone."""
    steps: int | None = None
    """Optimiser steps. Left out: train.steps of the student."""
    learning_rate: float | None = None
    """Peak learning rate; that of AdamW beside Muon keeps its ratio to it. Left out:
    optimizer.learning_rate of the student."""
    seed: int | None = None
    """Of fresh weights, the batches and the dropout. Left out: train.seed of the student."""
