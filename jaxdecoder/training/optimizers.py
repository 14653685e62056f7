"""Update rules and learning-rate schedules, from optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Int, UInt32
from optax.contrib import MuonDimensionNumbers, muon

from jaxdecoder.config import Config, OptimizerConfig
from jaxdecoder.kernels.dropout import Rate, places, word
from jaxdecoder.layers import tree
from jaxdecoder.typing import Index, Params, Scalar


class Hyperparameters(NamedTuple):
    """The numbers of a run that its compiled step takes as arguments or as constants.

    Members of a population share a program and have each their own; see `ablation.population`.
    """

    learning_rate: Scalar
    adam_learning_rate: Scalar
    weight_decay: Scalar
    steps: Index
    seed: Index
    dropout: Rate


def hyperparameters_of(config: Config) -> Hyperparameters:
    """Return the hyperparameters of a config."""
    o = config.optimizer
    adam = o.learning_rate if o.adam_learning_rate is None else o.adam_learning_rate
    t, dropout = config.train, config.model.dropout
    return Hyperparameters(o.learning_rate, adam, o.weight_decay, t.steps, t.seed, dropout)


def constant(c: OptimizerConfig, progress: jax.Array) -> jax.Array:
    """Stay at the peak."""
    return jnp.ones_like(progress)


def cosine(c: OptimizerConfig, progress: jax.Array) -> jax.Array:
    """Follow half a cosine from the peak to its final fraction (arXiv 1608.03983)."""
    return c.final_fraction + (1 - c.final_fraction) * (1 + jnp.cos(jnp.pi * progress)) / 2


def linear(c: OptimizerConfig, progress: jax.Array) -> jax.Array:
    """Follow a straight line from the peak to its final fraction (arXiv 2310.07831)."""
    return 1 - (1 - c.final_fraction) * progress


def warmup_stable_decay(c: OptimizerConfig, progress: jax.Array) -> jax.Array:
    """Stay at the peak, then fall linearly over the last decay_fraction (arXiv 2404.06395)."""
    return linear(c, jnp.maximum(0, 1 - (1 - progress) / c.decay_fraction))


SCHEDULES: dict[str, Callable[[OptimizerConfig, jax.Array], jax.Array]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "wsd": warmup_stable_decay,
}
"""From the progress after the warm-up, 0 to 1, to a share of the peak."""


def make_schedule(c: OptimizerConfig, steps: Index, peak: Scalar) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warm-up, then the named shape."""

    def rate(step: Index) -> jax.Array:
        after = jnp.clip((step - c.warmup_steps) / jnp.maximum(1, steps - c.warmup_steps), 0, 1)
        share = SCHEDULES[c.schedule](c, after)
        if c.warmup_steps:
            # The first of its steps is not wasted at zero.
            share = jnp.where(step < c.warmup_steps, (step + 1) / c.warmup_steps, share)
        return peak * share

    return rate


# --- Update rules ---------------------------------------------------------------------------------


Optimizer = Callable[
    [OptimizerConfig, Hyperparameters, optax.Schedule], optax.GradientTransformation
]
"""(config, hyperparameters, learning rate by step) -> what turns gradients into updates."""


def descend(scale_by: Callable[[OptimizerConfig], optax.GradientTransformation]) -> Optimizer:
    """Give a rule its tail: its direction d becomes -rate x (d + weight_decay x p).

    p are the parameters. Weight decay is decoupled from the gradients (arXiv 1711.05101), and of
    matrices alone.
    """

    return lambda c, hyperparameters, rate: optax.chain(
        scale_by(c),
        optax.add_decayed_weights(hyperparameters.weight_decay, matrices),
        optax.scale_by_learning_rate(rate),
    )


def then_decay(
    rule: Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation],
) -> Optimizer:
    """Give a tail to a rule that takes the rate itself: its step s becomes s - rate x decay x p.

    Equal to `descend` but for rounding and for the counts in its state, both of which earlier
    runs and checkpoints of `sgd` and `adafactor` have.
    """

    return lambda c, hyperparameters, rate: optax.chain(
        rule(c, rate), _decay(rate, hyperparameters.weight_decay, matrices)
    )


def scale_by_adam(c: OptimizerConfig) -> optax.GradientTransformation:
    """Divide the mean of gradients by the root of the mean of their squares (arXiv 1412.6980)."""
    return optax.scale_by_adam(c.beta1, c.beta2, c.epsilon)


def scale_by_lion(c: OptimizerConfig) -> optax.GradientTransformation:
    """Take the sign of an interpolated momentum (arXiv 2302.06675)."""
    return optax.scale_by_lion(c.beta1, c.beta2)


def muon_and_adamw(
    c: OptimizerConfig, hyperparameters: Hyperparameters, rate: optax.Schedule
) -> optax.GradientTransformation:
    """Apply Muon, orthogonalised momentum, to the blocks' matrices, and AdamW to the rest.

    Keller Jordan et al., 2024; the update is scaled by sqrt(max(1, fan_out / fan_in)).
    """
    adam_rate = make_schedule(c, hyperparameters.steps, hyperparameters.adam_learning_rate)
    rule = muon(
        rate,
        beta=c.beta1,
        adam_b1=c.beta1,
        adam_b2=c.beta2,
        adam_learning_rate=adam_rate,
        muon_weight_dimension_numbers=_dimension_numbers,
    )
    # Its own decay would reach the norms and biases of the AdamW side.
    return optax.chain(
        rule,
        _decay(rate, hyperparameters.weight_decay, block_matrices),
        _decay(adam_rate, hyperparameters.weight_decay, _other_matrices),
    )


def adafactor(c: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Apply Adam with factored second moments (arXiv 1804.04235), which needs little memory.

    Its own clipping by update size and relative step sizes are left at their defaults.
    """
    return optax.adafactor(rate, min_dim_size_to_factor=64)


def sgd(c: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Apply gradient descent with Nesterov momentum beta1."""
    return optax.sgd(rate, momentum=c.beta1 or None, nesterov=c.beta1 > 0)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": descend(scale_by_adam),
    "muon": muon_and_adamw,
    "lion": descend(scale_by_lion),
    "adafactor": then_decay(adafactor),
    "sgd": then_decay(sgd),
}
"""By `OptimizerConfig.name`. A new one is a function of its direction here, under `descend`."""


def make_optimizer(
    c: OptimizerConfig, hyperparameters: Hyperparameters
) -> optax.GradientTransformation:
    """Clip by global norm, then apply the named update rule under its schedule."""
    rate = make_schedule(c, hyperparameters.steps, hyperparameters.learning_rate)
    rule = OPTIMIZERS[c.name](c, hyperparameters, rate)
    if c.state_dtype == "bfloat16":
        rule = in_bfloat16(rule)
    clip = optax.clip_by_global_norm(c.gradient_clip) if c.gradient_clip else optax.identity()
    return optax.chain(clip, rule)


def keep_zeros() -> optax.GradientTransformation:
    """Give no update to weights of matrices that are zero, so that a pruned model stays pruned.

    A mask without a mask: what training has touched is never exactly zero.
    """

    def update(updates: Params, params: Params) -> Params:
        def kept(u: jax.Array, p: jax.Array, matrix: bool) -> jax.Array:
            return jnp.where(p == 0, 0, u) if matrix else u

        return jax.tree.map(kept, updates, params, matrices(params))

    return optax.stateless(update)


class Halved(NamedTuple):
    """The state of a rule `in_bfloat16`."""

    step: Int[Array, ""]
    rule: optax.OptState


def in_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the rule with its float32 arrays kept in bfloat16 from step to step.

    Rounded to the nearest, a moving average that changes by less than a part in 256 would stand
    still; so it is rounded at random (arXiv 1502.02551).
    """

    def store(state: optax.OptState, step: Int[Array, ""]) -> Halved:
        leaves, tree = jax.tree.flatten(state)
        seeds = word(step.astype(jnp.uint32), jnp.arange(len(leaves)))
        stored = [
            round_at_random(leaf, seed) if leaf.dtype == jnp.float32 else leaf
            for leaf, seed in zip(leaves, seeds, strict=True)
        ]
        return Halved(step, jax.tree.unflatten(tree, stored))

    def restore(leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    def init(params: Params) -> Halved:
        return store(rule.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Params, state: Halved, params: Params | None = None
    ) -> tuple[Params, Halved]:
        updates, new = rule.update(updates, jax.tree.map(restore, state.rule), params)
        return updates, store(new, state.step + 1)

    return optax.GradientTransformation(init, update)


def round_at_random(
    x: Float[Array, "*shape"], seed: UInt32[Array, ""]
) -> BFloat16[Array, "*shape"]:
    """Round float32 to one of its two neighbours in bfloat16; the expected value is x itself."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (word(seed, *places(x)) & 0xFFFF)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return cut.astype(jnp.bfloat16)


def matrices(params: Params) -> Params:
    """Return True for the weights of linear layers and embeddings, False for biases and norms."""
    return tree.marked(params, tree.is_weight)


def block_matrices(params: Params) -> Params:
    """Return True for the weights of linear layers but the head."""
    return tree.marked(params, tree.is_kernel)


def _other_matrices(params: Params) -> Params:
    return tree.marked(params, lambda path: tree.is_weight(path) and not tree.is_kernel(path))


def _dimension_numbers(params: Params) -> Params:
    """Return Muon's axes: the last two of every block matrix, and none of the rest."""
    return jax.tree.map(
        lambda leaf, chosen: MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1) if chosen else None,
        params,
        block_matrices(params),
    )


def _decay(
    rate: optax.Schedule, weight_decay: Scalar, mask: Callable[[Params], Params]
) -> optax.GradientTransformation:
    """Subtract rate x weight_decay x the parameters where their mask is True."""

    def init(params: Params) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: Params, state: optax.ScaleByScheduleState, params: Params
    ) -> tuple[Params, optax.ScaleByScheduleState]:
        factor = rate(state.count) * weight_decay
        updates = jax.tree.map(lambda u, p: u - factor * p, updates, params)
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.masked(optax.GradientTransformation(init, update), mask)
