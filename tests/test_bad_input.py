"""What the person at the keyboard can get wrong while training, each with its message."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import pytest

from jaxdecoder.config import DataConfig, load
from jaxdecoder.data import tokenizers, vocabularies
from jaxdecoder.errors import UserError
from jaxdecoder.training.runs import load_model, lock
from jaxdecoder.training.single import train
from tests.runs import here, losses, script, write_config


def refuse(config, *overrides):
    """The message with which a config is refused."""
    with pytest.raises(UserError) as error:
        train(load(config, overrides))
    return str(error.value)


def test_a_missing_file(tmp_path):
    config = write_config(tmp_path)
    assert "nowhere.txt" in refuse(config, "--data.path", str(tmp_path / "nowhere.txt"))


def test_an_empty_corpus(tmp_path):
    assert "corpus.txt" in refuse(write_config(tmp_path, text=""))


def test_a_corpus_shorter_than_the_context(tmp_path):
    message = refuse(write_config(tmp_path, text="short"))
    assert "context_length" in message


def test_bytes_that_are_not_utf_8(tmp_path):
    config = write_config(tmp_path)
    (tmp_path / "corpus.txt").write_bytes(b"fine until here \xff\xfe" * 100)
    message = refuse(config)
    assert "corpus.txt" in message
    assert "UTF-8" in message
    assert "16" in message


def test_a_prompt_with_characters_never_seen(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    letters = vocabularies.build(DataConfig(tokenizer="char"), lambda: ["one two three"])
    tokenizers.save(letters, run / "tokenizer.json")
    said = here("sample.py", run, "--prompt", "qua ☃")
    assert said.returncode == 1
    assert said.output.startswith("error:")
    assert "☃" in said.output


def test_a_run_folder_that_belongs_to_another_config(tiny_run):
    message = refuse(tiny_run / "config.toml", "--model.d-model", "32")
    assert str(tiny_run) in message
    assert "model.d_model: 16 there, 32 here" in message
    assert "--train.out" in message


def test_a_corpus_that_changed_under_the_same_path(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    write_config(tmp_path, text="something else entirely " * 400)
    other = ("--data.path", str(tmp_path / "corpus.txt"))
    message = refuse(tiny_run / "config.toml", "--train.out", str(run), *other)
    assert "the corpus or the tokenizer is not the one that this run was started with" in message
    assert losses(run) == losses(tiny_run)


def test_a_run_that_was_refused_before_its_first_step_can_be_mended(tmp_path):
    config = write_config(tmp_path, text="too short for a context of five hundred tokens " * 9)
    assert "context_length" in refuse(config, "--model.context-length", "500")
    assert train(load(config))["steps"] == 24


def test_a_batch_that_does_not_divide_over_the_devices(tmp_path):
    process = script("train.py", write_config(tmp_path), "--train.cpu-devices", "3")
    assert process.returncode == 1
    said = " ".join(process.output.split())
    assert "train.batch_size = 8: does not divide over 3 devices" in said
    assert "9 would" in said


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path):
    message = refuse(write_config(tmp_path), "--model.vocab-size", "100")
    assert "model.vocab_size = 100: the tokenizer has 257 entries" in message


def test_two_processes_in_one_run_folder(tmp_path):
    config = write_config(tmp_path)
    with lock(tmp_path / "run"):
        message = refuse(config)
    assert "another process is training in this folder" in message


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = write_config(tmp_path)
    message = refuse(
        config,
        *("--optimizer.name", "sgd", "--optimizer.learning-rate", "1e4"),
        *("--optimizer.gradient-clip", "0", "--optimizer.warmup-steps", "0"),
        *("--optimizer.schedule", "constant", "--train.checkpoint-every", "1"),
    )
    assert message.startswith("step ")
    assert "the last good checkpoint is kept" in message
    named = int(message.split()[1].rstrip(":"))
    for which in ("last", "best"):
        model = load_model(tmp_path / "run", which)
        assert 0 < model.step < named
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.params))


def test_a_run_to_start_from_whose_weights_do_not_fit(tiny_run, tmp_path):
    config = write_config(tmp_path)
    message = refuse(config, "--train.init-from", str(tiny_run), "--model.n-layers", "3")
    assert "train.init_from" in message
    assert "model.n_layers: 2 there, 3 here" in message
    # Weights of the same shapes that mean something else are refused too.
    message = refuse(config, "--train.init-from", str(tiny_run), "--model.n-heads", "4")
    assert "model.n_heads: 2 there, 4 here" in message


def test_a_run_can_start_from_the_weights_of_another(tiny_run, tmp_path):
    config = write_config(tmp_path)
    summary = train(load(config, ["--train.init-from", str(tiny_run)]))
    first = min(losses(tiny_run))
    assert losses(tmp_path / "run")[first] < losses(tiny_run)[first] - 0.5
    assert summary["steps"] == 24


def test_a_folder_that_is_no_run(tmp_path):
    said = here("sample.py", tmp_path)
    assert said.returncode == 1
    assert "not a run folder" in said.output


@pytest.mark.slow
def test_a_full_disk_ends_with_a_message_and_the_run_goes_on_later(tiny_run, tmp_path):
    config, run = tiny_run / "config.toml", tmp_path / "run"
    process = script("train.py", config, "--train.out", run, longest_file=20_000)
    assert process.returncode == 1, process.output
    said = " ".join(process.output.split())
    assert "no space left for what training writes" in said
    assert "run the same command again" in said
    train(load(config, ["--train.out", str(run)]))
    assert losses(run) == losses(tiny_run)


def test_a_run_whose_every_checkpoint_is_broken_says_so(tiny_run, tmp_path):
    run = tmp_path / "broken"
    shutil.copytree(tiny_run, run)
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    said = here("sample.py", run)
    assert said.returncode == 1
    assert "no checkpoint there can be read" in said.output


def test_no_checkpoint_is_thrown_away_when_none_can_be_read(tiny_run, tmp_path):
    run = tmp_path / "broken"
    shutil.copytree(tiny_run, run)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and file.parent.name != "metrics":
            file.write_bytes(b"")
    message = refuse(tiny_run / "config.toml", "--train.out", str(run))
    assert "none of these checkpoints can be read" in message
    assert all((run / "checkpoints" / name).is_dir() for name in kept)
    assert losses(run) == losses(tiny_run)


def test_a_checkpoint_whose_loss_cannot_be_read_is_set_aside_and_said(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "checkpoints" / "24" / "metrics" / "metrics").write_text("{")
    train(load(tiny_run / "config.toml", ["--train.out", str(run)]))
    said = capsys.readouterr().out
    assert "checkpoint 24 cannot be read (its noted loss cannot be read)" in said
    assert "going on at step 20" in said
    assert losses(run) == losses(tiny_run)
