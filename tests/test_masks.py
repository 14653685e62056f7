"""A mask is its definition, and what it says of a block is true of every entry in it."""

import functools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from jaxdecoder.config import ModelConfig
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import masks
from jaxdecoder.kernels.masks import EMPTY, FULL, PARTIAL
from jaxdecoder.layers.masked import MASKED

IDS = np.array([7] * 5 + [3] * 9 + [8] * 3 + [3] * 2 + [0] * 60)


def near_or_even(q, k):
    return (jnp.abs(q - k) < 3) | (k % 2 == 0)


def product_is_small(q, k):
    return q * k < 40


DEFINITIONS = [
    (masks.everything(), lambda q, k: True),
    (masks.nothing(), lambda q, k: False),
    (masks.causal(), lambda q, k: k <= q),
    (masks.diagonal(), lambda q, k: k == q),
    (masks.future(), lambda q, k: k >= q),
    (masks.sliding_window(5), lambda q, k: q - k < 5),
    (masks.causal() & masks.sliding_window(1), lambda q, k: k == q),
    (masks.sliding_window(99), lambda q, k: True),
    (masks.causal() & masks.sliding_window(5), lambda q, k: k in range(q - 4, q + 1)),
    (masks.first(3), lambda q, k: k in (0, 1, 2)),
    (masks.first(99), lambda q, k: True),
    (masks.prefix(6), lambda q, k: max(q, k) < 6),
    (masks.causal() | masks.prefix(6), lambda q, k: k <= q or (k < 6 and q < 6)),
    (masks.strided(1), lambda q, k: True),
    (masks.strided(4), lambda q, k: (q - k) % 4 == 0),
    (masks.strided(5), lambda q, k: (q - k) % 5 == 0),
    (masks.dilated(3, 4), lambda q, k: q - k in (8, 4, 0) or (q < k and (k - q) % 4 == 0)),
    (masks.causal() & masks.dilated(3, 5), lambda q, k: q - k in (0, 5, 10)),
    (masks.fixed_blocks(8, 2), lambda q, k: q // 8 == k // 8 or k % 8 in (6, 7)),
    (masks.fixed_blocks(6, 1), lambda q, k: q // 6 == k // 6 or k % 6 == 5),
    (masks.fixed_blocks(6, 0), lambda q, k: q // 6 == k // 6),
    (masks.fixed_blocks(6, 6), lambda q, k: True),
    (masks.summaries(4, 2, 9), lambda q, k: k >= 9 and (k - 9) // 2 < q // 4),
    (masks.summaries(3, 1, 12), lambda q, k: k >= 12 and k - 12 < q // 3),
    (masks.documents(IDS), lambda q, k: IDS[q] == IDS[k]),
    (masks.from_function(near_or_even), lambda q, k: abs(q - k) < 3 or k % 2 == 0),
    (~masks.first(3), lambda q, k: k >= 3),
    (~masks.nothing(), lambda q, k: True),
    (
        ~(masks.causal() & masks.first(4)) | masks.diagonal(),
        lambda q, k: k > q or k >= 4 or k == q,
    ),
    (
        masks.causal() & (masks.sliding_window(4) | masks.first(2)),
        lambda q, k: k <= q and (q - k < 4 or k < 2),
    ),
]


def dense(mask, q_length, k_length, q_offset=0):
    return np.asarray(mask(np.arange(q_length)[:, None] + q_offset, np.arange(k_length)[None]))


def rules(mask):
    """The rules and operators of an expression."""
    operands = [x for x in mask.arguments if isinstance(x, masks.Mask)]
    return {mask.rule}.union(*map(rules, operands))


def test_every_rule_and_operator_is_among_the_definitions():
    named = set().union(*(rules(mask) for mask, _ in DEFINITIONS))
    assert named == {*masks.RULES, *masks.OPERATORS, "~"}


@pytest.mark.parametrize("name", MASKED)
def test_the_mask_of_every_attention_is_the_definition_of_the_naive_decoder(name):
    for window, dilation, first, block in ((1, 1, 0, 1), (3, 2, 1, 4), (5, 3, 2, 2), (99, 1, 9, 9)):
        config = ModelConfig(
            vocab_size=9,
            attention=name,
            attention_window=window,
            attention_dilation=dilation,
            attention_globals=first,
            attention_block=block,
        ).resolve()
        expected = [
            [k <= q and naive.VISIBLE[name](config, q, k) for k in range(19)] for q in range(19)
        ]
        assert dense(MASKED[name].mask(config), 19, 19).tolist() == expected


@pytest.mark.parametrize(
    ("mask", "definition"), DEFINITIONS, ids=[str(mask) for mask, _ in DEFINITIONS]
)
class TestEveryMask:
    def test_is_its_definition(self, mask, definition):
        expected = [[bool(definition(q, k)) for k in range(23)] for q in range(19)]
        assert dense(mask, 19, 23).tolist() == expected
        assert bool(mask(3, 11)) is expected[3][11]

    def test_counts_its_allowed_entries(self, mask, definition):
        assert masks.allowed_entries(mask, 19, 23, 5) == dense(mask, 19, 23, 5).sum()


def test_all_agree_on_jax_under_jit_and_inside_a_kernel():
    """In one program for all of them, as each would take a second."""
    positional = [mask for mask, _ in DEFINITIONS if masks.is_positional(mask)]

    def kernel(*outs):
        q, k = (jax.lax.broadcasted_iota(jnp.int32, (16, 16), axis) for axis in (0, 1))
        for mask, out in zip(positional, outs, strict=True):
            out[...] = mask(q, k).astype(jnp.int32)

    @jax.jit
    def evaluated(q, k):
        shapes = [jax.ShapeDtypeStruct((16, 16), jnp.int32)] * len(positional)
        inside = pl.pallas_call(kernel, out_shape=shapes, interpret=True)()
        return [mask(q, k) for mask, _ in DEFINITIONS], inside

    under_jit, inside = evaluated(np.arange(4, 13)[:, None], np.arange(17)[None])
    for (mask, _), found in zip(DEFINITIONS, under_jit, strict=True):
        assert found.dtype == bool
        np.testing.assert_array_equal(found, dense(mask, 9, 17, 4), err_msg=str(mask))
    for mask, found in zip(positional, inside, strict=True):
        np.testing.assert_array_equal(found, dense(mask, 16, 16), err_msg=str(mask))
    q, k = jnp.arange(4, 13)[:, None], jnp.arange(17)[None]
    np.testing.assert_array_equal(DEFINITIONS[-1][0](q, k), dense(DEFINITIONS[-1][0], 9, 17, 4))


small = st.integers(1, 9)
leaves = st.one_of(
    st.sampled_from([masks.everything(), masks.nothing(), masks.causal(), masks.diagonal()]),
    st.sampled_from([masks.from_function(near_or_even), masks.from_function(product_is_small)]),
    st.sampled_from([masks.future(), masks.documents(IDS), masks.documents(np.arange(79) // 7)]),
    *(st.builds(make, small) for make in (masks.sliding_window, masks.first, masks.strided)),
    st.builds(masks.prefix, small),
    st.builds(masks.dilated, small, small),
    st.builds(masks.summaries, small, small, small),
    small.flatmap(lambda n: st.builds(masks.fixed_blocks, st.just(n), st.integers(0, n))),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a: ~a, inner),
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
    ),
    max_leaves=6,
)


def block_truth(allowed, block_q, block_k):
    q_starts, k_starts = range(0, len(allowed), block_q), range(0, allowed.shape[1], block_k)
    blocks = [[allowed[i : i + block_q, j : j + block_k] for j in k_starts] for i in q_starts]
    return np.array(
        [[FULL if b.all() else PARTIAL if b.any() else EMPTY for b in row] for row in blocks]
    )


@settings(max_examples=150, deadline=None)
@given(expressions, st.integers(1, 40), st.integers(1, 40), small, small, st.integers(0, 30))
def test_blocks_never_say_what_is_not_so(mask, q_length, k_length, block_q, block_k, q_offset):
    truth = block_truth(dense(mask, q_length, k_length, q_offset), block_q, block_k)
    size = (q_length, k_length, block_q, block_k, q_offset)
    states = masks.block_map(mask, *size)
    assert states.shape == truth.shape
    assert ((states == PARTIAL) | (states == truth)).all()
    np.testing.assert_array_equal(masks.block_map(mask, *size, exact=True), truth)


@settings(max_examples=50, deadline=None)
@given(expressions, expressions, expressions)
def test_operators_form_a_boolean_algebra(a, b, c):
    def same(x, y):
        np.testing.assert_array_equal(dense(x, 13, 17), dense(y, 13, 17))

    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(a & (b | c), (a & b) | (a & c))
    same(a | (a & b), a)
    same(~~a, a)
    same(a & ~a, masks.nothing())
    same(a | ~a, masks.everything())


@settings(max_examples=50, deadline=None)
@given(expressions)
def test_an_expression_reads_as_it_was_built(mask):
    if "documents" in str(mask):  # shown in short
        return
    names = {"near_or_even": near_or_even, "product_is_small": product_is_small}
    assert eval(str(mask), {**vars(masks), **names}) == mask


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & masks.sliding_window(7),
        masks.causal() & masks.first(64) & masks.strided(9) & masks.sliding_window(20),
        masks.causal() & (masks.sliding_window(6) | masks.first(3)),
        masks.causal() & (masks.sliding_window(6) | masks.strided(6)),
        masks.causal() & masks.strided(9) & masks.sliding_window(20),
        masks.causal() & masks.dilated(4, 3),
        masks.causal() & masks.fixed_blocks(8, 2),
        masks.fixed_blocks(6, 2),
        (masks.causal() & masks.fixed_blocks(6, 0)) | masks.summaries(6, 2, 42),
        masks.causal() & masks.documents(IDS[:64]),
        masks.causal() | masks.prefix(13),
        masks.causal() & masks.from_function(near_or_even),
    ],
    ids=str,
)
@pytest.mark.parametrize("block", [(4, 4), (8, 4), (5, 7)])
def test_the_usual_masks_waste_no_block(mask, block):
    states = masks.block_map(mask, 64, 64, *block)
    truth = block_truth(dense(mask, 64, 64), *block)
    np.testing.assert_array_equal(states == EMPTY, truth == EMPTY)


def test_single_blocks_of_any_shape():
    mask = masks.causal()
    assert mask.block(0, 8, 8, 16) == EMPTY
    assert mask.block(8, 16, 0, 9) == FULL
    assert mask.block(8, 16, 0, 10) == PARTIAL
    assert mask.block(0, 8, 8, 16).shape == ()
    wrapped = masks.from_function(lambda q, k: k <= q)
    assert wrapped.block(0, 8, [0, 8], [8, 16]).tolist() == [PARTIAL, EMPTY]
    assert wrapped.block(1500, 3000, 0, 1501) == FULL  # larger than a tile


@pytest.fixture
def entries(monkeypatch):
    """Counts the (query, key) pairs that masks are asked about, and the most at a time."""
    seen = {"total": 0, "largest": 0}
    call = masks.Mask.__call__

    def spy(self, q, k):
        size = np.broadcast(q, k).size
        seen["total"] += size
        seen["largest"] = max(seen["largest"], size)
        return call(self, q, k)

    monkeypatch.setattr(masks.Mask, "__call__", spy)
    return seen


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal() & (masks.sliding_window(1000) | masks.first(5)),
        masks.causal() & (masks.sliding_window(362) | masks.strided(362)),
        masks.causal() & masks.fixed_blocks(128, 8),
        masks.causal() & (masks.fixed_blocks(128, 0) | masks.summaries(128, 4, 2**16)),
        masks.causal() & masks.documents(np.arange(2**17) // 1000),
        masks.causal() | masks.prefix(300),
    ],
    ids=str,
)
def test_a_map_of_128k_positions_looks_at_positions_not_at_pairs(mask, entries):
    masks.block_map.cache_clear()
    states = masks.block_map(mask, 2**17, 2**17, 128, 128)
    assert states.shape == (1024, 1024)
    assert entries["total"] < 8 * 2**17


def test_a_function_is_evaluated_only_where_the_rest_leaves_it_open(entries):
    masks.block_map.cache_clear()
    mask = masks.from_function(near_or_even) & masks.causal() & masks.sliding_window(64)
    masks.block_map(mask, 2**14, 2**14, 64, 64)
    assert entries["total"] < 2**14 * 64 * 3
    assert entries["largest"] <= masks.CHUNK_ENTRIES


def test_a_function_is_never_asked_about_positions_that_do_not_exist():
    asked = []

    def function(q, k):
        if isinstance(q, np.ndarray):
            asked.append((q.max(), k.max()))
        return q >= k

    mask = masks.from_function(function)
    asked.clear()
    masks.block_map(mask, 19, 23, 8, 8, 100)
    assert np.max(asked, axis=0).tolist() == [118, 22]


def test_counting_the_entries_of_a_long_window_looks_at_few(entries):
    masks.allowed_entries.cache_clear()
    mask = masks.causal() & (masks.sliding_window(64) | masks.first(1))
    assert masks.allowed_entries(mask, 2**15, 2**15) == sum(
        min(q + 1, 64) + (q >= 64) for q in range(2**15)
    )
    assert entries["total"] < 2**15 * 128 * 5
    assert entries["largest"] <= masks.CHUNK_ENTRIES
    causal = masks.allowed_entries(masks.causal(), 2**17, 2**17)
    assert causal == 2**17 * (2**17 + 1) // 2


def test_a_wrapped_function_can_be_mapped_while_tracing():
    mask = masks.from_function(lambda q, k: jnp.abs(q - k) < 2)

    @jax.jit
    def traced(x):
        return x + masks.block_map(mask, 8, 8, 4, 4).sum()

    assert traced(0) == 4 * PARTIAL


def test_maps_are_cached_and_read_only():
    mask = masks.causal()
    states = masks.block_map(mask, 32, 32, 8, 8)
    assert masks.block_map(masks.causal(), 32, 32, 8, 8) is states
    with pytest.raises(ValueError, match="read-only"):
        states[0, 0] = FULL


@settings(max_examples=50, deadline=None)
@given(expressions, st.integers(1, 40), st.integers(1, 40), small, small)
def test_lists_hold_every_block_that_is_not_empty(mask, q_length, k_length, block_q, block_k):
    states = masks.block_map(mask, q_length, k_length, block_q, block_k)
    for view in (states, states.T):
        lists = masks.block_lists(view)
        assert {array.dtype for array in lists} == {np.dtype(np.int32)}
        assert lists.indices.shape == (len(view), max(1, lists.counts.max()))
        for row, count, full, indices in zip(view, *lists, strict=True):
            assert indices[:full].tolist() == np.flatnonzero(row == FULL).tolist()
            assert indices[full:count].tolist() == np.flatnonzero(row == PARTIAL).tolist()
            assert set(indices[count:]) <= {indices[max(count, 1) - 1]}


def test_masks_are_values():
    def build(n):
        return masks.causal() & (masks.sliding_window(n) | ~masks.first(4))

    assert build(128) == build(np.int64(128))
    assert hash(build(128)) == hash(build(128))
    assert build(128) != build(64)
    assert masks.from_function(near_or_even) == masks.from_function(near_or_even)
    assert masks.from_function(near_or_even) != masks.from_function(lambda q, k: q > k)
    assert masks.documents([5, 5, 2]) == masks.documents(np.array([0, 0, 9]))
    assert masks.documents([5, 5, 2]) != masks.documents([5, 2, 2])
    assert str(build(8)) == "causal() & (sliding_window(8) | ~first(4))"
    assert str(masks.documents([5, 5, 2])) == "documents([0, 0, 1])"


def test_equal_masks_compile_once():
    traces = []

    @functools.partial(jax.jit, static_argnames="mask")
    def attend(x, mask):
        traces.append(mask)
        return jnp.where(mask(jnp.arange(4)[:, None], jnp.arange(4)), x, 0)

    attend(jnp.ones(()), mask=masks.causal() & masks.first(2))
    attend(jnp.ones(()), mask=masks.causal() & masks.first(2))
    assert len(traces) == 1


def test_documents_can_be_taken_out_for_a_kernel():
    window = masks.sliding_window(5)
    rest, ids = masks.split_documents(masks.causal() & masks.documents([4, 4, 9, 9]) & window)
    assert rest == masks.causal() & window
    assert ids.tolist() == [0, 0, 1, 1]
    twice = masks.documents([1, 1, 2, 2]) & masks.documents([1, 2, 2, 2])
    rest, ids = masks.split_documents(twice)
    np.testing.assert_array_equal(ids[:, None] == ids, dense(twice, 4, 4))
    assert rest == masks.everything()
    assert masks.split_documents(window) == (window, None)
    assert not masks.is_positional(~twice)
    assert masks.is_positional(window)


def impure():
    calls = []

    def function(q, k):
        calls.append(1)
        return q - k < len(calls)

    return function


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.sliding_window(0), "sliding_window: n must be at least 1, not 0"),
        (lambda: masks.first(-2), "first: n must be at least 1"),
        (lambda: masks.first(True), "whole number"),
        (lambda: masks.strided(np.array([4])), "strided: n must be a whole number"),
        (lambda: masks.dilated(4, 0), "dilated: dilation must be at least 1"),
        (lambda: masks.fixed_blocks(4, 5), "summary must lie between 0 and block = 4"),
        (lambda: masks.documents([[1, 2]]), "one row of integers"),
        (lambda: masks.documents([0.5]), "one row of integers"),
        (lambda: masks.documents([0, 1]).block(0, 4, 0, 4), "ids for 2 positions"),
        (
            lambda: masks.split_documents(masks.documents([0]) & masks.documents([0, 1])),
            "different lengths: 1, 2",
        ),
        (lambda: masks.block_map(masks.causal(), 8, 8, 0, 4), "block_q must be at least 1"),
        (lambda: masks.from_function(lambda q, k: q if q > k else k), "raised"),
        (lambda: masks.from_function(lambda q, k: q - k), "returned int32, not bool"),
        (lambda: masks.from_function(lambda q, k: (q > k).ravel()), "shape"),
        (lambda: masks.from_function(lambda q: q > 0), "raised TypeError"),
        (lambda: masks.from_function(impure()), "two calls"),
        (lambda: masks.from_function(lambda q, k: q - q[0] >= k), "other positions"),
    ],
)
def test_a_mistake_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_length_known_only_while_tracing_is_named():
    with pytest.raises(UserError, match="known before tracing"):
        jax.jit(lambda n: masks.sliding_window(n)(3, 2))(4)


def test_and_or_not_are_refused():
    with pytest.raises(TypeError, match="combine masks with &"):
        masks.causal() and masks.first(3)
    with pytest.raises(TypeError):
        masks.causal() & 3
