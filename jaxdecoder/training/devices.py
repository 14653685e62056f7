"""Choices that JAX takes once, before its first computation."""

from __future__ import annotations

import os

import jax

from jaxdecoder.config import Config


def set_up(config: Config) -> None:
    """Divides the CPU's cores into devices if asked, and joins the other hosts if there are any."""
    if config.train.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.train.cpu_devices)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()
