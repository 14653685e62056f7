"""Attention of a few queries to a long cache, as in decoding: reading the cache takes the time.

NVIDIA GPUs have a kernel for it (`decode_kernel.py`); elsewhere it is `reference.attention`.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from jaxdecoder.errors import UserError
from jaxdecoder.kernels import reference
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.scores import Score

IMPLEMENTATIONS = ("reference", "kernel")


def decode_attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    allowed: Bool[Array, "#batch #heads q_time k_time"],
    *,
    scale: float,
    score: Score | None = None,
    q_index: Int[Array, "#batch q_time"] | None = None,
    k_index: Int[Array, "#batch k_time"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_time heads width"]:
    """Compute softmax(score(scale q k^T)) v over the allowed keys; a query with none gives zeros.

    The arguments are those of `reference.attention`. The kernel of NVIDIA GPUs reads a cache
    (batch, kv_heads, k_time, width) as it lies, if `k` and `v` are its `swapaxes(1, 2)`. It has no
    gradient.

    Raises:
        UserError: for an unknown `implementation`, or "kernel" where it cannot do this.
    """
    device = current_device()
    if implementation == "auto" and device.platform != "gpu":
        implementation = "reference"
    if implementation not in ("auto", *IMPLEMENTATIONS):
        names = ", ".join(("auto", *IMPLEMENTATIONS))
        raise UserError(f"decode_attention: there is no {implementation!r}; there are {names}")
    if implementation != "reference":
        from jaxdecoder.kernels import decode_kernel  # it loads Pallas

        why_not = decode_kernel.refuses(q, k, score, device)
        if why_not is None:
            return decode_kernel.attention(q, k, v, allowed, scale, score, q_index, k_index)
        if implementation == "kernel":
            raise UserError(f"decode_attention: the kernel cannot do this, because {why_not}")
    return reference.attention(
        q, k, v, allowed, scale=scale, score=score, q_index=q_index, k_index=k_index
    )
