"""Distillation from end to end: what is minimised, who learns from whom, and going on."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxdecoder import Decoder
from jaxdecoder.compression import distillation
from jaxdecoder.compression.distillation import distill, first_lesson, lesson, objective
from jaxdecoder.compression.on_policy import continued, judged
from jaxdecoder.compression.options import Distill
from jaxdecoder.compression.passes import Made, corpus_of, run_pass
from jaxdecoder.compression.students import chosen_layers, start_from, student_of
from jaxdecoder.config import Config, ConfigError, DistillationConfig, load, to_toml
from jaxdecoder.config.sections import Teaching
from jaxdecoder.data.batches import Batch
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.data.tokens import prepare
from jaxdecoder.errors import UserError
from jaxdecoder.training.runs import load_model, read_config
from jaxdecoder.training.single import train
from jaxdecoder.training.step import next_token
from tests.models import random_params, random_tokens, small
from tests.runs import here, losses, write_config

# --- What is minimised ----------------------------------------------------------------------------

TOKENIZER = Tokenizer("char", "char", tuple(bytes([letter]) for letter in b"abcdefghijk"))


def a_batch(model):
    tokens = jnp.asarray(random_tokens(model, 2, 9))
    weights = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 8)), jnp.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def logits_of(model, params, tokens):
    return np.asarray(jax.jit(Decoder(model).apply)({"params": params}, tokens), np.float64)


def test_the_loss_is_the_mixture_of_both():
    student, teacher = small(d_model=8, n_heads=2), small()
    settings = DistillationConfig(temperature=3.0, alpha=0.3)
    batch, params, held = a_batch(student), random_params(student), random_params(teacher, 1)
    loss = lesson(Config(model=student, distillation=settings), TOKENIZER, Decoder(teacher))
    found = jax.jit(loss)(params, batch, jax.random.key(0), held)
    ours, theirs = (
        logits_of(*model, batch.inputs) for model in ((student, params), (teacher, held))
    )
    q, p = log_softmax(ours / 3.0, -1), log_softmax(theirs / 3.0, -1)
    soft = 9.0 * (np.exp(p) * (p - q)).sum(-1)
    hard = -np.take_along_axis(log_softmax(ours, -1), batch.targets[..., None], -1)[..., 0]
    expected = ((0.3 * soft + 0.7 * hard) * batch.weights).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    "depth", ["early_exit", pytest.param("mixture_of_depths", marks=pytest.mark.slow)]
)
def test_with_no_divergence_it_is_the_decoders_own_loss_whatever_the_variant(depth):
    # What matches is weighed by nothing: all that is left is the student's own.
    settings = DistillationConfig(alpha=0.0, matching="similarity", matching_weight=0.0)
    student = small(depth=depth)
    batch, params = a_batch(student), random_params(student)
    loss = lesson(Config(model=student, distillation=settings), TOKENIZER, Decoder(small()))
    plain = next_token(Config(model=student)).loss
    found, own = jax.jit(
        lambda params, held: (
            loss(params, batch, jax.random.key(0), held),
            plain(params, batch, jax.random.key(0), ()),
        )
    )(params, random_params(small()))
    np.testing.assert_allclose(found, own, rtol=1e-5)


def test_what_a_student_goes_on_with_is_what_it_would_sample():
    """With the same keys, from full passes instead of a cache."""
    model, key = small(position="rope"), jax.random.key(3)
    params, prompts = random_params(model), jnp.asarray(random_tokens(model, 2, 3))
    found = jax.jit(lambda p: continued(Decoder(model), p, prompts, 8, key, 11))(params)
    tokens = np.asarray(prompts)
    for each in jax.random.split(key, 5):
        logits = logits_of(
            model, params, jnp.asarray(np.pad(tokens, ((0, 0), (0, 8 - tokens.shape[1]))))
        )
        last = jnp.asarray(logits[:, tokens.shape[1] - 1], jnp.float32)
        drawn = jax.random.categorical(each, last.at[:, 11:].set(-jnp.inf))
        tokens = np.concatenate([tokens, drawn[:, None]], 1)
    np.testing.assert_array_equal(found, tokens)
    assert (np.asarray(found)[:, 3:] < 11).all()


def test_of_sampled_texts_what_follows_the_prompt_counts_up_to_the_end():
    tokens = jnp.asarray([[9, 1, 2, 3, 4, 5], [9, 1, 2, 9, 4, 5], [9, 1, 9, 0, 0, 0]])
    weights = jnp.ones((3, 6)).at[2, 2:].set(0)
    found = np.asarray(judged(tokens, weights, 3, 9))
    np.testing.assert_allclose(found.sum(), weights.sum(), rtol=1e-6)
    np.testing.assert_array_equal(
        found > 0, [[0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    )


def test_no_gradient_passes_through_sampling_and_the_key_decides_the_text():
    model = small(n_layers=1)
    settings = DistillationConfig(on_policy=1.0, alpha=0.0, temperature=1.0)
    batch, params, held = a_batch(model), random_params(model), random_params(model, 1)
    batch = batch._replace(weights=jnp.ones((2, 8)))
    loss = lesson(Config(model=model, distillation=settings), TOKENIZER, Decoder(model))
    both = jax.jit(jax.value_and_grad(loss))
    value, gradient = both(params, batch, jax.random.key(0), held)
    again, _ = both(params, batch, jax.random.key(0), held)
    other, _ = both(params, batch, jax.random.key(1), held)
    assert value == again
    assert value != other
    # It is the gradient of the divergence on the text as it was drawn.
    _, draw = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))

    def by_hand(params):
        text = jax.lax.stop_gradient(
            continued(Decoder(model), params, batch.inputs[:, :2], 8, draw, 11)
        )
        q, p = (
            jax.nn.log_softmax(Decoder(model).apply({"params": w}, text)) for w in (params, held)
        )
        return ((jnp.exp(p) * (p - q)).sum(-1) * judged(text, batch.weights, 2, None)).sum()

    expected = jax.jit(jax.grad(by_hand))(params)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


# --- From run to run ------------------------------------------------------------------------------

LETTERS = "abcdefghij"


def planted(length=6000):
    """Text whose next letter is drawn by a table: most of what one letter says is chance."""
    draw = np.random.default_rng(0)
    table = draw.dirichlet([0.5] * len(LETTERS), len(LETTERS)).cumsum(1)
    letters, text = 0, []
    for chance in draw.random(length):
        letters = min(int(np.searchsorted(table[letters], chance)), len(LETTERS) - 1)
        text.append(LETTERS[letters])
    return "".join(text)


@pytest.fixture(scope="module", autouse=True)
def no_samples():
    """Samples take longer to compile than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "show_sample", lambda *told: "a sample")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a trained teacher, `run`, and the configs of two students of it."""
    folder = tmp_path_factory.mktemp("planted")
    write_config(folder, text=planted())
    # One device call for several steps, and few evaluations: the planted task is quick.
    common = ["--data.tokenizer", "char", "--data.no-end-of-text", "--model.dropout", "0"]
    common += ["--train.checkpoint-every", "40", "--train.evaluate-every", "40"]
    common += ["--train.steps-per-call", "8", "--optimizer.ema-decay", "0"]
    config = load(folder / "tiny.toml", [*common, "--train.steps", "240"])
    train(config)
    small_one = [*common, "--train.steps", "40", "--model.d-model", "8", "--model.n-layers", "1"]
    (folder / "student.toml").write_text(to_toml(load(folder / "tiny.toml", small_one)))
    half = [*common, "--train.steps", "8", "--model.n-layers", "1"]
    (folder / "half.toml").write_text(to_toml(load(folder / "tiny.toml", half)))
    return folder


def taught(folder, out, student="student.toml", how=None, **options):
    """The summary of a distillation of the folder's teacher."""
    told = Distill(
        str(folder / "run"),
        str(folder / student),
        str(out),
        how or Teaching(temperature=1.0, alpha=1.0),
        **options,
    )
    return distill(told, f"python compress.py distill {out}")


@pytest.fixture(scope="module")
def distilled(folder):
    """The summary of the plain distillation."""
    return taught(folder, folder / "distilled")


@pytest.mark.slow
def test_a_student_learns_more_from_the_teacher_than_alone(folder, distilled):
    config = load(folder / "student.toml", ["--train.out", str(folder / "alone")])
    alone = train(config)
    assert alone["steps"] == distilled["steps"] == 40
    assert distilled["validation_loss"] < alone["validation_loss"] - 0.01
    told = distilled["compression"]
    assert told["before"]["validation_loss"] < distilled["validation_loss"]
    assert told["at_once"]["validation_loss"] > distilled["validation_loss"] + 0.1
    assert told["start"] == "fresh weights"
    kept = read_config(folder / "distilled")
    assert kept.distillation.teacher == str(folder / "run")
    assert len(kept.compression.recipe) == 1
    assert str(folder / "run") in (folder / "distilled" / "samples.txt").read_text()


@pytest.mark.parametrize(
    "how",
    [
        Teaching(temperature=1.0, alpha=1.0),
        pytest.param(
            # With all that is drawn or looked into at once.
            Teaching(matching="relations", on_policy=0.5, divergence="jensen_shannon"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["plain", "all"],
)
@pytest.mark.slow
def test_a_student_goes_on_where_it_stopped_and_as_train_py_would(
    folder, tmp_path, monkeypatch, how
):
    config = load(folder / "student.toml", ["--train.checkpoint-every", "8"])
    config = replace(config, train=replace(config.train, sample_every=8))
    (tmp_path / "short.toml").write_text(to_toml(config))
    calls = []

    def stops(*told):
        # First the teacher's, then the one after 8 steps.
        calls.append(told)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return "a sample"

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "show_sample", stops)
        with pytest.raises(KeyboardInterrupt):
            taught(folder, cut, tmp_path / "short.toml", how)
    assert max(step for step, _ in losses(cut)) == 8
    (tmp_path / "short.toml").unlink()  # what the run needs to know it has written down
    found = taught(folder, cut, tmp_path / "short.toml", how)
    written = read_config(cut)
    undisturbed = replace(written, train=replace(written.train, out=str(whole)))
    expected = train(undisturbed, objective=objective)
    assert losses(cut) == losses(whole)
    assert found["validation_loss"] == expected["validation_loss"]


@pytest.mark.slow
def test_answers_from_disk_teach_as_the_teacher_does(folder, distilled, tmp_path):
    # All ten letters but one, and that is the rest: less the rounding there is no difference.
    taught(folder, tmp_path / "new", how=Teaching(temperature=1.0, alpha=1.0, cached_top_k=9))
    cached, live = losses(tmp_path / "new"), losses(folder / "distilled")
    assert cached.keys() == live.keys()
    for key, loss in live.items():
        assert cached[key] == pytest.approx(loss, rel=0.02), key


def test_only_those_who_can_learn_from_a_teacher_take_its_students(folder, distilled, tmp_path):
    config = read_config(folder / "distilled")
    with pytest.raises(ConfigError, match=r"distillation\.teacher"):
        train(replace(config, train=replace(config.train, out=str(tmp_path / "plain"))))


def test_of_all_its_layers_a_student_is_the_teacher(folder):
    teacher = load_model(folder / "run")
    model = teacher.config.model
    fresh = random_params(model)
    taken, words = start_from(teacher, model, fresh)
    jax.tree.map(np.testing.assert_array_equal, taken, teacher.params)
    assert words == "blocks 1, 2 of the teacher's 2, and all that is not in blocks"
    half = replace(model, n_layers=1, context_length=4)
    taken, words = start_from(teacher, half, random_params(half))
    assert words == "block 1 of the teacher's 2, and all that is not in blocks"
    kernel = "body", "blocks", "block_0", "feed_forward", "up", "kernel"
    mine, theirs = taken, teacher.params
    for name in kernel:
        mine, theirs = mine[name], theirs[name]
    np.testing.assert_array_equal(mine, theirs[:1])
    positions = teacher.params["positions"]["embedding"]
    np.testing.assert_array_equal(taken["positions"]["embedding"], positions[:4])


def test_what_does_not_fit_is_told_whole(folder):
    teacher = load_model(folder / "run")
    other = replace(teacher.config.model, d_model=32, activation="relu", n_heads=4)
    with pytest.raises(UserError) as error:
        start_from(teacher, other, random_params(other))
    for difference in ("d_model: 16 there, 32 here", "activation", "n_heads: 2 there, 4 here"):
        assert difference in str(error.value)


def test_layers_are_taken_evenly_and_of_the_same_kind():
    four, two = small(n_layers=4), small(n_layers=2)
    assert chosen_layers(four, two) == [0, 3]
    assert chosen_layers(small(n_layers=6), small(n_layers=3)) == [0, 2, 5]
    assert chosen_layers(four, small(n_layers=1)) == [0]
    assert chosen_layers(four, four) == [0, 1, 2, 3]
    mixed = ("full", "linear")
    assert chosen_layers(small(n_layers=4, attention=mixed), small(attention=mixed)) == [0, 3]
    assert chosen_layers(small(n_layers=4, attention=mixed), small(attention="full")) == [0, 2]
    assert "at most 2 fit" in chosen_layers(two, four)
    assert "no linear block is left" in chosen_layers(four, small(attention="linear"))


@pytest.mark.slow
def test_a_sparse_run_learns_and_stays_sparse_with_its_recipe(folder, tmp_path):
    def halve(model, corpus):
        def half(path, x):
            kept = np.arange(x.size).reshape(x.shape) % 2 == 0
            return x * kept if path[-1].key in ("kernel", "embedding") else x

        params = jax.tree_util.tree_map_with_path(half, model.params)
        config = replace(
            model.config,
            train=replace(model.config.train, steps=0),
            compression=replace(model.config.compression, keep_zeros=True),
        )
        return Made(config, params, {})

    sparse = tmp_path / "sparse"
    run_pass(str(folder / "run"), str(sparse), "halve", halve, sampler=lambda *told: "")
    summary = taught(folder, tmp_path / "new", sparse, steps=8)
    before, after = load_model(sparse).params, load_model(tmp_path / "new", "last").params
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old == 0, new == 0)
    assert summary["validation_loss"] < summary["compression"]["at_once"]["validation_loss"]
    recipe = read_config(tmp_path / "new").compression.recipe
    assert [line.split()[0] for line in recipe] == ["halve", "python"]


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(folder):
    """The teacher as a pass is given it."""
    model = load_model(folder / "run")
    return model._replace(config=corpus_of(model, folder / "run")[0])


def refused(teacher, folder, tmp_path, *changes, how=None, **options):
    """The message that a student of this config gets."""
    config = load(folder / "student.toml", changes)
    (tmp_path / "other.toml").write_text(to_toml(config))
    told = Distill(str(folder / "run"), str(tmp_path / "other.toml"), "", how or Teaching())
    with pytest.raises(UserError) as error:
        first_lesson(replace(told, **options), teacher, prepare(teacher.config.data))
    return str(error.value)


def test_tokenizers_that_differ_are_refused(teacher, folder, tmp_path):
    said = refused(teacher, folder, tmp_path, "--data.tokenizer", "byte")
    assert "its tokenizer is not the teacher's: byte of 256 entries there, char of 10" in said
    assert f'data.tokenizer_path = "{folder}/run/tokenizer.json"' in said
    (tmp_path / "corpus.txt").write_text("klmnopqrst " * 400)
    said = refused(teacher, folder, tmp_path, "--data.path", str(tmp_path / "corpus.txt"))
    assert "its tokenizer is not the teacher's" in said
    # The text may be another's, if the tokens are the teacher's.
    (tmp_path / "corpus.txt").write_text("abcdefghij" * 400)
    config = load(folder / "student.toml", ["--data.path", str(tmp_path / "corpus.txt")])
    (tmp_path / "fits.toml").write_text(to_toml(config))
    student = student_of(Distill(str(folder / "run"), str(tmp_path / "fits.toml"), ""), teacher)
    assert student.config.data.path == str(tmp_path / "corpus.txt")


def test_a_config_without_data_has_the_teachers(teacher, folder, tmp_path):
    (tmp_path / "bare.toml").write_text(
        "[model]\ncontext_length = 8\nd_model = 8\nn_layers = 1\nn_heads = 2\n"
    )
    student = student_of(Distill(str(folder / "run"), str(tmp_path / "bare.toml"), ""), teacher)
    assert student.config.data == teacher.config.data
    assert student.config.data.tokenizer_path == str(folder / "run" / "tokenizer.json")
    assert student.config.model.vocab_size == 10


def test_students_that_cannot_learn_from_this_teacher_are_refused(teacher, folder, tmp_path):
    def said(*changes, **options):
        return refused(teacher, folder, tmp_path, *changes, **options)

    assert "which is the most" in said("--model.context-length", "32")
    assert "the teacher's is 10" in said("--model.vocab-size", "12")
    assert "the vocabulary has 10 entries" in said(how=Teaching(cached_top_k=10))
    assert "nothing is left" in said(how=Teaching(on_policy=0.5, on_policy_prompt=16))
    assert "give the run as the student" in said("--train.init-from", str(folder / "run"))
    assert "model.d_model: 16 there, 8 here" in said(start_from_teacher=True)
    assert "say how many steps" in said(steps=0)
    assert "train.steps = -1" in said(steps=-1)
    assert "optimizer.learning_rate = -1" in said(learning_rate=-1.0)
    assert "a run, which starts from its own weights" in said(
        student=str(folder / "run"), start_from_teacher=True
    )


def test_settings_that_contradict_each_other_are_refused():
    for settings in ({"on_policy": 0.5}, {"matching": "cka"}):
        with pytest.raises(ConfigError, match="cached_top_k = 8"):
            Teaching(cached_top_k=8, **settings)
    with pytest.raises(ConfigError, match="nothing would be learned"):
        Teaching(alpha=0.0)


def test_a_teacher_that_changed_is_refused(folder, distilled):
    config = read_config(folder / "distilled")
    other = replace(config.distillation, teacher_digest="0" * 32)
    with pytest.raises(UserError, match="not those that this student began to learn from"):
        objective(replace(config, distillation=other))


def learns(folder, out):
    """The command by which a student of half the layers learns."""
    return ("compress.py", "distill", folder / "run", folder / "half.toml", out)


def test_the_command_says_what_is_wrong(folder, tmp_path):
    said = here(*learns(folder, tmp_path / "new"), "--temperature", "-1")
    assert said.returncode == 1
    assert "distillation.temperature" in said.output


@pytest.mark.slow
def test_the_command_says_what_came_of_it(folder, tmp_path):
    said = here(*learns(folder, tmp_path / "new"), "--start-from-teacher", "--steps", "8")
    assert said.returncode == 0, said.output
    assert "the student starts from block 1 of the teacher's 2" in said.output
    assert "a sample at step 8" in said.output
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["compression"]["teacher"]
