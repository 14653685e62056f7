"""Eight devices compute what one does, with parameters replicated and with them split."""

from __future__ import annotations

import math
import socket

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxdecoder.config import Config, ModelConfig
from jaxdecoder.training.sharding import state_sharding
from jaxdecoder.training.step import init_state
from tests.runs import devices, losses, script, write_config

EIGHT = devices(8)


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    config = write_config(folder)
    common = ("--train.steps", "20", "--optimizer.name", "adamw")
    process = script("train.py", config, *common, "--train.out", folder / "one")
    assert process.returncode == 0, process.output
    return folder, (config, *common)


@pytest.mark.parametrize("fsdp", [False, True], ids=["replicated", "fsdp"])
def test_eight_devices_give_the_losses_of_one(configured, fsdp):
    folder, command = configured
    out = folder / f"eight_{fsdp}"
    process = script(
        *("train.py", *command, "--train.out", out),
        *(["--train.fsdp"] if fsdp else []),
        XLA_FLAGS=EIGHT,
    )
    assert process.returncode == 0, process.output
    assert "on 8 cpu devices" in " ".join(process.output.split())
    one, eight = losses(folder / "one"), losses(out)
    assert len(one) == len(eight) > 40
    for key, value in one.items():
        assert eight[key] == pytest.approx(value, abs=1e-4), key


def test_what_eight_devices_trained_one_can_sample(configured):
    folder, command = configured
    out = folder / "eight_True"
    process = script("train.py", *command, "--train.out", out, "--train.fsdp", XLA_FLAGS=EIGHT)
    assert process.returncode == 0, process.output
    process = script("sample.py", out, "--prompt", "one ", "--max-new-tokens", "5")
    assert process.returncode == 0, process.output
    assert process.output.startswith("one ")


def test_two_hosts_give_the_losses_of_one(configured):
    folder, command = configured
    out = folder / "hosts"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        script(
            *("train.py", *command, "--train.out", out),
            wait=False,
            **together,
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "on 2 cpu devices" in said[0]
    assert "training tokens" not in said[1]  # the first host speaks for all
    one, two = losses(folder / "one"), losses(out)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-4), key


def test_fsdp_splits_every_matrix_and_its_moments():
    config = Config(model=ModelConfig(vocab_size=64, d_model=16, n_heads=2, context_length=16))
    shapes = jax.eval_shape(lambda: init_state(config))
    where = state_sharding(shapes, AbstractMesh((8,), ("data",)), fsdp=True)
    split = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(where), strict=True
    ):
        share = leaf.size // math.prod(sharding.shard_shape(leaf.shape))
        matrix = jax.tree_util.keystr(path).endswith(("['kernel']", "['embedding']"))
        assert share == (8 if matrix else 1), path
        split += matrix
    assert split == 3 * 9  # parameters, and Adam's two moments of each
