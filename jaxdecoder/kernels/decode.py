"""Attention of a few queries to a long cache, as in decoding: reading the cache takes the time.

NVIDIA GPUs have a kernel for it (`decode_kernel.py`); elsewhere it is `reference.attention`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float, Int

from jaxdecoder.errors import UserError
from jaxdecoder.kernels import reference
from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.scores import Score

IMPLEMENTATIONS = ("reference", "kernel")

SHORT = 128
"""Caches with fewer keys are always read whole."""

PARTS = 4
"""Of a longer cache that many lengths are read, each by a small program of its own."""


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
    filled: Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch q_time heads width"]:
    """Compute softmax(score(scale q k^T)) v over the allowed keys; a query with none gives zeros.

    The arguments are those of `reference.attention`. The kernel of NVIDIA GPUs reads a cache
    (batch, kv_heads, k_time, width) as it lies, if `k` and `v` are its `swapaxes(1, 2)`. It has no
    gradient. `filled` promises that no key after so many first ones is allowed, which spares XLA
    on a CPU to read them; the kernel sees it in `allowed`.

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

    # A branch of a program is given its arrays as they lie: else they would be copied for it.
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def to_first(count: int) -> Callable[[], jax.Array]:
        def attend() -> jax.Array:
            first = *(x[:, :, :count].swapaxes(1, 2) for x in (k, v)), allowed[..., :count]
            index = None if k_index is None else k_index[:, :count]
            return reference.attention(
                q, *first, scale=scale, score=score, q_index=q_index, k_index=index
            )

        return attend

    keys = k.shape[2]
    if filled is None or keys < SHORT or device.platform != "cpu":
        return to_first(keys)()
    counts = [-(-keys * part // PARTS) for part in range(1, PARTS + 1)]
    which = sum((filled > count).astype("int32") for count in counts[:-1])
    return jax.lax.switch(which, [to_first(count) for count in counts])
