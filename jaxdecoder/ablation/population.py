"""Many runs in one program: members that differ in numbers alone train side by side.

Members share a program if their configs differ in nothing but `MEMBERS_OWN`: seed (and with it
weights, data order and what is dropped), rates, weight decay, length. Every array of the training
state then has a leading member axis, which is split over the devices. How a device works through
its members depends on the platform (`MAPPINGS`): a GPU takes them at once, a CPU's core one after
another, since a small model fills a core but not a GPU.

A member computes what its solo run computes, up to rounding.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdecoder.config import Config, to_dict
from jaxdecoder.data.batches import Batch, Feed, SplitName, Told, untold
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.training import runs
from jaxdecoder.training.devices import compiled_soon
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.training.memory import peak
from jaxdecoder.training.optimizers import Hyperparameters, hyperparameters_of
from jaxdecoder.training.step import (
    Metrics,
    State,
    evaluated_params,
    init_params,
    init_state,
    make_decoder,
    make_step,
    state_of,
)
from jaxdecoder.typing import Params

AXIS = "members"

TOKENS_A_CALL = 1 << 11
"""Smaller batches are evaluated several at once, or the devices would wait for the host."""

T = TypeVar("T")

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
    """Return a config's own hyperparameters as the arrays that the program takes."""
    types = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.float32)
    return Hyperparameters(
        *(kind(x) for kind, x in zip(types, hyperparameters_of(config), strict=True))
    )


def named_by(config: Config) -> dict[str, Any]:
    """Return the tables of a config, without what changes nothing that its members train."""
    tables = to_dict(config)
    for field in runs.FREE:
        section, name = field.split(".")
        if section == "train" and name != "out":
            tables[section].pop(name, None)
    return tables


def program_key(config: Config) -> str:
    """Return a key that is equal for configs that share a program."""
    tables = named_by(config)
    for field in MEMBERS_OWN:
        section, name = field.split(".")
        tables[section].pop(name, None)
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:12]


# --- The program ----------------------------------------------------------------------------------


def one_after_another(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a function to one member after another, so that each has a core's caches to itself."""
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
    """Return the function that takes several steps of one member, stacked in its batches.

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


class Program:
    """The compiled functions of a population; all arrays have a leading member axis.

    `config` is that of the member with the most steps; all are complete.

    advance: (states, hyperparameters, batches) -> states, metrics.
    evaluate: (params, batch without member axis) -> the summed loss of every member.
    """

    def __init__(
        self,
        config: Config,
        devices: Sequence[jax.Device],
        *,
        ends_differ: bool = False,
        dropout_differs: bool = False,
        mapping: str | None = None,
    ):
        self.config = config
        self._state = jax.eval_shape(partial(init_state, config))
        mesh = Mesh(np.array(devices), (AXIS,))
        self.sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.options = compiled_soon(devices[0].platform)
        across = MAPPINGS[mapping or devices[0].platform]
        decoder = make_decoder(config)
        steps = member_steps(config, ends_differ=ends_differ, dropout_differs=dropout_differs)

        def evaluate(params: Params, batch: Batch) -> jax.Array:
            return across(lambda params: summed_cross_entropy(decoder, params, batch))(params)

        def spread(function: Callable[..., Any], *specs: PartitionSpec) -> Callable[..., Any]:
            # Members never speak to one another, so nothing needs to be known of what varies.
            return jax.shard_map(
                function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False
            )

        split, whole = PartitionSpec(AXIS), PartitionSpec()
        self.advance = jax.jit(
            spread(across(steps), split, split, split),
            donate_argnums=0,
            compiler_options=self.options,
        )
        self.evaluate = jax.jit(spread(evaluate, split, whole), compiler_options=self.options)
        # What is asked for its memory is what runs.
        self.advance_of = functools.cache(self._advance_of)
        self.evaluate_of = functools.cache(self._evaluate_of)

    @property
    def batches_a_call(self) -> int:
        """The number of batches that one call evaluates."""
        t = self.config.train
        return max(1, TOKENS_A_CALL // (t.batch_size * self.config.model.context_length))

    def shapes(self, members: int) -> State:
        """Return the shapes and shardings of the state of so many members."""
        return self._of_members(members, self._state)

    def memory_needed(self, members: int, steps: int) -> int:
        """Return the bytes on each device that so many members need, so many steps a call."""
        compiled = (self.advance_of(members, steps), self.evaluate_of(members))
        return max(map(memory_needed, compiled))

    def _advance_of(self, members: int, steps: int) -> jax.stages.Compiled:
        """Compile `advance` for so many members and steps a call."""
        c = self.config
        shape = (steps, c.train.batch_size, c.model.context_length)
        tokens, weights = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.float32))
        each = (jax.eval_shape(partial(arrays_of, c)), Batch(tokens, tokens, weights))  # type: ignore[arg-type]
        others = self._of_members(members, each)
        return self.advance.lower(self.shapes(members), *others).compile()

    def _evaluate_of(self, members: int) -> jax.stages.Compiled:
        """Compile `evaluate` for so many members."""
        c = self.config
        shape = (self.batches_a_call * c.train.batch_size, c.model.context_length)
        tokens, weights = (
            jax.ShapeDtypeStruct(shape, kind, sharding=self.everywhere)
            for kind in (jnp.int32, jnp.float32)
        )
        params = evaluated_params(self.shapes(members))
        return self.evaluate.lower(params, Batch(tokens, tokens, weights)).compile()  # type: ignore[arg-type]

    def _of_members(self, members: int, each: T) -> T:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((members, *s.shape), s.dtype, sharding=self.sharding),
            each,
        )


class Population:
    """The `Placement` of members that share a program: each device has some of them."""

    def __init__(
        self, members: Sequence[Config], program: Program, corpus: Corpus, steps_per_call: int
    ):
        self.program, self.corpus, self.steps_per_call = program, corpus, steps_per_call
        # Members divide over the devices, so the last one is repeated until they do.
        self.count = len(members)
        self.padded = [*members] + [members[-1]] * (-len(members) % program.sharding.mesh.size)
        self.like = program.shapes(len(self.padded))
        self.hyperparameters = self._place([arrays_of(config) for config in self.padded])

    def start(self, params: Params | None) -> State:
        """Return the states at step 0: of these weights, or each member's fresh ones."""
        to_state = jax.jit(partial(state_of, self.program.config))
        if params is not None:
            return self._place([jax.tree.map(np.asarray, to_state(params))] * len(self.padded))
        # Weights and optimiser apart: other programs of this shape have the first in common.
        makers: dict[float, Callable[[jax.Array], Params]] = {}
        fresh = []
        for config in self.padded:
            # Members of one program differ in their first weights by seed and scale alone.
            make = makers.setdefault(
                config.model.init_std,
                jax.jit(partial(init_params, config), compiler_options=self.program.options),
            )
            own = make(jax.random.key(config.train.seed))
            fresh.append(jax.tree.map(np.asarray, to_state(own)))
        return self._place(fresh)

    def batches(self, step: int, count: int) -> Batch:
        """See `Placement`; members with one seed see the same batches."""
        seeds = {config.train.seed: config for config in self.padded}
        by_seed = {
            seed: Feed.of(config, self.corpus, "train").at(step, count)
            for seed, config in seeds.items()
        }
        return self._place([by_seed[config.train.seed] for config in self.padded])

    def advance(self, state: State, batches: Batch) -> tuple[State, Metrics]:
        """Take the steps of these batches."""
        advance = self.program.advance_of(len(self.padded), batches.inputs.shape[1])
        new: tuple[State, Metrics] = advance(state, self.hyperparameters, batches)
        return new

    def losses(
        self, state: State, split: SplitName, count: int | None, told: Told = untold
    ) -> list[float]:
        """Return each member's mean loss over (the first `count`) fixed batches of a split."""
        program = self.program
        each = Feed.of(program.config, self.corpus, split).fixed(count, told=told)
        at_once, call = program.batches_a_call, program.evaluate_of(len(self.padded))
        params, losses, weights = evaluated_params(state), [], []
        while several := list(islice(each, at_once)):
            # The last call is filled up at weight 0, so that all have one shape.
            nothing = several[0]._replace(weights=np.zeros_like(several[0].weights))
            several += [nothing] * (at_once - len(several))
            batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *several)
            losses.append(call(params, jax.device_put(batch, program.everywhere)))
            weights.append(float(batch.weights.sum()))
        sums = np.sum(np.asarray(losses, np.float64), axis=0)
        return [float(s) / max(1.0, sum(weights)) for s in sums[: self.count]]

    def members(self, state: State) -> Iterator[State]:
        """Return the state of each member by itself, on the host."""
        host = jax.tree.map(np.asarray, state)
        return (jax.tree.map(lambda leaf, i=i: leaf[i], host) for i in range(self.count))

    def _place(self, each: Sequence[T]) -> T:
        """Return one tree a member as one tree of arrays with a member axis, on the devices."""
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        placed: T = jax.device_put(stacked, self.program.sharding)
        return placed


# --- Memory ---------------------------------------------------------------------------------------


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Return the bytes on each device that a compiled program needs, as the compiler counts."""
    return peak(compiled.memory_analysis())


def memory_available(devices: Sequence[jax.Device]) -> int:
    """Return the bytes that a program may use on each of these devices."""
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(0.95 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return int(0.8 * psutil.virtual_memory().available / len(devices))


def most_at_once(
    need: Callable[[int], int], wanted: int, available: int, per: int, what: str
) -> int:
    """Return how many members fit: all `wanted`, or a multiple of `per`, the number of devices.

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
