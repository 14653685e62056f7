"""An ablation from its file to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxdecoder.ablation import report
from jaxdecoder.ablation.claims import Verdict, check, judge
from jaxdecoder.ablation.evidence import Outcome, knowing_nothing
from jaxdecoder.ablation.grid import Ablation
from jaxdecoder.ablation.training import Result, train_members
from jaxdecoder.ablation.workers import train_on_cores
from jaxdecoder.training import runs
from jaxdecoder.training.devices import cores


def run(ablation: Ablation, out: Path, *, command: str) -> list[Verdict]:
    """Train the members that are not trained yet, judge the claims, and write the report.

    Raises:
        UserError: before any training, if a claim cannot be answered by the arms.
    """
    check(ablation)
    console = Console(markup=False, emoji=False)
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(f"{out}: {report.about(ablation)}")
    train: Callable[..., list[Result]] = train_members
    if jax.default_backend() == "cpu":
        train = partial(train_on_cores, cores=cores()[: jax.device_count()])
    with runs.lock(out), _progress(console) as progress:
        task = progress.add_task("training", total=None)
        results = train(
            [member.config for member in ablation.members],
            out,
            report=lambda done, of: progress.update(task, completed=done, total=of),
        )
    outcomes = outcomes_of(ablation, results)
    verdicts = judge(ablation, outcomes)
    report.write(out, ablation, results, outcomes, verdicts, command)
    table = Table(*report.HEADINGS[:3])  # the first columns, because a terminal is narrow
    for row in report.table(ablation, results, outcomes):
        table.add_row(*report.cells(ablation, row)[:3])
    console.print(table)
    for verdict in verdicts:
        say(f"{verdict.verdict}: {verdict.claim}\n  {report.sentence(verdict)}")
    say(f"{out / 'report.html'} tells it all")
    return verdicts


def outcomes_of(ablation: Ablation, results: Sequence[Result]) -> list[Outcome]:
    """Return the members' results as evidence."""
    outcomes = []
    for member, result in zip(ablation.members, results, strict=True):
        summary = result.summary
        diverged = summary.get("diverged_at")  # train.py, which finds it finished, leaves it out
        if diverged is None:
            train, validation = summary["train_loss"], summary["validation_loss"]
            metrics = {
                "train_loss": train,
                "validation_loss": validation,
                "overfitting": validation - train,
            }
        else:
            model = runs.read_config(Path(result.config.train.out)).architecture
            metrics = knowing_nothing(model.vocab_size)
        outcomes.append(Outcome(member.arm, member.learning_rate, member.seed, metrics, diverged))
    return outcomes


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("steps of all members"),
        TimeRemainingColumn(),
        console=console,
    )
