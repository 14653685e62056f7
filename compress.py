"""Shows what models cost: python compress.py chart RUN... --out chart.html; see its --help."""

from __future__ import annotations

import shlex
import sys

from tyro.extras import subcommand_cli_from_dict

from jaxdecoder.compression.options import Chart
from jaxdecoder.errors import friendly


@friendly
def main() -> None:
    """Reads the command, then hands over."""
    options = subcommand_cli_from_dict({"chart": Chart}, description=__doc__)
    command = f"python compress.py {shlex.join(sys.argv[1:])}"

    # Imported late: --help needs no JAX.
    from jaxdecoder.compression.chart import chart

    chart(options, command)


if __name__ == "__main__":
    main()
