"""A filter is its definition, written out for one row of probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxdecoder.errors import UserError
from jaxdecoder.sampling import filters

ROWS, VOCAB = 2, 7

# Halves, so that ties occur; a token that another filter has forbidden is -inf.
numbers = st.integers(-16, 16).map(lambda n: n / 2)
some_logits = arrays(np.float32, (ROWS, VOCAB), elements=numbers | st.just(-np.inf)).filter(
    lambda logits: np.isfinite(logits).any(axis=1).all()
)
some_counts = arrays(np.int32, (ROWS, VOCAB), elements=st.integers(0, 3))


def applied(chosen, logits, counts=None):
    counts = np.zeros((ROWS, VOCAB), np.int32) if counts is None else counts
    return np.asarray(chosen(jnp.asarray(logits), jnp.asarray(counts)))


def probabilities(row):
    weights = np.exp(np.float64(row) - np.float64(row).max())
    return weights / weights.sum()


def by_rank(row):
    """Tokens, the likeliest first; of equals the lower token."""
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def only(row, tokens):
    return [row[token] if token in tokens else -np.inf for token in range(len(row))]


class TestDefinitions:
    @given(some_logits, st.floats(0.1, 5.0))
    def test_temperature_divides(self, logits, value):
        np.testing.assert_allclose(
            applied(filters.temperature(value), logits), logits / np.float32(value), rtol=1e-6
        )

    @given(some_logits)
    def test_temperature_zero_is_greedy(self, logits):
        kept = applied(filters.temperature(0.0), logits)
        expected = [only(row, by_rank(row)[:1]) for row in logits]
        np.testing.assert_array_equal(kept, expected)

    @given(some_logits, st.integers(1, VOCAB + 2))
    def test_first_keeps_the_first(self, logits, n):
        expected = [only(row, range(n)) for row in logits]
        np.testing.assert_array_equal(applied(filters.first(n), logits), expected)

    @given(some_logits, st.integers(1, VOCAB + 2))
    def test_top_k_keeps_the_k_largest(self, logits, k):
        expected = [only(row, by_rank(row)[:k]) for row in logits]
        np.testing.assert_array_equal(applied(filters.top_k(k), logits), expected)

    @given(some_logits, st.floats(0.01, 1.0))
    def test_top_p_keeps_the_fewest_that_reach_p(self, logits, p):
        expected = []
        for row in logits:
            probability, tokens, mass = probabilities(row), [], 0.0
            for token in by_rank(row):
                if mass >= p:
                    break
                tokens.append(token)
                mass += probability[token]
                assume(abs(mass - p) > 1e-5)
            expected.append(only(row, tokens))
        np.testing.assert_array_equal(applied(filters.top_p(p), logits), expected)

    @given(some_logits, st.floats(0.01, 1.0))
    def test_min_p_keeps_what_is_near_the_likeliest(self, logits, p):
        expected = []
        for row in logits:
            probability = probabilities(row)
            relative = probability / probability.max()
            assume((abs(relative - p) > 1e-5).all() or p == 1.0)
            expected.append(only(row, np.flatnonzero(relative >= p)))
        np.testing.assert_array_equal(applied(filters.min_p(p), logits), expected)

    @given(some_logits, some_counts, st.floats(0.5, 3.0))
    def test_repetition_penalty_moves_what_is_already_there_down(self, logits, counts, factor):
        expected = [
            [
                (x / factor if x > 0 else x * factor) if count else x
                for x, count in zip(row, seen, strict=True)
            ]
            for row, seen in zip(logits, counts, strict=True)
        ]
        kept = applied(filters.repetition_penalty(factor), logits, counts)
        np.testing.assert_allclose(kept, expected, rtol=1e-6)


ANY = (
    st.floats(0.0, 3.0).map(filters.temperature)
    | st.integers(1, 9).map(filters.top_k)
    | st.floats(0.01, 1.0).map(filters.top_p)
    | st.floats(0.01, 1.0).map(filters.min_p)
    | st.floats(0.5, 3.0).map(filters.repetition_penalty)
)


class TestChains:
    @given(some_logits, some_counts, st.lists(ANY, max_size=4))
    def test_apply_their_filters_in_turn(self, logits, counts, parts):
        one_by_one = logits
        for part in parts:
            one_by_one = applied(part, one_by_one, counts)
        np.testing.assert_array_equal(applied(filters.chain(*parts), logits, counts), one_by_one)

    @given(some_logits, some_counts, st.lists(ANY, max_size=4))
    def test_leave_a_token_and_revive_none(self, logits, counts, parts):
        kept = applied(filters.chain(*parts), logits, counts)
        assert np.isfinite(kept).any(axis=1).all()
        assert not np.isnan(kept).any()
        assert not np.isfinite(kept[np.isneginf(logits)]).any()

    def test_depend_on_the_order(self):
        logits = np.array([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0]] * ROWS, np.float32)
        hot, cut = filters.temperature(3.0), filters.top_p(0.8)
        first_hot = np.isfinite(applied(filters.chain(hot, cut), logits)).sum()
        first_cut = np.isfinite(applied(filters.chain(cut, hot), logits)).sum()
        assert (first_hot, first_cut) == (2 * 4, 2 * 2)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
extreme = st.sampled_from([3.4e38, -3.4e38, 1e-40, 0.0, 1.0, -1.0, -np.inf]) | finite
extreme_logits = arrays(np.float32, (ROWS, VOCAB), elements=extreme).filter(
    lambda logits: np.isfinite(logits).any(axis=1).all()
)
tiny = st.sampled_from([5e-324, 1e-45, 1e-40, 1.2e-38, 1e-30])
EXTREME = {
    "repetition_penalty": st.sampled_from([1.2e-38, 1e-30, 1e30, 3.4e38]),
    "temperature": tiny | st.sampled_from([0.0, 1e30, 3.4e38]),
    "top_k": st.sampled_from([1, VOCAB, 2**31, 2**70]),
    "top_p": tiny | st.just(1.0),
    "min_p": tiny | st.just(1.0),
}


@pytest.mark.parametrize("name", EXTREME)
@given(data=st.data(), logits=extreme_logits)
def test_extreme_numbers_leave_a_token_and_no_nan(name, data, logits):
    value = data.draw(EXTREME[name])
    counts = data.draw(some_counts)
    chosen = filters.FILTERS[name](value)
    compiled = jax.jit(chosen)(jnp.asarray(logits), jnp.asarray(counts))
    for kept in (applied(chosen, logits, counts), np.asarray(compiled)):
        assert not np.isnan(kept).any()
        assert np.isfinite(kept).any(axis=1).all()
        assert not np.isfinite(kept[np.isneginf(logits)]).any()


def test_every_filter_is_tried_with_extreme_numbers():
    assert EXTREME.keys() == filters.FILTERS.keys()


@pytest.mark.parametrize("value", [1e-40, 5e-324])
def test_a_temperature_that_devices_take_for_0_is_greedy(value):
    assert filters.temperature(value) is filters.top_k(1)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e39])
@pytest.mark.parametrize("make", [filters.temperature, filters.repetition_penalty])
def test_a_number_that_no_float32_holds_is_refused_by_name(make, value):
    with pytest.raises(UserError, match=f"{make.__name__} = .*: must be from"):
        make(value)


def test_the_same_arguments_give_the_same_filter_so_that_decoding_compiles_once():
    def made():
        return filters.chain(filters.temperature(0.8), filters.top_k(5), filters.min_p(0.1))

    assert made() is made()
    assert filters.top_k(5) is not filters.top_k(6)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (filters.temperature, -0.1),
        (filters.top_k, 0),
        (filters.top_p, 0.0),
        (filters.top_p, 1.5),
        (filters.min_p, 0.0),
        (filters.min_p, 1.1),
        (filters.repetition_penalty, 0.0),
        (filters.repetition_penalty, 1e-40),
        (filters.top_p, np.nan),
        (filters.min_p, np.nan),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make, value):
    with pytest.raises(UserError, match=f"{make.__name__} = {value}"):
        make(value)


def test_every_filter_of_one_number_is_an_option():
    import sample

    options = {field.name for field in dataclasses.fields(sample.Options)}
    assert set(filters.FILTERS) <= options
    assert all(callable(make(1)) for make in filters.FILTERS.values())
