"""Writes docs/findings.md from the committed results of the ablations.

    make ablations                                    # trains all members
    python -m docs.findings --collect runs/ablations  # takes their results over, then writes
    python -m docs.findings                           # writes from what is committed

The verdicts are judged anew from every member's losses in `benchmarks/results/ablations/`, so the
page says what the code says of them today.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdecoder.ablation.claims import Verdict, judge
from jaxdecoder.ablation.evidence import LEVEL, Evidence, Outcome
from jaxdecoder.ablation.grid import METRICS, Ablation, read
from jaxdecoder.ablation.statistics import POWER, estimate

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "ablations"
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "findings.md"

HEAD = """# Findings

What published claims become when they are tried here, and what else our own runs found. This page
is written by `python -m docs.findings` from the results in `benchmarks/results/`; every section
names the command that makes them anew. Differences and losses are in nats a token (a character of
Tiny Shakespeare), intervals are 95% t intervals over the seeds, p values are corrected by Holm's
method over the claims of a section, and a claim is decided at {level:.0%}. Every arm is compared at
the best of the learning rates that it was tried at, on the same data in the same order for a seed.
A star marks a verdict for which the best was at an end of them, so that a better one may lie
beyond. The last column is the difference that so many seeds would find {power:.0%} of the time,
where one is asked about.

These are models of 0.1 to 0.2 million parameters (parallel against serial stacks: 1 million),
trained for a few hundred steps: a verdict speaks of them, and a larger model may differ. Each
file's `[full]` table asks the same question of a larger one.
"""


class Found(NamedTuple):
    """An ablation with what came of it."""

    ablation: Ablation
    outcomes: list[Outcome]
    verdicts: list[Verdict]
    about: dict[str, Any]

    @property
    def question(self) -> str:
        """The comment at the head of its file."""
        lines = self.ablation.path.read_text(encoding="utf-8").splitlines()
        until = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        return " ".join(line.lstrip("# ") for line in lines[:until])


def found(config: Path) -> Found:
    """An ablation's committed results, judged."""
    ablation = read(config)
    folder = RESULTS / "ablations"
    with (folder / f"{config.stem}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    outcomes = []
    for member, row in zip(ablation.members, rows, strict=True):
        asked = member.name, member.config.train.steps
        assert asked == (Path(row["run"]).name, int(row["steps"])), (
            f"{config}: the results are those of other members; run it again"
        )
        metrics = {name: float(row[name]) for name in METRICS}
        diverged = int(row["diverged_at"]) if row["diverged_at"] else None
        outcomes.append(Outcome(member.arm, member.learning_rate, member.seed, metrics, diverged))
    about = json.loads((folder / f"{config.stem}.json").read_text(encoding="utf-8"))
    return Found(ablation, outcomes, judge(ablation, outcomes), about)


def section(it: Found) -> str:
    """The question, what was run, the verdicts and the arms."""
    spec, ablation = it.ablation.spec, it.ablation
    base = ablation.base
    lines = [
        f"### {ablation.path.stem.replace('_', ' ')}",
        "",
        it.question,
        "",
        f"`{it.about['command']}`: {len(ablation.arms)} arms, {spec.seeds} seeds, "
        f"{_count(len(ablation.learning_rates), 'learning rate')}, {base.train.steps:,} "
        f"steps of {base.train.batch_size} x {base.model.context_length} tokens, "
        f"{len(ablation.members)} runs; {it.about['machine']}, "
        f"{it.about['train_seconds'] / 60:.1f} minutes of training.",
        "",
    ]
    if it.verdicts:
        lines += [
            "| claim | verdict | estimate | of | 95% interval | corrected p | would be seen |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *map(_verdict_row, it.verdicts),
            "",
        ]
    lines += ["| arm | validation loss | best learning rate |", "| --- | --- | --- |"]
    lines += [*_arm_rows(it), ""]
    return "\n".join(lines)


def _verdict_row(verdict: Verdict) -> str:
    e = verdict.judgement.estimate
    seen = "" if np.isnan(e.detectable) else f"{e.detectable:.4f}"
    return (
        f"| {verdict.claim} | **{verdict.verdict}**{_star(verdict)} | {e.mean:+.4f} "
        f"| {verdict.judgement.what} | {e.low:+.4f} to {e.high:+.4f} | {verdict.adjusted_p:.2g} "
        f"| {seen} |"
    )


def _star(verdict: Verdict) -> str:
    return r"\*" if verdict.judgement.caveat else ""


def _arm_rows(it: Found) -> list[str]:
    """The arms by their losses, the best first."""
    evidence = Evidence(it.ablation, it.outcomes)
    rows = []
    for arm in it.ablation.arms:
        losses = [evidence.value(arm, seed, evidence.metric) for seed in evidence.seeds]
        interval = estimate(losses)
        diverged = sum(o.diverged_at is not None for o in it.outcomes if o.arm == arm)
        rate = f"{evidence.best_rate(arm):g}" + " (an end of the grid)" * evidence.at_end(arm)
        text = f"{np.mean(losses):.4f} ({interval.low:.4f} to {interval.high:.4f})"
        note = f", {_count(diverged, 'run')} diverged" if diverged else ""
        rows.append((np.mean(losses), f"| {arm.name} | {text} | {rate}{note} |"))
    return [row for _, row in sorted(rows)]


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")


def upper_triangle() -> str:
    """The section on the parallel stacks' published losses."""
    arms = json.loads((RESULTS / "upper_triangle.json").read_text())["arms"]
    rows = "\n".join(
        f"| {name} | {arm['parameters']:,} | {arm['validation']['100']:.3f} "
        f"| {arm['validation']['1000']:.3f} | {arm['validation_under_a_causal_mask']:.3f} |"
        for name, arm in arms.items()
    )
    gap = arms["parallel stacks, causal"]["validation"]["1000"]
    gap -= arms["serial, causal"]["validation"]["1000"]
    return f"""## Low loss after 100 steps

The author of the parallel decoder stacks reports a loss of 0.37 after 100 steps and 0.07 after
2,700. The mask of that code keeps the upper triangle: a token sees itself and the future, and so
the very token that it is to tell.

`python -m benchmarks.upper_triangle` trains `parallel_stacks_small` with that mask, the same with a
causal one, and a serial decoder with as many parameters (5 blocks of width 128), on the same
batches of Tiny Shakespeare's characters (16 x 64 a step, Adam at 1e-3, one seed). Validation losses
in nats a character:

| model | parameters | after 100 steps | after 1,000 | then, with a causal mask |
| --- | --- | --- | --- | --- |
{rows}

![Losses of the three models by step](upper_triangle.png)

The low loss is that of a copy. Where the future is out of sight, as it is when text is written, the
same weights are worse than an even guess among the 65 characters (log 65 = 4.17). With a causal
mask the stacks learn as other decoders do, and here more slowly than a serial one of the same size:
{gap:.2f} nats behind it after 1,000 steps.
"""


def page() -> str:
    """The whole page."""
    every = [found(config) for config in sorted(CONFIGS.glob("*.toml"))]
    claims = [it for it in every if it.ablation.path.stem.startswith("claim_")]
    others = [it for it in every if it not in claims]
    summary = ["| claim | verdict |", "| --- | --- |"]
    summary += [f"| {v.claim} | {v.verdict}{_star(v)} |" for it in claims for v in it.verdicts]
    return "\n".join(
        [
            HEAD.format(level=LEVEL, power=POWER),
            "## The ten claims of the Tiny Shakespeare system",
            "",
            *summary,
            "",
            *map(section, claims),
            "## Which variant is best?",
            "",
            *map(section, others),
            upper_triangle(),
        ]
    )


def collect(runs: Path) -> None:
    """Copies every ablation's results from its run folder to where they are committed."""
    target = RESULTS / "ablations"
    target.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS.glob("*.toml"):
        folder = runs / config.stem
        shutil.copy(folder / "results.csv", target / f"{config.stem}.csv")
        shutil.copy(folder / "about.json", target / f"{config.stem}.json")


def main() -> None:
    """Reads the command line and writes the page."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--collect", type=Path, help="folder with the ablations' run folders")
    options.add_argument("--out", type=Path, default=PAGE)
    chosen = options.parse_args()
    if chosen.collect:
        collect(chosen.collect)
    chosen.out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
