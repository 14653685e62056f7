"""Compiling for GPUs that are not here, by the CUDA compilers inside jax's wheels.

Nothing is run: XLA plans memory and makes machine code for a card that it is only told about.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from jaxdecoder.devices import Device

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# A GpuTargetConfigProto of XLA's, in text form.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {card.shared_a_block}
  shared_memory_per_core: {card.shared_a_core}
  threads_per_core_limit: {card.threads_a_core}
  core_count: {card.cores}
  fpus_per_core: {card.fpus_a_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {device.bandwidth:.0f}
  l2_cache_size: {card.l2}
  clock_rate_ghz: {card.clock_ghz}
  device_memory_size: {device.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{device.kinds[0]}"
"""


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def can_compile() -> bool:
    """Return whether jax's CUDA packages are installed; they need no GPU."""
    return any(map(_installed, PLUGINS))


def find_compilers() -> Path | None:
    """Put the folder of NVIDIA's compilers where XLA and Mosaic look for it, and return it.

    It is that of CUDA_ROOT, or else that of the packages. XLA takes its ptxas from CUDA_ROOT, but
    Mosaic takes the first one on the PATH. Call it before anything is compiled.
    """
    if "CUDA_ROOT" in os.environ:
        root: Path | None = Path(os.environ["CUDA_ROOT"]).absolute()
    else:
        places = importlib.util.find_spec("nvidia.cu13") if _installed("nvidia.cu13") else None
        found = [Path(x) for x in (places and places.submodule_search_locations) or ()]
        root = next((x for x in found if (x / "bin" / "ptxas").exists()), None)
    if root is not None:
        os.environ["CUDA_ROOT"] = str(root)
        first, path = str(root / "bin"), os.environ.get("PATH", "")
        if path.split(os.pathsep)[0] != first:
            os.environ["PATH"] = os.pathsep.join([first, path])
    return root


@functools.cache
def mesh_of(device: Device, count: int, axis: str) -> Mesh:
    """Return a mesh of so many GPUs of this kind, in one host, along one axis."""
    assert device.card is not None
    topology = topologies.get_topology_desc(
        device.name,
        platform="cuda",
        target_config=_TARGET.format(device=device, card=device.card),
        topology=f"1x1x{count}",
    )
    return topologies.make_mesh(topology, (count,), (axis,))


def abstract_mesh(device: Device, count: int, axis: str) -> AbstractMesh:
    """Return the mesh by which what is traced knows the device that it is for."""
    assert device.card is not None
    kind = AbstractDevice(device.kinds[0], num_cores=device.card.cores, platform="gpu")
    return AbstractMesh((count,), (axis,), axis_types=(AxisType.Auto,), abstract_device=kind)


@contextlib.contextmanager
def traced_for(device: Device, count: int, axis: str) -> Iterator[Mesh]:
    """Trace for GPUs that are not here, and give their mesh to place arrays on.

    Triton's lowering asks the abstract mesh which device it is for, and so do our own choices. What
    has been compiled for such a card cannot be read back, so it is not kept.
    """
    kept = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with jax.sharding.use_abstract_mesh(abstract_mesh(device, count, axis)):
            yield mesh_of(device, count, axis)
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
