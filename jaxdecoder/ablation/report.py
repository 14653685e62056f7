"""Write the report of an ablation: HTML in one file, Markdown, CSV and pictures.

First come the verdicts in plain words, then the arms with their costs, the curves, and the command
and config that make all of it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdecoder import analysis
from jaxdecoder.ablation.claims import Verdict
from jaxdecoder.ablation.evidence import LEVEL, Evidence, Outcome
from jaxdecoder.ablation.grid import METRICS, Ablation, Arm
from jaxdecoder.ablation.population import MAPPINGS
from jaxdecoder.ablation.statistics import POWER, Estimate, estimate
from jaxdecoder.ablation.training import Result
from jaxdecoder.files import as_page, as_png, write_csv
from jaxdecoder.training.devices import processor
from jaxdecoder.training.logging import read_metrics


class ArmRow(NamedTuple):
    """One arm in the table."""

    arm: Arm
    learning_rate: float
    """The best of the rates tried."""
    at_end: bool
    """Whether that is an end of the grid, so that a better one may be beyond it."""
    losses: list[float]
    """The metric of every seed at that rate."""
    parameters: int
    steps: int
    train_flops: float
    """FLOPs of one member, from `jaxdecoder.analysis`."""
    seconds: float
    """Training time of one member, on average."""
    diverged: int
    """Members, at any rate, in which a number was no longer finite."""


def write(
    folder: Path,
    ablation: Ablation,
    results: Sequence[Result],
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict],
    command: str,
) -> None:
    """Write report.html, report.md, results.csv and the pictures into a folder."""
    rows = table(ablation, results, outcomes)
    pictures = {"loss.png": draw_losses(ablation, results, outcomes)}
    if len(ablation.learning_rates) > 1:
        pictures["learning_rate.png"] = draw_sensitivity(ablation, outcomes)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    _write_csv(folder / "results.csv", ablation, results, outcomes)
    facts = {"command": command, "machine": machine(), "train_seconds": sum_of_seconds(results)}
    (folder / "about.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    source = ablation.path.read_text(encoding="utf-8")
    text = markdown(ablation, rows, verdicts, pictures, command, source)
    (folder / "report.md").write_text(text, encoding="utf-8")
    page = as_html(ablation, rows, verdicts, pictures, command, source)
    (folder / "report.html").write_text(page, encoding="utf-8")


# --- The table ------------------------------------------------------------------------------------


def table(
    ablation: Ablation, results: Sequence[Result], outcomes: Sequence[Outcome]
) -> list[ArmRow]:
    """Return a row for each arm, the best first."""
    evidence = Evidence(ablation, outcomes)
    rows = []
    for arm in ablation.arms:
        own = [
            (result, outcome)
            for result, outcome in zip(results, outcomes, strict=True)
            if outcome.arm == arm
        ]
        result = own[0][0]
        rows.append(
            ArmRow(
                arm,
                evidence.best_rate(arm),
                evidence.at_end(arm),
                [evidence.value(arm, seed, evidence.metric) for seed in evidence.seeds],
                result.summary["parameters"],
                result.summary["steps"],
                analysis.flops_per_token(result.config.model).train["total"]
                * result.summary["tokens"],
                float(np.mean([result.summary["seconds"] for result, _ in own])),
                sum(outcome.diverged_at is not None for _, outcome in own),
            )
        )
    return sorted(rows, key=lambda row: float(np.nan_to_num(np.mean(row.losses), nan=np.inf)))


HEADINGS = ("arm", "loss", "learning rate", "parameters", "steps", "FLOPs", "seconds", "diverged")


def cells(ablation: Ablation, row: ArmRow) -> list[str]:
    """Return a row as text, for `HEADINGS`."""
    mean = float(np.mean(row.losses))
    if len(row.losses) > 1:
        interval = estimate(row.losses, ablation.spec.confidence)
        loss = f"{mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"
    else:
        loss = f"{mean:.4f}"
    return [
        row.arm.name,
        loss,
        f"{row.learning_rate:g}" + " (an end of the grid)" * row.at_end,
        f"{row.parameters:,}",
        f"{row.steps:,}",
        f"{row.train_flops:.3g}",
        f"{row.seconds:.1f}",
        str(row.diverged) if row.diverged else "",
    ]


# --- Words ----------------------------------------------------------------------------------------


def sentence(verdict: Verdict) -> str:
    """Explain a verdict in one or two sentences."""
    e, what, caveat = verdict.judgement.estimate, verdict.judgement.what, verdict.judgement.caveat
    what = what[0].upper() + what[1:]
    if np.isnan(e.mean):
        return " ".join([f"{what}: not known, since members diverged.", caveat]).strip()
    text = (
        f"{what}: {e.mean:+.4f} on "
        f"average over {e.n} seeds, {_interval(e)}, p = {verdict.judgement.p_value:.2g} "
        f"({verdict.adjusted_p:.2g} corrected for all claims here)"
    )
    if np.isfinite(e.effect_size):
        text += f", effect size {e.effect_size:.2f}"
    return " ".join(filter(None, [text + ".", caveat, power_line(e)]))


def _interval(e: Estimate) -> str:
    return (
        f"t interval {e.low:+.4f} to {e.high:+.4f} "
        f"(bootstrap {e.bootstrap_low:+.4f} to {e.bootstrap_high:+.4f})"
    )


def power_line(e: Estimate) -> str:
    """Say how small a difference this many seeds show; "" if the question is another one."""
    if np.isnan(e.detectable):
        return ""
    return (
        f"With {e.n} seeds, a difference of {e.detectable:.4f} would be seen "
        f"{POWER:.0%} of the time."
    )


def about(ablation: Ablation) -> str:
    """Say what was trained, and where."""
    spec = ablation.spec
    return (
        f"{len(ablation.arms)} arms, {spec.seeds} seeds, {len(ablation.learning_rates)} learning "
        f"rates: {len(ablation.members)} runs from {spec.base}, equal {spec.budget}, judged by "
        f"{spec.metric.replace('_', ' ')} (nats a token). Every arm sees the same data in the "
        "same order for a seed, and is compared at its best learning rate, on average over the "
        "seeds. Intervals are at "
        f"{spec.confidence:.0%}; verdicts at {LEVEL:.0%} after Holm's correction. "
        f"On each device, members that share a program are trained {_way()}. {machine()}."
    )


def _way() -> str:
    """Say how a device trains its members here; benchmarks/population.py compares the ways."""
    mapping = MAPPINGS[jax.default_backend()]
    return "all at once" if mapping is jax.vmap else mapping.__name__.replace("_", " ")


def machine() -> str:
    """Name the hardware that the members are trained on."""
    device, count = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        return f"jax {jax.__version__}, {count} cores of {processor()}"
    return f"jax {jax.__version__}, {count} x {device.device_kind}"


def sum_of_seconds(results: Sequence[Result]) -> float:
    """Return the seconds that training all members took, without compilation."""
    return float(sum(result.summary["seconds"] or 0.0 for result in results))


# --- Markdown and HTML ----------------------------------------------------------------------------


def markdown(
    ablation: Ablation,
    rows: Sequence[ArmRow],
    verdicts: Sequence[Verdict],
    pictures: dict[str, bytes],
    command: str,
    source: str,
) -> str:
    """Return the report as Markdown."""
    lines = [f"# {title(ablation)}", "", about(ablation), ""]
    if verdicts:
        lines += ["## Verdicts", ""]
        lines += [f"- **{v.claim}**: {v.verdict}. {sentence(v)}" for v in verdicts]
        lines += [""]
    lines += ["## Arms", "", _markdown_row(HEADINGS), _markdown_row(["---"] * len(HEADINGS))]
    lines += [_markdown_row(cells(ablation, row)) for row in rows]
    lines += [""]
    lines += [f"![{name}]({name})\n" for name in pictures]
    lines += ["## Again", "", "```", command, "```", "", "```toml", source.rstrip(), "```", ""]
    return "\n".join(lines)


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def as_html(
    ablation: Ablation,
    rows: Sequence[ArmRow],
    verdicts: Sequence[Verdict],
    pictures: dict[str, bytes],
    command: str,
    source: str,
) -> str:
    """Return the report as one self-contained HTML file."""
    return as_page(
        Path(__file__).with_name("report.html.jinja"),
        title=title(ablation),
        about=about(ablation),
        verdicts=[(v.claim, v.verdict, sentence(v)) for v in verdicts],
        headings=HEADINGS,
        rows=[cells(ablation, row) for row in rows],
        pictures=pictures,
        command=command,
        source=source,
    )


def title(ablation: Ablation) -> str:
    """Return the name of the ablation, from its file."""
    name = ablation.path.stem.replace("_", " ")
    return name if ablation.size == "small" else f"{name} ({ablation.size})"


def _write_csv(
    path: Path, ablation: Ablation, results: Sequence[Result], outcomes: Sequence[Outcome]
) -> None:
    keys = list(ablation.factors)
    heading = [*keys, "learning_rate", "seed", *METRICS]
    heading += ["steps", "parameters", "diverged_at", "run"]
    rows = [
        [
            *(o.arm.value(key) for key in keys),
            o.learning_rate,
            o.seed,
            *(f"{o.metrics[name]:.6f}" for name in METRICS),
            result.summary["steps"],
            result.summary["parameters"],
            "" if o.diverged_at is None else o.diverged_at,
            result.config.train.out,
        ]
        for result, o in zip(results, outcomes, strict=True)
    ]
    write_csv(path, [heading, *rows])


# --- Pictures -------------------------------------------------------------------------------------


def draw_losses(
    ablation: Ablation, results: Sequence[Result], outcomes: Sequence[Outcome]
) -> bytes:
    """Plot validation loss against steps, each arm at its best learning rate.

    The line is the mean over the seeds; the band is between their extremes.
    """
    axes, loss = _axes(), "validation_loss"
    evidence = Evidence(ablation, outcomes)
    for arm in ablation.arms:
        curves = []
        for member, result in zip(ablation.members, results, strict=True):
            if (member.arm, member.learning_rate) == (arm, evidence.best_rate(arm)):
                lines = read_metrics(Path(result.config.train.out))
                curves.append({m["step"]: m[loss] for m in lines if loss in m})
        steps = sorted(set.intersection(*map(set, curves)))
        if not steps:
            continue  # all of them diverged before the first evaluation
        values = np.array([[curve[step] for step in steps] for curve in curves])
        (line,) = axes.plot(steps, values.mean(axis=0), label=arm.name, lw=1.5)
        axes.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15
        )
    axes.set(xlabel="step", ylabel="validation loss (nats a token)")
    return _png(axes)


def draw_sensitivity(ablation: Ablation, outcomes: Sequence[Outcome]) -> bytes:
    """Plot the metric against the learning rate: the mean and the extremes over the seeds."""
    axes = _axes()
    evidence = Evidence(ablation, outcomes)
    for arm in ablation.arms:
        curves = np.array([evidence.curve(arm, seed) for seed in evidence.seeds])
        (line,) = axes.plot(
            ablation.learning_rates, curves.mean(axis=0), label=arm.name, marker="o", ms=3
        )
        axes.fill_between(
            ablation.learning_rates,
            curves.min(axis=0),
            curves.max(axis=0),
            color=line.get_color(),
            alpha=0.15,
        )
    axes.set(
        xscale="log", xlabel="learning rate", ylabel=f"{evidence.metric.replace('_', ' ')} (nats)"
    )
    return _png(axes)


def _axes() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), layout="constrained").subplots()


def _png(axes: Any) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return as_png(axes.figure)
