"""Kernels over many devices: under `jit`, each device computes its own batch entries and heads.

XLA cannot look into a kernel, and would gather every array on every device. Here it is told that a
kernel computes batch entries and heads independently, and so leaves the arrays where they are.
Under `shard_map` they are local to begin with.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, PyTreeDef
from jaxtyping import PyTree

from jaxdecoder.kernels import scores
from jaxdecoder.kernels.problem import (
    Gradients,
    LogSumExp,
    Operands,
    Problem,
    field,
    numbered,
)
from jaxdecoder.kernels.typing import AnyArray

# A layout has a letter for every axis of an array: batch entries, query heads, key heads, or an
# axis that is whole on every device. Any other letter is an axis that `vmap` has added.
BATCH, HEADS, KV_HEADS, WHOLE = "bhk."
MAPPED = sorted(set(string.ascii_letters) - {BATCH, HEADS, KV_HEADS})
OF_QUERIES, OF_KEYS, OF_ROWS = "b.h.", "b.k.", "bh."

Forward = Callable[[Problem, Operands], tuple[jax.Array, LogSumExp]]
Backward = Callable[[Problem, Operands, jax.Array, LogSumExp, jax.Array], Gradients]

Flat = Callable[..., list[jax.Array]]
"""A function of arrays that gives a list of arrays."""

Shaped = Sequence[jax.ShapeDtypeStruct]
"""Shapes and shardings of the arguments or results of a `Flat` function."""

Results = TypeVar("Results")


def over_devices(forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
    """Partition the two functions of a `problem.Implementation` by batch entries and heads.

    The operands gain `batch_index` and `head_index` where the problem depends on them.
    """

    def partitioned_forward(problem: Problem, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        operands = numbered(problem, operands)
        return _call(forward, problem, (operands,), (_layouts(operands),), (OF_QUERIES, OF_ROWS))

    def partitioned_backward(
        problem: Problem, operands: Operands, out: jax.Array, logsumexp: jax.Array, dout: jax.Array
    ) -> Gradients:
        operands = numbered(problem, operands)
        learned = scores.chosen(operands.score, problem.learned)
        return _call(
            backward,
            problem,
            (operands, out, logsumexp, dout),
            (_layouts(operands), OF_QUERIES, OF_ROWS, OF_QUERIES),
            _layouts(Gradients(operands.q, operands.k, operands.v, learned)),
        )

    return partitioned_forward, partitioned_backward


def _layouts(bundle: Operands | Gradients) -> PyTree[str]:
    """Return the bundle with layouts in the places of its arrays."""
    batch = bundle.q.shape[0]
    known = {"q": OF_QUERIES, "k": OF_KEYS, "v": OF_KEYS, "dropout": WHOLE}
    known |= {"batch_index": BATCH, "head_index": HEADS}

    def layout(path: KeyPath, x: AnyArray) -> str:
        name = field(path)
        if name == "score":
            return HEADS + WHOLE * (x.ndim - 1)
        if name.endswith("_segments"):
            return (BATCH if x.shape[0] == batch else WHOLE) + WHOLE
        return known[name]

    return jax.tree_util.tree_map_with_path(layout, bundle)


def _call(
    function: Callable[..., Results],
    problem: Problem,
    arguments: tuple[Operands | jax.Array, ...],
    ins: PyTree[str],
    outs: PyTree[str],
) -> Results:
    """Return function(problem, *arguments); `ins` and `outs` have layouts in the arrays' places."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return function(problem, *arguments)
    arrays, structure = jax.tree.flatten(arguments)
    layouts = tuple(jax.tree.leaves(ins)), tuple(jax.tree.leaves(outs))
    found = _flat(function, problem, structure, *layouts)(*arrays)
    results: Results = jax.tree.unflatten(jax.tree.structure(outs), found)
    return results


@functools.lru_cache(maxsize=256)
def _flat(
    function: Callable[..., PyTree],
    problem: Problem,
    structure: PyTreeDef,
    ins: tuple[str, ...],
    outs: tuple[str, ...],
) -> Flat:
    """Return the partitioned function of the flat arrays that `structure` is made of."""

    def flat(*arrays: AnyArray) -> list[jax.Array]:
        return jax.tree.leaves(function(problem, *jax.tree.unflatten(structure, arrays)))

    return _partitioned(flat, ins, outs)


def _partitioned(function: Flat, ins: tuple[str, ...], outs: tuple[str, ...]) -> Flat:
    """Return the function as XLA may partition it, and `vmap` add axes to it."""
    # Only inside another jit may the function have constants, such as lists of blocks.
    partitioned = custom_partitioning(jax.jit(function))
    partitioned.def_partition(
        functools.partial(_partition, function, ins, outs),
        sharding_rule=functools.partial(_sharding_rule, ins, outs),
    )
    mappable = jax.custom_batching.custom_vmap(lambda *arrays: partitioned(*arrays))

    @mappable.def_vmap
    def mapped(
        size: int, batched: list[bool], *arrays: AnyArray
    ) -> tuple[list[jax.Array], list[bool]]:
        new = next(letter for letter in MAPPED if not any(letter in layout for layout in ins))
        axes = tuple(0 if flag else None for flag in batched)
        flags = zip(ins, batched, strict=True)
        call = _partitioned(
            jax.vmap(function, in_axes=axes),
            tuple(new + layout if flag else layout for layout, flag in flags),
            tuple(new + layout for layout in outs),
        )
        return call(*arrays), [True] * len(outs)

    return mappable


# --- Sharding rules ----------------------------------------------------------------------------


def _sharding_rule(
    ins: tuple[str, ...], outs: tuple[str, ...], mesh: Mesh, in_types: Shaped, out_types: Shaped
) -> SdyShardingRule:
    """Return which axes of the arrays belong together, so that Shardy propagates shardings."""
    sizes = _sizes(ins, in_types)
    group = sizes[HEADS] // sizes[KV_HEADS]
    # Query heads are key heads times the group; Shardy has no factors of size 1.
    heads: str | CompoundFactor = HEADS if sizes[KV_HEADS] == 1 else CompoundFactor("k", "h")
    if group == 1:
        heads = KV_HEADS
    whole: list[str] = []

    def factor(letter: str) -> str | CompoundFactor:
        if letter == WHOLE:
            whole.append(f"whole{len(whole)}")
            return whole[-1]
        return heads if letter == HEADS else letter

    def mappings(layouts: tuple[str, ...]) -> tuple[ArrayMapping, ...]:
        return tuple(ArrayMapping(*map(factor, layout)) for layout in layouts)

    arguments = mappings(ins), mappings(outs)
    rule = functools.partial(SdyShardingRule, *arguments, need_replication_factors=tuple(whole))
    return rule(h=group) if isinstance(heads, CompoundFactor) else rule()


def _partition(
    function: Flat,
    ins: tuple[str, ...],
    outs: tuple[str, ...],
    mesh: Mesh,
    arguments: Shaped,
    results: Shaped,
) -> tuple[Mesh, Flat, list[NamedSharding], tuple[NamedSharding, ...]]:
    """Return what one device computes, and the shardings of its results and arguments."""
    axes = _mesh_axes(ins, mesh, arguments)
    every = {axis for letter in axes for axis in axes[letter]}

    def sharding(layout: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axes.get(letter) or None for letter in layout)))

    def local(*arrays: AnyArray) -> list[jax.Array]:
        # A result without an axis for batch entries, or for the heads of a group, is their sum.
        missing = (
            tuple(every - {axis for letter in layout for axis in axes.get(letter, ())})
            for layout in outs
        )
        pairs = zip(function(*arrays), missing, strict=True)
        return [jax.lax.psum(x, names) if names else x for x, names in pairs]

    return mesh, local, [*map(sharding, outs)], tuple(map(sharding, ins))


def _mesh_axes(ins: tuple[str, ...], mesh: Mesh, arguments: Shaped) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes that each letter is split over, by the first array that is split."""
    sizes = _sizes(ins, arguments)
    axes: dict[str, tuple[str, ...]] = {}
    for letter, names in _split_axes(ins, arguments):
        used = {name for other in axes.values() for name in other}
        pieces = math.prod(mesh.shape[name] for name in names)
        if letter not in axes and not used & set(names) and sizes[letter] % pieces == 0:
            axes[letter] = names
    # Query heads go where their key head goes. A single key head may be on every device.
    names = axes.pop(HEADS, ()) or axes.pop(KV_HEADS, ())
    axes.pop(KV_HEADS, None)
    pieces = math.prod(mesh.shape[name] for name in names)
    if sizes[KV_HEADS] % pieces == 0:
        return axes | {HEADS: names, KV_HEADS: names}
    return axes | ({HEADS: names} if sizes[KV_HEADS] == 1 else {})


def _split_axes(layouts: tuple[str, ...], arrays: Shaped) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the letters that arrays are split over, and the mesh axes of each."""
    for layout, array in zip(layouts, arrays, strict=True):
        for letter, names in zip(layout, array.sharding.spec, strict=True):
            if letter != WHOLE and names:
                yield letter, (names,) if isinstance(names, str) else tuple(names)


def _sizes(layouts: tuple[str, ...], arrays: Shaped) -> dict[str, int]:
    """Return the size of the axis of each letter."""
    return {
        letter: size
        for layout, array in zip(layouts, arrays, strict=True)
        for letter, size in zip(layout, array.shape, strict=True)
    }
