"""What students match of their teacher's layers, against naive 64-bit NumPy."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecoder import Decoder
from jaxdecoder.compression import matching
from jaxdecoder.compression.matching import MATCHINGS, Outputs, check, looking, paired
from jaxdecoder.config import Config, ConfigError, DistillationConfig, ModelConfig
from jaxdecoder.config.sections import Teaching
from tests.models import name_of, random_params, random_tokens, small


@partial(jax.jit, static_argnums=(0, 4))
def matched(name, student, teacher, weights, how=None):
    """How far a student's layers are from those of its teacher."""
    return MATCHINGS[name](student, teacher, weights, how or Teaching())


DRAW = np.random.default_rng(0)
BATCH, TIME = 2, 6
WEIGHTS = jnp.ones((BATCH, TIME))


def layer(width, heads, kv_heads, head):
    shapes = [(width,), (heads, head), (kv_heads, head), (kv_heads, head)]
    return Outputs(*(DRAW.normal(size=(BATCH, TIME, *s)).astype(np.float32) for s in shapes))


STUDENT = [layer(5, 2, 1, 6) for _ in range(2)]
TEACHER = [layer(9, 4, 2, 3) for _ in range(4)]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_relations(student, teacher, heads):
    """Token by token, relation head by relation head."""
    losses = np.zeros((BATCH, TIME))
    for mine, theirs in zip(student[1:], teacher[1:], strict=True):
        for b in range(BATCH):
            parts = []
            for x in (mine, theirs):
                flat = np.asarray(x[b], np.float64).reshape(TIME, heads, -1)
                parts.append(flat)
            for i in range(TIME):
                for h in range(heads):
                    q, p = (softmax(x[: i + 1, h] @ x[i, h] / np.sqrt(x.shape[-1])) for x in parts)
                    losses[b, i] += (p * np.log(p / q)).sum() / heads / 3
    return losses


@pytest.mark.parametrize("heads", [0, 1, 3, 6])
def test_relations_are_minilms(heads):
    found = matched("relations", STUDENT, TEACHER, WEIGHTS, Teaching(relation_heads=heads))
    # Heads of 2, 1, 4 and 2 have only 1 in common.
    expected = naive_relations(STUDENT[-1], TEACHER[-1], heads or 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_relations_may_be_those_of_another_layer_of_the_teacher():
    found = matched("relations", STUDENT, TEACHER, WEIGHTS, Teaching(teacher_layer=2))
    np.testing.assert_allclose(found, naive_relations(STUDENT[-1], TEACHER[1], 1), rtol=1e-4)


def test_similarity_is_that_of_cosines():
    expected = np.zeros((BATCH, TIME))
    for mine, theirs in ((STUDENT[0], TEACHER[1]), (STUDENT[1], TEACHER[3])):
        for b in range(BATCH):
            x, y = (np.asarray(part.stream[b], np.float64) for part in (mine, theirs))
            x, y = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, y))
            for i in range(TIME):
                gaps = [(x[i] @ x[j] - y[i] @ y[j]) ** 2 for j in range(i + 1)]
                expected[b, i] += np.mean(gaps) / 2
    found = matched("similarity", STUDENT, TEACHER, WEIGHTS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_cka_is_that_of_centred_grams_of_the_real_tokens():
    weights = WEIGHTS.at[1, 4:].set(0)
    found = np.asarray(matched("cka", STUDENT, TEACHER, weights))
    for b in range(BATCH):
        expected = 0.0
        for mine, theirs in ((STUDENT[0], TEACHER[1]), (STUDENT[1], TEACHER[3])):
            real = np.asarray(weights[b]) > 0
            n = int(real.sum())
            centring = np.eye(n) - 1 / n
            grams = [
                centring @ (x @ x.T) @ centring
                for x in (np.asarray(part.stream[b], np.float64)[real] for part in (mine, theirs))
            ]
            aligned = (grams[0] * grams[1]).sum()
            aligned /= np.sqrt((grams[0] ** 2).sum() * (grams[1] ** 2).sum())
            expected += (1 - aligned) / 2
        np.testing.assert_allclose(found[b], expected, rtol=1e-4)


@pytest.mark.parametrize("name", MATCHINGS)
def test_a_model_matches_itself_and_turned_streams_and_heads(name):
    rotation = np.linalg.qr(DRAW.normal(size=(9, 9)))[0].astype(np.float32)
    turned = [each._replace(stream=each.stream @ rotation) for each in TEACHER]
    np.testing.assert_allclose(matched(name, turned, TEACHER, WEIGHTS), 0.0, atol=1e-5)
    assert np.asarray(matched(name, STUDENT, TEACHER, WEIGHTS)).mean() > 1e-3


@pytest.mark.parametrize("name", MATCHINGS)
def test_nothing_is_known_of_later_tokens_but_for_whole_rows(name):
    def change(layers):
        return [Outputs(*(np.concatenate([x[:, :4], x[:, 4:] + 1], 1) for x in y)) for y in layers]

    before = matched(name, STUDENT, TEACHER, WEIGHTS)
    after = matched(name, change(STUDENT), change(TEACHER), WEIGHTS)
    if name != "cka":
        np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5)
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_layers_are_paired_evenly_and_last_with_last():
    assert paired(2, 4) == [1, 3]
    assert paired(3, 4) == [1, 2, 3]
    assert paired(4, 2) == [0, 0, 1, 1]
    assert paired(1, 6) == [5]


LOOKED_INTO = [
    small(n_kv_heads=2, remat="block", position="rope", qk_norm=True),
    small(layout="parallel_stacks", n_layers=4, attention=("full", "linear")),
]
MORE_OF_THEM = [
    small(),
    small(attention=("linformer", "linear"), attention_block=4, attention_rank=2),
    small(depth="early_exit"),
    small(depth="mixture_of_depths"),
]


@pytest.mark.parametrize(
    "config",
    [*LOOKED_INTO, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE_OF_THEM)],
    ids=name_of,
)
def test_every_decoder_can_be_looked_into(config):
    params, tokens = random_params(config), jnp.asarray(random_tokens(config, 2, 8))
    decoder = Decoder(config)

    @jax.jit
    def both(params):
        plain = decoder.apply({"params": params}, tokens, method="features")
        return plain, looking(decoder, params, tokens, method="features")

    plain, (features, layers) = both(params)
    np.testing.assert_allclose(features, plain, rtol=1e-5)
    stacked = config.layout == "parallel_stacks"
    assert len(layers) == (config.n_stacks if stacked else config.n_layers)
    heads = config.n_heads * (2 if stacked else 1)
    for each in layers:
        assert each.q.shape == (2, 8, heads, 4)
        assert each.k.shape == (2, 8, (config.n_kv_heads or config.n_heads) * heads // 4, 4)
        assert each.stream.shape[:2] == (2, 8)


def test_the_heads_are_those_of_the_projections():
    config = small(position="rope")
    params, tokens = random_params(config), jnp.asarray(random_tokens(config, 2, 8))
    _, layers = features_of(config)(params, tokens)
    norm = params["body"]["blocks"]["block_0"]["attention_norm"]
    attention = params["body"]["blocks"]["block_0"]["attention"]
    # The second block reads the stream after the first.
    x = np.asarray(layers[0].stream, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * norm["scale"][1] + norm["bias"][1]
    for kind, name in (("q", "query"), ("k", "key"), ("v", "value")):
        projected = (x @ attention[name]["kernel"][1]).reshape(2, 8, 4, 4)
        np.testing.assert_allclose(getattr(layers[1], kind), projected, rtol=1e-3, atol=1e-4)


def test_gradients_reach_the_student_through_its_layers():
    mine, theirs = small(d_model=8, n_heads=2), small(n_layers=3)
    tokens = jnp.asarray(random_tokens(mine, BATCH, TIME))
    _, teacher = features_of(theirs)(random_params(theirs), tokens)

    @jax.jit
    @jax.grad
    def gradient(params, shares):
        _, layers = looking(
            Decoder(mine), params, tokens, dropout=0.0, rngs={"dropout": jax.random.key(0)}
        )
        losses = [match(layers, teacher, WEIGHTS, Teaching()) for match in MATCHINGS.values()]
        return sum(share * loss.sum() for share, loss in zip(shares, losses, strict=True))

    for name, shares in zip(MATCHINGS, np.eye(len(MATCHINGS)), strict=True):
        gradients = gradient(random_params(mine), shares)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)), name
        assert np.abs(gradients["body"]["blocks"]["block_0"]["attention"]["key"]["kernel"]).max()


def features_of(config):
    """A function from parameters and tokens to the features and the layers."""
    return jax.jit(partial(looking, Decoder(config), method="features"))


def with_settings(model, **settings):
    return Config(model=model, distillation=DistillationConfig(matching="relations", **settings))


def test_what_cannot_be_matched_is_refused():
    teacher = ModelConfig(vocab_size=9, n_heads=6, d_model=384, n_layers=4).resolve()
    with pytest.raises(ConfigError, match="relation_heads = 5: must divide"):
        check(with_settings(small(), relation_heads=5), teacher)
    with pytest.raises(ConfigError, match="teacher_layer = 5: the teacher has 4"):
        check(with_settings(small(), teacher_layer=5), teacher)
    with pytest.raises(ConfigError, match="mixture_of_depths"):
        check(with_settings(small(depth="mixture_of_depths")), teacher)
    check(with_settings(small(), relation_heads=4, teacher_layer=4), teacher)
    other = dataclasses.replace(small(depth="mixture_of_depths"))
    check(Config(model=other, distillation=DistillationConfig(matching="cka")), teacher)


def test_every_layout_is_known_here():
    from jaxdecoder.decoder import LAYOUTS

    assert list(matching.LAYERS) == list(LAYOUTS)
