"""The options of compress.py. They load no JAX, so that --help is quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxdecoder.compression.criteria import CRITERIA, Criterion, Need, Scope
from jaxdecoder.config.fields import PathOption
from jaxdecoder.config.sections import Teaching

if TYPE_CHECKING:
    CriterionName = str
    PruningMethod = str
else:
    CriterionName = Literal[tuple(CRITERIA)]
    PruningMethod = Annotated[
        Literal[(*CRITERIA, "n-m", "heads", "neurons", "width", "layers")],
        tyro.conf.arg(
            help=f"Set single weights to zero by {', '.join(CRITERIA)}, or all but n of every m "
            "weights (n-m). Or remove parts, which makes the model smaller: heads, neurons (of the "
            "feed-forward), width (features of the residual stream), layers. Each method has its "
            "own options: see prune --method NAME --help."
        ),
    ]


@dataclass(frozen=True)
class Chart:
    """Plot the losses of runs against their costs."""

    runs: tyro.conf.Positional[tuple[PathOption, ...]]
    """Run folders."""
    out: PathOption = "chart.html"
    """File of the chart. The table goes beside it as .md and .csv, the picture as .png."""
    exit_thresholds: tuple[float, ...] = ()
    """For models with early exits: draw a point for each of these. Left out: 1 (never early) and
    the run's own."""
    tokens: int = 200
    """Tokens to sample in each round of measuring the speed."""


@dataclass(frozen=True)
class Prune:
    """Make a new run without the weights, or the parts, that matter least."""

    run: tyro.conf.Positional[PathOption]
    """Run folder."""
    out: tyro.conf.Positional[PathOption]
    """Folder of the new run."""
    method: PruningMethod = "wanda"
    recover_steps: int | None = None
    """Steps to train after pruning. Left out: 0."""
    learning_rate: float | None = None
    """Peak learning rate of these steps. Left out: the run's own."""


@dataclass(frozen=True, kw_only=True)
class Calibrated(Prune):
    """Options of methods that read text."""

    calibration_tokens: int = 32768
    """Tokens of the training text on which to measure inputs and importance."""


@dataclass(frozen=True, kw_only=True)
class Drawn(Prune):
    """Options of methods that choose at random."""

    seed: int = 0
    """Seed of the random choice."""


@dataclass(frozen=True, kw_only=True)
class SingleWeights(Prune):
    """Options of methods that set single weights to zero."""

    recover_steps: int | None = None
    """Steps to train after pruning. Left out: 0; with --rewind, the rest of the run's steps."""
    head: bool = False
    """Prune the matrix of an untied output head too."""
    rewind: int | None = None
    """Set the remaining weights back to their values at this step, as for lottery tickets; 0: their
    initial values."""
    rewind_run: PathOption = ""
    """For --rewind: the run that has this step. Left out: RUN."""


@dataclass(frozen=True, kw_only=True)
class ByCriterion(SingleWeights):
    """Options of methods that are named after a criterion."""

    sparsity: float
    """Share to set to zero, of the weights that are not zero yet."""
    scope: Scope = "matrix"
    """Compare weights within each matrix, within each output unit, or all with all (global)."""


@dataclass(frozen=True, kw_only=True)
class Gradual(ByCriterion):
    """Options of criteria that can be applied during training."""

    gradual: bool = False
    """Start dense and set weights to zero during training, by a cubic schedule."""
    gradual_share: float = 0.6
    """For --gradual: share of the steps after which the sparsity is reached."""
    gradual_every: int = 10
    """For --gradual: steps between two rounds of pruning."""


@dataclass(frozen=True, kw_only=True)
class Groups(Drawn, Calibrated, SingleWeights):
    """Make a new run that keeps n of every m weights; the others are zero."""

    method: PruningMethod = "n-m"
    n: int = 2
    """Weights to keep of every m."""
    m: int = 4
    """Weights in a group."""
    criterion: CriterionName = "wanda"
    """Criterion by which to compare the weights of a group."""


@dataclass(frozen=True, kw_only=True)
class Part(Calibrated):
    """Options of methods that remove parts."""

    sparsity: float
    """Share of the parts to remove from each layer."""


@dataclass(frozen=True, kw_only=True)
class Layers(Part):
    """Make a new run without the layers that change the residual stream least."""

    method: PruningMethod = "layers"
    sparsity: float
    """Share of the layers to remove; with a repeating pattern of layers, share of its turns."""


@dataclass(frozen=True, kw_only=True)
class ByGates(Part):
    """Options of methods that remove parts which a gate can close."""

    importance: Literal["taylor", "gates"] = "taylor"
    """Measure of importance: the first-order change of the loss without the part, as mean square
    over texts (taylor), or as mean absolute value (gates)."""


@dataclass(frozen=True, kw_only=True)
class Heads(ByGates):
    """Make a new run without the attention heads that matter least."""

    method: PruningMethod = "heads"


@dataclass(frozen=True, kw_only=True)
class Neurons(ByGates):
    """Make a new run without the neurons of the feed-forward that matter least."""

    method: PruningMethod = "neurons"


@dataclass(frozen=True, kw_only=True)
class Width(ByGates):
    """Make a new run without the features of the residual stream that matter least."""

    method: PruningMethod = "width"


OPTIONS_FOR: dict[Need, tuple[type[Prune], ...]] = {
    "nothing": (),
    "input_norms": (Calibrated,),
    "lot": (Drawn,),
}
"""The options for measuring what a criterion needs."""


def by_criterion(name: str, criterion: Criterion) -> type[Prune]:
    """Return the options of the method that is named after a criterion."""
    base = Gradual if criterion.gradual else ByCriterion
    own: list[tuple[str, object, object]] = [
        ("method", PruningMethod, field(default=name)),
        ("scope", Scope, field(default=criterion.scope)),
    ]
    said = "Make a new run in which the weights with the lowest score are zero. The score: "
    return make_dataclass(
        name.title(),
        own,
        bases=(*OPTIONS_FOR[criterion.needs], base),
        namespace={"__doc__": f"{said}{criterion.score.__doc__}", "__module__": __name__},
        frozen=True,
        kw_only=True,
    )


PRUNING: dict[str, Callable[..., Prune]] = {
    **{name: by_criterion(name, criterion) for name, criterion in CRITERIA.items()},
    **{kind.method: kind for kind in (Groups, Heads, Neurons, Width, Layers)},
}
"""The options of each method."""


@dataclass(frozen=True)
class Sensitivity:
    """Plot how much the loss grows when one layer at a time is pruned."""

    run: tyro.conf.Positional[PathOption]
    """Run folder."""
    out: PathOption = "sensitivity.png"
    """File of the picture. The table goes beside it as .csv and .md."""
    criterion: CriterionName = "wanda"
    """Criterion for single weights."""
    scope: Literal["matrix", "output"] = "output"
    """Compare weights within each matrix, or within each output unit."""
    importance: Literal["taylor", "gates"] = "taylor"
    """Measure of importance for heads and neurons."""
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares to prune, one panel each."""
    calibration_tokens: int = 32768
    """Tokens of the training text on which to measure inputs and importance."""
    batches: int = 8
    """Batches of validation text for each loss."""
    seed: int = 0
    """For random: seed of the random choice."""


@dataclass(frozen=True)
class Quantize:
    """Make a new run that stores the weights of the linear layers in few bits."""

    run: tyro.conf.Positional[PathOption]
    """Run folder."""
    new_run: tyro.conf.Positional[PathOption]
    """Folder of the new run."""
    bits: Literal[8, 4] = 8
    """Bits per weight."""
    format: Literal["int", "float8_e4m3fn", "float8_e5m2"] = "int"
    """Integers, or 8-bit floats."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """Weights that share a scale: a whole kernel, a column of it, or group_size of a column."""
    group_size: int = 64
    """For group: inputs that share a scale. It must divide the number of inputs of every layer."""
    symmetric: bool = True
    """Use no zero point: the levels are symmetric around zero."""
    activations: Literal[16, 8] = 16
    """Bits of the inputs of linear layers: 16 leaves them as they are, 8 rounds those of each token
    to int8."""
    method: Literal["nearest", "gptq"] = "nearest"
    """Round each weight to the nearest level, or correct its error with later weights (GPTQ)."""
    calibration_tokens: int = 32768
    """For gptq: tokens of the training text on which to measure the inputs."""
    include_head: bool = False
    """Quantize the head and the token embedding too."""
    fine_tune_steps: int = 0
    """First train this many steps through the rounding, in another run beside the new one."""
    learning_rate: float | None = None
    """Peak learning rate of those steps. Left out: a tenth of the run's."""


@dataclass(frozen=True)
class Dequantize:
    """Make a new run that has the weights of a quantized run as floats, so that it can train."""

    run: tyro.conf.Positional[PathOption]
    """Run folder."""
    new_run: tyro.conf.Positional[PathOption]
    """Folder of the new run."""


@dataclass(frozen=True)
class Distill:
    """Train a student on a teacher's predictions of every next token."""

    teacher: tyro.conf.Positional[PathOption]
    """Run folder of the teacher."""
    student: tyro.conf.Positional[PathOption]
    """A config file; its data section may be left out, then it is the teacher's. Or a run folder:
    the student starts from its weights, and a pruned run stays as sparse as it is."""
    new_run: tyro.conf.Positional[PathOption]
    """Folder of the new run. The same command again continues it."""
    how: tyro.conf.OmitArgPrefixes[Teaching] = field(default_factory=Teaching)
    """How the student learns."""
    start_from_teacher: bool = False
    """Start from evenly spaced layers of the teacher. The student's config may differ from the
    teacher's only in its depth."""
    steps: int | None = None
    """Optimiser steps. Left out: train.steps of the student."""
    learning_rate: float | None = None
    """Peak learning rate; that of AdamW beside Muon keeps its ratio to it. Left out:
    optimizer.learning_rate of the student."""
    seed: int | None = None
    """Seed of new weights, the batches and the dropout. Left out: train.seed of the student."""
