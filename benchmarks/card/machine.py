"""What the figures are measured on: the card, its driver, the versions, and where compilers lie.

JAX looks for CUDA's compilers in CUDA_ROOT, else among the packages that pip installed. Where those
lack ptxas it takes the word "None" for a folder, hands it to XLA (`xla_gpu_cuda_data_dir`) and to
Mosaic (`MOSAIC_GPU_CUDA_ROOT`), and what they then find is left to chance: so it is printed.
Mosaic's kernels are compiled by the first ptxas on the PATH, if there is one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.card.task import Task, first_line, part

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax"),
    *("orbax-checkpoint", "numpy", "torch", "triton", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13"),
)
VARIABLES = (
    *("CUDA_ROOT", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"),
    *("XLA_PYTHON_CLIENT_PREALLOCATE", "CUDA_VISIBLE_DEVICES"),
)
FILES = {
    "ptxas": "bin/ptxas",
    "nvdisasm": "bin/nvdisasm",
    "libdevice": "nvvm/libdevice/libdevice.10.bc",
}
DEFAULT_CUDA = Path("/usr/local/cuda")


def versions() -> dict[str, str]:
    """Those of the packages that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cards() -> list[str]:
    """What nvidia-smi says of each."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi: {first_line(error)}"]
    return said.stdout.strip().splitlines()


def compilers(jax_says: str | None) -> dict[str, list[str]]:
    """Where each of CUDA's files lies: where JAX looks first, then elsewhere."""
    folders = [Path(jax_says)] if jax_says else []
    folders += [DEFAULT_CUDA]
    for entry in map(Path, sys.path):
        folders += [entry / "nvidia" / name for name in ("cu13", "cuda_nvcc")]
    found = {}
    for name, inside in FILES.items():
        places = [str(folder / inside) for folder in folders if (folder / inside).is_file()]
        on_path = shutil.which(name)
        found[name] = list(dict.fromkeys([*places, *([on_path] if on_path else [])]))
    return found


def cuda_root() -> str | None:
    """What CUDA_ROOT should be where it is not set: nothing, if JAX finds ptxas by itself."""
    by_pip = any((Path(entry) / "nvidia/cu13" / FILES["ptxas"]).is_file() for entry in sys.path)
    return str(DEFAULT_CUDA) if DEFAULT_CUDA.is_dir() and not by_pip else None


def release(compiler: str) -> str:
    """What a compiler says of its version."""
    try:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return first_line(error)
    return next((line for line in said.stdout.splitlines() if "release" in line), "")


def run(task: Task) -> None:
    from benchmarks.turns import machine

    described: dict[str, Any] = {**machine(), "cards": cards(), "versions": versions()}
    described["variables"] = {name: os.environ.get(name) for name in VARIABLES}
    task.write(**described)
    import jax
    from jax._src import lib

    cuda = getattr(lib, "cuda_path", None)
    found = compilers(cuda)
    on_path = shutil.which("ptxas")
    task.write(cuda_as_jax_sees_it=cuda, files=found, ptxas=[*map(release, found["ptxas"])])
    task.write(ptxas_of_mosaic=on_path and [on_path, release(on_path)])
    device = jax.devices()[0]
    task.write(platform=device.platform, kind=device.device_kind, devices=jax.device_count())
    for name, value in task.report.items():
        if name != "tables":
            print(f"{name}: {value}", flush=True)


if __name__ == "__main__":
    part(run)
