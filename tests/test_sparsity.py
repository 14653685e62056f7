"""Which weights become zero: exactly as many as asked, the right ones, at once or in training."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder import Decoder
from jaxdecoder.compression.calibration import calibration_batches, input_squares, sums
from jaxdecoder.compression.criteria import CRITERIA
from jaxdecoder.compression.passes import corpus_of
from jaxdecoder.compression.sparsity import apply, lots, mask, n_of_m, zeros
from jaxdecoder.config import CompressionConfig, ConfigError, load
from jaxdecoder.data.batches import Batch
from jaxdecoder.errors import UserError
from jaxdecoder.layers.feed_forward import FeedForward
from jaxdecoder.layers.tree import body_matrices
from jaxdecoder.training.optimizers import keep_zeros
from jaxdecoder.training.runs import load_model
from jaxdecoder.training.sparsity import SCOPES, gradual, rounds
from tests.models import random_params, random_tokens, small
from tests.runs import write_config

STACKED, PLAIN = ("body", "blocks", "up", "kernel"), ("body", "down", "kernel")
PATHS = {STACKED: (2, 6, 8), PLAIN: (5, 4)}


def matrices(seed=0):
    draw = np.random.default_rng(seed)
    return {p: jnp.asarray(draw.normal(size=shape), jnp.float32) for p, shape in PATHS.items()}


def norms():
    draw = np.random.default_rng(9)
    return {p: jnp.asarray(draw.random(shape[:-1]), jnp.float32) for p, shape in PATHS.items()}


def scored(criterion, weights, seed=0):
    """Scores by a criterion, with what it needs by lot."""
    needed = {
        "nothing": dict.fromkeys(weights),
        "input_norms": norms(),
        "lot": lots(weights, seed),
    }[CRITERIA[criterion].needs]
    return {path: CRITERIA[criterion].score(w, needed[path]) for path, w in weights.items()}


def groups_of(arrays, scope):
    """Each group's numbers, one loop after another."""
    if scope == "global":
        return [np.concatenate([np.ravel(x) for x in arrays.values()])]
    each = [m for x in arrays.values() for m in np.asarray(x).reshape(-1, *x.shape[-2:])]
    if scope == "matrix":
        return [m.ravel() for m in each]
    return [m[:, output] for m in each for output in range(m.shape[1])]


def nearest(share, size):
    """The whole number nearest to a share of a size, halves upwards."""
    return int(np.floor(share * size + 0.5))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", CRITERIA)
@given(sparsity=st.floats(0.01, 0.99))
def test_a_mask_has_exactly_the_asked_sparsity_and_keeps_the_highest(scope, criterion, sparsity):
    weights = matrices()
    scores = scored(criterion, weights)
    kept = mask(weights, scores, sparsity, scope)
    pairs = zip(groups_of(kept, scope), groups_of(scores, scope), strict=True)
    for stays, score in pairs:
        assert np.sum(~stays) == nearest(sparsity, stays.size)
        if stays.any() and not stays.all():
            assert score[stays].min() >= score[~stays].max()


def test_equal_scores_lose_no_more_than_was_asked():
    weights = {PLAIN: jnp.ones((5, 4))}
    for scope in SCOPES:
        kept = mask(weights, scored("magnitude", weights), 0.5, scope)[PLAIN]
        # Of 5 weights an output has, 2.5 go: halves upwards.
        assert np.sum(~np.asarray(kept)) == {"matrix": 10, "global": 10, "output": 12}[scope]


def test_magnitude_and_wanda_score_as_their_papers_say():
    weights, seen = matrices(), norms()
    by_size, by_input = (scored(name, weights) for name in ("magnitude", "wanda"))
    for path, w in weights.items():
        norm = np.asarray(seen[path], np.float64)
        np.testing.assert_allclose(by_size[path], np.abs(w))
        expected = np.abs(np.asarray(w, np.float64)) * norm[..., :, None]
        np.testing.assert_allclose(by_input[path], expected, rtol=1e-6)


def test_a_lot_depends_on_its_seed_alone():
    one, same, other = (scored("random", matrices(), seed) for seed in (0, 0, 1))
    for path in PATHS:
        np.testing.assert_array_equal(one[path], same[path])
        assert not np.array_equal(one[path], other[path])


@pytest.mark.parametrize("scope", SCOPES)
def test_pruning_twice_equals_pruning_once_to_the_product(scope):
    """Half of what is left after a half is a quarter of all: exactly, where nothing is rounded."""
    weights = {STACKED: matrices()[STACKED], ("body", "q", "kernel"): jnp.linspace(-3, 5, 32)}
    weights["body", "q", "kernel"] = weights["body", "q", "kernel"].reshape(8, 4)
    weights[STACKED] = jnp.concatenate([weights[STACKED], 2 * weights[STACKED][:, :2]], axis=1)

    def cut(w, sparsity):
        return apply(w, mask(w, scored("magnitude", w), sparsity, scope))

    twice, once = cut(cut(weights, 0.5), 0.5), cut(weights, 0.75)
    for path in weights:
        np.testing.assert_array_equal(twice[path], once[path])
    count = zeros(once)
    assert count["zeros"] == 0.75 * count["weights"]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_n_of_every_m_that_follow_one_another_stay_the_highest(n, m):
    weights = {STACKED: jnp.concatenate([matrices()[STACKED]] * 2, axis=1)}  # 12 inputs
    scores = scored("magnitude", weights)
    kept = np.asarray(n_of_m(weights, scores, n, m)[STACKED])
    for layer, first, output in np.ndindex(2, 12 // m, 8):
        group = slice(first * m, (first + 1) * m), output
        stays, score = kept[layer][group], np.asarray(scores[STACKED][layer][group])
        assert stays.sum() == n
        assert set(np.flatnonzero(stays)) == set(np.argsort(score, kind="stable")[m - n :])
    with pytest.raises(UserError, match="has 6 inputs"):
        n_of_m(matrices(), scored("magnitude", matrices()), 2, 4)


# --- Calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {
                "n_kv_heads": 2,
                "activation": "swiglu",
                "norm_placement": "parallel",
                "remat": "dots",
            },
            marks=pytest.mark.slow,
        ),
        {"depth": "mixture_of_depths"},
        pytest.param({"layout": "parallel_stacks", "n_layers": 4}, marks=pytest.mark.slow),
    ],
    ids=["serial", "routed", "stacks"],
)
def test_the_sums_are_those_of_the_inputs_that_products_meet(changes):
    """Against the inputs themselves, noted one by one by a decoder that is not compiled."""
    config = small(**changes)
    params, tokens = random_params(config), random_tokens(config, 3, 8)
    weights = np.ones((3, 8), np.float32)
    weights[2, 5:] = 0
    batch = Batch(tokens, tokens, weights)
    decoder = Decoder(config)
    squares_of, grams_of = (sums(decoder, params, batch, grams) for grams in (False, True))
    matrices = body_matrices(params, head=True)
    assert set(matrices) <= set(squares_of)
    for path, kernel in matrices.items():
        assert squares_of[path].shape == kernel.shape[:-1]
        gram = np.asarray(grams_of[path])
        np.testing.assert_allclose(
            np.diagonal(gram, axis1=-2, axis2=-1), squares_of[path], rtol=1e-4
        )
        np.testing.assert_allclose(gram, gram.swapaxes(-1, -2), rtol=1e-4, atol=1e-4)
    features, seen = jax.jit(
        partial(
            decoder.apply,
            method="features",
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, FeedForward),
        )
    )({"params": params}, tokens)
    rows = np.asarray(features, np.float64)[weights > 0]
    np.testing.assert_allclose(grams_of["head", "kernel"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    if config.layout != "serial":
        return
    # What the last block's feed-forward reads can be had from what it gives: down is a product.
    seen = seen["intermediates"]["body"]["blocks"]
    routed = config.depth == "mixture_of_depths"
    block = ("block_1", "block") if routed else ("block_0",)
    out, taken = seen, weights > 0
    for name in (*block, "feed_forward"):
        out = out[name]
    if routed:
        taken = taken & np.asarray(seen["block_1"]["taken"][0][-1])
        assert 0 < taken.sum() < (weights > 0).sum()
    down = params["body"]["blocks"]
    for name in (*block, "feed_forward", "down"):
        down = down[name]
    kernel, bias = (np.asarray(down[name], np.float64)[-1] for name in ("kernel", "bias"))
    given = np.asarray(out["__call__"][0], np.float64)[-1][taken] - bias
    gram = np.asarray(grams_of[("body", "blocks", *block, "feed_forward", "down", "kernel")][-1])
    np.testing.assert_allclose(
        kernel.T @ gram @ kernel, given.T @ given, rtol=1e-3, atol=1e-3 * np.abs(given).max() ** 2
    )


def test_too_little_calibration_data_is_refused(tiny_run):
    model = load_model(tiny_run)
    config, corpus = corpus_of(model, tiny_run)
    have = len(corpus.train.tokens) - 1
    with pytest.raises(UserError, match=f"between 1 and the {have:,} tokens"):
        input_squares(model, corpus, have + 1)
    wide = dataclasses.replace(config.train, batch_size=1)
    few = model._replace(config=dataclasses.replace(config, train=wide))
    with pytest.raises(UserError, match="has 64 inputs, and 16 tokens"):
        input_squares(few, corpus, 16)
    one, again = (calibration_batches(config, corpus, 512) for _ in range(2))
    assert sum(batch.weights.sum() for batch in one) == 512
    jax.tree.map(np.testing.assert_array_equal, one, again)


# --- Zeros made in training -----------------------------------------------------------------------

SCHEDULE = CompressionConfig(
    keep_zeros=True, sparsity=0.8, sparsity_begin=4, sparsity_end=17, sparsity_every=5
)


def test_the_schedule_is_cubic_and_ends_where_it_should():
    schedule = rounds(SCHEDULE)
    assert list(schedule) == [4, 9, 14, 17]
    for step, share in schedule.items():
        assert share == pytest.approx(0.8 - 0.8 * (1 - (step - 4) / 13) ** 3)
    assert schedule[17] == 0.8


@pytest.mark.parametrize("scope", SCOPES)
def test_training_makes_exactly_the_zeros_of_its_schedule_the_smallest_first(scope):
    c = dataclasses.replace(SCHEDULE, sparsity_scope=scope)
    params = {"body": {"up": {"kernel": matrices()[STACKED]}, "norm": {"scale": jnp.zeros(3)}}}
    rule = optax.chain(optax.sgd(0.1), keep_zeros(), gradual(c))
    state = rule.init(params)
    path, before = ("body", "up", "kernel"), 0

    @jax.jit
    def step(params, state, grads):
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    schedule = rounds(c)
    for number in range(1, 21):
        draw = np.random.default_rng(number)
        noise = draw.normal(size=PATHS[STACKED])
        grads = {
            "body": {
                "up": {"kernel": jnp.asarray(noise, jnp.float32)},
                "norm": {"scale": jnp.ones(3)},
            }
        }
        old = np.asarray(params["body"]["up"]["kernel"])
        params, state = step(params, state, grads)
        new = np.asarray(params["body"]["up"]["kernel"])
        assert (new[old == 0] == 0).all()
        if number in schedule:
            moved = np.where(old == 0, 0, old - np.float32(0.1) * grads["body"]["up"]["kernel"])
            for after, wanted in zip(
                groups_of({path: new}, scope), groups_of({path: moved}, scope), strict=True
            ):
                count = nearest(schedule[number], after.size)
                assert np.sum(after == 0) == count
                assert set(np.flatnonzero(after == 0)) == set(
                    np.argsort(np.abs(wanted), kind="stable")[:count]
                )
            before = np.sum(new == 0)
        assert np.sum(new == 0) == before
    assert (np.asarray(params["body"]["norm"]["scale"]) != 0).all()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"keep_zeros": False}, "keep_zeros"),
        ({"sparsity_from": 0.9}, "sparsity_from"),
        ({"sparsity_begin": 18}, "sparsity_end"),
        ({"sparsity_begin": 0, "sparsity_end": 0}, "sparsity_end"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changes, key):
    with pytest.raises(ConfigError, match=f"compression.{key}"):
        dataclasses.replace(SCHEDULE, **changes)


def test_a_schedule_that_outlasts_training_is_refused(tmp_path):
    arguments = ["--compression.sparsity", "0.5", "--compression.keep-zeros"]
    with pytest.raises(UserError, match=r"compression.sparsity_end = 30: .* at most 24 would do"):
        load(write_config(tmp_path), [*arguments, "--compression.sparsity-end", "30"])
