"""Weights of few bits: their formats, and what cannot go together."""

from __future__ import annotations

from typing import Any, Literal

from jaxdecoder.config.fields import ConfigError, nearest_multiples

WeightFormat = Literal["float32", "int8", "int4", "float8_e4m3fn", "float8_e5m2"]
Granularity = Literal["tensor", "channel", "group"]
ActivationFormat = Literal["float", "int8"]


def check_levels(model: Any, fan_ins: dict[str, int]) -> None:
    """That a `ModelConfig`'s weight format has what is asked of it, and groups fit every kernel.

    `fan_ins`: how many inputs linear layers have, by what says so.

    Raises:
        ConfigError: where they do not.
    """
    floats = model.weight_format.startswith("float")
    if floats and not model.weight_symmetric:
        raise ConfigError(
            "model.weight_symmetric",
            False,
            f'model.weight_format = "{model.weight_format}" has no zero point; true would do',
        )
    if floats and model.activation_format != "float":
        raise ConfigError(
            "model.activation_format",
            model.activation_format,
            f'is multiplied with whole numbers, and model.weight_format = "{model.weight_format}" '
            'has others; "float" would do',
        )
    even = model.weight_format == "int4"
    for name, width in fan_ins.items():
        if even and width % 2:
            raise ConfigError(
                "model.weight_format",
                model.weight_format,
                f'two weights share a byte, and {name} = {width} is odd; "int8" would do',
            )
    if model.weight_granularity == "group":
        _check_groups(model.weight_group_size, fan_ins, even)


def _check_groups(size: int, fan_ins: dict[str, int], even: bool) -> None:
    key = "model.weight_group_size"
    if even and size % 2:
        would_do = nearest_multiples(size, 2)
        raise ConfigError(
            key, size, f"two weights of int4 share a byte, so it must be even; {would_do} would do"
        )
    for name, width in fan_ins.items():
        if width % size:
            divisors = [n for n in range(1, width + 1) if width % n == 0 and not (even and n % 2)]
            near = sorted(sorted(divisors, key=lambda n: abs(n - size))[:2])
            would_do = " or ".join(map(str, near))
            raise ConfigError(key, size, f"does not divide {name} = {width}; {would_do} would")
