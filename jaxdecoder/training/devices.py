"""Choices that JAX takes once, before its first computation."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxdecoder.errors import UserError

if TYPE_CHECKING:  # whoever asks for the processor's name needs no packages that read a config
    from jaxdecoder.config import Config


def set_up(config: Config) -> None:
    """Keep compiled programs, divide the CPU's cores if asked, and join other hosts if any.

    A run on several hosts is the same command on each, on a shared run folder, with
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID set.
    """
    keep_programs(config.data.cache)
    if config.train.cpu_devices:
        divide_cpu(config.train.cpu_devices)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            count, index = (int(os.environ[f"JAX_{x}"]) for x in ("NUM_PROCESSES", "PROCESS_ID"))
        except (KeyError, ValueError) as error:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
                f"numbers too: {error}"
            ) from None
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, index)


def divide_cpu(devices: int) -> None:
    """Make this number of devices of the CPU's cores."""
    jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        # A device is then a core: its products must not spread over the others.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"


def one_device_a_core(most: int = 0) -> None:
    """Make a device of every core of the CPU, or of the first `most`."""
    count = len(cores())
    divide_cpu(min(count, most) if most else count)


def cores() -> list[int]:
    """Return the CPU's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # macOS binds no process to a core


def stay_on(core: int) -> None:
    """Bind this process to a core, if the system can. Call it before JAX has threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def keep_programs(cache: str | Path) -> None:
    """Keep compiled programs for later processes, in `cache` or where JAX_COMPILATION_CACHE_DIR is.

    What took a second to compile is kept, if it can be written there. JAX keeps apart what another
    version, flag or processor would compile otherwise.
    """
    folder = Path(cache).absolute() / "programs"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return  # JAX would complain of every program
    chosen = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    jax.config.update("jax_compilation_cache_dir", chosen)


def compiled_soon(platform: str) -> dict[str, Any] | None:
    """Return the compiler's options for a program that runs once, or is one of many.

    On a CPU LLVM's higher levels compile for up to twice as long and hardly make a step faster: the
    work is in products that XLA has at hand.
    """
    if platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 1}


def processor() -> str:
    """Return the CPU's name for itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def is_first_host() -> bool:
    """Return whether this process is the one that writes what all of them know."""
    return jax.process_index() == 0
