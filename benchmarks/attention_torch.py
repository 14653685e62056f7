"""PyTorch's part in `benchmarks/attention.py`: its own attention, and compiled FlexAttention.

Without PyTorch, or without a card that it sees, both sit out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

WINDOW, GLOBALS = 1024, 64


class Cannot(Exception):
    """Why an implementation sits a case out."""


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise Cannot("PyTorch is not installed") from error
    if not torch.cuda.is_available():
        raise Cannot("PyTorch sees no GPU")
    return torch


def versions() -> dict[str, str]:
    """That of PyTorch, if it takes part."""
    try:
        return {"torch": _torch().__version__}
    except Cannot:
        return {}


def _run(case: Any, made: Any, attention: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    """Runs attention(q, k, v), of tensors (batch, heads, time, width)."""
    torch = _torch()
    kind = getattr(torch, case.dtype)
    tensors = [
        torch.from_numpy(x).to("cuda", kind).transpose(1, 2).contiguous() for x in made.arrays
    ]
    *qkv, dout = tensors
    for tensor in qkv:
        tensor.requires_grad_(case.backward)

    def run(count: int) -> Callable[[], Any]:
        with torch.set_grad_enabled(case.backward):
            for _ in range(count):
                out = attention(*qkv)
                if case.backward:
                    torch.autograd.grad(out, qkv, dout)
        torch.cuda.synchronize()
        return lambda: out.detach().transpose(1, 2).float().cpu().numpy()

    return run


def sdpa(case: Any, made: Any) -> Callable[[int], Callable[[], Any]]:
    """scaled_dot_product_attention, which knows one mask that it does not read from memory."""
    torch = _torch()
    if case.mask != "causal":
        raise Cannot("it has no such mask but as an array")

    def attention(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _run(case, made, attention)


def flex(case: Any, made: Any) -> Callable[[int], Callable[[], Any]]:
    """FlexAttention, compiled, with its block mask made beforehand."""
    torch = _torch()
    from torch.nn.attention.flex_attention import create_block_mask

    documents = torch.from_numpy(made.documents).to("cuda")

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k <= q

    rules = {
        "causal": causal,
        "window": lambda b, h, q, k: (k <= q) & (q - k < WINDOW),
        "longformer": lambda b, h, q, k: (k <= q) & ((q - k < WINDOW) | (k < GLOBALS)),
        "documents": lambda b, h, q, k: (k <= q) & (documents[q] == documents[k]),
    }
    blocks = create_block_mask(
        rules[case.mask], None, None, case.time, case.time, device="cuda", _compile=True
    )
    compiled = _compiled_flex()
    return _run(case, made, lambda q, k, v: compiled(q, k, v, block_mask=blocks))


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """One function for all cases, so that none of them compiles what another one has compiled.

    Past its limit of programs for one function PyTorch would run the rest uncompiled.
    """
    torch = _torch()
    from torch.nn.attention.flex_attention import flex_attention

    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, 1000)
    return torch.compile(flex_attention, dynamic=False)
