"""A laboratory for small decoder-only language models; the names here are its public API.

    from jaxdecoder import generate, load_run

    run = load_run("runs/demo")  # config, decoder, params, tokenizer, step
    print(generate(run, "Once upon a time", temperature=0.4))

`load` reads the config of a `Decoder`; `flash_attention` takes any of the `masks` and `scores`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdecoder.config import load
    from jaxdecoder.decoder import Decoder
    from jaxdecoder.kernels import flash_attention, masks, scores
    from jaxdecoder.sampling.text import generate
    from jaxdecoder.training.runs import load_model as load_run

__all__ = ["Decoder", "flash_attention", "generate", "load", "load_run", "masks", "scores"]

# Imported when asked for: reading a config or tokenising a corpus needs no JAX.
_PLACES = {
    "Decoder": ("jaxdecoder.decoder", "Decoder"),
    "flash_attention": ("jaxdecoder.kernels", "flash_attention"),
    "generate": ("jaxdecoder.sampling.text", "generate"),
    "load": ("jaxdecoder.config", "load"),
    "load_run": ("jaxdecoder.training.runs", "load_model"),
    "masks": ("jaxdecoder.kernels", "masks"),
    "scores": ("jaxdecoder.kernels", "scores"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
