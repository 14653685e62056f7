"""A run can be killed at any moment: it goes on where it stopped and ends with the same bits."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdecoder.config import load
from jaxdecoder.training import single
from jaxdecoder.training.checkpoints import open_checkpoints, restore_latest, steps_in
from jaxdecoder.training.loop import boundary, steps_a_call
from jaxdecoder.training.record import saves
from jaxdecoder.training.runs import load_model, read_config
from jaxdecoder.training.single import train
from jaxdecoder.training.step import init_state
from tests.runs import losses, script, write_config

KILLS = int(os.environ.get("JAXDECODER_KILLS", "4"))


def final_state(run: Path):
    """Everything the last checkpoint holds."""
    like = jax.eval_shape(lambda: init_state(read_config(run)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with open_checkpoints(run, read_only=True) as manager:
        found = restore_latest(manager, like)
    assert found is not None
    return found[1]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    config = write_config(tmp_path)
    long = ("--train.steps", "400", "--train.checkpoint-every", "20", "--train.keep", "20")
    long += ("--model.dropout", "0.1")
    reference, run = tmp_path / "reference", tmp_path / "killed"
    process = script("train.py", config, *long, "--train.out", reference)
    assert process.returncode == 0, process.output

    draw = random.Random(0)
    went_on = []
    for _ in range(KILLS):
        process = script("train.py", config, *long, "--train.out", run, wait=False)
        begun = steps_logged(run)
        # Most kills fall while it trains and saves, some while it starts.
        if draw.random() < 0.8:
            while steps_logged(run) <= begun and process.poll() is None:
                time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 2.0))
        process.kill()
        said = " ".join(process.communicate()[0].split())
        if "going on at step" in said:
            went_on.append(int(said.split("going on at step ")[1].split()[0]))
        if steps_logged(run) == 400:
            shutil.rmtree(run)  # so that every kill hits something
    assert went_on
    assert max(went_on) > 0
    process = script("train.py", config, *long, "--train.out", run)
    assert process.returncode == 0, process.output
    assert losses(run) == losses(reference)
    assert_same_bits(final_state(run), final_state(reference))


def steps_logged(run: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split(",")[0].split(":")[1]) if lines and "," in lines[-1] else 0


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_is_used(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    last = run / "checkpoints" / "24"
    files = sorted((p for p in last.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    for file in files[-3:]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train(load(tiny_run / "config.toml", ["--train.out", str(run)]))
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint 24 cannot be read" in said
    assert "going on at step 20" in said
    assert (run / "damaged" / "24").is_dir()
    assert losses(run) == losses(tiny_run)
    assert_same_bits(final_state(run), final_state(tiny_run))


@pytest.mark.parametrize("which", range(3))
def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_used(
    tiny_run, tmp_path, capsys, which
):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    last = run / "checkpoints" / "24"
    files = sorted((p for p in last.glob("*/d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(files[-1 - which].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1 - which].write_bytes(content)
    if "params" in str(files[-1 - which]) or "ema" in str(files[-1 - which]):
        assert load_model(run, "last").step in (20, 24)  # it reads the average alone
    train(load(tiny_run / "config.toml", ["--train.out", str(run)]))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{files[-1 - which].name} is not as it was saved" in said
    assert "going on at step 20" in said
    assert_same_bits(final_state(run), final_state(tiny_run))


def test_a_damaged_line_of_metrics_costs_that_line_alone(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:9]
    path.write_text("\n".join(["[]", '{"step": "x"}', *lines, '{"step": 24, "train']))
    train(load(tiny_run / "config.toml", ["--train.out", str(run)]))
    expected = losses(tiny_run)
    missing = expected.keys() - losses(run).keys()
    assert {step for step, _ in missing} == {4}
    assert all(line.endswith("}") for line in path.read_text().splitlines())


def test_calls_end_where_the_step_alone_says(tmp_path):
    config = load(write_config(tmp_path), ["--train.steps", "30", "--train.steps-per-call", "7"])
    ends, step = [], 0
    while step < 30:
        step = boundary(step, config, 7)
        ends.append(step)
    assert ends == [4, 7, 8, 12, 14, 16, 20, 21, 24, 28, 30]
    assert all(boundary(inside, config, 7) == end for end in ends for inside in (end - 1,))


@pytest.mark.parametrize(
    ("every", "saved"),
    [
        (0, [10, 20, 30, 40, 50, 60, 70, 80, 90]),
        (5, [10, 20, 30, 40, 50, 60, 70, 80, 90]),
        (25, [30, 35, 60, 70, 90]),  # the next evaluation is no more than that away
        (1000, [35, 70]),
    ],
)
def test_better_models_are_saved_no_more_often_than_asked(tmp_path, every, saved):
    given = {"steps": 95, "evaluate-every": 10, "checkpoint-every": 35, "best-every": every}
    config = load(
        write_config(tmp_path), [f"--train.{name}={value}" for name, value in given.items()]
    )
    evaluated = [*range(10, 95, 10)]
    better = [step for step in [*evaluated, 35, 70] if saves(step, config, better=True)]
    assert sorted({*better}) == sorted({*saved, 35, 70})
    assert [step for step in [*evaluated, 35, 95] if saves(step, config, better=False)] == [
        70,
        35,
        95,
    ]


def test_a_better_model_is_better_than_those_that_were_saved(tmp_path, monkeypatch):
    """Step 4 is the best, but not saved; step 6 is, which a run resumed after 4 does as well."""
    validation = iter([3.0, 1.0, 2.0, 4.0])  # after 2, 4, 6 and 8 steps; at the end 5.0
    monkeypatch.setattr(single, "make_evaluator", lambda _: lambda *_: next(validation, 5.0))
    given = {"steps": 8, "evaluate-every": 2, "checkpoint-every": 100, "best-every": 6}
    overrides = [f"--train.{name}={value}" for name, value in given.items()]
    summary = train(load(write_config(tmp_path), overrides))
    assert steps_in(tmp_path / "run" / "checkpoints") == [8, 6]
    assert summary["best_validation_loss"] == 2.0


@pytest.mark.slow
def test_a_resumed_run_saves_better_models_at_the_same_steps(tmp_path):
    """Evaluated every 2 steps and saved every 6 if better: cut anywhere, it keeps the same."""
    config = write_config(tmp_path)
    given = ["--train.evaluate-every", "2", "--train.checkpoint-every", "8"]
    given += ["--train.best-every", "5", "--train.keep", "100"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(load(config, [*given, "--train.out", str(whole)]))
    expected = steps_in(whole / "checkpoints")
    assert set(expected) <= {6, 8, 12, 16, 18, 24}
    assert {6, 12} & set(expected)
    train(load(config, [*given, "--train.out", str(cut)]))
    for step in expected[1:3]:
        shutil.rmtree(cut / "checkpoints" / str(step))
    shutil.rmtree(cut / "checkpoints" / str(expected[0]))
    train(load(config, [*given, "--train.out", str(cut)]))
    assert steps_in(cut / "checkpoints") == expected
    assert_same_bits(final_state(cut), final_state(whole))


@pytest.mark.parametrize(
    ("steps", "every", "most", "chosen"),
    [
        (250, 125, 50, 25),  # one program of 25 steps instead of two, of 50 and of 25
        (5000, 500, 50, 50),
        (250, 1000, 50, 50),  # a checkpoint that is never reached does not matter
        (1000, 300, 30, 25),
        (997, 250, 10, 10),  # nothing between 3 and 10 divides both
        (24, 12, 1, 1),
    ],
)
def test_calls_are_equally_long_where_they_can_be(tmp_path, steps, every, most, chosen):
    given = {"steps": steps, "evaluate-every": every, "checkpoint-every": 5000}
    config = load(
        write_config(tmp_path),
        [text for name, n in given.items() for text in (f"--train.{name}", str(n))],
    )
    assert steps_a_call(config, most) == chosen


def test_a_finished_run_trains_no_further_and_repeats_its_summary(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    summary = train(load(tiny_run / "config.toml", ["--train.out", str(run)]))
    assert losses(run) == losses(tiny_run)
    assert summary["steps"] == 24
