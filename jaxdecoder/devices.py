"""What devices hold and do: memory, peak speed, and what a compiler needs to know of a card.

The figures of memory, dense bfloat16 products and bandwidth are NVIDIA's, where a data sheet's "GB"
is taken as 1e9 bytes (the driver reports up to 7% more):

- H200 SXM: "NVIDIA H200 Tensor Core GPU", data sheet: 141 GB, 4.8 TB/s, 989 TFLOP/s (the 1,979 of
  the sheet are with sparsity).
- H100 SXM: "NVIDIA H100 Tensor Core GPU", data sheet: 80 GB, 3.35 TB/s, 989 TFLOP/s.
- A100 80GB SXM: "NVIDIA A100 Tensor Core GPU", data sheet: 80 GB, 2,039 GB/s, 312 TFLOP/s.
- GeForce RTX 4090: "NVIDIA Ada GPU Architecture" whitepaper, appendix: 24 GB, 1,008 GB/s, 165.2
  TFLOP/s with sums in float32.

Cores, shared memory and caches are from the architectures' whitepapers and the tables of compute
capabilities in the CUDA programming guide. Nothing here needs JAX.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CUDA_MEMORY_FRACTION = 0.75
"""The share of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set."""


class Card(NamedTuple):
    """What NVIDIA's compilers are told of a GPU that is not there."""

    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    threads_a_core: int
    fpus_a_core: int
    shared_a_block: int
    """Bytes, as are the next two."""
    shared_a_core: int
    l2: int
    clock_ghz: float


class Device(NamedTuple):
    """A kind of device."""

    name: str
    kinds: tuple[str, ...]
    """How `jax.devices()[0].device_kind` ends; what follows would be another product or a part."""
    memory: int
    """Bytes."""
    bfloat16_flops: float | None = None
    """Dense products a second, at the peak; None: not known."""
    bandwidth: float | None = None
    """Bytes a second; None: not known."""
    card: Card | None = None
    """None: no GPU."""

    @property
    def usable(self) -> int:
        """Bytes that JAX may use of the memory."""
        if self.card is None:
            return self.memory
        return int(self.memory * memory_fraction(os.environ))


def memory_fraction(environment: Mapping[str, str]) -> float:
    """Return the share of a GPU's memory that JAX takes in this environment."""
    try:
        return float(environment["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    except (KeyError, ValueError):
        return CUDA_MEMORY_FRACTION


def machine_memory() -> int:
    """Return the bytes of memory that processes of this machine, or this container, may use."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not a POSIX system
        found = 0
    with contextlib.suppress(OSError, ValueError):  # there may be no limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


HOPPER = Card((9, 0), 132, 2048, 128, 232_448, 233_472, 62_914_560, 1.98)

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("h200", ("NVIDIA H200",), 141 * 10**9, 989e12, 4.8e12, HOPPER),
        Device(
            "h100",
            ("NVIDIA H100 80GB HBM3",),
            80 * 10**9,
            989e12,
            3.35e12,
            HOPPER._replace(l2=52_428_800),
        ),
        Device(
            "a100",
            ("NVIDIA A100-SXM4-80GB",),
            80 * 10**9,
            312e12,
            2.039e12,
            Card((8, 0), 108, 2048, 64, 166_912, 167_936, 41_943_040, 1.41),
        ),
        Device(
            "rtx4090",
            ("NVIDIA GeForce RTX 4090",),
            24 * 10**9,
            165.2e12,
            1.008e12,
            Card((8, 9), 128, 1536, 128, 101_376, 102_400, 75_497_472, 2.52),
        ),
        Device("cpu", ("cpu",), machine_memory()),
    )
}
"""By name."""


def of_kind(kind: str) -> Device | None:
    """Return the device whose `device_kind` this is, or None for one that the table lacks."""
    found = (device for device in DEVICES.values() if kind.endswith(device.kinds))
    return next(found, None)
