"""What a config costs, in closed form: parameters, FLOPs and bytes, with no array built.

    python -m jaxdecoder.analysis configs/shakespeare_nano.toml --model.vocab-size 65

Costs stand beside the components, in `jaxdecoder.layers`; `counts.py` adds them up.

FLOPs are those of the matrix products alone, two for each multiply-add; lookups, norms,
activations, biases and the softmax are left out. Attention is counted over the (query, key) pairs
that its mask allows, which is what a kernel that skips the others computes at best, and linear
attention as its recurrence; the dense count is what plain XLA computes, over all pairs, all slots
of a cache and all of a chunk. The backward pass is twice the forward, one product for the gradient
of either operand; recomputation is not counted.
"""

from __future__ import annotations

from jaxdecoder.analysis.counts import (
    FlopsPerToken,
    cache_bytes,
    early_exit_flops,
    flops_per_token,
    forward_flops,
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
    "parameters",
    "weight_bytes",
    "with_vocab_size",
]
