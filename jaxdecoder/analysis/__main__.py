"""The counts of a config as tables for a terminal, or whether its training fits a device."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdecoder.config import Config, load
from jaxdecoder.devices import DEVICES
from jaxdecoder.errors import UserError, friendly

if TYPE_CHECKING:
    from rich.table import Table


def arguments() -> argparse.ArgumentParser:
    """Return what the command takes besides overrides of the config."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxdecoder.analysis",
        description="Tell what a config costs: parameters, FLOPs and bytes; with --device, whether "
        "a training step fits into the device's memory, what fills it, and what would make it fit.",
        epilog="Any field of the config can be given too: --model.n-layers 6",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--device", choices=DEVICES, help="train on this")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="on so many of them")
    parser.add_argument(
        "--estimate", action="store_true", help="by the closed form, even where XLA can count"
    )
    return parser


@friendly
def main() -> None:
    """Read a config file and overrides, and print the tables."""
    options, overrides = arguments().parse_known_args()
    config = load(options.config, overrides)
    if options.devices < 1:
        raise UserError(f"--devices {options.devices}: at least 1")

    # Imported late: --help and a refused config need no JAX.
    from rich.console import Console

    from jaxdecoder import analysis

    config = dataclasses.replace(
        config, model=analysis.with_vocab_size(config, str(options.config))
    )
    console = Console()
    if options.device is None:
        from jaxdecoder.analysis.tables import report

        for table in report(config.model):
            console.print(table)
        return
    _prepare(options.devices)
    for part in memory_report(config, options.device, options.devices, options.estimate):
        console.print(part, soft_wrap=isinstance(part, str), highlight=False)


def memory_report(config: Config, name: str, devices: int, estimate: bool) -> Iterator[Table | str]:
    """Yield what fills the device's memory, whether it fits, and what to do about it."""
    from jaxdecoder.analysis import fitting
    from jaxdecoder.analysis.tables import memory_table
    from jaxdecoder.training import memory as by

    device = DEVICES[name]
    counts = by.can_count(device) and not estimate
    told = by.told if counts else by.estimated
    tell = functools.cache(lambda config, devices: told(config, device, devices))
    memory, room = tell(config, devices), device.usable
    how = "Counted by XLA." if counts else "Estimated in closed form, not counted by XLA"
    if not counts:
        how += "." if by.can_count(device) else ": jax's CUDA packages are not installed."
    yield memory_table(memory, room, f"each of {devices} {name}" if devices > 1 else name)
    yield how
    if device.card is not None:
        yield (
            f"JAX takes {room / device.memory:.0%} of the {gigabytes(device.memory)} of a GPU like "
            "this; XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives it more."
        )
    if memory.total <= room:
        yield f"It fits: {gigabytes(memory.total)} of {gigabytes(room)}."
        larger = fitting.largest_batch(config, devices, room, tell)
        if larger is None:
            yield "No larger batch fits, in powers of two."
        else:
            yield f"A larger batch fits: {larger[0].command} ({gigabytes(larger[1].total)})."
        return
    yield f"It does not fit: {gigabytes(memory.total)}, and there are {gigabytes(room)}. Tried:"
    more = fitting.MORE_DEVICES if device.card is not None else ()
    found = False
    for attempt, needed in fitting.attempts(config, devices, room, tell, more=more):
        found = needed.total <= room
        on = f", on {attempt.devices} devices" if attempt.devices > devices else ""
        verdict = "fits" if found else "does not fit"
        yield f"  {attempt.command}{on}: {gigabytes(needed.total)}, {verdict}"
    if not found:
        yield "Nothing of this fits: take a smaller model, a shorter context, or another device."


def gigabytes(size: int) -> str:
    """Return a number of bytes for people, in units of 1e9."""
    return f"{size / 1e9:.2f} GB"


def _prepare(count: int) -> None:
    """Compile on the CPU, which has as many devices; take no memory of a GPU that is here."""
    import jax

    from jaxdecoder.training import ahead

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    ahead.find_compilers()


if __name__ == "__main__":
    main()
