"""What compress.py can be told. Read without JAX, so that --help is quick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jaxdecoder.compression.criteria import CRITERIA, Criterion, Need, Scope
from jaxdecoder.config.sections import Teaching

if TYPE_CHECKING:
    CriterionName = str
    PruningMethod = str
else:
    CriterionName = Literal[tuple(CRITERIA)]
    PruningMethod = Annotated[
        Literal[(*CRITERIA, "n-m", "heads", "neurons", "width", "layers")],
        tyro.conf.arg(
            help=f"Single weights become zero by {', '.join(CRITERIA)}, or all but n of every m "
            "(n-m); or parts are removed, and the model is smaller: heads, neurons (of the "
            "feed-forward), width (features of the residual stream), layers. Each has options of "
            "its own: see prune --method NAME --help."
        ),
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
    recover_steps: int | None = None
    """Steps to train on from there. Left out: 0."""
    learning_rate: float | None = None
    """Peak learning rate of these steps. Left out: the run's own."""


@dataclass(frozen=True, kw_only=True)
class Calibrated(Prune):
    """Of methods that read text."""

    calibration_tokens: int = 32768
    """Tokens of the training text from which inputs and importance are measured."""


@dataclass(frozen=True, kw_only=True)
class Drawn(Prune):
    """Of methods that draw lots."""

    seed: int = 0
    """Another seed gives another lot."""


@dataclass(frozen=True, kw_only=True)
class SingleWeights(Prune):
    """Of methods by which single weights become zero."""

    recover_steps: int | None = None
    """Steps to train on from there. Left out: 0; with --rewind what the run's own steps leave."""
    head: bool = False
    """Prune the matrix of an untied output head as well."""
    rewind: int | None = None
    """The weights that stay go back to what they were at this step, as of lottery tickets; 0: as
    they were drawn."""
    rewind_run: str = ""
    """For --rewind: the run whose step that is. Left out: RUN."""


@dataclass(frozen=True, kw_only=True)
class ByCriterion(SingleWeights):
    """Of methods that a criterion gives its name to."""

    sparsity: float
    """Share that goes of the weights that are not zero yet."""
    scope: Scope = "matrix"
    """Which weights compare with one another: each matrix's, each output unit's, or all."""


@dataclass(frozen=True, kw_only=True)
class Gradual(ByCriterion):
    """Of criteria that training can go by."""

    gradual: bool = False
    """Starts dense, and training makes the zeros by a cubic schedule."""
    gradual_share: float = 0.6
    """For --gradual: share of the steps after which the sparsity is reached."""
    gradual_every: int = 10
    """For --gradual: steps between two rounds of making zeros."""


@dataclass(frozen=True, kw_only=True)
class Groups(Drawn, Calibrated, SingleWeights):
    """Makes a run of a run in which n of every m weights stay, and the others are zero."""

    method: PruningMethod = "n-m"
    n: int = 2
    """Weights that stay of every m."""
    m: int = 4
    """Weights in a group."""
    criterion: CriterionName = "wanda"
    """By what the weights of a group compare."""


@dataclass(frozen=True, kw_only=True)
class Part(Calibrated):
    """Of methods that remove parts."""

    sparsity: float
    """Share that goes of each layer's parts."""


@dataclass(frozen=True, kw_only=True)
class Layers(Part):
    """Makes a run of a run without the layers that change the residual stream least."""

    method: PruningMethod = "layers"
    sparsity: float
    """Share of the layers, or of the turns of their pattern, that goes."""


@dataclass(frozen=True, kw_only=True)
class ByGates(Part):
    """Of parts that a gate can close."""

    importance: Literal["taylor", "gates"] = "taylor"
    """What the loss would change by without the part, to the first order: its mean square over
    texts (taylor), or its mean size (gates)."""


@dataclass(frozen=True, kw_only=True)
class Heads(ByGates):
    """Makes a run of a run without the attention heads that matter least."""

    method: PruningMethod = "heads"


@dataclass(frozen=True, kw_only=True)
class Neurons(ByGates):
    """Makes a run of a run without the neurons of the feed-forward that matter least."""

    method: PruningMethod = "neurons"


@dataclass(frozen=True, kw_only=True)
class Width(ByGates):
    """Makes a run of a run without the features of the residual stream that matter least."""

    method: PruningMethod = "width"


OPTIONS_FOR: dict[Need, tuple[type[Prune], ...]] = {
    "nothing": (),
    "input_norms": (Calibrated,),
    "lot": (Drawn,),
}
"""The options with which what a criterion needs is measured."""


def by_criterion(name: str, criterion: Criterion) -> type[Prune]:
    """The options of the method that is called as its criterion."""
    base = Gradual if criterion.gradual else ByCriterion
    own: list[tuple[str, object, object]] = [
        ("method", PruningMethod, field(default=name)),
        ("scope", Scope, field(default=criterion.scope)),
    ]
    said = "Makes a run of a run with zeros for the weights that score lowest. The score: "
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
    """Draws how much the loss minds each layer's pruning, alone."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    out: str = "sensitivity.png"
    """The picture; the table goes beside it, as .csv and .md."""
    criterion: CriterionName = "wanda"
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
