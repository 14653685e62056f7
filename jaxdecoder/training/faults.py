"""Batches that a run skips: after a loss that spiked or was not finite, it goes back and past them.

A run that is rolled back to its last checkpoint would meet the same fault with the same batches, so
it goes on with later ones (as PaLM did, arXiv 2204.02311, section 5.1). Which ones is written down
before it does, so that a run that is killed and resumed sees the same batches.
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxdecoder.errors import UserError
from jaxdecoder.files import write_atomically
from jaxdecoder.training.devices import is_first_host


class Fault(UserError):
    """A step after which training cannot simply go on; `step` counts from 1."""

    def __init__(self, step: int, what: str):
        super().__init__(
            f"step {step}: {what}; training stopped, the last good checkpoint is kept. A lower "
            "optimizer.learning_rate, more warmup_steps or a gradient_clip may help, with another "
            "--train.out"
        )
        self.step, self.what = step, what


class Skipped:
    """The batches that a run has skipped, in `skipped.json` of its folder."""

    def __init__(self, run: Path):
        self.path = run / "skipped.json"
        self.parts: list[tuple[int, int]] = []
        try:
            found = json.loads(self.path.read_text())
            self.parts = [(int(part["step"]), int(part["batches"])) for part in found]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(
                f"{self.path}: cannot be read; it lists the batches that were skipped, as "
                '[{"step": 500, "batches": 37}]. Mend it, or remove it to skip none'
            ) from None

    def batch_of(self, step: int) -> int:
        """Return the number of the batch that step `step` takes."""
        return step + sum(batches for since, batches in self.parts if since <= step)

    def add(self, step: int, batches: int) -> None:
        """Skip so many batches from step `step` on."""
        self.parts.append((step, batches))
        if is_first_host():
            parts = [{"step": since, "batches": count} for since, count in self.parts]
            write_atomically(self.path, json.dumps(parts) + "\n")

    def clear(self) -> None:
        """Skip none: the run starts anew."""
        self.parts = []
        if is_first_host():
            self.path.unlink(missing_ok=True)
