"""What a config costs, without building the model: parameters, FLOPs, bytes, and memory to train.

    python -m jaxdecoder.analysis configs/shakespeare_nano.toml --model.vocab-size 65
    python -m jaxdecoder.analysis configs/gpt2_124m.toml --device h200

`counts.py` has the closed forms, `memory.py` that of a training step's memory; XLA's own count of
it is in `training/memory.py`. Nothing here loads JAX before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdecoder.analysis.counts import (
        FlopsPerToken,
        cache_bytes,
        early_exit_flops,
        flops_per_token,
        forward_flops,
        kernels,
        parameters,
        weight_bytes,
        with_vocab_size,
    )

__all__ = [
    "FlopsPerToken",
    "cache_bytes",
    "early_exit_flops",
    "flops_per_token",
    "forward_flops",
    "kernels",
    "parameters",
    "weight_bytes",
    "with_vocab_size",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("jaxdecoder.analysis.counts"), name)
