"""Attention by NVIDIA's cuDNN, with JAX's gradient rule, for the few masks that it has.

These are causal, a causal window, and no mask; in half precision, without scores and dropout.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.masks import Mask
from jaxdecoder.kernels.problem import Implementation, Operands, Problem

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def _pattern(mask: Mask) -> dict[str, Any] | None:
    """Return the mask in the terms of `dot_product_attention`, or None if cuDNN has no such."""
    match mask:
        case Mask("everything"):
            return {"is_causal": False}
        case Mask("causal"):
            return {"is_causal": True}
        case Mask("&", (Mask("causal"), Mask("sliding_window", (int(n),)))) | Mask(
            "&", (Mask("sliding_window", (int(n),)), Mask("causal"))
        ):
            return {"is_causal": True, "local_window_size": (n - 1, 0)}
    return None


def forward(problem: Problem, operands: Operands) -> tuple[jax.Array, None]:
    """See `problem.Implementation`."""
    pattern = _pattern(problem.mask)
    assert pattern is not None
    q, k, v, *_ = operands
    attend = jax.nn.dot_product_attention
    return attend(q, k, v, scale=problem.scale, implementation="cudnn", **pattern), None


def _refuses(problem: Problem, operands: Operands, device: Device) -> str | None:
    q, k = operands.q, operands.k
    pattern, width, hopper = _pattern(problem.mask), q.shape[-1], _capability() >= 9
    if device.platform != "gpu" or not any(map(importlib.util.find_spec, PLUGINS)):
        return f"cuDNN comes with JAX for NVIDIA GPUs, not for a {device.kind}"
    if _capability() < 8:
        return "cuDNN's attention needs a card of compute capability 8.0"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention is in bfloat16 or float16, not in {q.dtype}"
    if width % 8 or width > (256 if hopper else 128):
        return (
            "cuDNN's heads are a multiple of 8 wide, up to 128, or 256 from compute capability "
            f"9.0 on, not {width}"
        )
    if problem.score is not None:
        return "it takes no score function"
    if problem.dropout:
        return "cuDNN's dropout is not the one of this operation"
    if pattern is None or operands.q_segments is not None:
        return "its masks are causal(), causal() & sliding_window(n) and everything() alone"
    if pattern["is_causal"] and q.shape[1] != k.shape[1]:
        return "under its causal mask there are as many queries as keys"
    return None


def _capability() -> float:
    """Return that of the machine's first card, or 8.0 to compile on a machine without one."""
    try:
        return float(jax.devices("cuda")[0].compute_capability)
    except RuntimeError:
        return 8.0


IMPLEMENTATION = Implementation(forward, None, _refuses)
