"""Where arrays live: a device mesh, and one table from the names of axes to its axes.

A parameter's axes have names (`layers/tree.py`), and names map to mesh axes (`RULES`): splitting
another axis, or over another axis of the mesh, is another row.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr
from jaxtyping import PyTree

from jaxdecoder.config import Config, ConfigError
from jaxdecoder.layers import tree

RULES: dict[str, str] = {"features": "data"}
"""Axis name -> mesh axis that splits it, under `train.fsdp` (ZeRO-3, arXiv 1910.02054)."""


def make_mesh(config: Config) -> Mesh:
    """Return a mesh of all visible devices along `data`. The batch must divide over them."""
    devices, train = jax.devices(), config.train
    share = train.batch_size // train.gradient_accumulation
    if share % len(devices):
        fits = len(devices) * -(-share // len(devices)) * train.gradient_accumulation
        raise ConfigError(
            "train.batch_size",
            train.batch_size,
            f"does not divide over {len(devices)} devices and gradient_accumulation = "
            f"{train.gradient_accumulation}; {fits} would",
        )
    return Mesh(np.array(devices), ("data",))


def state_sharding(state: PyTree, mesh: Mesh | AbstractMesh, *, fsdp: bool) -> PyTree:
    """Return a sharding for every array of a training state (or its shapes).

    Optimiser moments have their parameters' names at the end of their paths, so the same table
    places them.
    """

    def place(path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        spec = _spec(path, leaf.shape, mesh) if fsdp else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh | AbstractMesh, leading: int = 0) -> NamedSharding:
    """Split the batch axis, which follows `leading` others, over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, "data"))


def everywhere(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Give every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def _spec(path: KeyPath, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    names = tuple(keystr((entry,), simple=True) for entry in path)
    axes = tree.axes_of(names)
    # Norms and biases are small, and stay whole.
    if len(axes) < 2 or len(shape) < len(axes):
        return PartitionSpec()
    axes = ("layers",) * (len(shape) - len(axes)) + axes
    split = [RULES.get(axis) for axis in axes]
    return PartitionSpec(
        *(m if m and n % mesh.shape[m] == 0 else None for m, n in zip(split, shape, strict=True))
    )
