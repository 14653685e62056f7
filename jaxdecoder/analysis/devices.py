"""The table of `jaxdecoder.devices`, beside the other figures that analysis needs; loads no JAX."""

from __future__ import annotations

from jaxdecoder.devices import DEVICES, Device, of_kind

__all__ = ["DEVICES", "Device", "of_kind"]
