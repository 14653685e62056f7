"""The product of activations and a packed kernel.

Decoding multiplies a row or two by every weight, and reading the weights takes the time. There the
codes are read as they lie, which are a quarter or an eighth of the bytes. With many rows the
product takes longer than reading: then the kernel is unpacked once, for a product of floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxdecoder.kernels.device import current_device
from jaxdecoder.kernels.packing import Packed, spread
from jaxdecoder.kernels.product import product

FEW_ROWS = 4
"""Up to this many rows, reading codes is quicker than unpacking them for a product of floats."""

TILE = 8
"""The most inputs whose products one pass over the columns sums: as many as have registers."""

LARGEST_ACTIVATION = 127


def packed_product(
    x: Float[Array, "*batch d_in"],
    kernel: Packed | Float[Array, "d_in d_out"],
    *,
    activations: str = "float",
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "*batch d_out"]:
    """Compute x @ kernel, in the type of x or in the preferred one.

    `activations`: int8 rounds each row of x to 255 levels first (W8A8 with dynamic scales, arXiv
    2208.07339 without its outliers); gradients pass the rounding unchanged.
    """
    rounds = activations == "int8"
    dtype = preferred_element_type or x.dtype
    rows = x.size // x.shape[-1]
    if isinstance(kernel, Packed) and rows <= FEW_ROWS and current_device().platform == "cpu":
        few = by_integers if rounds else by_codes
        out = few(x.reshape(rows, -1), kernel)
        return out.reshape(*x.shape[:-1], -1).astype(dtype)
    whole = kernel.dequantized(x.dtype) if isinstance(kernel, Packed) else kernel.astype(x.dtype)
    if rounds:
        x = rounded(x)
    return product(x, whole, preferred_element_type=preferred_element_type)


def by_codes(x: Float[Array, "rows d_in"], kernel: Packed) -> Float[Array, "rows d_out"]:
    """Compute x @ kernel in float32, for few rows.

    Codes are converted where they are multiplied, in a loop over the columns that sums a tile of
    inputs. The terms of the sum are written out, because XLA makes no vector code of a sum over
    inputs that are not floats in memory.
    """
    terms = _terms(x.astype(jnp.float32), kernel, kernel.scheme.kind.decode)
    return _joined(_added(a * b for a, b in terms), _added(a for a, _ in terms), kernel)


def by_integers(x: Float[Array, "rows d_in"], kernel: Packed) -> Float[Array, "rows d_out"]:
    """Compute rounded(x) @ kernel for few rows and whole levels, with exact sums of products.

    Products have 16 bits, and so have sums of as many as cannot overflow.
    """
    integers, scale = rounded_to_integers(x.astype(jnp.float32))
    kind = kernel.scheme.kind
    terms = _terms(integers.astype(jnp.int16), kernel, _integers[kind.codes])
    highest = max(-kind.lowest, kind.largest) + kind.offset
    safe = (2**15 - 1) // (LARGEST_ACTIVATION * highest)
    parts = [terms[i : i + safe] for i in range(0, len(terms), safe)]
    products = _added(_added(a * b for a, b in part).astype(jnp.int32) for part in parts)
    inputs = _added(a.astype(jnp.int32) for a, _ in terms)
    total = _joined(products.astype(jnp.float32), inputs.astype(jnp.float32), kernel)
    return scale * total


def rounded(x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_in"]:
    """Round each row to multiples of a 127th of its largest magnitude; gradients pass unchanged.

    The error is at most half of that step.
    """
    constant = jax.lax.stop_gradient(x)
    integers, scale = rounded_to_integers(constant.astype(jnp.float32))
    return (integers * scale).astype(x.dtype) + (x - constant)


def rounded_to_integers(
    x: Float[Array, "*batch d_in"],
) -> tuple[Float[Array, "*batch d_in"], Float[Array, "*batch 1"]]:
    """Return the whole numbers of `rounded`, from -127 to 127, and the scale of each row."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST_ACTIVATION, 1.0)
    return jnp.round(x / scale), scale


def _terms(
    x: jax.Array, kernel: Packed, decode: Callable[[jax.Array], tuple[jax.Array, ...]]
) -> list[tuple[jax.Array, jax.Array]]:
    """Return the factors of each tile's sum of products, a pair for each input of a tile.

    A pair is inputs (groups, tiles, rows, 1) and decoded codes (groups, tiles, 1, d_out). Both pass
    a barrier together, without which a loop around might unpack the kernel first and read floats.
    """
    groups, per = kernel.scales.shape[0], kernel.scheme.kind.codes
    x, codes = jax.lax.optimization_barrier((x, kernel.codes))
    if not kernel.scheme.kind.integer:
        # As bits, because XLA converts small floats to wider ones even to slice them.
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    stored, d_out = codes.shape
    in_group = stored // groups
    tile = max(size for size in range(1, TILE // per + 1) if in_group % size == 0)
    inputs = x.T.reshape(groups, per, in_group // tile, tile, len(x), 1)
    tiles = codes.reshape(groups, in_group // tile, tile, 1, d_out)
    return [
        (inputs[:, half, :, k], part)
        for k in range(tile)
        for half, part in enumerate(decode(tiles[:, :, k]))
    ]


def _joined(products: jax.Array, inputs: jax.Array, kernel: Packed) -> Float[Array, "rows d_out"]:
    """Scale and sum over all tiles, given each tile's sums of products and of inputs."""
    scales, offset = (part[:, :, None] for part in spread(kernel))
    if kernel.zeros is not None or kernel.scheme.kind.offset:
        products = products - offset * inputs
    groups, tiles, rows, d_out = products.shape
    scaled = (scales * products).reshape(groups * tiles, rows * d_out)
    # As a product: for a sum, XLA would put the loop over the columns inside one over the tiles.
    return (jnp.ones((1, groups * tiles)) @ scaled).reshape(rows, d_out)


def _added(terms: Iterable[jax.Array]) -> jax.Array:
    """Return the sum of the terms, in their own type."""
    return functools.reduce(jnp.add, terms)


_integers: dict[int, Callable[[jax.Array], tuple[jax.Array, ...]]] = {
    1: lambda codes: (codes.astype(jnp.int16),),
    2: lambda codes: ((codes & 15).astype(jnp.int16), (codes >> 4).astype(jnp.int16)),
}
"""Decode codes as whole numbers; the key is how many codes share an element."""
