"""Where arrays live on a mesh of devices.

A parameter's axes have names (`layers/tree.py`), and names map to mesh axes (`kernels/mesh.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr
from jaxtyping import PyTree

from jaxdecoder.config import Architecture, Config, ConfigError
from jaxdecoder.kernels.mesh import AXES, RULES, spec
from jaxdecoder.layers import tree

Anywhere = Mesh | AbstractMesh

T = TypeVar("T")


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh that a config asks for, of these devices, or of all visible ones.

    Raises:
        ConfigError: if its sizes do not fit the devices, or the batch or the model does not divide.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes_on(len(devices), config)
    shape = tuple(sizes[axis] for axis in AXES)
    kinds = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    left_whole(config, mesh)
    return mesh


def sizes_on(devices: int, config: Config) -> dict[str, int]:
    """Return the sizes of the mesh that a config asks for on so many devices.

    Raises:
        ConfigError: if they do not fit, or the batch does not divide over them.
    """
    sizes = config.mesh.sizes(devices)
    train, parts = config.train, sizes["data"] * sizes["fsdp"]
    share = train.batch_size // train.gradient_accumulation
    if share % parts:
        fits = parts * -(-share // parts) * train.gradient_accumulation
        raise ConfigError(
            "train.batch_size",
            train.batch_size,
            f"does not divide over {parts} devices (mesh.data x mesh.fsdp) and "
            f"gradient_accumulation = {train.gradient_accumulation}; {fits} would",
        )
    return sizes


def known_to_layers(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which what is traced knows of the mesh; one device has no use for it."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def left_whole(config: Config, mesh: Anywhere) -> list[str]:
    """Return which fields of the model do not divide over their mesh axis, and so stay whole.

    Raises:
        ConfigError: if none does that an axis could split.
    """
    model = config.model
    split: dict[str, dict[str, int | None]] = {
        "fsdp": {"d_model": model.d_model},
        "context": {"context_length": model.context_length},
        "tensor": {
            "n_heads": model.n_heads,
            "n_kv_heads": model.n_kv_heads,
            "d_ff": model.d_ff,
            "vocab_size": model.vocab_size,
        },
    }
    found = []
    for axis, fields in split.items():
        parts = mesh.shape.get(axis, 1)
        known = {name: size for name, size in fields.items() if size is not None}
        whole = [f"model.{name} = {size}" for name, size in known.items() if size % parts]
        if len(whole) == len(known):
            fits = next(n for n in range(parts, 0, -1) if any(s % n == 0 for s in known.values()))
            why = f"{', '.join(whole)}: none divides; {fits} would do"
            raise ConfigError(f"mesh.{axis}", parts, why)
        found += [f"{field} does not divide by mesh.{axis} = {parts}" for field in whole]
    return found


def state_sharding(state: PyTree, mesh: Anywhere, model: Architecture) -> PyTree:
    """Return a sharding for every array of a training state (or its shapes).

    Optimiser moments have their parameters' names at the end of their paths, so the same table
    places them. Those of adafactor lack an axis of theirs.
    """
    named = jax.tree_util.tree_leaves_with_path(state)
    shapes = {_names(path)[1:]: leaf.shape for path, leaf in named if _names(path)[0] == "params"}

    def place(path: KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        names = _names(path)
        ends = (names[i:] for i in range(len(names)))
        own = next((end for end in ends if end in shapes), None)
        found = None if own is None else _spec(own, shapes[own], leaf.shape, mesh, model)
        return NamedSharding(mesh, found or PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, state)


def located(shapes: T, shardings: PyTree) -> T:
    """Return the shapes of arrays with where they live."""
    found: T = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )
    return found


def training_call(several: Callable[..., Any], mesh: Mesh, shardings: PyTree) -> Any:
    """Return (state, batches, constants) -> (state, metrics) over a mesh; the state is donated."""
    return jax.jit(
        several,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh, 1), everywhere(mesh)),
        out_shardings=(shardings, None),
    )


def batch_sharding(mesh: Anywhere, leading: int = 0) -> NamedSharding:
    """Split the axes of batch and tokens, which follow `leading` others, over the devices."""
    axes = [
        tuple(m for m in RULES[name] if mesh.shape.get(m, 1) > 1) for name in ("batch", "tokens")
    ]
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, *(split or None for split in axes)))


def everywhere(mesh: Anywhere) -> NamedSharding:
    """Give every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows_needed(sharding: NamedSharding, rows: int) -> slice:
    """Return which of so many rows, the first axis that is split, the devices of this host need."""
    own = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    parts = own.addressable_devices_indices_map((rows,)).values()
    found = [part[0].indices(rows) for part in parts if part is not None]
    return slice(min(start for start, *_ in found), max(stop for _, stop, _ in found))


def place_rows(
    batch: PyTree, sharding: NamedSharding, rows: slice, total: int, axis: int
) -> PyTree:
    """Place arrays that have but these of all rows along an axis, as `sharding` says."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[axis].indices(total)
            own = slice(start - rows.start, stop - rows.start)
            return array[(*index[:axis], own, *index[axis + 1 :])]

        shape = (*array.shape[:axis], total, *array.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(place, batch)


def _names(path: KeyPath) -> tuple[str, ...]:
    return tuple(keystr((entry,), simple=True) for entry in path)


def _spec(
    path: tree.Path,
    whole: tuple[int, ...],
    shape: tuple[int, ...],
    mesh: Anywhere,
    model: Architecture,
) -> PartitionSpec | None:
    """Return how an array of a parameter is split: itself, a moment, or a sum over one axis."""
    axes = tree.axes_of(path)
    # Norms and biases are small, and stay whole.
    if len(axes) < 2:
        return None
    names = ("layers",) * (len(whole) - len(axes)) + axes
    lacking = [i for i in range(len(whole)) if whole[:i] + whole[i + 1 :] == shape]
    if lacking:
        names = names[: lacking[-1]] + names[lacking[-1] + 1 :]
    elif whole != shape:
        return None
    # Heads are never cut in two.
    counts = {"heads": model.n_heads, "kv_heads": model.n_kv_heads}
    parts = mesh.shape.get("tensor", 1)
    return spec([None if counts.get(n, 0) % parts else n for n in names], shape, mesh.shape)
