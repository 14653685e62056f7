"""Choices that JAX takes once, before its first computation."""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxdecoder.errors import UserError, first_line

HEARTBEAT_SECONDS = 30
"""A host that has been silent for so long is given up, and the others end."""

DEATH = (
    "error: this process has died, or was ended because another one of the run has; the lines "
    "above, or the other one's, may say why. The last checkpoint stands: give the same command "
    "again on every host, and the run goes on from there"
)

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables by which srun and mpirun tell how many processes they have started."""

if TYPE_CHECKING:  # whoever asks for the processor's name needs no packages that read a config
    from jaxdecoder.config import Config


def set_up(config: Config) -> None:
    """Keep compiled programs, divide the CPU's cores if asked, and join other hosts if any.

    A run on several hosts is the same command on each, on a shared run folder; see `hosts`.
    """
    keep_programs(config.data.cache)
    if config.train.cpu_devices:
        divide_cpu(config.train.cpu_devices)
    joined = hosts(os.environ)
    if joined is not None:
        explain_death()
        try:
            jax.distributed.initialize(
                **joined,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            why = f"the processes of this run did not find one another: {first_line(error)}"
            raise UserError(why) from None


def explain_death() -> None:
    """Start a small process that has the last word if this one ends by a signal or a traceback.

    Where a host is lost, JAX ends the processes of the others in the middle of what they do, after
    many lines of its own.
    """
    command = ["sh", "-c", 'read -r _ || echo "$0" >&2', DEATH]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE)

    def ended() -> None:
        if not hasattr(sys, "last_value"):  # that of an exception which nothing has caught
            watcher.communicate(b"ended\n")

    atexit.register(ended)


def hosts(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return what `jax.distributed.initialize` is to be told, or None if this process is alone.

    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it
    all; an indexed job of Kubernetes has the last as JOB_COMPLETION_INDEX. What they do not say,
    JAX asks srun or mpirun for.

    Raises:
        UserError: if there is an address, and neither numbers nor a launcher that knows them.
    """
    launched = any(int(environment.get(name, "1")) > 1 for name in LAUNCHERS)
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return {} if launched else None
    index = environment.get("JAX_PROCESS_ID", environment.get("JOB_COMPLETION_INDEX"))
    given = {"num_processes": environment.get("JAX_NUM_PROCESSES"), "process_id": index}
    try:
        known = {name: int(value) for name, value in given.items() if value is not None}
    except ValueError as error:
        known, launched = {}, False
        why = str(error)
    else:
        why = f"only {', '.join(known) or 'the address'} is known"
    if len(known) < len(given) and not launched:
        raise UserError(
            "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
            f"numbers too, unless srun or mpirun starts the processes: {why}"
        )
    return {"coordinator_address": address, **known}


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
