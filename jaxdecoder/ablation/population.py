"""Many runs in one program: members that differ in numbers alone train side by side.

Members share a program if their configs differ in nothing but `MEMBERS_OWN`: seed (and with it
weights, data order and what is dropped), rates, weight decay, length. Every array of the training
state then has a leading member axis, which is split over the devices. How a device works through
its members depends on the platform (`MAPPINGS`): a GPU takes them at once, a CPU's core one after
another, since a small model fills a core but not a GPU.

A member computes what its solo run computes, up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdecoder.config import Config, to_dict
from jaxdecoder.data.batches import Batch
from jaxdecoder.errors import UserError
from jaxdecoder.training.devices import compiled_soon
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.training.optimizers import Hyperparameters, hyperparameters_of
from jaxdecoder.training.step import Metrics, State, make_decoder, make_step

AXIS = "members"


MEMBERS_OWN = (
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "optimizer.weight_decay",
    "train.steps",
    "train.seed",
    "train.out",
    "model.init_std",
    "model.dropout",
)
"""Fields in which members of one program may differ: their `Hyperparameters`, and what only the
first weights and the place of the run folder depend on."""


def arrays_of(config: Config) -> Hyperparameters:
    """A config's own hyperparameters as the program takes them."""
    types = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.float32)
    return Hyperparameters(
        *(kind(x) for kind, x in zip(types, hyperparameters_of(config), strict=True))
    )


def program_key(config: Config) -> str:
    """Equal for configs that share a program."""
    tables = to_dict(config)
    for field in MEMBERS_OWN:
        section, name = field.split(".")
        tables[section].pop(name, None)
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12]


# --- The program ----------------------------------------------------------------------------------


def one_after_another(function: Callable[..., Any]) -> Callable[..., Any]:
    """Members in turn: each has a core's caches to itself."""
    return lambda *arguments: jax.lax.map(lambda x: function(*x), arguments)


MAPPINGS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "cpu": one_after_another,
    "gpu": jax.vmap,
    "tpu": jax.vmap,
}
"""How a device works through its members, by platform: see benchmarks/population.py."""


def member_steps(
    config: Config, *, ends_differ: bool, dropout_differs: bool
) -> Callable[..., tuple[State, Metrics]]:
    """(state, hyperparameters, batches with a leading step axis) -> a member's state and metrics.

    `ends_differ`: members that have taken all their steps stand still while others go on.
    `dropout_differs`: if not, the rate is a constant, and none costs nothing.
    """

    def several(
        state: State, hyperparameters: Hyperparameters, stacked: Batch
    ) -> tuple[State, Metrics]:
        if not dropout_differs:
            hyperparameters = hyperparameters._replace(dropout=config.model.dropout)
        step = make_step(config, hyperparameters)

        def one(state: State, batch: Batch) -> tuple[State, Metrics]:
            new, metrics = step(state, batch)
            if ends_differ:
                going = state.step < hyperparameters.steps
                new = jax.tree.map(lambda a, b: jnp.where(going, a, b), new, state)
            return new, metrics

        return jax.lax.scan(one, state, stacked)

    return several


class Program(NamedTuple):
    """The compiled functions of a population; all arrays have a leading member axis."""

    advance: Any
    """(states, hyperparameters, batches) -> states, metrics"""
    evaluate: Any
    """(params, batch without member axis) -> summed loss of every member"""
    sharding: NamedSharding
    everywhere: NamedSharding
    options: dict[str, Any] | None
    """For the compiler."""


def make_program(
    config: Config,
    devices: Sequence[jax.Device],
    *,
    ends_differ: bool = False,
    dropout_differs: bool = False,
    mapping: str | None = None,
) -> Program:
    """The program of one config on these devices, which members divide over."""
    mesh = Mesh(np.array(devices), (AXIS,))
    across = MAPPINGS[mapping or devices[0].platform]
    options = compiled_soon(devices[0].platform)
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    decoder = make_decoder(config)
    steps = member_steps(config, ends_differ=ends_differ, dropout_differs=dropout_differs)

    def evaluate(params: Any, batch: Batch) -> Any:
        return across(lambda params: summed_cross_entropy(decoder, params, batch))(params)

    def spread(function: Any, in_specs: Any) -> Any:
        # Members never speak to one another, so nothing needs to be known of what varies.
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False
        )

    return Program(
        jax.jit(
            spread(across(steps), (split, split, split)),
            donate_argnums=0,
            compiler_options=options,
        ),
        jax.jit(spread(evaluate, (split, whole)), compiler_options=options),
        NamedSharding(mesh, split),
        NamedSharding(mesh, whole),
        options,
    )


# --- Memory ---------------------------------------------------------------------------------------


def memory_needed(compiled: Any) -> int:
    """Bytes on each device that a compiled program needs, by the compiler's own count."""
    m = compiled.memory_analysis()
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )


def memory_available(devices: Sequence[jax.Device]) -> int:
    """Bytes that a program may use on each of these devices."""
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.95 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return int(0.8 * psutil.virtual_memory().available / len(devices))


def most_at_once(
    need: Callable[[int], int], wanted: int, available: int, per: int, what: str
) -> int:
    """How many members fit, a multiple of `per` (the devices) where it is not all of them.

    `need` says what a number of members needs. It is asked for all, and if those do not fit, for
    one a device, between which it grows linearly.

    Raises:
        UserError: if not even one member a device fits.
    """
    rounded = -(-wanted // per) * per
    everything = need(rounded)
    if everything <= available:
        return wanted
    single = need(per)
    if single > available:
        raise UserError(
            f"{what}: one member needs {single / 1e9:,.2f} GB and {available / 1e9:,.2f} GB are "
            "available; a smaller train.batch_size, or more train.gradient_accumulation, needs less"
        )
    slope = (everything - single) / (rounded / per - 1)
    return per * (1 + int((available - single) / slope))
