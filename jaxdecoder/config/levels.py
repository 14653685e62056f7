"""Weights of few bits: their formats, and what cannot go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

# The module rather than its class: it is still loading.
from jaxdecoder.config import model
from jaxdecoder.config.fields import nearest_multiples

WeightFormat = Literal["float32", "int8", "int4", "float8_e4m3fn", "float8_e5m2"]
Granularity = Literal["tensor", "channel", "group"]
ActivationFormat = Literal["float", "int8"]

Wrong = tuple[str, str]
"""A field of a `ModelConfig`, and why its value cannot be."""


def weight_levels(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that the weight format has what is asked of it, and groups fit every kernel."""
    if not c.quantized:
        if c.activation_format != "float":
            yield (
                "activation_format",
                'is for weights of few levels, and model.weight_format = "float32"; "float" '
                "would do",
            )
        return
    floats = c.weight_format.startswith("float")
    if floats and not c.weight_symmetric:
        why = f'model.weight_format = "{c.weight_format}" has no zero point; true would do'
        yield "weight_symmetric", why
    if floats and c.activation_format != "float":
        yield (
            "activation_format",
            f'is multiplied with whole numbers, and model.weight_format = "{c.weight_format}" '
            'has others; "float" would do',
        )
    # How many inputs linear layers have; those of wider stacks are multiples of these.
    fan_ins = {"model.d_model": c.d_model}
    if c.attention_projection:
        fan_ins["model.n_heads x model.d_head"] = c.n_heads * c.head_width
    if c.feed_forward and c.feed_forward_projection:
        fan_ins["model.d_ff"] = c.hidden_width
    even = c.weight_format == "int4"
    for name, width in fan_ins.items():
        if even and width % 2:
            why = f'two weights share a byte, and {name} = {width} is odd; "int8" would do'
            yield "weight_format", why
    if c.weight_granularity == "group":
        for why in _misfits(c.weight_group_size, fan_ins, even):
            yield "weight_group_size", why


def _misfits(size: int, fan_ins: dict[str, int], even: bool) -> Iterator[str]:
    if even and size % 2:
        would_do = nearest_multiples(size, 2)
        yield f"two weights of int4 share a byte, so it must be even; {would_do} would do"
    for name, width in fan_ins.items():
        if width % size:
            divisors = [n for n in range(1, width + 1) if width % n == 0 and not (even and n % 2)]
            near = sorted(sorted(divisors, key=lambda n: abs(n - size))[:2])
            would_do = " or ".join(map(str, near))
            yield f"does not divide {name} = {width}; {would_do} would"
