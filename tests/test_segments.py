"""Blocks without a common segment are left out, and no others, when ids are packed in order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecoder.kernels import masks
from jaxdecoder.kernels.segments import narrowed

TIME, BLOCKS = 100, (16, 8)


def cut(ids, block):
    return [ids[i : i + block] for i in range(0, len(ids), block)]


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_left_out_is_what_shares_no_segment(in_order, together):
    random = np.random.default_rng(3)
    ids = random.integers(0, 9, (3, TIME)).astype(np.int32)
    ids = np.sort(ids, axis=1) if in_order else ids
    states = np.array(masks.block_map(masks.causal(), TIME, TIME, *BLOCKS))
    states[states == masks.FULL] = masks.PARTIAL
    arrays = jnp.asarray(ids), BLOCKS[0], jnp.asarray(ids), BLOCKS[1]
    lists = jax.jit(lambda: narrowed(masks.block_lists(states), *arrays, together=together))()
    shared = np.array(
        [
            [[bool(np.intersect1d(a, b).size) for b in cut(row, 8)] for a in cut(row, 16)]
            for row in ids
        ]
    )
    shared &= states != masks.EMPTY
    for entry in [...] if together else range(3):
        wanted = shared.any(axis=0) if together else shared[entry]
        counts, indices = (np.asarray(x[entry]) for x in (lists.counts, lists.indices))
        found = [set(columns[:count]) for columns, count in zip(indices, counts, strict=True)]
        needed = [set(np.flatnonzero(columns)) for columns in wanted]
        if in_order:
            assert found == needed
            assert counts.sum() < np.count_nonzero(states)
        else:
            assert all(a >= b for a, b in zip(found, needed, strict=True))
    assert not np.any(lists.full_counts)
