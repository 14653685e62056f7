"""The mesh of devices, seen from inside a computation that is traced under `jax.set_mesh`.

Whoever makes an array says what its axes are, and one table says which axes of the mesh split them:
splitting another axis, or over another axis of the mesh, is another row. Without a mesh, with one
device, and inside `shard_map`, where arrays are local to begin with, all of this does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
"""The axes of a mesh. Neighbours along the last speak most with one another."""

RULES: Mapping[str, tuple[str, ...]] = {
    # Activations.
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "tokens of the loss": ("context", "tensor"),
    # Both: tensor parallelism (Megatron-LM, arXiv 1909.08053).
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "neurons": ("tensor",),
    "vocabulary": ("tensor",),
    # Parameters: ZeRO-3 (arXiv 1910.02054).
    "features": ("fsdp",),
}
"""Name of an array's axis -> axes of the mesh that split it."""


def current() -> AbstractMesh | None:
    """Return the mesh that a computation is traced for, or None if it has nothing to split."""
    mesh = jax.sharding.get_abstract_mesh()
    known = not mesh.empty and not mesh.manual_axes and set(mesh.axis_names) <= set(AXES)
    # Axes that are Explicit are for whoever made them.
    ours = known and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours and mesh.size > 1 else None


def spec(
    names: Sequence[str | None], sizes: Sequence[int], shape: Mapping[str, int]
) -> PartitionSpec:
    """Return how an array of these axes is split over a mesh of this shape.

    An axis is split over as many of its mesh axes as divide it, and else stays whole. `names` are
    those of the table; others, and None, are of axes that are never split.
    """
    used: set[str] = set()
    found: list[tuple[str, ...] | None] = []
    for name, size in zip(names, sizes, strict=True):
        own = [m for m in RULES.get(name or "", ()) if shape.get(m, 1) > 1 and m not in used]
        while own and size % math.prod(shape[m] for m in own):
            own.pop()
        used.update(own)
        found.append(tuple(own) or None)
    return PartitionSpec(*found)


def split(x: jax.Array, *names: str | None) -> jax.Array:
    """Return x, split over the current mesh by the names of its axes."""
    mesh = current()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh.shape))


def devices_of_an_array() -> int:
    """Return how many devices may have parts of an array; inside `shard_map` it is one's own."""
    return 1 if jax.sharding.get_abstract_mesh().manual_axes else jax.device_count()
