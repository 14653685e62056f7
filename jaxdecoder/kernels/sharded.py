"""Attention over a mesh: each device computes its own batch entries, heads and queries.

Heads are split with their key heads. Queries of a part of the sequence need the keys before them:
keys and values are gathered along the sequence, and each part's place in it is known before the
run, so that every part is a program of its own, which skips the blocks that its mask empties.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath

from jaxdecoder.kernels import mesh
from jaxdecoder.kernels.problem import Operands, Problem, alike, field, numbered
from jaxdecoder.kernels.typing import AnyArray

NAMES: dict[str, tuple[str | None, ...]] = {
    "q": ("batch", "tokens", "heads", None),
    "k": ("batch", None, "heads", None),
    "v": ("batch", None, "heads", None),
    "score": ("heads", None),
    "q_segments": ("batch", "tokens"),
    "k_segments": ("batch", None),
    "dropout": (None,),
    "batch_index": ("batch",),
    "head_index": ("heads",),
}
"""The axes of the operands."""

Solve = Callable[[Problem, Operands], jax.Array]


def over_mesh(solve: Solve, problem: Problem, operands: Operands) -> jax.Array:
    """Return solve(problem, operands), each device of the current mesh its own part.

    The result is that of one device up to rounding: scores and dropout count entries, heads and
    positions from the first of all.
    """
    found = mesh.current()
    if found is None:
        return solve(problem, operands)
    shape = found.shape
    operands = numbered(problem, _with_heads_for(operands, shape.get("tensor", 1)))
    arrays, structure = jax.tree.flatten(operands)

    def spec(path: KeyPath, x: AnyArray) -> PartitionSpec:
        return mesh.spec(NAMES[field(path)][: x.ndim], x.shape, shape)

    specs = tuple(jax.tree.leaves(jax.tree_util.tree_map_with_path(spec, operands)))
    q_time = operands.q.shape[1]
    split = mesh.spec(("tokens",), (q_time,), shape) != PartitionSpec(None)
    parts = shape["context"] if split else 1

    def local(*arrays: AnyArray) -> jax.Array:
        # Outside of the branches, since their gradients are summed over devices in other branches.
        own = alike(jax.tree.unflatten(structure, arrays))
        starts = range(0, q_time, q_time // parts)
        solves = [partial(solve, dataclasses.replace(problem, q_start=start)) for start in starts]
        if parts == 1:
            return solves[0](own)
        chosen: jax.Array = jax.lax.switch(jax.lax.axis_index("context"), solves, own)
        return chosen

    run = jax.shard_map(local, in_specs=specs, out_specs=specs[0])
    out: jax.Array = run(*arrays)
    return out


def _with_heads_for(operands: Operands, devices: int) -> Operands:
    """Repeat key heads until they divide over the devices, if the query heads do."""
    heads, kv_heads = operands.q.shape[2], operands.k.shape[2]
    times = math.lcm(kv_heads, devices) // kv_heads
    if heads % devices or times == 1:
        return operands
    k, v = (jnp.repeat(x, times, axis=2) for x in (operands.k, operands.v))
    return operands._replace(k=k, v=v)
