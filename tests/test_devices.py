"""Eight devices compute what one does, with parameters replicated and with them split."""

from __future__ import annotations

import math

import jax
import pytest
from jax.sharding import AbstractMesh

from jaxdecoder.config import Config, ModelConfig
from jaxdecoder.training.sharding import batch_sharding, everywhere, state_sharding
from jaxdecoder.training.step import init_state
from tests.runs import devices, here, losses, script


def assert_losses_of_one(run, tiny_run):
    one, several = losses(tiny_run), losses(run)
    assert one.keys() == several.keys()
    assert len(one) > 40
    for key, value in one.items():
        assert several[key] == pytest.approx(value, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(), ("--mesh.data", "2", "--mesh.fsdp", "-1")], ids=str)
def test_eight_devices_give_the_losses_of_one(tiny_run, tmp_path, sizes):
    command = ("train.py", tiny_run.parent / "tiny.toml", "--train.out", tmp_path)
    process = script(*command, *sizes, XLA_FLAGS=devices(8))
    assert process.returncode == 0, process.output
    assert "on 8 cpu devices" in " ".join(process.output.split())
    assert_losses_of_one(tmp_path, tiny_run)
    # What eight devices trained one can sample.
    said = here("sample.py", tmp_path, "--prompt", "one ", "--max-new-tokens", "5")
    assert said.returncode == 0, said.output
    assert said.output.startswith("one ")


def test_fsdp_splits_every_matrix_and_its_moments():
    config = Config(model=ModelConfig(vocab_size=64, d_model=16, n_heads=2, context_length=16))
    shapes = jax.eval_shape(lambda: init_state(config))
    where = state_sharding(shapes, AbstractMesh((8,), ("fsdp",)), config.architecture)
    split = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(where), strict=True
    ):
        share = leaf.size // math.prod(sharding.shard_shape(leaf.shape))
        matrix = jax.tree_util.keystr(path).endswith(("['kernel']", "['embedding']"))
        assert share == (8 if matrix else 1), path
        split += matrix
    assert split == 3 * 9  # parameters, and Adam's two moments of each


def test_batches_are_split_over_the_devices_row_by_row():
    mesh = AbstractMesh((8,), ("data",))
    assert batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)
    assert batch_sharding(mesh, 1).shard_shape((4, 16, 5)) == (4, 2, 5)
    assert everywhere(mesh).shard_shape((16, 5)) == (16, 5)
