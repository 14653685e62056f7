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
from jaxdecoder.ablation.statistics import POWER, estimate
from jaxdecoder.ablation.training import Result
from jaxdecoder.files import as_label, as_markdown, as_page, as_png, write_csv
from jaxdecoder.training.devices import processor
from jaxdecoder.training.logging import read_metrics
from jaxdecoder.typing import Table


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
    pictures = {"loss.png": draw_losses(ablation, results, outcomes)}
    if len(ablation.learning_rates) > 1:
        pictures["learning_rate.png"] = draw_sensitivity(ablation, outcomes)
    for picture, data in pictures.items():
        (folder / picture).write_bytes(data)
    _write_csv(folder / "results.csv", ablation, results, outcomes)
    # Seconds that training all members took, without compilation.
    seconds = float(sum(result.summary["seconds"] or 0.0 for result in results))
    facts = {"command": command, "machine": machine(), "train_seconds": seconds}
    (folder / "about.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    name = ablation.path.stem.replace("_", " ")
    told: Table = {
        "title": name if ablation.size == "small" else f"{name} ({ablation.size})",
        "about": about(ablation),
        "verdicts": [(v.claim, v.verdict, sentence(v)) for v in verdicts],
        "headings": HEADINGS,
        "rows": [cells(ablation, row) for row in table(ablation, results, outcomes)],
        "pictures": pictures,
        "command": command,
        "source": ablation.path.read_text(encoding="utf-8-sig"),
    }
    (folder / "report.md").write_text(markdown(told), encoding="utf-8")
    page = as_page(Path(__file__).with_name("report.html.jinja"), **told)
    (folder / "report.html").write_text(page, encoding="utf-8")


# --- The table ------------------------------------------------------------------------------------


def table(
    ablation: Ablation, results: Sequence[Result], outcomes: Sequence[Outcome]
) -> list[ArmRow]:
    """Return a row for each arm, the best first."""
    evidence = Evidence(ablation, outcomes)
    rows = []
    for arm in ablation.arms:
        own = [pair for pair in zip(results, outcomes, strict=True) if pair[1].arm == arm]
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
    loss = f"{np.mean(row.losses):.4f}"
    if len(row.losses) > 1:
        interval = estimate(row.losses, ablation.spec.confidence)
        loss += f" ({interval.low:.4f} to {interval.high:.4f})"
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
        f"{what}: {e.mean:+.4f} on average over {e.n} seeds, "
        f"t interval {e.low:+.4f} to {e.high:+.4f} "
        f"(bootstrap {e.bootstrap_low:+.4f} to {e.bootstrap_high:+.4f}), "
        f"p = {verdict.judgement.p_value:.2g} "
        f"({verdict.adjusted_p:.2g} corrected for all claims here)"
    )
    if np.isfinite(e.effect_size):
        text += f", effect size {e.effect_size:.2f}"
    said = [text + ".", caveat]
    if not np.isnan(e.detectable):  # as it is if the question is another one
        shown = f"a difference of {e.detectable:.4f} would be seen {POWER:.0%} of the time."
        said.append(f"With {e.n} seeds, {shown}")
    return " ".join(filter(None, said))


def about(ablation: Ablation) -> str:
    """Say what was trained, and where."""
    spec = ablation.spec
    # benchmarks/population.py compares the ways.
    mapping = MAPPINGS[jax.default_backend()]
    way = "all at once" if mapping is jax.vmap else mapping.__name__.replace("_", " ")
    return (
        f"{len(ablation.arms)} arms, {spec.seeds} seeds, {len(ablation.learning_rates)} learning "
        f"rates: {len(ablation.members)} runs from {spec.base}, equal {spec.budget}, judged by "
        f"{spec.metric.replace('_', ' ')} (nats a token). Every arm sees the same data in the "
        "same order for a seed, and is compared at its best learning rate, on average over the "
        "seeds. Intervals are at "
        f"{spec.confidence:.0%}; verdicts at {LEVEL:.0%} after Holm's correction. "
        f"On each device, members that share a program are trained {way}. {machine()}."
    )


def machine() -> str:
    """Name the hardware that the members are trained on."""
    device, count = jax.devices()[0], jax.device_count()
    if device.platform == "cpu":
        return f"jax {jax.__version__}, {count} cores of {processor()}"
    return f"jax {jax.__version__}, {count} x {device.device_kind}"


def markdown(told: Table) -> str:
    """Return the report as Markdown, from what the template of the page takes."""
    lines = [f"# {told['title']}", "", told["about"], ""]
    if told["verdicts"]:
        lines += ["## Verdicts", ""]
        lines += [f"- **{claim}**: {verdict}. {why}" for claim, verdict, why in told["verdicts"]]
        lines += [""]
    lines += ["## Arms", "", as_markdown([told["headings"], *told["rows"]])]
    lines += [f"![{name}]({name})\n" for name in told["pictures"]]
    lines += ["## Again", "", "```", told["command"], "```", ""]
    return "\n".join([*lines, "```toml", told["source"].rstrip(), "```", ""])


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
    """Plot validation loss against steps, each arm at its best learning rate, over the seeds."""
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
        _band(axes, steps, values, label=as_label(arm.name), lw=1.5)
    axes.set(xlabel="step", ylabel="validation loss (nats a token)")
    return _png(axes)


def draw_sensitivity(ablation: Ablation, outcomes: Sequence[Outcome]) -> bytes:
    """Plot the metric against the learning rate, over the seeds."""
    axes = _axes()
    evidence = Evidence(ablation, outcomes)
    for arm in ablation.arms:
        curves = np.array([evidence.curve(arm, seed) for seed in evidence.seeds])
        _band(axes, ablation.learning_rates, curves, label=as_label(arm.name), marker="o", ms=3)
    axes.set(
        xscale="log", xlabel="learning rate", ylabel=f"{evidence.metric.replace('_', ' ')} (nats)"
    )
    return _png(axes)


def _axes() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 4.5), layout="constrained").subplots()


def _band(axes: Any, x: Sequence[float], curves: np.ndarray, **style: Any) -> None:
    """Plot the mean of curves over the band between their extremes."""
    (line,) = axes.plot(x, curves.mean(axis=0), **style)
    extremes = curves.min(axis=0), curves.max(axis=0)
    axes.fill_between(x, *extremes, color=line.get_color(), alpha=0.15)


def _png(axes: Any) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return as_png(axes.figure)
