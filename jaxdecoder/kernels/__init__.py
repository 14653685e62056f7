"""Attention as one operation, whatever the mask and the machine."""

from jaxdecoder.kernels.flash import flash_attention

__all__ = ["flash_attention"]
