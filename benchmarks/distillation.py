"""Distilled students against the same students trained alone, for the same tokens.

    python -m benchmarks.distillation [--presets stories shakespeare_small] [--seeds 0 1 2]

A student of a quarter of the teacher's parameters is trained twice from the same weights, on the
same batches: alone on the next token, and by compress.py distill. Differences of validation losses
are paired by the seed, with Student's interval. Runs are under runs/distillation/; one that is
finished is not trained again, one that was stopped goes on, and a teacher that is not there yet
(runs/stories, runs/shakespeare_small) is trained first. Rows are written as they come, to
benchmarks/results/distillation.json and .md. `--quick` shows in a minute that all of it works.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.turns import HERE, describe, trained, write
from jaxdecoder.ablation.statistics import estimate
from jaxdecoder.compression.distillation import distill
from jaxdecoder.compression.options import Distill
from jaxdecoder.config import load, to_toml
from jaxdecoder.config.sections import Teaching

STUDENTS = {"stories": "stories_student", "shakespeare_small": "shakespeare_student"}
GOAL = 0.02
"""Nats a token by which a distilled student should be better."""
QUICK = ["--train.steps", "20", "--train.evaluate-every", "20", "--train.checkpoint-every", "20"]
QUICK += ["--train.evaluation-batches", "2", "--train.steps-per-call", "10"]


def summary_of(run: Path) -> dict[str, Any] | None:
    """What a finished run came to."""
    path = run / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def measure(preset: str, chosen: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds a row for each seed and arm to the report, and writes it."""
    overrides = QUICK if chosen.quick else []
    runs = Path(chosen.runs)
    teacher = load(f"configs/{preset}.toml", overrides)
    out = str(runs / f"{preset}_quick") if chosen.quick else teacher.train.out
    taught_by = trained(replace(teacher, train=replace(teacher.train, out=out)))
    student = load(f"configs/{STUDENTS[preset]}.toml", overrides)
    steps = chosen.steps or student.train.steps
    how = Teaching(divergence=chosen.divergence, temperature=chosen.temperature, alpha=chosen.alpha)
    runs.mkdir(parents=True, exist_ok=True)
    file = runs / f"{STUDENTS[preset]}.toml"
    file.write_text(to_toml(student))
    name = f"{chosen.divergence}_{chosen.temperature:g}_{chosen.alpha:g}"
    quick = "_quick" if chosen.quick else ""
    for seed in chosen.seeds:
        alone = runs / f"{preset}{quick}_{steps}_alone_{seed}"
        lessons = runs / f"{preset}{quick}_{steps}_{name}_{seed}"
        config = replace(student.train, out=str(alone), seed=seed, steps=steps)
        arms = {"alone": trained(replace(student, train=config))}
        options = Distill(out, str(file), str(lessons), how, seed=seed, steps=steps)
        arms["distilled"] = summary_of(lessons) or distill(options, f"{lessons} from {out}")
        for arm, summary in arms.items():
            row = {"preset": preset, "arm": arm, "seed": seed}
            row |= {key: summary[key] for key in ("parameters", "tokens", "validation_loss")}
            report["rows"].append({**row, "seconds": summary["seconds"]})
        report["teachers"][preset] = {
            key: taught_by[key] for key in ("parameters", "tokens", "validation_loss")
        }
        report["comparisons"] = comparisons(report["rows"])
        write(chosen.out, report)
        chosen.out.with_suffix(".md").write_text(markdown(report))


def comparisons(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By preset, how much lower the distilled loss is, over the seeds that have both arms."""
    found: dict[str, Any] = {}
    for preset in dict.fromkeys(row["preset"] for row in rows):
        arms = {
            arm: {r["seed"]: r["validation_loss"] for r in rows if (r["preset"], r["arm"]) == key}
            for arm in ("alone", "distilled")
            for key in [(preset, arm)]
        }
        gains = [arms["alone"][seed] - loss for seed, loss in arms["distilled"].items()]
        found[preset] = {
            arm: sum(losses.values()) / len(losses) for arm, losses in arms.items()
        } | {"gains": gains}
        if len(gains) > 1:
            found[preset]["gain"] = estimate(gains)._asdict()
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table of the results."""
    lines = [
        "| teacher | its loss | student's parameters | alone | distilled | gain (95% interval) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for preset, found in report["comparisons"].items():
        teacher = report["teachers"][preset]
        student = next(r["parameters"] for r in report["rows"] if r["preset"] == preset)
        gain = found.get("gain")
        told = (
            f"{gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f}), {gain['n']} seeds"
            if gain
            else f"{found['gains'][0]:.4f}, one seed"
        )
        share = f"{student:,} of {teacher['parameters']:,}"
        theirs, *ours = (
            f"{loss:.4f}"
            for loss in (teacher["validation_loss"], found["alone"], found["distilled"])
        )
        cells = [preset, theirs, share, *ours, told]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"Validation losses in nats a token; the goal is a gain of at least {GOAL:g}."
    return "\n".join([*lines, "", note]) + "\n"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the command line and measures."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--presets", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=0, help="of students; 0: as their configs")
    options.add_argument("--divergence", default="forward_kl")
    options.add_argument("--temperature", type=float, default=1.0)
    options.add_argument("--alpha", type=float, default=0.9)
    options.add_argument("--quick", action="store_true", help="20 steps of everything")
    options.add_argument("--runs", default="runs/distillation")
    options.add_argument("--out", type=Path, default=HERE / "results" / "distillation.json")
    chosen = options.parse_args(arguments)
    described = describe()
    how = {key: getattr(chosen, key) for key in ("divergence", "temperature", "alpha")}
    report: dict[str, Any] = {**described, **how, "teachers": {}, "comparisons": {}, "rows": []}
    for preset in chosen.presets:
        measure(preset, chosen, report)
    print(markdown(report))
    return report


if __name__ == "__main__":
    main()
