"""The scripts as a person uses them: what a run leaves behind, and how to talk to it."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxdecoder.config import load
from jaxdecoder.data import tokenizers
from jaxdecoder.training.runs import load_model, read_config
from tests.runs import here, losses, script


@pytest.fixture(scope="module")
def run(tiny_run):
    return tiny_run


def test_a_run_is_a_folder_with_all_that_is_needed(run):
    assert "--- a sample at step 12 ---" in (run.parent / "said.txt").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 24
    assert summary["tokens"] == 24 * 8 * 16
    assert summary["validation_loss"] < 5
    assert {"train_loss", "bits_per_byte", "seconds", "parameters"} <= summary.keys()
    config = read_config(run)
    assert config.model.vocab_size == 257
    assert config.model.d_ff == 64
    assert tokenizers.load(run / "tokenizer.json").vocab_size == 257
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "samples.txt").read_text().count("--- step") == 2
    assert list((run / "tensorboard").glob("events*"))


def test_metrics_have_a_line_a_step_with_what_is_known(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 25))
    for line in logged:
        assert {"learning_rate", "gradient_norm"} <= line.keys()
        # The first call's time is that of compiling.
        assert ("tokens_per_second" in line) == (line["step"] > 4)
    assert {step for step, name in losses(run) if name == "validation_loss"} == {
        4,
        8,
        12,
        16,
        20,
        24,
    }


def test_the_last_few_checkpoints_and_the_best_are_kept(run):
    steps = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
    found = losses(run)
    best = min(
        (step for step, name in found if name == "validation_loss"),
        key=lambda step: found[step, "validation_loss"],
    )
    assert steps == {12, 16, 20, 24, best}
    assert load_model(run, "last").step == 24
    assert load_model(run, "best").step == best


def test_the_config_that_a_run_wrote_describes_the_same_run(run, tmp_path):
    assert load(run / "config.toml").train.out == str(run)
    # Training again with it is a run that is finished already.
    shutil.copytree(run, tmp_path / "run")
    said = here("train.py", run / "config.toml", "--train.out", tmp_path / "run")
    assert said.returncode == 0, said.output
    assert "going on at step 24" in " ".join(said.output.split())


def sample(run, *arguments, stdin="") -> str:
    said = here("sample.py", run, "--max-new-tokens", "20", *arguments, stdin=stdin)
    assert said.returncode == 0, said.output
    return said.output


def test_the_same_seed_says_the_same_again(run):
    first = sample(run, "--prompt", "two ", "--seed", "3")
    assert first.startswith("two ")
    assert first == sample(run, "--prompt", "two ", "--seed", "3")
    assert first != sample(run, "--prompt", "two ", "--seed", "4")


def test_several_prompts_and_samples_come_whole(run):
    texts = sample(run, "--prompt", "two ", "three four ", "--num-samples", "2").split("\n---\n")
    assert [text.split()[0] for text in texts] == ["two", "two", "three", "three"]


def test_a_prompt_can_come_from_a_file_or_the_standard_input(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("five six ")
    greedy = ("--temperature", "0")
    said = sample(run, "--prompt", "five six ", *greedy)
    assert sample(run, "--prompt-file", tmp_path / "prompt.txt", *greedy) == said
    assert sample(run, "--prompt-file", "-", *greedy, stdin="five six ") == said


def test_filters_are_refused_outside_their_range(run):
    process = script("sample.py", run, "--top-p", "1.5")
    assert process.returncode == 1
    assert "top_p = 1.5: must be in (0, 1]" in process.output


def test_an_exit_threshold_is_for_models_with_exits(run):
    said = here("sample.py", run, "--exit-threshold", "0.5")
    assert said.returncode != 0
    assert 'model.depth = "fixed"' in said.output
