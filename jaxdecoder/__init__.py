"""A laboratory for small decoder-only language models."""

from jaxdecoder.decoder import Decoder

__all__ = ["Decoder"]
