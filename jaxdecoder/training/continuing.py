"""Go on with a run in another way: more steps, another schedule, other intervals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxdecoder.config import Config, ConfigError
from jaxdecoder.training import runs
from jaxdecoder.training.checkpoints import steps_in
from jaxdecoder.training.optimizers import make_schedule

CHANGEABLE = (
    "train.steps",
    "train.steps_per_call",
    "train.evaluate_every",
    "train.evaluation_batches",
    "train.final_batches",
    "train.checkpoint_every",
    "train.best_every",
    "train.log_every",
    "train.sample_every",
    "train.rollbacks",
    "train.spike",
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.final_fraction",
    "optimizer.decay_fraction",
    "optimizer.weight_decay",
    "optimizer.gradient_clip",
)
"""What may differ when a run goes on: it changes the steps that follow, and not what is trained."""


def go_on(config: Config) -> tuple[Config, list[str]]:
    """Return the config that its run goes on with, and what to say of the change.

    `train.history` says what changed, and when. A run that has not begun has nothing to change.

    Raises:
        UserError: if the run would become another one, or is further than it should go.
    """
    run = Path(config.train.out)
    changes = runs.check_same_config(run, config, CHANGEABLE)
    if not steps_in(run / "checkpoints") and not config.train.init_from:
        runs.check_beginning(config)
    if not (run / "config.toml").is_file():
        return config, []
    theirs = runs.read_config(run)
    history = theirs.train.history
    step = max(steps_in(run / "checkpoints"), default=0)
    if config.train.steps < min(step, theirs.train.steps):
        why = f"{run} is at step {step:,} already; at least {step}, or {runs.ANOTHER_FOLDER}"
        raise ConfigError("train.steps", config.train.steps, why)
    news = []
    if changes:
        lines = [f"step {step}: {change.key} = {change.then}" for change in changes]
        history = (*history, *lines)
        news = [f"changed at step {step:,}: {change}" for change in changes]
        news += _rates(theirs, config, step)
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, history=history)
    ), news


def _rates(before: Config, now: Config, step: int) -> list[str]:
    """Return what to say of the learning rate, which may jump where a schedule is drawn anew."""
    old, new = (_rate(config, step) for config in (before, now))
    if not step or old == new:
        return []
    peak = before.optimizer.learning_rate
    said = f"the learning rate was {old:.3g} at step {step:,}, and goes on at {new:.3g}"
    if step >= before.train.steps and old < peak:
        said += (
            f": the {before.optimizer.schedule} schedule had decayed to {old / peak:.0%} of its "
            f"peak, and is drawn anew over {now.train.steps:,} steps"
        )
    return [said]


def _rate(config: Config, step: int) -> float:
    o = config.optimizer
    return float(make_schedule(o, config.train.steps, o.learning_rate)(step))
