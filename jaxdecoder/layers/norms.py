"""Normalisation functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from jaxdecoder.config import ModelConfig


def layernorm(config: ModelConfig, dtype: Any, name: str | None = None) -> nn.Module:
    """Layer normalisation (arXiv 1607.06450), with a bias if the config has biases."""
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        use_bias=config.bias,
        use_fast_variance=False,
        dtype=dtype,
        name=name,
    )


def rmsnorm(config: ModelConfig, dtype: Any, name: str | None = None) -> nn.Module:
    """Root-mean-square normalisation (arXiv 1910.07467)."""
    return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=dtype, name=name)


def identity(config: ModelConfig, dtype: Any, name: str | None = None) -> Callable[..., jax.Array]:
    """No normalisation."""
    return lambda x: x


NORMS: dict[str, Callable[..., Any]] = {
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "none": identity,
}
