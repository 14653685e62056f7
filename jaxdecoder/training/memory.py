"""The memory of a training step by XLA's own plan, with no array made.

The step is the one that training runs: its state donated, several steps a call, parameters and
batch placed alike. XLA says what a device holds at once; what of it is weights, moments or tokens
is known from their shapes. Its temporaries are not told apart: the gradients are taken to be among
them, and what remains is activations. Not counted are the evaluation, which needs less, and what
CUDA and its libraries take for themselves, about half a gigabyte.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from jaxdecoder.analysis.memory import Memory, by_closed_form
from jaxdecoder.config import Config
from jaxdecoder.data.batches import Batch
from jaxdecoder.devices import Device
from jaxdecoder.training import ahead
from jaxdecoder.training.loop import steps_a_call
from jaxdecoder.training.sharding import (
    batch_sharding,
    known_to_layers,
    located,
    make_mesh,
    sizes_on,
    state_sharding,
    training_call,
)
from jaxdecoder.training.step import State, fuse, init_state, make_step


class Lowered(NamedTuple):
    """A training call that XLA can compile, and what enters it, as shapes with shardings."""

    call: jax.stages.Lowered
    state: State
    batches: Batch


def can_count(device: Device) -> bool:
    """Return whether XLA can compile for this device here."""
    return device.card is None or ahead.can_compile()


def told(config: Config, device: Device, count: int = 1) -> Memory:
    """Return the memory of the config's training step on each of `count` devices.

    Raises:
        UserError: if the batch does not divide over the devices.
    """
    lowered, compiled = compile_step(config, device, count)
    return counted(lowered, compiled)


def estimated(config: Config, device: Device, count: int = 1) -> Memory:
    """Return the same by the closed form, for a device that XLA cannot compile for here."""
    sizes_on(count, config)
    return by_closed_form(config, device, _steps(config), count)


def compile_step(
    config: Config, device: Device, count: int = 1, steps: int | None = None, *, run: bool = False
) -> tuple[Lowered, jax.stages.Compiled]:
    """Compile a call of so many steps, or of as many as training takes at once.

    `run`: as well as for a program that is run, and not only counted.
    """
    with _mesh(config, device, count) as mesh:
        lowered = lower(config, mesh, steps or _steps(config))
        # How LLVM optimises a CPU's code changes no plan of memory, only how long this takes.
        quick: dict[str, Any] = {"xla_backend_optimization_level": 0}
        fast = None if run or device.card is not None else quick
        return lowered, lowered.call.compile(fast)


def lower(config: Config, mesh: Mesh, steps: int) -> Lowered:
    """Trace the training call of a config over the devices of a mesh, as a run places it."""
    shapes = jax.eval_shape(partial(init_state, config))
    where = state_sharding(shapes, mesh, config.architecture)
    shape = (steps, config.train.batch_size, config.model.context_length)
    rows = batch_sharding(mesh, 1)

    def array(dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    batches = Batch(array(jnp.int32), array(jnp.int32), array(jnp.float32))
    call, state = training_call(fuse(make_step(config)), mesh, where), located(shapes, where)
    return Lowered(call.lower(state, batches, ()), state, batches)


def counted(lowered: Lowered, compiled: jax.stages.Compiled) -> Memory:
    """Return what XLA says of a compiled call, by part."""
    plan: Any = compiled.memory_analysis()
    state = lowered.state
    total = peak(plan)
    weights, moments, average, batch = map(
        _held, (state.params, (state.optimizer, state.step), state.ema, lowered.batches)
    )
    gradients = min(weights, plan.temp_size_in_bytes)
    rest = total - weights - moments - average - batch - gradients
    return Memory(weights, moments, average, batch, gradients, rest)


def peak(plan: Any) -> int:
    """Return the bytes that a device holds at once: results share memory with what is donated."""
    arguments, results = plan.argument_size_in_bytes, plan.output_size_in_bytes
    found: int = arguments + results - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return found


@contextlib.contextmanager
def _mesh(config: Config, device: Device, count: int) -> Iterator[Mesh]:
    if device.card is None:
        mesh = make_mesh(config, jax.devices("cpu")[:count])
        with known_to_layers(mesh):
            yield mesh
        return
    with ahead.traced_for(device, count, "devices") as there:
        mesh = make_mesh(config, list(there.devices.flat))
        kind = ahead.abstract_mesh(device, 1, "devices").abstract_device
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=kind)):
            yield mesh


def _steps(config: Config) -> int:
    return steps_a_call(config, config.train.steps_per_call)


def _held(tree: PyTree) -> int:
    """Return the bytes that each device has of these arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
