"""Checkpoints through orbax: asynchronous, atomic, the last few and the best kept.

A checkpoint has the items `params`, `ema` (only where there is one) and `optimizer`, so that
whoever wants weights reads weights alone. Beside them are the checksums of their files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxdecoder.data.digests import file_digest
from jaxdecoder.errors import UserError, first_line
from jaxdecoder.files import disk_is_full, make_room, plain_name
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.training.step import State
from jaxdecoder.typing import Params

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports what we report ourselves

METRIC = "validation_loss"
CHECKSUMS = "checksums.json"
UNKNOWN = math.inf
"""The loss noted with a checkpoint that was saved without an evaluation."""


@contextlib.contextmanager
def open_checkpoints(
    run: Path, *, keep: int = 2, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints of a run folder; for writing, set aside those with broken notes."""
    folder = (run / "checkpoints").absolute()
    if not read_only:
        make_room(folder / "0")
    for step in [] if read_only else steps_in(folder):
        # The policy below reads every note, so one that cannot be read would stop every save.
        if recorded_loss(folder, step) is None:
            _set_aside(folder, step, "its noted loss cannot be read")
    # Called in the folder's temporary place, before its name says that it is complete.
    sealing = partial(_write_checksums, folder) if is_first_host() else None
    policy = AnyPreservationPolicy(
        [LatestN(n=keep), BestN(n=1, get_metric_fn=lambda m: m[METRIC], reverse=True)]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=None if read_only else policy,
        best_fn=lambda metrics: metrics[METRIC],
        best_mode="min",
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        enable_background_delete=False,
        async_options=ocp.AsyncOptions(post_finalization_callback=sealing),
    )
    # Orbax takes some characters of a name for a pattern, and would not find its own files.
    with plain_name(folder) as known_as, ocp.CheckpointManager(known_as, options=options) as opened:
        yield opened


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, newest first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def recorded_loss(folder: Path, step: int) -> float | None:
    """Return the validation loss noted with a checkpoint, or None if it cannot be read.

    It is infinite where none was known.
    """
    try:
        noted = json.loads((folder / str(step) / "metrics" / "metrics").read_text())
        loss = float(noted[METRIC])
        return None if math.isnan(loss) or loss < 0 else loss
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best_loss(folder: Path, since: int = 0) -> float:
    """Return the lowest validation loss of checkpoints from step `since` on; infinite if none."""
    losses = [recorded_loss(folder, step) for step in steps_in(folder) if step >= since]
    return min((loss for loss in losses if loss is not None), default=math.inf)


def save(
    manager: ocp.CheckpointManager, step: int, state: State, validation_loss: float = UNKNOWN
) -> None:
    """Start writing the state; it is on disk once the manager is closed, or has waited.

    A step that is there already is left as it is.
    """
    if step in manager.all_steps():
        return
    arguments = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
    manager.save(
        step, args=ocp.args.Composite(**arguments), metrics={METRIC: validation_loss}, force=True
    )


def restore_latest(manager: ocp.CheckpointManager, like: State) -> tuple[int, State] | None:
    """Return the newest step that can be read and its state, or None; `like` has its shardings.

    Newer ones that cannot be read are moved to the run's `damaged/` folder. If none can be read,
    the fault may lie elsewhere (memory, permissions): nothing is moved and a `UserError` raised.
    """
    folder = Path(str(manager.directory)).resolve()
    arguments = {name: ocp.args.StandardRestore(item) for name, item in _items(like).items()}
    failures: dict[int, str] = {}
    for step in steps_in(folder):
        try:
            verify(folder / str(step))
            read = manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:
            # Whatever a broken file raises, the answer is the same: use the one before.
            failures[step] = first_line(error)
            continue
        for broken, why in failures.items():
            _set_aside(folder, broken, why)
        if failures:
            manager.reload()
        counter = jax.device_put(np.full(like.step.shape, step, np.int32), like.step.sharding)
        return step, State(counter, read["params"], read["optimizer"], read.get("ema", ()))
    if failures:
        listed = "".join(f"\n  {step}: {why}" for step, why in failures.items())
        raise UserError(f"{folder}: none of these checkpoints can be read:{listed}")
    return None


def restore_params(
    run: Path, like: PyTree, which: str | int = "best", since: int = 0
) -> tuple[int, Params]:
    """Return step and weights of a run's `best` or `last` checkpoint, or of the one of a step.

    They are the moving average where the run has one, and come as NumPy arrays, whatever devices
    they were saved from. `like` has their shapes. The best is sought from step `since` on.
    """
    folder = run / "checkpoints"
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"{run}: no checkpoint there yet; has train.py run in this folder?")
    if isinstance(which, int):
        if which not in steps:
            listed = ", ".join(map(str, sorted(steps)))
            raise UserError(f"{run}: no checkpoint of step {which} there; there are: {listed}")
        steps = [which]
    losses = {
        step: loss
        for step in steps
        if step >= since and math.isfinite(loss := recorded_loss(folder, step) or UNKNOWN)
    }
    if which == "best" and losses:
        # The wanted one first, then the newest ones, should it be damaged.
        steps.insert(0, min(losses, key=losses.__getitem__))
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    for step in steps:
        item = "ema" if (folder / str(step) / "ema").is_dir() else "params"
        try:
            verify(folder / str(step), [item])
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
            with open_checkpoints(run, read_only=True) as manager:
                return step, manager.restore(step, args=args)[item]
        except Exception as error:
            print(f"{run}: checkpoint {step} cannot be read: {first_line(error)}")
    raise UserError(f"{run}: no checkpoint there can be read")


@contextlib.contextmanager
def full_disk_explained(run: Path) -> Iterator[None]:
    """Turn a full disk into a `UserError` that says what is safe."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not disk_is_full(error):
            raise
        steps = steps_in(run / "checkpoints")
        kept = f"the last good checkpoint is step {steps[0]}" if steps else "none was saved"
        raise UserError(
            f"{run}: no space left for what training writes; {kept}. "
            "Free some space and run the same command again"
        ) from None


def _items(state: State) -> dict[str, PyTree]:
    """Return the items of a checkpoint of this state."""
    items = {"params": state.params, "optimizer": state.optimizer}
    return items if state.ema == () else {**items, "ema": state.ema}


def verify(checkpoint: Path, items: Iterable[str] | None = None) -> None:
    """Raise a `UserError` if a file of these items, or of all, is not the one that was saved.

    A checkpoint from before there were checksums is taken as it is.
    """
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_text())
        wanted = {
            name: checksum
            for name, checksum in checksums.items()
            if items is None or name.split("/")[0] in items
        }
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{checkpoint / CHECKSUMS} cannot be read") from None
    for name, checksum in wanted.items():
        path = checkpoint / name
        if not path.is_file() or file_digest(path) != checksum:
            raise UserError(f"{path} is not as it was saved")


def _write_checksums(folder: Path) -> None:
    """Write the checksums of the items that are about to be complete."""
    for checkpoint in folder.glob("*.orbax-checkpoint-tmp*"):
        files = [path for path in sorted(checkpoint.glob("*/**/*")) if path.is_file()]
        sums = {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files}
        (checkpoint / CHECKSUMS).write_text(json.dumps(sums, indent=0))


def _set_aside(folder: Path, step: int, why: str) -> None:
    target = folder.parent / "damaged" / str(step)
    if is_first_host():
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        (folder / str(step)).rename(target)
    print(f"checkpoint {step} cannot be read ({why}); moved to {target}")
