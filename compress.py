"""Make models smaller and show what they cost: python compress.py COMMAND; see its --help."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

import tyro
from tyro.extras import subcommand_cli_from_dict

from jaxdecoder.compression.options import (
    PRUNING,
    Chart,
    Dequantize,
    Distill,
    Prune,
    Quantize,
    Sensitivity,
)
from jaxdecoder.errors import UserError, friendly, not_utf8

COMMANDS: dict[str, Any] = {
    "prune": Prune,
    "sensitivity": Sensitivity,
    "distill": Distill,
    "quantize": Quantize,
    "dequantize": Dequantize,
    "chart": Chart,
}


def read(arguments: list[str]) -> Any:
    """Return the options of the command; for prune, those of its method."""
    if arguments[:1] != ["prune"]:
        return subcommand_cli_from_dict(COMMANDS, args=arguments, description=__doc__)
    which = argparse.ArgumentParser("compress.py prune", add_help=False, allow_abbrev=False)
    which.add_argument("--method", choices=PRUNING, default=Prune.method)
    method = which.parse_known_args(arguments[1:])[0].method
    told = f"compress.py prune --method {method}"
    return tyro.cli(PRUNING[method], prog=told, args=arguments[1:])


@friendly
def main() -> None:
    """Read the command and run it."""
    for word in filter(not_utf8, sys.argv):
        raise UserError(f"{word!a}: not UTF-8 text, which the new run's config must be")
    options = read(sys.argv[1:])
    command = f"python compress.py {shlex.join(sys.argv[1:])}"

    # Imported late: --help needs no JAX.
    from jaxdecoder.compression.chart import chart
    from jaxdecoder.compression.distillation import distill
    from jaxdecoder.compression.pruning import prune
    from jaxdecoder.compression.quantization import dequantize, quantize
    from jaxdecoder.compression.sensitivity import sensitivity
    from jaxdecoder.training.stopping import listening

    with listening(idle=True):
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
