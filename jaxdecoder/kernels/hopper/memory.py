"""Shared memory of the Hopper kernels: rings of buffers in it, and matrix products from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxdecoder.kernels.typing import Ref
from jaxdecoder.typing import Index

Span = pl.Slice | slice
"""A run of positions, as `pl.ds` returns it: a `Slice`, or by the types of older JAX a `slice`."""

# The places of a product in the registers of a warpgroup, as the tensor cores leave it.
TILE = plgpu.Layout.WGMMA


def matrix(*shape: int, dtype: DTypeLike) -> pl.MemoryRef:
    """Declare matrices (..., rows, columns) that `wgmma` and the copy engine can read."""
    bits = 8 * jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    # From jax 0.12 on a protocol's method without a body makes both look abstract to mypy.
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))  # type: ignore[abstract]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vector(*shape: int, dtype: DTypeLike = jnp.float32) -> pl.MemoryRef:
    """Declare plain arrays."""
    return plgpu.SMEM(shape, dtype)


class Ring(NamedTuple):
    """Buffers that the memory warpgroup fills ahead, in turn, and the compute warpgroups empty.

    Each holds the same arrays, by name. All warpgroups count the steps from 0 on their own.
    Outside the kernel the fields are types of memory, inside they are refs.
    """

    arrays: dict[str, Ref]
    loaded: Ref
    """Barriers, one for each buffer, that the copies into it arrive at."""
    consumed: Ref
    """Barriers, one for each buffer, that the warpgroups arrive at that have emptied it."""

    @classmethod
    def of(cls, depth: int, consumers: int, **arrays: pl.MemoryRef | None) -> Ring:
        """Declare `depth` buffers that `consumers` warpgroups empty.

        `depth` is the first axis of the arrays; those that are None are left out.
        """
        present = {name: array for name, array in arrays.items() if array is not None}
        return cls(
            arrays=present,
            loaded=plgpu.Barrier(num_arrivals=len(present), num_barriers=depth),
            consumed=plgpu.Barrier(num_arrivals=consumers, num_barriers=depth),
        )

    @property
    def depth(self) -> int:
        depth: int = self.loaded.shape[0]
        return depth

    def slot(self, step: Index) -> jax.Array:
        """Return the buffer of a step."""
        return lax.rem(step, jnp.int32(self.depth))

    def fill(self, step: Index, **sources: Ref) -> None:
        """Copy the sources into the buffer of a step, once it is empty."""
        slot = self.slot(step)
        pl.when(step >= self.depth)(lambda: plgpu.barrier_wait(self.consumed.at[slot]))
        for name, array in self.arrays.items():
            plgpu.copy_gmem_to_smem(sources[name], array.at[slot], self.loaded.at[slot])

    def take(self, step: Index) -> dict[str, Ref]:
        """Wait until the buffer of a step is full, and return its arrays."""
        plgpu.barrier_wait(self.loaded.at[self.slot(step)])
        return self.held(step)

    def held(self, step: Index) -> dict[str, Ref]:
        """Return the arrays of a step that are taken and not yet released."""
        slot = self.slot(step)
        return {name: array.at[slot] for name, array in self.arrays.items()}

    def release(self, step: Index) -> None:
        """Say that this warpgroup has emptied the buffer of a step."""
        plgpu.barrier_arrive(self.consumed.at[self.slot(step)])

    def drain(self, steps: Index) -> None:
        """Wait, after so many steps, until all buffers are empty."""

        def wait(step: Index, _: None) -> None:
            plgpu.barrier_wait(self.consumed.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.depth, 0), steps, wait, None)


def part(ref: Ref, *index: Index | Span) -> Ref:
    """Return a part of memory, or None where there is none."""
    return None if ref is None else ref.at[index]


def along(axis: int, ref: Ref) -> jax.Array:
    """Load a vector that lies along an axis of a tile."""
    return plgpu.layout_cast(ref[...], TILE.reduce(1 - axis))


def floats_along(axis: int, ref: Ref) -> jax.Array:
    """Load a vector along an axis of a tile, from the bits of float32 numbers."""
    return lax.bitcast_convert_type(along(axis, ref), jnp.float32)


def zeros(*shape: int) -> jax.Array:
    """Return float32 zeros: a tile, or a number for each of its rows."""
    layout = TILE if len(shape) == 2 else TILE.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def spread(x: jax.Array, axis: int, shape: tuple[int, int]) -> jax.Array:
    """Repeat a vector that lies along an axis of a tile over the other one."""
    return lax.broadcast_in_dim(x, shape, (axis,))


# --- Matrix products ---------------------------------------------------------------------------


def transposed(ref: Ref) -> Ref:
    return ref.transpose((1, 0))


class Product(NamedTuple):
    """start + a b in float32."""

    a: jax.Array | Ref
    """(rows, n) in shared memory; the first of several may have it in registers."""
    b: Ref
    """(n, columns) in shared memory."""
    start: jax.Array | None = None
    """(rows, columns); zeros if left out. This addition costs nothing."""
    more: tuple[tuple[Ref, Ref], ...] = ()
    """Pairs like a and b, in shared memory, whose products are added, too."""


def multiply(
    *products: Product, stage: Ref | None, issued: Callable[[], None] = lambda: None
) -> list[jax.Array]:
    """Compute all the products at the same time; call `issued` while they are under way.

    The interpreter cannot multiply factors in registers: there `stage`, in shared memory, takes
    them first.
    """
    first = products[0]
    if stage is not None and isinstance(first.a, jax.Array):
        stage[...] = first.a
        plgpu.commit_smem()
        products = (first._replace(a=stage), *products[1:])

    def multiplied(*accumulators: Ref) -> None:
        for accumulator, product in zip(accumulators, products, strict=True):
            for a, b in ((product.a, product.b), *product.more):
                plgpu.wgmma(accumulator, a, b)
        issued()

    shapes = [(product.a.shape[0], product.b.shape[1]) for product in products]
    if stage is None:
        starts = [
            zeros(*s) if p.start is None else p.start for s, p in zip(shapes, products, strict=True)
        ]
        found = pl.run_state(lambda refs: multiplied(*refs))(tuple(map(plgpu.ACC.init, starts)))
        return list(found)

    def scoped(*accumulators: Ref) -> list[jax.Array]:
        multiplied(*accumulators)
        return [accumulator[...] for accumulator in accumulators]

    found = pl.run_scoped(scoped, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
    return [x if p.start is None else x + p.start for x, p in zip(found, products, strict=True)]
