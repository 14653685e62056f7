"""Ctrl-C and SIGTERM lose nothing: what is new is saved, and the same command goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxdecoder.config import load
from jaxdecoder.training.checkpoints import steps_in
from jaxdecoder.training.runs import load_model
from jaxdecoder.training.single import train
from jaxdecoder.training.stopping import listening
from tests.runs import here, losses, script, write_config
from tests.test_resume import assert_same_bits, final_state, steps_logged

LONG = ("--train.steps", "1500", "--train.checkpoint-every", "1000")
LONG += ("--train.evaluate-every", "500", "--train.log-every", "1")


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_has_saved_all_and_ends_with_the_bits_of_one_never_stopped(tmp_path, number):
    config, run, whole = write_config(tmp_path), tmp_path / "run", tmp_path / "whole"
    process = script("train.py", config, *LONG, wait=False)
    wait_for(lambda: steps_logged(run) > 0)
    process.send_signal(number)
    start = time.monotonic()
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert time.monotonic() - start < 60
    (step,) = steps_in(run / "checkpoints")[:1]
    assert f"stopped at step {step:,} of 1,500, which is saved" in said
    assert f"to go on: python train.py {config} --train.steps 1500" in said
    assert 0 < step == steps_logged(run)
    assert load_model(run, "last").step == step
    assert here("train.py", config, *LONG).returncode == 0
    train(load(config, [*LONG, "--train.out", str(whole)]))
    assert losses(run) == losses(whole)
    assert_same_bits(final_state(run), final_state(whole))


PROGRAM = """
import sys, time
from jaxdecoder.errors import friendly
from jaxdecoder.training.stopping import listening

@friendly
def main():
    with listening() as stop:
        stop.idle = "idle" in sys.argv
        print("ready", flush=True)
        while "politely" not in sys.argv or not stop.requested:
            time.sleep(0.01)
        stop.check()

main()
"""


def listener(*how):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_the_process_at_once():
    process = listener()
    process.send_signal(signal.SIGINT)
    assert "a second time stops at once" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)  # a sender may tell a process and its group
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


def test_where_nothing_is_to_be_saved_one_signal_is_enough():
    process = listener("idle")
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert "nothing new was to be saved" in process.stderr.read()


def test_who_is_stopped_says_how_to_go_on():
    process = listener("politely", "two words")
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert "to go on: python -c politely 'two words'" in process.stderr.read()


def test_listening_leaves_the_handlers_as_they_were():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with listening() as stop:
        assert signal.getsignal(signal.SIGINT) != before[0]
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: stop.requested, 5)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert not [t for t in threading.enumerate() if "_listen" in t.name]


def test_another_thread_is_never_asked():
    found = []

    def run():
        with listening() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_checkpoints_are_due_by_the_clock_too(tiny_run, tmp_path):
    """However often: the same bits, and the same best model."""
    often = ("--train.checkpoint-minutes", "1e-9", "--train.keep", "99")
    train(load(tiny_run.parent / "tiny.toml", [*often, "--train.out", str(tmp_path)]))
    assert steps_in(tmp_path / "checkpoints") == [24, 20, 16, 12, 8, 4]
    given = [*often, "--train.checkpoint-every", "12", "--train.out", str(tmp_path / "rare")]
    train(load(tiny_run.parent / "tiny.toml", given))
    assert steps_in(tmp_path / "rare" / "checkpoints") == [24, 20, 16, 12, 8, 4]
    assert losses(tmp_path) == losses(tiny_run)
    assert_same_bits(final_state(tmp_path), final_state(tiny_run))
    assert load_model(tmp_path / "rare").step in (12, 24)


ABLATION = """
base = "tiny.toml"
seeds = 2
learning_rates = [1e-2]
claims = ["norm=layernorm beats norm=none"]
[overrides]
train.steps = 600
train.checkpoint_every = 1000
train.evaluate_every = 300
[factors]
model.norm = ["layernorm", "none"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_ablation_goes_on_where_it_was(tmp_path, number):
    write_config(tmp_path)
    (tmp_path / "x.toml").write_text(ABLATION)
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = script("ablate.py", tmp_path / "x.toml", "--out", out, wait=False)
    wait_for(lambda: [p for p in out.glob("members/*/metrics.jsonl") if p.stat().st_size > 9000])
    process.send_signal(number)
    start = time.monotonic()
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert time.monotonic() - start < 60
    assert "to go on: python ablate.py" in said
    (saved, *_) = [steps_in(path) for path in out.glob("programs/*/*/checkpoints")]
    assert 0 < saved[0] < 600
    for folder in (out, whole):
        process = script("ablate.py", tmp_path / "x.toml", "--out", folder)
        assert process.returncode == 0, process.output
    for member in (whole / "members").iterdir():
        assert losses(out / "members" / member.name) == losses(member)


@pytest.mark.slow
def test_a_stopped_recovery_of_a_pruned_model_goes_on_where_it_was(tiny_run, tmp_path):
    command = ["compress.py", "prune", tiny_run, tmp_path / "cut", "--method", "magnitude"]
    command += ["--sparsity", "0.5", "--recover-steps", "160"]
    process = script(*command, wait=False)
    wait_for(lambda: steps_logged(tmp_path / "cut") > 12)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "to go on: python compress.py prune" in said
    assert 0 < steps_in(tmp_path / "cut" / "checkpoints")[0] == steps_logged(tmp_path / "cut")
    assert here(*command).returncode == 0
    command[3] = tmp_path / "whole"
    assert here(*command).returncode == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_bits(final_state(tmp_path / "cut"), final_state(tmp_path / "whole"))
