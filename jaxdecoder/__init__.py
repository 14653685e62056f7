"""A laboratory for small decoder-only language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxdecoder.decoder import Decoder

__all__ = ["Decoder"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: reading a config or tokenising a corpus needs no JAX.
    if name == "Decoder":
        from jaxdecoder.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
