"""What would make a training step fit into a device's memory, and how much more would fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxdecoder.analysis.memory import Memory
from jaxdecoder.config import Config, ConfigError, ModelConfig, choices

Tell = Callable[[Config, int], Memory]
"""(config, devices) -> the memory of its training step on each device."""

MORE_DEVICES = (2, 4, 8)


class Attempt(NamedTuple):
    """A version of a config that needs less memory."""

    config: Config
    devices: int
    overrides: dict[str, Any]
    """By key, such as `mesh.fsdp`: what was changed of the config."""

    def with_(self, section: str, key: str, value: Any) -> Attempt:
        """Return it with another field changed."""
        table = dataclasses.replace(getattr(self.config, section), **{key: value})
        config = dataclasses.replace(self.config, **{section: table})
        return Attempt(config, self.devices, {**self.overrides, f"{section}.{key}": value})

    @property
    def parts(self) -> int:
        """The number of parts of a batch, each on devices of its own."""
        sizes = self.config.mesh.sizes(self.devices)
        return sizes["data"] * sizes["fsdp"]

    @property
    def command(self) -> str:
        """The arguments that make it of the config."""
        return " ".join(
            f"--{key.replace('_', '-')} {value}" for key, value in self.overrides.items()
        )


def attempts(
    config: Config, devices: int, room: int, tell: Tell, *, more: tuple[int, ...] = MORE_DEVICES
) -> Iterator[tuple[Attempt, Memory]]:
    """Yield ever smaller versions with what they need, up to the first that `room` bytes hold.

    First more is computed again, then the batch is taken in more passes, then moments are kept in
    bfloat16, and last everything is split over `more` devices.
    """
    now = Attempt(config, devices, {})
    memory = tell(config, devices)
    for change in (_recomputed, _in_passes, _halved):
        for changed in change(now, memory, room):
            now, memory = changed, tell(changed.config, changed.devices)
            yield now, memory
            if memory.total <= room:
                return
    for count in more:
        over = _split(now, count) if count > devices else None
        if over is not None:
            try:
                memory = tell(over.config, over.devices)
            except ConfigError:  # the model, or the rest of the mesh, does not divide
                continue
            now = over
            yield now, memory
            if memory.total <= room:
                return


def _recomputed(now: Attempt, memory: Memory, room: int) -> list[Attempt]:
    policies = choices(ModelConfig, "remat")
    after = policies[policies.index(now.config.model.remat) + 1 :]
    return [now.with_("model", "remat", policy) for policy in after]


def _in_passes(now: Attempt, memory: Memory, room: int) -> list[Attempt]:
    """Return as few passes as seem to fit; activations go with the rows of a pass."""
    t = now.config.train
    fewer = [
        t.gradient_accumulation * 2**n
        for n in range(1, t.batch_size.bit_length())
        if t.batch_size % (t.gradient_accumulation * 2**n * now.parts) == 0
    ]

    def seems_to_fit(passes: int) -> bool:
        share = t.gradient_accumulation / passes
        summed = memory.weights if t.gradient_accumulation == 1 else 0
        return memory.total - (1 - share) * memory.activations + summed <= room

    first = next((n for n, passes in enumerate(fewer) if seems_to_fit(passes)), len(fewer) - 1)
    return [now.with_("train", "gradient_accumulation", passes) for passes in fewer[first:]]


def _halved(now: Attempt, memory: Memory, room: int) -> list[Attempt]:
    if now.config.optimizer.state_dtype == "bfloat16":
        return []
    return [now.with_("optimizer", "state_dtype", "bfloat16")]


def _split(now: Attempt, count: int) -> Attempt | None:
    """Return it over `count` devices, each of which has as many rows in a pass as before."""
    t = now.config.train
    if now.config.mesh.tensor * now.config.mesh.context != 1:
        return None  # whoever splits so knows better
    passes = max(1, t.gradient_accumulation * now.parts // count)
    if t.batch_size % (passes * count):
        return None
    if passes != t.gradient_accumulation:
        now = now.with_("train", "gradient_accumulation", passes)
    return now.with_("mesh", "data", 1).with_("mesh", "fsdp", -1)._replace(devices=count)


def largest_batch(
    config: Config, devices: int, room: int, tell: Tell
) -> tuple[Attempt, Memory] | None:
    """Return the largest batch that fits, with its memory; None if no larger one does.

    The sequences of a pass on a device are a power of two. It is guessed by proportion, and told.
    """
    memory, t = tell(config, devices), config.train
    passes = t.gradient_accumulation * Attempt(config, devices, {}).parts
    a_row = (memory.activations + memory.batch) * passes / t.batch_size
    rows = 2 ** (int((room - memory.total) / a_row + t.batch_size / passes).bit_length() - 1)
    while rows * passes > t.batch_size:
        larger = Attempt(config, devices, {}).with_("train", "batch_size", rows * passes)
        found = tell(larger.config, devices)
        if found.total <= room:
            return larger, found
        rows //= 2
    return None
