"""The device that a computation is traced for, as far as JAX knows it before the run."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Device(NamedTuple):
    platform: str
    """cpu, gpu or tpu"""
    kind: str
    """The maker's name for it, such as NVIDIA H200."""


def current_device() -> Device:
    """Return the device that the computation being traced will run on, as far as JAX knows."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return Device(abstract.platform or jax.default_backend(), abstract.device_kind)
    chosen = getattr(jax.config, "jax_default_device", None)
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    device = jax.devices()[0] if chosen is None else chosen
    return Device(device.platform, device.device_kind)
