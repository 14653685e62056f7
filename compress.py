"""Makes models smaller and shows what they cost: python compress.py COMMAND; see its --help."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from tyro.extras import subcommand_cli_from_dict

from jaxdecoder.compression.options import (
    Chart,
    Dequantize,
    Distill,
    Prune,
    Quantize,
    Sensitivity,
)
from jaxdecoder.errors import friendly

COMMANDS: dict[str, Any] = {
    "prune": Prune,
    "sensitivity": Sensitivity,
    "distill": Distill,
    "quantize": Quantize,
    "dequantize": Dequantize,
    "chart": Chart,
}


@friendly
def main() -> None:
    """Reads the command, then hands over."""
    options = subcommand_cli_from_dict(COMMANDS, description=__doc__)
    command = f"python compress.py {shlex.join(sys.argv[1:])}"

    # Imported late: --help needs no JAX.
    from jaxdecoder.compression.chart import chart
    from jaxdecoder.compression.distillation import distill
    from jaxdecoder.compression.pruning import prune
    from jaxdecoder.compression.quantization import dequantize, quantize
    from jaxdecoder.compression.sensitivity import sensitivity

    match options:
        case Prune():
            prune(options, command)
        case Sensitivity():
            sensitivity(options, command)
        case Distill():
            distill(options, command)
        case Quantize():
            quantize(options, command)
        case Dequantize():
            dequantize(options, command)
        case Chart():
            chart(options, command)


if __name__ == "__main__":
    main()
