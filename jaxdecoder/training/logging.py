"""What a person sees of a run: its progress, TensorBoard events, and a loss curve."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxdecoder.files import as_label, as_png, write_atomically
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.typing import Table

EVALUATING = "evaluating"


class Screen:
    """The first host's terminal, with a progress bar, and the run's TensorBoard events."""

    def __init__(self, run: Path, *, steps: int, tensorboard: bool):
        self.run, self.first = run, is_first_host()
        self.tensorboard = tensorboard and self.first
        self.writer: Any = None
        self.console = Console(quiet=not self.first)
        self.progress = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=steps, shown="")
        self.shown: dict[str, float] = {}

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        done = self.progress.tasks[0]
        if done.description == EVALUATING and not error[0]:
            self.progress.update(self.task, completed=done.total)
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def begin(self, step: int) -> None:
        """Start the progress bar, and the events, at this step."""
        self.progress.update(self.task, completed=step)
        if self.tensorboard:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Show what was measured at a step."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        if self.writer is not None and "validation_loss" in metrics:
            self.writer.flush()
        self.shown |= metrics
        self.progress.update(self.task, completed=step, shown=_summary(self.shown))
        if "validation_loss" in metrics and not self.console.is_terminal:
            # Where there is no bar, a line an evaluation shows that something happens.
            self.say(f"step {step}: {_summary(self.shown)}")

    def evaluating(self, split: str, done: int, of: int, seconds: float) -> None:
        """Show how far the evaluation at the end is, and first how long it may take."""
        if done == 0:
            about = f", about {seconds:.0f} s" if seconds >= 1 else ""
            self.say(f"evaluating {of:,} batch{'es' if of > 1 else ''} of the {split} split{about}")
            what = f"of the {split} split"
            self.progress.reset(self.task, total=of, shown=what, description=EVALUATING)
        self.progress.update(self.task, completed=done)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.console.print(
            text, markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def sample(self, step: int, text: str) -> None:
        """Print a text that the model wrote at a step, and keep it in samples.txt."""
        self.say(f"\n--- a sample at step {step} ---\n{text}\n---\n")
        if self.first:
            with (self.run / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{text}\n")


def keep_metrics(run: Path, start: int) -> list[Table]:
    """Drop the lines of metrics.jsonl past a checkpoint: their steps will be taken again.

    Every host returns those that are kept.
    """
    kept = [line for line in read_metrics(run) if line["step"] <= start]
    if is_first_host():
        content = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(run / "metrics.jsonl", content)
    return kept


def read_metrics(run: Path) -> list[Table]:
    """Return the lines of a run's metrics.jsonl, without those cut short by a kill, or damaged."""
    path = run / "metrics.jsonl"
    lines = []
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                lines.append(found)
    return lines


def draw_losses(run: Path) -> None:
    """Draw loss.png from metrics.jsonl."""
    from matplotlib.figure import Figure

    metrics = read_metrics(run)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("train_loss", {"lw": 0.8, "alpha": 0.5}), ("validation_loss", {"lw": 2})):
        points = [(m["step"], m[name]) for m in metrics if name in m]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=as_label(run.name))
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(run / "loss.png", as_png(figure, dpi=120))


def _summary(metrics: dict[str, float]) -> str:
    forms = {
        "train_loss": "loss {:.4f}",
        "validation_loss": "val {:.4f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "model_flop_utilisation": "{:.0%} MFU",
    }
    return "  ".join(form.format(metrics[name]) for name, form in forms.items() if name in metrics)
