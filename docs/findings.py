"""Write docs/findings.md from the committed results of the ablations.

    make ablations                                    # trains all members
    python -m docs.findings --collect runs/ablations  # copies their results, then writes the page
    python -m docs.findings                           # writes the page from the committed results

The claims are judged again from the losses of every member in `benchmarks/results/ablations/`. So
the page has the verdicts of the current code.
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

This page tests published claims, and has other results of our own runs. `python -m docs.findings`
writes it from the results in `benchmarks/results/`. Every section names the command that makes its
results again.

- Differences and losses are in nats per token (a character of Tiny Shakespeare).
- Intervals are 95% t intervals over the seeds.
- p values are corrected by Holm's method over the claims of a section. A claim is decided at
  {level:.0%}.
- Every arm is compared at its best learning rate of those tried. For a seed, all arms see the same
  data in the same order.
- A star marks a verdict for which the best learning rate was at an end of the grid. A better rate
  may be beyond that end.
- "detectable" is the difference that this many seeds would find {power:.0%} of the time. It is
  empty where the claim is not about one difference.

The models have 0.1 to 0.2 million parameters (parallel against serial stacks: 1 million) and train
for a few hundred steps. A verdict is about these models; a larger model may differ. The `[full]`
table of each file asks the same question about a larger model.
"""


class Found(NamedTuple):
    """An ablation with its results."""

    ablation: Ablation
    outcomes: list[Outcome]
    verdicts: list[Verdict]
    about: dict[str, Any]

    @property
    def question(self) -> str:
        """Return the comment at the top of its file."""
        lines = self.ablation.path.read_text(encoding="utf-8").splitlines()
        until = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        return " ".join(line.lstrip("# ") for line in lines[:until])


def found(config: Path) -> Found:
    """Read the committed results of an ablation, and judge its claims."""
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
    """Write one section: the question, what was run, the verdicts and the arms."""
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
            "| claim | verdict | estimate | of what | 95% interval | corrected p | detectable |",
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
    """Return the arms by their losses, the best first."""
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
    """Write the section on the published losses of the parallel stacks."""
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
2,700. The mask of that code keeps the upper triangle: a token sees itself and the tokens after it.
So it sees the token that it should predict.

`python -m benchmarks.upper_triangle` trains three models: `parallel_stacks_small` with that mask,
the same model with a causal mask, and a serial decoder with as many parameters (5 blocks of width
128). All see the same batches of Tiny Shakespeare's characters (16 x 64 per step, Adam at 1e-3, one
seed). These are validation losses in nats per character:

| model | parameters | after 100 steps | after 1,000 | then, with a causal mask |
| --- | --- | --- | --- | --- |
{rows}

![Losses of the three models by step](upper_triangle.png)

The low loss comes from copying. When text is generated, the future is not visible. Then the same
weights are worse than a uniform guess among the 65 characters (log 65 = 4.17). With a causal mask
the stacks learn as other decoders do. Here they learn more slowly than a serial decoder of the same
size: after 1,000 steps their loss is {gap:.2f} nats higher.
"""


def page() -> str:
    """Write the whole page."""
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
    """Copy the results of every ablation from its run folder to where they are committed."""
    target = RESULTS / "ablations"
    target.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS.glob("*.toml"):
        folder = runs / config.stem
        shutil.copy(folder / "results.csv", target / f"{config.stem}.csv")
        shutil.copy(folder / "about.json", target / f"{config.stem}.json")


def main() -> None:
    """Read the command line and write the page."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--collect", type=Path, help="folder with the ablations' run folders")
    options.add_argument("--out", type=Path, default=PAGE)
    chosen = options.parse_args()
    if chosen.collect:
        collect(chosen.collect)
    chosen.out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
