"""The backward kernels that own keys, and stream the queries of all heads that share them.

They compute the gradients of keys and values: the other pass of FlashAttention-2's two (arXiv
2307.08691), beside `queries.py`. One of them computes the gradient of the queries as well.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecoder.kernels.hopper import memory
from jaxdecoder.kernels.hopper.launch import TOTALS, Block, Kernel, Launch
from jaxdecoder.kernels.hopper.memory import Product, Ring, Span, floats_along, spread
from jaxdecoder.kernels.hopper.tiles import ROWS, Head, Tile
from jaxdecoder.kernels.hopper.walk import Step, walk, walk_with
from jaxdecoder.kernels.typing import Ref
from jaxdecoder.typing import Index


class _Memory(NamedTuple):
    """Shared memory; of `keys` and of what is no ring, each compute warpgroup has its own."""

    keys: Ring
    queries: Ring
    douts: Ring
    stage: Ref | None
    joint: _Joint | None
    """For the kernel that computes all gradients."""


class _Joint(NamedTuple):
    """Shared memory in which compute warpgroups sum the gradient of the queries over their keys.

    Each computes its share of the width, once the gradients of scores of all of them are there.
    """

    ds: Ref
    """(consumers, ROWS, columns)"""
    dq: Ref
    """float32 (consumers, columns, width / consumers)"""
    written: Ref
    read: Ref

    def show(self, n: Index, warpgroup: Index, ds: jax.Array) -> Ref:
        """Write a warpgroup's `ds` to shared memory, and wait until all warpgroups have."""
        pl.when(n > 0)(lambda: plgpu.barrier_wait(self.read))
        mine = self.ds.at[warpgroup]
        mine[...] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.written)
        plgpu.barrier_wait(self.written)
        return mine


def _memory(wanted: str, launch: Launch) -> _Memory:
    columns, depth = launch.sizes.columns, launch.sizes.depth
    return _Memory(
        keys=launch.own(k=launch.owned(), v=launch.owned(), segments=launch.owned_segments()),
        queries=launch.ring(
            q=launch.streamed(),
            numbers=memory.vector(depth, 2 + launch.segmented, columns, dtype=jnp.int32),
        ),
        douts=launch.ring(dout=launch.streamed()),
        stage=launch.stage(),
        joint=_joint(launch) if "q" in wanted else None,
    )


def _joint(launch: Launch) -> _Joint:
    n, columns = launch.consumers, launch.sizes.columns
    return _Joint(
        ds=memory.matrix(n, ROWS, columns, dtype=launch.dtype),
        dq=memory.matrix(n, columns, launch.width // n, dtype=jnp.float32),
        written=plgpu.Barrier(num_arrivals=n),
        read=plgpu.Barrier(num_arrivals=n),
    )


def _load(block: Block) -> None:
    at, launch, arrays, shared = block.here(), block.launch, block.arrays, block.memory
    operands = arrays.operands
    for warpgroup in range(launch.consumers):
        keys = launch.rows(at, warpgroup)
        shared.keys.fill(
            warpgroup,
            k=operands.k.at[at.batch, keys, at.head],
            v=operands.v.at[at.batch, keys, at.head],
            segments=launch.segments(operands.k_segments, at.batch, keys),
        )

    def fill(check: bool, step: Step, _: None) -> None:
        head = at.head * launch.group + step.member
        queries = at.column(step, launch.q_block)
        shared.queries.fill(
            step.number,
            q=operands.q.at[at.batch, queries, head],
            numbers=arrays.of_queries.at[at.batch, head, :, queries],
        )
        shared.douts.fill(step.number, dout=arrays.dout.at[at.batch, queries, head])

    walk(at, launch.group, fill, None)
    steps = at.n_columns() * launch.group
    shared.queries.drain(steps)
    shared.douts.drain(steps)


def _compute(wanted: str, block: Block, warpgroup: jax.Array, results: list[Ref]) -> None:
    at, launch, arrays = block.here(), block.launch, block.arrays
    shared: _Memory = block.memory
    joint = shared.joint
    shape = ROWS, launch.q_block
    keys = launch.rows(at, warpgroup)
    for i in range(launch.consumers) if joint is not None else (warpgroup,):
        shared.keys.take(i)
    owned = shared.keys.held(warpgroup)
    stage = memory.part(shared.stage, warpgroup)
    drops = launch.problem.dropout

    def head_of(member: Index) -> Head:
        return launch.head(arrays, at.batch, at.head * launch.group + member)

    only_head = head_of(0) if launch.group == 1 else None

    def factors(n: Index) -> Product:
        return Product(owned["k"], memory.transposed(shared.queries.take(n)["q"]))

    def multiply(n: Index) -> list[jax.Array]:
        return memory.multiply(factors(n), stage=stage)

    def share() -> Span:
        """Return this warpgroup's share of the width."""
        width = launch.width // launch.consumers
        return pl.ds(warpgroup * width, width)

    def of_queries(joint: _Joint) -> Product:
        """Return the factors of this warpgroup's share of the gradient of a step's queries."""
        pairs = [
            (memory.transposed(joint.ds.at[i]), shared.keys.held(i)["k"].at[:, share()])
            for i in range(launch.consumers)
        ]
        return Product(*pairs[0], more=tuple(pairs[1:]))

    def add_to_queries(joint: _Joint, step: Step, dq: jax.Array) -> None:
        part = joint.dq.at[warpgroup]
        plgpu.barrier_arrive(joint.read)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part[...] = dq * launch.problem.scale
        plgpu.commit_smem()
        queries = at.column(step, launch.q_block)
        head = at.head * launch.group + step.member
        launch.add(part, results[-1].at[at.batch, queries, head, share()])

    def visit(
        check: bool, step: Step, sums: dict[str, jax.Array], products: list[jax.Array], more: bool
    ) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        n, sums = step.number, dict(sums)
        [of_scores] = products
        head = head_of(step.member) if only_head is None else only_head
        q_start = at.start(step, launch.q_block) if check or head.needs_index else jnp.int32(0)
        queries = shared.queries.held(n)
        numbers = queries["numbers"]
        segments = launch.segments_of(numbers), owned.get("segments")
        tile = Tile(head, q_start, keys.start, shape, 1, *segments)
        s, factor, pull = tile.scores(check, of_scores, learned=False)
        weights = jnp.exp2(s * factor - spread(floats_along(1, numbers.at[0]), 1, shape))
        dropped = tile.dropout()
        rounded = weights.astype(launch.dtype)
        dout = shared.douts.take(n)["dout"]
        delta = numbers.at[1]
        of_weights, last = [], []
        if "k" in wanted:
            start = None if drops else spread(-floats_along(1, delta), 1, shape)
            of_weights = [Product(owned["v"], memory.transposed(dout), start)]
        elif more:
            last = [factors(n + 1)]
        if "v" in wanted:
            of_values = Product(dropped(weights).astype(launch.dtype), dout, sums["v"])
            sums["v"], *found = memory.multiply(of_values, *of_weights, *last, stage=stage)
        else:
            found = memory.multiply(*of_weights, stage=stage)
        shared.douts.release(n)
        if "k" in wanted:
            # In half precision they take half the registers while the products are under way.
            weights = lax.optimization_barrier(rounded).astype(jnp.float32)
            [dweights] = found
            if drops:
                dweights = dropped(dweights) - spread(floats_along(1, delta), 1, shape)
            ds, _ = pull(weights * dweights)
            factor_of_keys: jax.Array | Ref = ds.astype(launch.dtype)
            last = [factors(n + 1)] if more else []
            if joint is not None:
                # From here on `ds` is in shared memory, and needs no registers.
                factor_of_keys = joint.show(n, warpgroup, factor_of_keys)
                last.insert(0, of_queries(joint))
            of_keys = Product(factor_of_keys, queries["q"], sums["k"])
            sums["k"], *found = memory.multiply(of_keys, *last, stage=stage)
            if joint is not None:
                dq, *found = found
                add_to_queries(joint, step, dq)
        shared.queries.release(n)
        return sums, found

    owns = wanted.replace("q", "")
    sums = {name: memory.zeros(ROWS, launch.width) for name in owns}
    sums = walk_with(at, launch.group, multiply, visit, sums, ahead=launch.sizes.rotated)

    if joint is not None:
        # No keys are overwritten while another warpgroup still multiplies with them.
        pl.when(at.n_columns() * launch.group > 0)(lambda: plgpu.barrier_wait(joint.read))

    # The gradients take the place of the keys and values in shared memory.
    at = block.here()
    keys = launch.rows(at, warpgroup)
    scales = {"k": launch.problem.scale, "v": 1.0}
    for name in owns:
        owned[name][...] = (sums[name] * scales[name]).astype(launch.dtype)
    plgpu.commit_smem()
    for name, out in zip(owns, results, strict=False):
        plgpu.copy_smem_to_gmem(owned[name], out.at[at.batch, keys, at.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


# By the gradients that they compute: for wide heads not both fit into the registers.
KEYS = {
    wanted: Kernel(
        f"attention_{name}_gradient",
        functools.partial(_memory, wanted),
        _load,
        functools.partial(_compute, wanted),
        rows_are_keys=True,
    )
    for wanted, name in {
        "kv": "keys_and_values",
        "k": "keys",
        "v": "values",
        **({"qkv": "whole"} if TOTALS else {}),
    }.items()
}
