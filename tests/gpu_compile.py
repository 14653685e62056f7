"""Compiling for an H200 on a machine without a GPU, by the CUDA compilers inside jax's wheels.

    record = compile_for_h200(function, *shapes)
    record.memory.temp_size_in_bytes, record.hlo, record.kernels, record.log

It needs jax's CUDA packages, so such tests carry the mark `needs_cuda_packages`; a GPU it does not
need. Nothing is run: what is shown is that the compilers take a program, and what they say of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdecoder.devices import DEVICES
from jaxdecoder.training import ahead

CUDA_PACKAGES = ahead.can_compile()
if CUDA_PACKAGES:
    CUDA_ROOT = ahead.find_compilers()
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

needs_cuda_packages = pytest.mark.skipif(
    not CUDA_PACKAGES,
    reason="jax has no CUDA compiler here: `make test-cuda` installs it and runs these tests",
)

H200 = ahead.abstract_mesh(DEVICES["h200"], 1, "x")


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
    device = DEVICES["h200"]
    mesh = ahead.mesh_of(device, n_devices, "x")
    sharding = NamedSharding(mesh, P() if spec is None else spec)

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arguments = jax.tree.map(placed, shapes)
    with ahead.traced_for(device, n_devices, "x"), _printed() as log:
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
