"""What the backward pass finds kept, and what it computes again: `model.remat`.

A policy wraps units of the body: in the serial layout a turn of blocks, in parallel stacks each
half of a layer, attention or feed-forward. From the most memory to the least:

- none: everything that the backward pass needs is kept.
- dots: the products of linear layers are kept, and each unit's input; norms, activations and
  attention itself are computed again from them.
- block: each unit's input is kept, and the unit is computed again: one more forward pass.
- everything: units are nested, and the inner ones are computed again within the outer ones. In the
  serial layout the branches of a block are inner units, so that the backward pass of a block holds
  the activations of one branch at a time. Of parallel stacks a whole stack is the outer unit, so
  that nothing is kept but its input. Up to two more forward passes.

Results and gradients are those of `none` but for rounding (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxdecoder.config import ModelConfig

PRODUCT = "product"

Keeps = Callable[..., bool]
"""(primitive, its arguments) -> whether its results are kept."""

# Products are known by a name, not by their primitive: attention's scores are products too, and
# those of parallel stacks are batched over the layers.
REMATS: dict[str, Keeps | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "block": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.nothing_saveable,
}
"""By `ModelConfig.remat`: what is kept within a unit; None: there are no units."""


def product_kept(x: jax.Array) -> jax.Array:
    """Mark the result of a linear layer, for `dots` to keep."""
    return checkpoint_name(x, PRODUCT)


def unit(config: ModelConfig, target: Any, **of_remat: Any) -> Any:
    """Return a module class, or a function of a module, as a unit of the config's policy."""
    keeps = REMATS[config.remat]
    return target if keeps is None else nn.remat(target, policy=keeps, **of_remat)


def nested(config: ModelConfig, target: Any, **of_remat: Any) -> Any:
    """Return it as a unit inside or around the others, where the policy nests them."""
    return nn.remat(target, **of_remat) if config.remat == "everything" else target
