"""Kernels over many devices: under `jit`, each device computes its own batch entries and heads.

XLA cannot look into a kernel. Left alone it would gather every array on every device; told that a
kernel treats batch entries and heads apart, it leaves the arrays where they are. (Under
`shard_map` they are local to begin with.)
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from jaxdecoder.kernels.problem import Gradients, LogSumExp, Operands, Problem

# A layout has a letter for every axis of an array: batch entries, query heads, key heads, or an
# axis that is whole on every device. Any other letter is an axis that `vmap` has added.
BATCH, HEADS, KV_HEADS, WHOLE = "bhk."
MAPPED = sorted(set(string.ascii_letters) - {BATCH, HEADS, KV_HEADS})
OF_QUERIES, OF_KEYS, OF_ROWS = "b.h.", "b.k.", "bh."


def over_devices(
    forward: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Partitions the two functions of a `problem.Implementation` by batch entries and heads.

    The operands gain `batch_index` and `head_index` where the problem depends on them.
    """

    def only_learned(problem: Problem, *arguments: Any) -> Gradients:
        gradients = backward(problem, *arguments)
        pairs = zip(gradients.score, problem.learned, strict=True)
        return gradients._replace(score=tuple(x if learned else None for x, learned in pairs))

    def partitioned_forward(problem: Problem, operands: Operands) -> tuple[jax.Array, LogSumExp]:
        operands, layouts = _laid_out(problem, operands)
        return _call(forward, problem, (operands,), (layouts,), (OF_QUERIES, OF_ROWS))

    def partitioned_backward(
        problem: Problem, operands: Operands, out: jax.Array, logsumexp: jax.Array, dout: jax.Array
    ) -> Gradients:
        operands, layouts = _laid_out(problem, operands)
        pairs = zip(layouts.score, problem.learned, strict=True)
        score = tuple(layout if learned else None for layout, learned in pairs)
        return _call(
            only_learned,
            problem,
            (operands, out, logsumexp, dout),
            (layouts, OF_QUERIES, OF_ROWS, OF_QUERIES),
            Gradients(OF_QUERIES, OF_KEYS, OF_KEYS, score),
        )

    return partitioned_forward, partitioned_backward


def _laid_out(problem: Problem, operands: Operands) -> tuple[Operands, Operands]:
    """The operands, numbered if need be, and their layouts."""
    batch, _, heads, _ = operands.q.shape
    if problem.score is not None or problem.dropout:
        operands = operands._replace(
            batch_index=jnp.arange(batch, dtype=jnp.int32),
            head_index=jnp.arange(heads, dtype=jnp.int32),
        )

    def segments(x: Any) -> str:
        return BATCH + WHOLE if x.shape[0] == batch else WHOLE * 2

    layouts = Operands(
        OF_QUERIES,
        OF_KEYS,
        OF_KEYS,
        tuple(HEADS + WHOLE * (x.ndim - 1) for x in operands.score),
        segments,
        segments,
        WHOLE,
        BATCH,
        HEADS,
    )
    present = {
        name: layout(x) if callable(layout) else layout
        for name, x, layout in zip(Operands._fields, operands, layouts, strict=True)
        if x is not None
    }
    return operands, Operands(**present)


def _call(
    function: Callable[..., Any], problem: Problem, arguments: Any, ins: Any, outs: Any
) -> Any:
    """function(problem, *arguments), with layouts in the places of the arrays."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return function(problem, *arguments)
    arrays, structure = jax.tree.flatten(arguments)
    layouts = tuple(jax.tree.leaves(ins)), tuple(jax.tree.leaves(outs))
    results = _flat(function, problem, structure, *layouts)(*arrays)
    return jax.tree.unflatten(jax.tree.structure(outs), results)


@functools.lru_cache(maxsize=256)
def _flat(
    function: Callable[..., Any],
    problem: Problem,
    structure: Any,
    ins: tuple[str, ...],
    outs: tuple[str, ...],
) -> Callable[..., Any]:
    def flat(*arrays: Any) -> list[Any]:
        return jax.tree.leaves(function(problem, *jax.tree.unflatten(structure, arrays)))

    return _partitioned(flat, ins, outs)


def _partitioned(
    function: Callable[..., list[Any]], ins: tuple[str, ...], outs: tuple[str, ...]
) -> Callable[..., Any]:
    # Constants of its own, such as lists of blocks, are allowed inside another jit only.
    partitioned = custom_partitioning(jax.jit(function))
    partitioned.def_partition(
        functools.partial(_partition, function, ins, outs),
        sharding_rule=functools.partial(_sharding_rule, ins, outs),
    )
    mappable = jax.custom_batching.custom_vmap(lambda *arrays: partitioned(*arrays))

    @mappable.def_vmap
    def mapped(size: int, batched: list[bool], *arrays: Any) -> Any:
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


# --- What XLA is told --------------------------------------------------------------------------


def _sharding_rule(
    ins: tuple[str, ...], outs: tuple[str, ...], mesh: Any, in_types: Any, out_types: Any
) -> SdyShardingRule:
    """How the axes of the arrays belong together, for Shardy to spread the shardings by."""
    sizes = _sizes(ins, in_types)
    group = sizes[HEADS] // sizes[KV_HEADS]
    # Query heads are key heads times the group, where neither is 1: Shardy has no such factors.
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
    replicated = tuple(whole)
    if not isinstance(heads, CompoundFactor):
        return SdyShardingRule(*arguments, need_replication_factors=replicated)
    return SdyShardingRule(*arguments, need_replication_factors=replicated, h=group)


def _partition(
    function: Callable[..., list[Any]],
    ins: tuple[str, ...],
    outs: tuple[str, ...],
    mesh: Any,
    arguments: Any,
    results: Any,
) -> Any:
    """The computation of one device, and how its arguments and results are laid out."""
    axes = _mesh_axes(ins, mesh, arguments)
    every = {axis for letter in axes for axis in axes[letter]}

    def sharding(layout: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(axes.get(letter) or None for letter in layout)))

    def local(*arrays: Any) -> list[Any]:
        # What a result does not tell apart, it sums over: batch entries, or heads of one group.
        missing = (
            tuple(every - {axis for letter in layout for axis in axes.get(letter, ())})
            for layout in outs
        )
        pairs = zip(function(*arrays), missing, strict=True)
        return [jax.lax.psum(x, names) if names else x for x, names in pairs]

    return mesh, local, [*map(sharding, outs)], tuple(map(sharding, ins))


def _mesh_axes(ins: tuple[str, ...], mesh: Any, arguments: Any) -> dict[str, tuple[str, ...]]:
    """The mesh axes that each letter is split over: those of the first array to say so."""
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


def _split_axes(layouts: tuple[str, ...], arrays: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    for layout, array in zip(layouts, arrays, strict=True):
        for letter, names in zip(layout, array.sharding.spec, strict=True):
            if letter != WHOLE and names:
                yield letter, (names,) if isinstance(names, str) else tuple(names)


def _sizes(layouts: tuple[str, ...], arrays: Any) -> dict[str, int]:
    return {
        letter: size
        for layout, array in zip(layouts, arrays, strict=True)
        for letter, size in zip(layout, array.shape, strict=True)
    }
