"""Compare variants: python ablate.py configs/ablations/positions.toml [--size full]."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jaxdecoder.config.fields import PathOption
from jaxdecoder.errors import UserError, friendly


@dataclass(frozen=True)
class Options:
    """Train all members of an ablation, judge its claims and write a report."""

    config: tyro.conf.Positional[PathOption]
    """TOML file of the ablation."""
    size: Literal["small", "full"] = "small"
    """small: takes minutes on two CPU cores; full: apply the changes of the file's [full] table."""
    out: PathOption = ""
    """Folder for members and report. Left out: runs/ablations/ and the file's name."""
    devices: int = 0
    """On the CPU: cores to use, one process each; 0: all."""


@friendly
def main() -> None:
    """Read the file and run the ablation."""
    if len(sys.argv) < 2:
        raise UserError("usage: python ablate.py CONFIG.toml [--size small|full] [--out FOLDER]")
    options = tyro.cli(Options, description=__doc__)
    name = Path(options.config).stem + ("" if options.size == "small" else f"_{options.size}")
    out = Path(options.out or f"runs/ablations/{name}")

    # Imported late: --help and a refused file need no JAX.
    from jaxdecoder.ablation.grid import read
    from jaxdecoder.ablation.run import run
    from jaxdecoder.training.devices import keep_programs, one_device_a_core
    from jaxdecoder.training.stopping import listening

    ablation = read(options.config, out=out, size=options.size)
    one_device_a_core(options.devices)
    # Ablations share compiled programs, and a resumed ablation finds those of its first part.
    keep_programs(ablation.base.data.cache)
    with listening(idle=True):
        run(ablation, out, command=f"python ablate.py {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
