"""A teacher's answers on disk: the likeliest tokens and the rest, whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from jaxdecoder.compression import answers
from jaxdecoder.compression.divergences import soften
from jaxdecoder.config import ConfigError, DistillationConfig
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import cache_key, prepare
from jaxdecoder.errors import UserError
from jaxdecoder.training.runs import load_model

DRAW = np.random.default_rng(0)
LOGITS = jnp.asarray(DRAW.normal(size=(2, 3, 11), scale=3.0), jnp.float32)


def test_outcomes_are_some_tokens_and_all_others_together():
    tokens = jnp.asarray(DRAW.permuted(np.tile(np.arange(11), (2, 3, 1)), axis=-1)[..., :4])
    found = answers.outcomes(soften(LOGITS, 2.0), tokens)
    exact = log_softmax(np.asarray(LOGITS, np.float64) / 2, -1)
    for b in range(2):
        for t in range(3):
            mine = np.asarray(tokens[b, t])
            rest = logsumexp(np.delete(exact[b, t], mine))
            np.testing.assert_allclose(found[b, t], [*exact[b, t, mine], rest], rtol=1e-5)


def test_answers_are_the_likeliest_in_order():
    answer = answers.answer(LOGITS, 3, 1.0)
    np.testing.assert_array_equal(answer.tokens, np.argsort(-np.asarray(LOGITS), -1)[..., :3])
    np.testing.assert_allclose(np.exp(answers.told(answer)).sum(-1), 1.0, rtol=1e-5)


@pytest.fixture(scope="module")
def taught(tiny_run, tmp_path_factory):
    """A config that asks for answers, its corpus and its teacher."""
    model = load_model(tiny_run)
    config = replace(
        model.config,
        data=replace(model.config.data, cache=str(tmp_path_factory.mktemp("taught"))),
        train=replace(model.config.train, steps=5, batch_size=2),
        distillation=DistillationConfig(teacher="nowhere", teacher_digest="known", cached_top_k=4),
    )
    return config, prepare(config.data), model


def with_lesson(config, **changes):
    return replace(config, distillation=replace(config.distillation, **changes))


def test_files_hold_what_the_teacher_says_of_the_very_windows_of_each_step(taught, capsys):
    config, corpus, model = taught
    said = answers.prepare(config, corpus, lambda: model)
    assert "GB for 4 answers to each of 160 tokens" in capsys.readouterr().out
    folder = answers.folder_of(config, corpus.key)
    assert sorted(path.name for path in folder.iterdir()) == sorted(answers.FILES)
    assert said.tokens.nbytes + said.log_probabilities.nbytes == answers.needed(config)
    assert answers.needed(config) == 160 * (4 * 4 + 2)
    batch = Feed.of(config, corpus, "train").at(3)
    logits = jax.jit(model.decoder.apply)({"params": model.params}, batch.inputs[0])
    exact = answers.answer(logits, 4, 2.0)
    np.testing.assert_array_equal(said.tokens[3], exact.tokens)
    np.testing.assert_allclose(said.log_probabilities[3], exact.log_probabilities, rtol=1e-3)
    # Those of some rows of some steps, without asking the teacher again.
    feed = answers.feeding(config, corpus, lambda: pytest.fail("they are there"))
    fed = feed(2, 2, slice(1, 2))
    np.testing.assert_array_equal(fed.tokens, said.tokens[2:4, 1:2])
    assert fed.log_probabilities.dtype == np.float32


def test_a_cache_that_was_cut_short_goes_on_and_ends_the_same(taught, monkeypatch):
    config, corpus, model = taught
    config = with_lesson(config, temperature=1.5)
    drawn = Feed.at

    def stops(feed, step):
        if step == 3:
            raise KeyboardInterrupt
        return drawn(feed, step)

    folder = answers.folder_of(config, corpus.key)
    with monkeypatch.context() as patch:
        patch.setattr(Feed, "at", stops)
        with pytest.raises(KeyboardInterrupt):
            answers.prepare(config, corpus, lambda: model)
    assert not folder.exists()
    partial = folder.with_name(folder.name + ".partial")
    # A kill may fall between two files, or in the middle of one.
    with (partial / answers.FILES[0]).open("ab") as file:
        file.write(b"half")
    asked = []

    def noted(feed, step):
        asked.append(step)
        return drawn(feed, step)

    with monkeypatch.context() as patch:
        patch.setattr(Feed, "at", noted)
        cut = answers.prepare(config, corpus, lambda: model)
    assert asked == [3, 4]
    whole = answers.prepare(
        with_lesson(config, teacher_digest="the same by another name"), corpus, lambda: model
    )
    for a, b in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_decides_the_answers_decides_the_folder(taught):
    config = taught[0]
    others = [
        with_lesson(config, cached_top_k=5),
        with_lesson(config, temperature=3.0),
        with_lesson(config, teacher_digest="another"),
        replace(config, train=replace(config.train, seed=1)),
        replace(config, train=replace(config.train, steps=6)),
        replace(config, data=replace(config.data, sampling="random")),
    ]
    folders = {answers.folder_of(each, cache_key(each.data)) for each in (config, *others)}
    assert len(folders) == 1 + len(others)
    same = replace(config, optimizer=replace(config.optimizer, learning_rate=1.0))
    corpora = [cache_key(config.data), "another"]
    assert answers.folder_of(same, corpora[0]) in folders
    assert answers.folder_of(same, corpora[1]) not in folders


def test_too_much_is_refused_before_anything_is_written(taught, monkeypatch):
    config, corpus, model = taught
    large = with_lesson(config, temperature=9.0, cached_most_gigabytes=1e-6)
    with pytest.raises(ConfigError, match="at most 1e-06 GB are allowed; about 1 would fit"):
        answers.prepare(large, corpus, lambda: model)
    usage = answers.shutil.disk_usage(".")
    monkeypatch.setattr(answers.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match="free some space"):
        answers.prepare(with_lesson(config, temperature=8.0), corpus, lambda: model)
    assert not answers.folder_of(large, corpus.key).exists()
