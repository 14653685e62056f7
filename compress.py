"""Makes models smaller: python compress.py prune | distill | quantize | chart, with --help."""

from __future__ import annotations

import shlex
import sys

import tyro

from jaxdecoder.compression.options import Chart, Distill, Prune, Quantize
from jaxdecoder.errors import UserError, friendly


@friendly
def main() -> None:
    """Reads the command, then hands over to the pass."""
    tyro.cli(Prune | Distill | Quantize | Chart, description=__doc__)  # type: ignore[arg-type]
    command = f"python compress.py {shlex.join(sys.argv[1:])}"
    raise UserError(f"{command}: not there yet")


if __name__ == "__main__":
    main()
