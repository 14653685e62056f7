"""Kernels of linear layers as codes of 8 or 4 bits, and back.

Linear quantization: weight = scale x (level - zero), where levels are the few numbers that a format
has. A scale, and a zero point in the asymmetric scheme, serve all inputs of a column (channel), a
group of them, or the whole kernel (tensor). Rounding to the nearest level is off by half a step at
most: scale / 2 for whole numbers; for floats, whose steps grow with the number, |weight| x 2^-(m+1)
with m bits of mantissa, and half the smallest step near zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxdecoder.kernels.typing import Leaf
from jaxdecoder.typing import Params


class Format(NamedTuple):
    """The format of a stored weight.

    storage: the dtype of codes; `codes` of them share one element.
    lowest, largest: the levels' ends. The symmetric scheme has -largest to largest.
    encode: levels, which are float32 and whole where the format is, to codes.
    decode: codes to float32, quickly; less `offset` they are the levels.
    integer: whether levels are whole numbers.
    """

    storage: DTypeLike
    codes: int
    lowest: int
    largest: int
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], tuple[jax.Array, ...]]
    offset: int = 0
    integer: bool = True


def _as(dtype: DTypeLike, numbers: jax.Array) -> jax.Array:
    return numbers.astype(dtype)


def _to_pairs(levels: jax.Array) -> jax.Array:
    """Pack two levels in a byte: those of the first half of the rows in the low nibbles."""
    low, high = jnp.split((levels + 8).astype(jnp.uint8), 2, axis=-2)
    return low | (high << 4)


def _from_pairs(codes: jax.Array) -> tuple[jax.Array, ...]:
    wide = codes.astype(jnp.int32)  # processors shift no vectors of bytes
    return (wide & 15).astype(jnp.float32), (wide >> 4).astype(jnp.float32)


def _from_float(mantissa: int, codes: jax.Array) -> tuple[jax.Array, ...]:
    """Convert floats of 8 bits by their bits, so that XLA makes vector code of it on CPUs."""
    bias = 2 ** (6 - mantissa) - 1
    wide = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32)
    magnitude = wide & 0x7F
    bits = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
    normal = jax.lax.bitcast_convert_type(bits, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa)
    value = jnp.where(magnitude < 2**mantissa, subnormal, normal)
    return (jnp.where(wide > 0x7F, -value, value),)


def _float_format(storage: DTypeLike, largest: int, mantissa: int) -> Format:
    encode, decode = partial(_as, storage), partial(_from_float, mantissa)
    return Format(storage, 1, -largest, largest, encode, decode, integer=False)


FORMATS: dict[str, Format] = {
    "int8": Format(
        jnp.int8, 1, -128, 127, partial(_as, jnp.int8), lambda codes: (_as(jnp.float32, codes),)
    ),
    "int4": Format(jnp.uint8, 2, -8, 7, _to_pairs, _from_pairs, offset=8),
    # arXiv 2209.05433
    "float8_e4m3fn": _float_format(jnp.float8_e4m3fn, 448, mantissa=3),
    "float8_e5m2": _float_format(jnp.float8_e5m2, 57344, mantissa=2),
}


class Scheme(NamedTuple):
    """How kernels are quantized. With granularity group, `group_size` inputs share a scale."""

    format: str = "int8"
    granularity: str = "channel"
    group_size: int = 64
    symmetric: bool = True

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    def groups(self, d_in: int) -> int:
        """Count the groups of inputs that have a scale of their own."""
        return d_in // self.group_size if self.granularity == "group" else 1

    def columns(self, d_out: int) -> int:
        """Count the columns that have a scale of their own."""
        return 1 if self.granularity == "tensor" else d_out


class Steps(NamedTuple):
    """The scales of a kernel, and in the asymmetric scheme its zero points."""

    scales: Float[Array, "*layers groups columns"]
    zeros: Int[Array, "*layers groups columns"] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A quantized kernel d_in -> d_out.

    codes: (d_in / codes an element, d_out). Where two share a byte, those of the first half of a
        group's inputs are in the low nibbles.
    """

    codes: Leaf
    scales: Leaf
    zeros: Leaf | None
    scheme: Scheme = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.codes.shape[0] * self.scheme.kind.codes, self.codes.shape[1]

    def dequantized(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "d_in d_out"]:
        """Return the kernel that the codes stand for."""
        d_in, d_out = self.shape
        groups, kind = self.scales.shape[0], self.scheme.kind
        raw = kind.decode(self.codes.reshape(groups, -1, d_out))
        scales, offset = spread(self)
        return ((jnp.concatenate(raw, axis=1) - offset) * scales).reshape(d_in, d_out).astype(dtype)

    def columns(self, chosen: Int[Array, "*rows"]) -> Float[Array, "*rows d_in"]:
        """Return some columns of the kernel as rows, float32."""

        def take(x: jax.Array) -> jax.Array:
            return jnp.take(x, chosen.reshape(-1), axis=1)

        parts = replace(self, codes=take(self.codes))
        if self.scheme.granularity != "tensor":
            zeros = None if self.zeros is None else take(self.zeros)
            parts = replace(parts, scales=take(self.scales), zeros=zeros)
        return parts.dequantized().T.reshape(*chosen.shape, self.shape[0])


def spread(packed: Packed) -> tuple[jax.Array, jax.Array]:
    """Return the scales of decoded codes, and the offsets to subtract from codes before.

    Both are (groups, 1, columns).
    """
    kind = packed.scheme.kind
    offset = jnp.full_like(packed.scales, kind.offset)
    if packed.zeros is not None:
        offset = offset + packed.zeros.astype(jnp.float32)
    return packed.scales[:, None], offset[:, None]


def steps_of(scheme: Scheme, kernel: Float[Array, "d_in d_out"]) -> Steps:
    """Return the scales whose levels reach every weight, and zero points at which zero is exact.

    Zero stays zero in every scheme, so a pruned kernel stays as sparse.
    """
    kind = scheme.kind
    grouped = kernel.reshape(scheme.groups(kernel.shape[0]), -1, kernel.shape[1])
    axes: tuple[int, ...] = (1, 2) if scheme.granularity == "tensor" else (1,)
    low = jnp.minimum(jnp.min(grouped, axis=axes, keepdims=True), 0.0)[:, 0]
    high = jnp.maximum(jnp.max(grouped, axis=axes, keepdims=True), 0.0)[:, 0]
    if scheme.symmetric:
        scales = jnp.maximum(-low, high) / kind.largest
    else:
        scales = (high - low) / (kind.largest - kind.lowest)
    scales = jnp.where(scales > 0, scales, 1.0)
    if scheme.symmetric:
        return Steps(scales, None)
    zeros = jnp.clip(jnp.round(kind.lowest - low / scales), kind.lowest, kind.largest)
    return Steps(scales, zeros.astype(jnp.int8))


def levels_of(
    scheme: Scheme,
    weights: Float[Array, "*rows columns"],
    scales: jax.Array,
    zeros: jax.Array | None,
) -> Float[Array, "*rows columns"]:
    """Return the nearest levels; the shapes of scales and zero points broadcast."""
    kind = scheme.kind
    lowest = -kind.largest if scheme.symmetric else kind.lowest
    levels = weights / scales
    if kind.integer:
        levels = jnp.round(levels)
    else:
        levels = jnp.clip(levels, lowest, kind.largest).astype(kind.storage).astype(jnp.float32)
    if zeros is not None:
        levels = levels + zeros.astype(jnp.float32)
    return jnp.clip(levels, lowest, kind.largest)


def weights_of(levels: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
    """Return the weights that levels stand for."""
    return scales * (levels if zeros is None else levels - zeros.astype(jnp.float32))


def pack(scheme: Scheme, levels: Float[Array, "d_in d_out"], steps: Steps) -> Packed:
    """Encode levels as they are stored."""
    d_out = levels.shape[1]
    grouped = levels.reshape(steps.scales.shape[0], -1, d_out)
    codes = scheme.kind.encode(grouped).reshape(-1, d_out)
    return Packed(codes, steps.scales, steps.zeros, scheme)


@partial(jax.jit, static_argnums=0)
def quantize(scheme: Scheme, kernel: Float[Array, "d_in d_out"]) -> Packed:
    """Round a kernel to the nearest levels."""
    kernel = kernel.astype(jnp.float32)
    steps = steps_of(scheme, kernel)
    grouped = kernel.reshape(steps.scales.shape[0], -1, kernel.shape[1])
    zeros = None if steps.zeros is None else steps.zeros[:, None]
    levels = levels_of(scheme, grouped, steps.scales[:, None], zeros)
    return pack(scheme, levels.reshape(kernel.shape), steps)


def straight_through(
    scheme: Scheme, kernel: Float[Array, "d_in d_out"]
) -> Float[Array, "d_in d_out"]:
    """Return the quantized kernel, with the gradient of the given one (arXiv 1308.3432)."""
    constant = jax.lax.stop_gradient(kernel)
    return quantize(scheme, constant).dequantized() + (kernel - constant)


# --- Parameters ----------------------------------------------------------------------------------

PARTS = ("codes", "scales", "zeros")
"""Names of a packed kernel's parameters, where a float one has `kernel`; zeros may be missing."""


def empty(scheme: Scheme, d_in: int, d_out: int) -> dict[str, jax.Array]:
    """Return the parameters of a packed kernel, all zero."""
    kind, shape = scheme.kind, (scheme.groups(d_in), scheme.columns(d_out))
    parts = {
        "codes": jnp.zeros((d_in // kind.codes, d_out), kind.storage),
        "scales": jnp.zeros(shape, jnp.float32),
    }
    return parts if scheme.symmetric else {**parts, "zeros": jnp.zeros(shape, jnp.int8)}


def parameters_of(packed: Packed) -> dict[str, jax.Array]:
    """Return the parameters of a packed kernel."""
    parts = {name: getattr(packed, name) for name in PARTS}
    return {name: part for name, part in parts.items() if part is not None}


Result = TypeVar("Result")


def over_layers(
    function: Callable[..., Result], kernel: jax.Array, *others: jax.Array | Steps
) -> Result:
    """Map the function over the kernels that leading axes stack."""
    for _ in range(kernel.ndim - 2):
        function = jax.vmap(function)
    return function(kernel, *others)


def of_parameters(scheme: Scheme, parts: Params) -> Packed:
    """Return the kernel of these parameters, which may be of several layers."""
    return Packed(parts["codes"], parts["scales"], parts.get("zeros"), scheme)


def cast(params: Params, dtype: DTypeLike) -> Params:
    """Convert float parameters to another type of float, except the parts of packed kernels."""

    def convert(path: KeyPath, leaf: jax.Array) -> jax.Array:
        return leaf if path[-1].key in PARTS else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(convert, params)


class Size(NamedTuple):
    """The size of a model."""

    parameters: int
    """Weights, however they are stored, without scales and zero points."""
    nonzero: int
    bytes: int


def size(params: PyTree, *, nonzero: bool = True) -> Size:
    """Return the size of a tree of parameters; counting those that are not zero reads them all."""
    if isinstance(params, Mapping):
        if "codes" in params:
            rest = {name: leaf for name, leaf in params.items() if name not in PARTS}
            parts = [_size_of_packed(params, nonzero), size(rest, nonzero=nonzero)]
        else:
            parts = [size(leaf, nonzero=nonzero) for leaf in params.values()]
        return Size(*map(sum, zip(Size(0, 0, 0), *parts, strict=True)))
    count = int(jnp.count_nonzero(params)) if nonzero else 0
    return Size(params.size, count, params.size * params.dtype.itemsize)


def _size_of_packed(parts: Params, nonzero: bool) -> Size:
    codes, zeros = parts["codes"], parts.get("zeros")
    kind = next(kind for kind in FORMATS.values() if jnp.dtype(kind.storage) == codes.dtype)
    held = sum(parts[name].size * parts[name].dtype.itemsize for name in PARTS if name in parts)

    def count(codes: jax.Array, zeros: jax.Array | None = None) -> jax.Array:
        grouped = codes.reshape(1 if zeros is None else zeros.shape[0], -1, codes.shape[1])
        raw = jnp.concatenate(kind.decode(grouped), axis=1) - kind.offset
        return jnp.count_nonzero(raw if zeros is None else raw - zeros[:, None])

    others = () if zeros is None else (zeros,)
    counted = int(jnp.sum(over_layers(count, codes, *others))) if nonzero else 0
    return Size(codes.size * kind.codes, counted, held)
