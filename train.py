"""Train a decoder: python train.py configs/stories.toml [--model.n-layers 6 ...]."""

from __future__ import annotations

import sys

from jaxdecoder.config import load
from jaxdecoder.errors import UserError, friendly


@friendly
def main() -> None:
    """Read the config and train."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
            load("/dev/null", ["--help"])
        raise UserError("usage: python train.py CONFIG.toml [--help] [--section.field value ...]")
    config = load(sys.argv[1], sys.argv[2:])

    # Imported late: --help and a refused config need no JAX.
    from jaxdecoder.compression.distillation import objective
    from jaxdecoder.sampling.generate import show_sample
    from jaxdecoder.training.devices import set_up
    from jaxdecoder.training.single import train
    from jaxdecoder.training.stopping import listening
    from jaxdecoder.training.tune import tuned

    with listening(idle=True):
        config = tuned(config, objective=objective)
        set_up(config)
        train(config, sampler=show_sample, objective=objective)


if __name__ == "__main__":
    main()
