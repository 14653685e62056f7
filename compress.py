"""Makes models smaller: python compress.py prune | distill | quantize | chart, with --help."""

from __future__ import annotations

import shlex
import sys

import tyro

from jaxdecoder.compression.options import Chart, Distill, Prune, Quantize
from jaxdecoder.errors import friendly


@friendly
def main() -> None:
    """Reads the command, then hands over to the pass."""
    options = tyro.cli(Prune | Distill | Quantize | Chart, description=__doc__)  # type: ignore[arg-type]
    command = f"python compress.py {shlex.join(sys.argv[1:])}"

    # Imported late: --help needs no JAX.
    if isinstance(options, Chart):
        from jaxdecoder.compression.chart import chart

        chart(options, command)


if __name__ == "__main__":
    main()
