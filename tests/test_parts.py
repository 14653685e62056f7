"""Parts that are removed are gone, and the model is the one whose parts are zero."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdecoder import Decoder
from jaxdecoder.compression.importance import by_gates, cosine, influence
from jaxdecoder.compression.parts import PARTS, kept
from jaxdecoder.config import Config
from jaxdecoder.data.batches import Batch
from jaxdecoder.errors import UserError
from jaxdecoder.layers import norms
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.positions import POSITIONS
from jaxdecoder.layers.serial import n_turns, turn
from jaxdecoder.layers.tree import SERIAL
from jaxdecoder.training.losses import summed_cross_entropy
from jaxdecoder.training.runs import Model
from tests.models import (
    covering_configs,
    logits_of,
    random_params,
    random_tokens,
    shapes,
    small,
    zip_cycled,
)

ALL_OF_THEM = covering_configs()


def drawn(part, params, config):
    """Scores by lot for the units of a part."""
    draw = np.random.default_rng(5)
    return {
        path: jnp.asarray(draw.random(x.shape), jnp.float32)
        for path, x in part.ones(params, config).items()
    }


def without(name, config, sparsity=0.5, seed=0):
    """Random weights, those of the smaller model, its config, and which units stayed."""
    part, params, config = PARTS[name], random_params(config, seed), config.resolve()
    keep = kept(drawn(part, params, config), config, part, sparsity)
    return params, *part.remove(params, config, keep), keep


def zeroed(params, keep, kernel, width):
    """The model in which the removed units reach nothing: the rows that read them are zero."""
    flat = {path: np.array(leaf) for path, leaf in flatten_dict(params).items()}
    for path, index in keep.items():
        rows = flat[(*path, kernel, "kernel")]
        for place in np.ndindex(index.shape[:-1]):
            units = rows[place].reshape(-1, width, rows.shape[-1])
            gone = np.setdiff1d(np.arange(len(units)), index[place])
            assert len(gone) > 0
            units[gone] = 0
    return unflatten_dict(flat)


def assert_same_logits(config, params, smaller, fewer):
    tokens = random_tokens(config, 2, config.context_length)
    expected = logits_of(Decoder(config), params, tokens)
    got = logits_of(Decoder(smaller), fewer, tokens)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got / scale, expected / scale, rtol=0, atol=1e-5)


def assert_smaller(smaller, fewer):
    assert jax.tree.map(jnp.shape, fewer) == jax.tree.map(lambda s: s.shape, shapes(smaller))


@pytest.mark.parametrize(
    ("number", "name"),
    [
        pytest.param(number, name, marks=pytest.mark.slow if number % 5 else ())
        for number, name in zip_cycled([*range(len(ALL_OF_THEM))], [*PARTS])
    ],
)
def test_a_model_without_parts_is_what_its_config_says(number, name):
    config = ALL_OF_THEM[number]
    config = dataclasses.replace(config, n_layers=config.n_layers * 2).resolve()
    part = PARTS[name]
    if part.refusal(config):
        assert (
            config.copying
            or config.layout == "parallel_stacks"
            or config.position in ("alibi", "sinusoidal")
        )
        return
    _, fewer, smaller, _ = without(name, config)
    assert_smaller(smaller, fewer)
    left = {"heads": 2, "neurons": 12, "width": 8, "layers": n_turns(config) // 2}
    assert part.units(smaller) == left[name]


QK = {"qkv_bias": True, "qk_norm": True}
VARIED = [
    {**QK, "n_kv_heads": 2, "position": "rope", "activation": "swiglu"},
    {"n_kv_heads": 2, "attention": ("full", "linear"), "activation": "relu2", "bias": False},
    {"n_layers": 1, "convolution_width": 2, "copying": True, "tie_embeddings": True},
    {"n_kv_heads": 1, "position": "t5", "depth": "mixture_of_depths"},
    {"layout": "parallel_stacks", "n_layers": 4, "activation": "reglu"},
]


def and_slowly(first, *others):
    """The first for every run of the tests, the others for the long one."""
    return [first, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.mark.parametrize(
    "changes", and_slowly(*VARIED), ids=lambda c: "-".join(map(str, c.values()))
)
def test_removing_heads_and_neurons_gives_the_logits_of_zeroing_them(changes):
    config = small(**changes).resolve()
    params, fewer, smaller, heads = without("heads", config)
    neurons = kept(drawn(PARTS["neurons"], params, config), config, PARTS["neurons"], 0.5)
    fewer, smaller = PARTS["neurons"].remove(fewer, smaller, neurons)
    assert_smaller(smaller, fewer)
    zero = zeroed(zeroed(params, heads, "out", 4), neurons, "down", 1)
    assert_same_logits(config, zero, smaller, fewer)
    for name, keep in {"heads": heads, "neurons": neurons}.items():
        gates = {
            path: jnp.put_along_axis(jnp.zeros(ones.shape), keep[path], 1.0, -1, inplace=False)
            for path, ones in PARTS[name].ones(params, config).items()
        }
        params = PARTS[name].gated(params, config, gates)
    jax.tree.map(np.testing.assert_array_equal, params, zero)


def silent(params, index, width):
    """No feature but these is ever given: columns of whatever writes to the stream are zero."""
    gone = np.setdiff1d(np.arange(width), index)
    writers = ("embedding", "out", "down", "positions")

    def cut(path, leaf):
        normed = path[-2:-1] and path[-2].endswith("norm") and leaf.shape[-1] == width
        if any(name in path for name in writers) or normed:
            leaf = np.array(leaf)
            leaf[..., gone] = 0
        return leaf

    return unflatten_dict({path: cut(path, leaf) for path, leaf in flatten_dict(params).items()})


RMSNORM = {"norm": "rmsnorm", "norm_epsilon": 0.01}
WIDTHS = [
    {**RMSNORM, "norm_placement": "post", "position": "rope", "convolution_width": 3},
    {**RMSNORM, "norm_placement": "sandwich", "bias": False, "depth": "mixture_of_depths"},
    {"norm": "none", "tie_embeddings": True},
]


@pytest.mark.parametrize(
    "changes", and_slowly(*WIDTHS), ids=lambda c: "-".join(map(str, c.values()))
)
def test_removing_features_gives_the_logits_of_zeroing_them(changes):
    config = small(d_head=6, **changes)
    params, fewer, smaller, keep = without("width", config)
    assert_smaller(smaller, fewer)
    assert_same_logits(config, silent(params, keep[()], 16), smaller, fewer)


def test_layer_norms_of_a_narrower_model_are_those_of_the_features_that_stay(monkeypatch):
    config = small(d_head=6)
    params, fewer, smaller, keep = without("width", config)

    def standardised(x, epsilon):
        some = x[..., keep[()]] if x.shape[-1] == 16 else x
        centred = x - some.mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt(some.var(axis=-1, keepdims=True) + epsilon)

    tokens = random_tokens(config, 2, 8)
    got = logits_of(Decoder(smaller), fewer, tokens)
    monkeypatch.setattr(norms, "standardise", standardised)
    zero = silent(params, keep[()], 16)
    expected = jax.jit(lambda p, t: Decoder(config).apply({"params": p}, t))(zero, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "changes",
    and_slowly(
        {"norm_placement": "parallel", "depth": "early_exit", "exit_minimum": 3},
        {"depth": "mixture_of_depths", "position": "t5"},
    ),
)
def test_removing_layers_gives_the_logits_of_zeroing_what_they_add(changes):
    config = small(n_layers=4, **changes)
    params, fewer, smaller, keep = without("layers", config)
    assert_smaller(smaller, fewer)
    gone = np.setdiff1d(np.arange(n_turns(config)), keep[SERIAL])
    assert len(gone) == n_turns(config) // 2

    def cut(path, leaf):
        if path[:2] == SERIAL and path[-2] in ("out", "down"):
            leaf = np.array(leaf)
            leaf[gone] = 0
        return leaf

    zero = unflatten_dict({path: cut(path, leaf) for path, leaf in flatten_dict(params).items()})
    assert_same_logits(config, zero, smaller, fewer)
    assert smaller.n_layers == 2


def test_each_group_of_heads_loses_as_many_its_least_important_ones():
    config = small(n_heads=6, n_kv_heads=2, d_head=4).resolve()
    scores = {("a",): jnp.asarray([[5.0, 1, 3, 0, 9, 2], [1, 2, 3, 6, 5, 4]])}
    keep = kept(scores, config, PARTS["heads"], 1 / 3)
    np.testing.assert_array_equal(keep["a",], [[0, 2, 4, 5], [1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("name", "changes", "sparsity", "message"),
    [
        ("heads", {}, 0.1, "of 4, none would go; 0.25 to 0.75 would do"),
        ("neurons", {}, 0.99, "of 24, all would go"),
        ("heads", {"n_kv_heads": 2}, 0.9, "of 2, all would go; 0.5 to 0.5"),
        ("layers", {"n_layers": 1}, 0.5, "there is but one"),
    ],
)
def test_a_share_that_is_none_or_all_is_refused(name, changes, sparsity, message):
    with pytest.raises(UserError, match=message):
        without(name, small(**changes), sparsity)


def test_what_a_model_cannot_lose_has_a_reason():
    cases = {
        "heads": [{"position": "alibi"}, {"attention_projection": False}],
        "neurons": [{"feed_forward": False}, {"feed_forward_projection": False, "d_ff": 16}],
        "width": [
            {"position": "sinusoidal"},
            {"layout": "parallel_stacks"},
            {"copying": True, "tie_embeddings": True},
            {"attention_projection": False},
            {"feed_forward_projection": False, "d_ff": 16},
        ],
        "layers": [{"layout": "parallel_stacks"}],
    }
    assert set(cases) == set(PARTS)
    for name, changes in cases.items():
        assert not PARTS[name].refusal(small().resolve())
        for change in changes:
            assert PARTS[name].refusal(small(**change).resolve())


# --- Importance -----------------------------------------------------------------------------------


def model_of(config, seed=0):
    params = random_params(config, seed)
    return Model(Config(model=config), Decoder(config), params, None, 0)


def batch_of(config, rows=3):
    tokens = random_tokens(config, rows, config.context_length + 1)
    weights = np.ones((rows, config.context_length), np.float32)
    weights[-1, 3:] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


@pytest.mark.parametrize(("name", "measure"), [("heads", "gates"), ("width", "taylor")])
def test_importance_is_the_slope_of_the_loss_along_gates(name, measure):
    """Against finite differences of the loss in the gates, text by text, for a few units."""
    config = small(norm="rmsnorm", n_layers=1).resolve()
    part, model, batch = PARTS[name], model_of(config), batch_of(config)
    ones = part.ones(model.params, config)
    path = next(iter(ones))

    @jax.jit
    def loss(value, place, row):
        gates = {**ones, path: ones[path].at[place].set(value)}
        rows = jax.tree.map(lambda x: jnp.asarray(x)[row][None], batch)
        total = summed_cross_entropy(model.decoder, part.gated(model.params, config, gates), rows)
        return total / jnp.sum(rows.weights)

    found = by_gates(model, part, [batch, batch], measure)[path]
    for place in itertools.islice(np.ndindex(ones[path].shape), 2):
        slopes = [
            (float(loss(1.05, place, row)) - float(loss(0.95, place, row))) / 0.1
            for row in range(3)
        ]
        expected = np.mean(np.square(slopes) if measure == "taylor" else np.abs(slopes))
        assert found[place] == pytest.approx(expected, rel=0.05, abs=1e-5)


def test_influence_is_one_less_the_cosine_of_the_stream_before_and_after():
    config = small(n_layers=4, depth="mixture_of_depths")
    model, batch = model_of(config), batch_of(config)
    found = influence(model, [batch])[SERIAL]
    _, seen = jax.jit(
        lambda p, t: model.decoder.apply(
            {"params": p}, t, method="features", mutable=["intermediates"]
        )
    )(model.params, batch.inputs)
    last = f"after_block_{len(turn(config)) - 1}"
    streams = np.asarray(seen["intermediates"]["body"]["blocks"][last][0], np.float64)
    first = np.asarray(model.params["embedding"])[batch.inputs]
    first = first + np.asarray(model.params["positions"]["embedding"])[None, :8]
    for i, (x, y) in enumerate(itertools.pairwise([first, *streams])):
        lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        angles = 1 - np.sum(x * y, axis=-1) / lengths
        expected = np.sum(angles * batch.weights) / np.sum(batch.weights)
        assert found[i] == pytest.approx(expected, rel=1e-4)
    assert len(found) == n_turns(config)


def test_the_cosine_of_nothing_is_zero():
    assert cosine(jnp.zeros((1, 3)), jnp.ones((1, 3))) == 0


def test_all_placements_positions_and_activations_were_met():
    met = {(c.norm_placement, c.position, c.activation) for c in ALL_OF_THEM}
    assert [{*names} for names in zip(*met, strict=True)] == [
        {*PLACEMENTS},
        {*POSITIONS},
        {*ACTIVATIONS},
    ]
