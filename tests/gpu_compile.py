"""Compiling for an H200 on a machine without a GPU, by the CUDA compilers inside jax's wheels.

    record = compile_for_h200(function, *shapes)
    record.memory.temp_size_in_bytes, record.hlo, record.kernels, record.log

It needs jax's CUDA packages, so such tests carry the mark `needs_cuda_packages`; a GPU it does not
need. Nothing is run: what is shown is that the compilers take a program, and what they say of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package
        return False


CUDA_PACKAGES = any(map(_installed, PLUGINS))


def _cuda_root() -> Path | None:
    """The folder of NVIDIA's compilers: that of the environment, or else that of the packages."""
    if "CUDA_ROOT" in os.environ:
        return Path(os.environ["CUDA_ROOT"]).absolute()
    places = importlib.util.find_spec("nvidia.cu13") if _installed("nvidia.cu13") else None
    found = [Path(x) for x in (places and places.submodule_search_locations) or ()]
    return next((x for x in found if (x / "bin" / "ptxas").exists()), None)


CUDA_ROOT = _cuda_root()
if CUDA_PACKAGES:
    if CUDA_ROOT is not None:
        # XLA takes its ptxas from there, but Mosaic takes the first one on the PATH.
        os.environ["CUDA_ROOT"] = str(CUDA_ROOT)
        os.environ["PATH"] = os.pathsep.join([str(CUDA_ROOT / "bin"), os.environ["PATH"]])
    # What the compilers print. They read this when the first of them is loaded, so before any
    # compiles.
    os.environ |= {
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",  # by nvdisasm, of the package nvidia-cuda-nvdisasm
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "subprocess_compilation=5",  # ptxas on all that XLA and Triton make
    }
    # Kernels that LLVM does not optimise spill registers; conftest.py makes it quick for the rest.
    jax.config.update("jax_disable_most_optimizations", False)
    # What has been compiled for a card that is not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)

needs_cuda_packages = pytest.mark.skipif(
    not CUDA_PACKAGES,
    reason="jax has no CUDA compiler here: `make test-cuda` installs it and runs these tests",
)

H200 = AbstractMesh(
    (1,),
    ("x",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu"),
)
# A GpuTargetConfigProto of XLA's, in text form, with the card's published and reported figures.
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


class Kernel(NamedTuple):
    """What ptxas says of one kernel; Mosaic's are all called entry_mosaic_gpu_kernel."""

    name: str
    registers: int
    stack: int
    """bytes, as are the spills"""
    spill_stores: int
    spill_loads: int


class Record(NamedTuple):
    """What the compilers say of one program."""

    memory: Any
    """XLA's `memory_analysis()`"""
    hlo: str
    """optimised, with the kernels as custom calls"""
    kernels: tuple[Kernel, ...]
    """Mosaic's, Triton's and XLA's own; one compiled before in this process is not there again"""
    log: str
    """what the compilers printed, with the machine code (SASS) of the Mosaic kernels"""
    ptxas: frozenset[str]
    """the versions of ptxas that were used, such as 13.0.88"""
    seconds: float
    """that compiling took, tracing left out"""


@functools.cache
def _mesh(n_devices: int) -> Mesh:
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=TARGET, topology=f"1x1x{n_devices}"
    )
    return topologies.make_mesh(topology, (n_devices,), ("x",))


def compile_for_h200(
    function: Callable[..., Any],
    *shapes: Any,
    n_devices: int = 1,
    spec: P | None = None,
    **of_jit: Any,
) -> Record:
    """Compiles `function` of pytrees of arrays, or of what has a shape and a dtype.

    On several devices, the arrays are laid out by `spec` over the mesh axis x, or all on each.
    `of_jit`: what `jax.jit` takes besides, such as `donate_argnums`.
    """
    mesh = _mesh(n_devices)
    sharding = NamedSharding(mesh, P() if spec is None else spec)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arguments = jax.tree.map(placed, shapes)
    # Triton's lowering asks the mesh which device it is for, and so does `implementation="auto"`.
    abstract = H200.update(axis_sizes=(n_devices,))
    with jax.sharding.use_abstract_mesh(abstract), _printed() as log:
        lowered = jax.jit(function, **of_jit).lower(*arguments)
        start = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
    text = log[0]
    versions = frozenset(re.findall(r"Using \S*/ptxas with version (\S+)", text))
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    return Record(memory, hlo, _kernels(text), text, versions, seconds)


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """Gathers what is written to the file descriptors 1 and 2, by C++ too, as one string."""
    log: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield log
        finally:
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            log.append(file.read())


_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def _kernels(log: str) -> tuple[Kernel, ...]:
    return tuple(
        Kernel(found["name"], *map(int, found.group("registers", "stack", "stores", "loads")))
        for found in _REPORT.finditer(log)
    )
