"""Types that many rooms speak of and that no library names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int

Params = Mapping[str, Any]
"""Parameters by name, as Flax has them: arrays, and more such mappings."""

Index = int | Int[Array, ""]
"""A whole number; it may be traced."""

Scalar = float | Float[Array, ""] | Index
"""A number; it may be traced."""
