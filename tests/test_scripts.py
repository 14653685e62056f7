"""The scripts as a person uses them: what a run leaves behind, and how to talk to it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jaxdecoder.config import load
from jaxdecoder.data import tokenizers
from jaxdecoder.training.runs import load_model, read_config
from tests.runs import ROOT, losses, script, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run with all there is to write down."""
    folder = tmp_path_factory.mktemp("scripts")
    process = script(
        *("train.py", write_config(folder), "--train.tensorboard"),
        *("--train.sample-every", "12", "--train.sample-prompt", "one "),
    )
    assert process.returncode == 0, process.output
    assert "--- a sample at step 12 ---" in process.output
    return folder / "run"


def test_a_run_is_a_folder_with_all_that_is_needed(run):
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
    assert steps == {16, 20, 24, best}
    assert load_model(run, "last").step == 24
    assert load_model(run, "best").step == best


def test_the_config_that_a_run_wrote_describes_the_same_run(run):
    # Training again with it is a run that is finished already.
    assert load(run / "config.toml").train.out == str(run)
    process = script("train.py", run / "config.toml")
    assert process.returncode == 0, process.output
    assert "going on at step 24" in " ".join(process.output.split())


def sample(run, *arguments, stdin=None) -> str:
    process = subprocess.run(
        [sys.executable, "sample.py", str(run), "--max-new-tokens", "20", *arguments],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout


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
    assert sample(run, "--prompt-file", str(tmp_path / "prompt.txt"), *greedy) == said
    assert sample(run, "--prompt-file", "-", *greedy, stdin="five six ") == said


def test_filters_are_refused_outside_their_range(run):
    process = script("sample.py", run, "--top-p", "1.5")
    assert process.returncode == 1
    assert "top_p = 1.5: must be in (0, 1]" in process.output


def test_an_exit_threshold_is_for_models_with_exits(run):
    process = script("sample.py", run, "--exit-threshold", "0.5")
    assert process.returncode != 0
    assert 'model.depth = "fixed"' in process.output
