"""Types that the kernels speak of and that no library names."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array of JAX's or of NumPy's; constants that JAX keeps, under `remat` for one, are NumPy's."""

Indices = int | np.integer | AnyArray
"""Positions of queries or keys, or numbers of heads or batch entries: one, or an array of them."""

Ref = Any
"""Memory that a Pallas kernel reads and writes by `ref[...]`, and whose parts are `ref.at[...]`.
Pallas has no public type for it."""

Leaf = Any
"""An array in a pytree, or what JAX has in its place there, such as a type or a sharding."""

Unchecked = Any
"""An argument as a person gave it, before it is checked."""

Carry = TypeVar("Carry")
"""What a loop hands from one step to the next: any pytree of arrays."""
