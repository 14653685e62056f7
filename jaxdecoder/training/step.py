"""The train step: a pure function from a state and a batch to the next state and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.config import Config, ConfigError
from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.dropout import Rate
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.training.optimizers import (
    Hyperparameters,
    hyperparameters_of,
    keep_zeros,
    make_optimizer,
    make_schedule,
)
from jaxdecoder.training.sparsity import gradual, zeros_of
from jaxdecoder.typing import Params


class State(NamedTuple):
    """All that training carries from step to step."""

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState
    ema: PyTree
    """Moving average of the parameters; empty when it is off."""


class Metrics(NamedTuple):
    """The numbers that one step reports."""

    train_loss: Float[Array, "*steps"]
    gradient_norm: Float[Array, "*steps"]
    learning_rate: Float[Array, "*steps"]


Step = Callable[..., tuple[State, Metrics]]
"""(state, batch, what the objective holds) -> the next state and the metrics."""


Gradients = tuple[Float[Array, ""], Params]
"""A loss and its derivatives by the parameters."""


class Objective(NamedTuple):
    """The loss that training minimises.

    loss: (params, batch, key, constants) -> the loss summed over the batch's tokens, in nats. The
        key is the step's own.
    constants: arrays that every step takes along unchanged, such as the weights of a teacher.
    feed: (batches of some steps, the first of them, this host's rows) -> what the loss gets of them
        as its batch. It has `weights`, and all its arrays begin with the axes (steps, batch).
    """

    loss: Callable[[Params, PyTree, jax.Array, PyTree], Float[Array, ""]]
    constants: PyTree = ()
    feed: Callable[[Batch, int, slice], PyTree] = lambda stacked, step, rows: stacked


def next_token(config: Config, dropout: Rate | None = None) -> Objective:
    """Return the decoder's own loss: cross-entropy, and the terms that its variants add.

    `dropout` stands in for the config's rate.

    Raises:
        ConfigError: if the config has a teacher, whose part in the loss is not here.
    """
    if config.distillation.teacher:
        raise ConfigError(
            "distillation.teacher",
            config.distillation.teacher,
            "only train.py and compress.py distill learn from a teacher; leave it out",
        )
    rate = config.model.dropout if dropout is None else dropout
    decoder = make_decoder(config)

    def loss(params: Params, batch: Batch, key: jax.Array, constants: PyTree) -> jax.Array:
        return summed_cross_entropy(decoder, params, batch, dropout=rate, dropout_key=key)

    return Objective(loss)


def compute_dtype(config: Config) -> np.dtype:
    """Return the dtype of the model's compute on the device that is traced for."""
    named = config.train.compute_dtype
    if named == "auto":
        named = "float32" if current_device().platform == "cpu" else "bfloat16"
    return jnp.dtype(named)


def make_decoder(config: Config) -> Decoder:
    """Return the config's decoder, which computes in the config's dtype."""
    return Decoder(config.model, dtype=compute_dtype(config))


def init_params(config: Config, key: jax.Array) -> Params:
    """Draw fresh weights."""
    tokens = jnp.zeros((1, min(2, config.model.context_length)), jnp.int32)
    return make_decoder(config).init(key, tokens)["params"]


def init_state(config: Config) -> State:
    """Return a fresh state; the weights depend on train.seed alone."""
    return state_of(config, init_params(config, jax.random.key(config.train.seed)))


def state_of(config: Config, params: Params) -> State:
    """Return the state at step 0 of a run that starts from these weights."""
    optimizer = optimizer_of(config, hyperparameters_of(config)).init(params)
    averaged = config.optimizer.ema_decay and not config.model.packed
    # A copy: the state is donated to every call, and no buffer may be given away twice.
    ema = jax.tree.map(jnp.copy, params) if averaged else ()
    return State(jnp.zeros((), jnp.int32), params, optimizer, ema)


def optimizer_of(config: Config, hyperparameters: Hyperparameters) -> optax.GradientTransformation:
    """Return the update rule, with the constraints of compressed weights."""
    if config.model.packed:
        # Codes do not train, and need no moments: the count of steps is all the state there is.
        return optax.scale_by_schedule(lambda step: 0.0)
    rule, compression = make_optimizer(config.optimizer, hyperparameters), config.compression
    if compression.sparsity:
        return optax.chain(rule, keep_zeros(), gradual(compression))
    return optax.chain(rule, keep_zeros()) if compression.keep_zeros else rule


def evaluated_params(state: State) -> Params:
    """Return the weights to evaluate and sample with: the moving average if there is one."""
    return state.ema if state.ema != () else state.params


def make_step(
    config: Config,
    hyperparameters: Hyperparameters | None = None,
    objective: Objective | None = None,
) -> Step:
    """Return the pure train step of a config; `hyperparameters`, maybe traced, replace its own."""
    h = hyperparameters_of(config) if hyperparameters is None else hyperparameters
    loss = (objective or next_token(config, h.dropout)).loss
    optimizer = optimizer_of(config, h)
    schedule = make_schedule(config.optimizer, h.steps, h.learning_rate)
    accumulation = config.train.gradient_accumulation

    def gradients(params: Params, batch: PyTree, key: jax.Array, constants: PyTree) -> Gradients:
        if accumulation == 1:
            return jax.value_and_grad(loss)(params, batch, key, constants)

        def add_part(total: Gradients, part_and_key: PyTree) -> tuple[Gradients, None]:
            part = jax.value_and_grad(loss)(params, *part_and_key, constants)
            return jax.tree.map(jnp.add, total, part), None

        # Interleaved rows, so that every device has its share of every part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
        total, _ = jax.lax.scan(add_part, zeros, (parts, jax.random.split(key, accumulation)))
        return total

    def step(state: State, batch: PyTree, constants: PyTree = ()) -> tuple[State, Metrics]:
        # A step's randomness depends on the seed and the step alone, so a run can stop anywhere.
        key = jax.random.fold_in(jax.random.key(h.seed + 1), state.step)
        total, grads = gradients(state.params, batch, key, constants)
        count = jnp.maximum(jnp.sum(batch.weights), 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = config.optimizer.ema_decay
        ema: PyTree = ()
        if decay:
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
            # What has just become zero is not yet forgotten by the average.
            ema = zeros_of(params, ema) if config.compression.sparsity else ema
        metrics = Metrics(total / count, optax.tree.norm(grads), schedule(state.step))
        return State(state.step + 1, params, optimizer_state, ema), metrics

    return step


def fuse(step: Step) -> Step:
    """Fuse several steps into one call: batches and metrics gain a leading axis."""

    def several(state: State, batches: PyTree, constants: PyTree = ()) -> tuple[State, Metrics]:
        return jax.lax.scan(lambda state, batch: step(state, batch, constants), state, batches)

    return several
