"""Types that many rooms use and that no library names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int

Params = Mapping[str, Any]
"""Parameters by name, as Flax has them: arrays, and more such mappings."""

Value = Any
"""What a key of a TOML or JSON table holds."""

Table = dict[str, Value]
"""Keys and values, as TOML and JSON have them."""

Index = int | Int[Array, ""]
"""A whole number; it may be traced."""

Scalar = float | Float[Array, ""] | Index
"""A number; it may be traced."""
