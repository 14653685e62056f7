"""A mesh of devices: its table in the config, where it puts arrays, and that it changes no loss."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from test_flash_attention import H200, Case, attend, close, make

from benchmarks import meshes
from jaxdecoder.config import Config, ConfigError, ModelConfig, OptimizerConfig, load, to_toml
from jaxdecoder.config.sections import MeshConfig
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import flash, flash_attention, masks, scores
from jaxdecoder.kernels.mesh import AXES, spec, split
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.training.optimizers import OPTIMIZERS
from jaxdecoder.training.sharding import left_whole, state_sharding
from jaxdecoder.training.step import init_state
from tests.runs import ROOT, devices, losses, script

MODEL = ModelConfig(vocab_size=64, d_model=16, n_heads=4, d_ff=32, context_length=16, n_layers=2)


def mesh(**sizes):
    """A mesh of these sizes, without devices."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


# --- The table [mesh] --------------------------------------------------------------------------


def test_the_size_that_is_left_out_takes_the_devices_that_remain():
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    assert MeshConfig(tensor=2, context=2).sizes(8)["data"] == 2
    assert MeshConfig(data=2, fsdp=-1).sizes(8)["fsdp"] == 4
    assert MeshConfig(data=2, fsdp=2, tensor=2).sizes(8)["context"] == 1


@pytest.mark.parametrize(
    ("sizes", "key", "why"),
    [
        ({"tensor": 0}, "mesh.tensor", "at least 1"),
        ({"context": -2}, "mesh.context", "at least 1"),
        ({"fsdp": -1}, "mesh.fsdp", "give mesh.data a number"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(sizes, key, why):
    with pytest.raises(ConfigError, match=why) as error:
        MeshConfig(**sizes)
    assert str(error.value).startswith(key)


@pytest.mark.parametrize(
    ("sizes", "key", "why"),
    [
        ({"tensor": 3}, "mesh.tensor", "does not divide 8 devices; 1 or 2 or 4 or 8 would do"),
        ({"data": 4}, "mesh.data", "8 would do, or -1"),
        ({"data": 4, "tensor": 4}, "mesh.data", "is not 8 devices; 2 would do"),
        ({"data": 1, "fsdp": 5, "tensor": 3}, "mesh.fsdp", "no size would do"),
    ],
)
def test_sizes_that_are_not_the_number_of_devices_are_refused(sizes, key, why):
    with pytest.raises(ConfigError, match=why) as error:
        MeshConfig(**sizes).sizes(8)
    assert str(error.value).startswith(key)


def test_an_old_config_with_fsdp_means_the_same(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text("[train]\nfsdp = true\nsteps = 5\n")
    assert load(path).mesh == MeshConfig(data=1, fsdp=-1)
    assert load(path).train.steps == 5
    path.write_text("[train]\nfsdp = false\n")
    assert load(path).mesh == MeshConfig()
    assert "fsdp = false" not in to_toml(load(path))
    path.write_text("[train]\nfsdp = true\n[mesh]\ntensor = 2\n")
    with pytest.raises(UserError, match=r"train\.fsdp = true: is mesh\.fsdp = -1"):
        load(path)


# --- Where arrays are --------------------------------------------------------------------------


def test_a_name_is_split_over_as_many_of_its_axes_as_divide_it():
    shape = {"data": 2, "fsdp": 2, "context": 1, "tensor": 4}
    assert spec(("batch", "tokens", "heads", None), (8, 6, 8, 3), shape) == PartitionSpec(
        ("data", "fsdp"), None, ("tensor",), None
    )
    assert spec(("batch", "heads"), (2, 6), shape) == PartitionSpec(("data",), None)
    assert spec(("heads", "neurons"), (8, 8), shape) == PartitionSpec(("tensor",), None)


def test_without_a_mesh_nothing_is_said_of_an_array():
    x = jnp.ones((2, 2))
    assert split(x, "batch", "tokens") is x


def shares(model, sizes, optimizer="adamw"):
    """How many parts each array of a training state is in, by its path."""
    config = Config(model=model, optimizer=OptimizerConfig(name=optimizer))
    shapes = jax.eval_shape(lambda: init_state(config))
    where = jax.tree.leaves(state_sharding(shapes, mesh(**sizes), config.architecture))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            math.prod(leaf.shape) // math.prod(sharding.shard_shape(leaf.shape)),
            leaf,
        )
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), where, strict=True
        )
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_matrix_and_all_that_an_optimiser_keeps_of_it_is_split(optimizer):
    model = dataclasses.replace(MODEL, d_model=128, d_ff=128)  # adafactor factors large ones only
    found = shares(model, {"fsdp": 2, "tensor": 2}, optimizer)
    matrices = {
        path: parts
        for path, (parts, leaf) in found.items()
        if path.endswith(("kernel", "embedding")) and "positions" not in path and leaf.ndim > 1
    }
    factored = {
        path: parts for path, parts in matrices.items() if "v_row" in path or "v_col" in path
    }
    assert bool(factored) == (optimizer == "adafactor")
    whole = {path: parts for path, parts in matrices.items() if path not in factored}
    assert set(whole.values()) == {4}
    assert len(matrices) > sum(path.startswith("params/") for path in matrices)
    assert set(factored.values()) <= {2}  # of two axes that are split, one is summed
    assert all(parts == 1 for path, (parts, _) in found.items() if path.endswith(("scale", "bias")))


def test_heads_are_never_cut_and_what_does_not_divide_stays_whole():
    model = dataclasses.replace(MODEL, n_kv_heads=2, vocab_size=65)
    found = shares(model, {"tensor": 4})
    [query], [key] = (
        [parts for path, (parts, _) in found.items() if path.endswith(f"{name}/kernel")][:1]
        for name in ("attention/query", "attention/key")
    )
    assert (query, key) == (4, 1)
    assert found["params/embedding"][0] == 1
    assert left_whole(Config(model=model), mesh(tensor=4)) == [
        "model.n_kv_heads = 2 does not divide by mesh.tensor = 4",
        "model.vocab_size = 65 does not divide by mesh.tensor = 4",
    ]


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"context": 3}, "mesh.context = 3: model.context_length = 16: none divides; 2 would do"),
        ({"fsdp": 3}, "mesh.fsdp = 3: model.d_model = 16: none divides; 2 would do"),
        ({"tensor": 7}, "mesh.tensor = 7: .*none divides; 4 would do"),
    ],
)
def test_an_axis_that_splits_nothing_is_refused(sizes, why):
    with pytest.raises(ConfigError, match=why):
        left_whole(Config(model=MODEL), mesh(**sizes))


# --- Attention over a mesh ---------------------------------------------------------------------

SPLIT = {"data": 2, "context": 2, "tensor": 2}
CASES = {
    "all at once": Case(q_time=64, k_time=64, score="bias", rate=0.2, segments=True, seed=3),
    "a key head for all": Case(q_time=64, k_time=64, kv_heads=1, group=4, mask="window_and_first"),
    "nothing divides": Case(batch=3, q_time=37, k_time=37, kv_heads=3, group=1, score="alibi"),
    "blocks": Case(q_time=256, k_time=256, mask="strided", score="alibi", rate=0.1, seed=5),
}


def check_attention():
    """Outputs and gradients are those of one device, whichever weights are dropped."""
    over = jax.make_mesh(
        tuple(SPLIT.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 4
    )
    for case in CASES.values():
        made = make(case)

        def both(implementation, case=case, made=made):
            def attended(q, k, v, operands):
                return attend(case, implementation, q, k, v, operands, made.segments)

            out, pull = jax.vjp(attended, made.q, made.k, made.v, made.operands)
            return out, pull(made.dout)

        wanted = jax.jit(functools.partial(both, "reference"))()
        for implementation in ("reference", "rows", "chunked"):
            with jax.set_mesh(over):
                found = jax.jit(functools.partial(both, implementation))()
            close(found, wanted, 1e-4)


def in_devices(count, call):
    """Calls a function of this module in a process with so many devices."""
    environment = os.environ | {
        "XLA_FLAGS": devices(count),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    }
    command = [sys.executable, "-c", f"import test_meshes; test_meshes.{call}"]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_attention_over_a_mesh_is_that_of_one_device():
    in_devices(8, "check_attention()")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize(
    ("implementation", "score", "mark"),
    [("portable", "bias", "triton"), ("hopper", "alibi", "mosaic_gpu")],
)
def test_kernels_for_gpus_lower_for_every_part_of_the_sequence(implementation, score, mark):
    large = {"batch": 4, "q_time": 512, "k_time": 512, "width": 64, "dtype": "bfloat16"}
    case = Case(score=score, rate=0.1, **large)
    q, k, v, dout, operands = jax.eval_shape(lambda: make(case)[:5])
    sizes = tuple(SPLIT.get(axis, 1) for axis in AXES)
    over = H200.update(axis_sizes=sizes, axis_names=AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(over):

        def gradients(q, k, v, dout, operands):
            attended = functools.partial(attend, case, implementation)
            return jax.vjp(attended, q, k, v, operands)[1](dout)

        traced = jax.jit(gradients).trace(q, k, v, dout, operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(mark) >= SPLIT["context"]


# --- Whole steps -------------------------------------------------------------------------------


def check_losses(layout, attention, names):
    """The losses of 20 steps, dropout included, are those of one device."""
    folder = Path(os.environ["FOLDER"])
    chosen = {name: meshes.MESHES[name] for name in names}
    for row in meshes.rows([attention], [layout], folder, chosen):
        assert row["apart"] < 1e-4, row
        parts = dataclasses.asdict(chosen[row["mesh"]])
        matrices = parts["fsdp"] * parts["tensor"]
        assert row["share"] < 1.4 / matrices if matrices > 1 else row["share"] == 1, row


# Every mechanism, and every layout; `python -m benchmarks.meshes` has all pairs and meshes.
PAIRS = [*((name, "serial") for name in ATTENTIONS), *(("full", layout) for layout in LAYOUTS)]


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "layout"), dict.fromkeys(PAIRS))
def test_losses_are_those_of_one_device(layout, attention, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    names = ("data 2, context 2, tensor 2", *(["fsdp 8"] if attention == "full" else []))
    assert set(LAYOUTS) == {layout for _, layout in PAIRS}
    in_devices(8, f"check_losses({layout!r}, {attention!r}, {names})")


VARIANTS = {
    "mixture of depths": {"depth": "mixture_of_depths", "position": "t5"},
    "exits": {"depth": "early_exit", "position": "alibi", "exit_minimum": 1},
    "copying": {
        "copying": True,
        "tie_embeddings": True,
        "convolution_width": 3,
        "position": "learned",
    },
    "a head of its own": {"tie_embeddings": False, "head_bias": True, "logit_softcap": 30.0},
}


def check_variant(name):
    """The same of a model with other parts, in two passes a step."""
    own = meshes.config("full", "serial", Path(os.environ["FOLDER"]))
    model = dataclasses.replace(own.model, **VARIANTS[name])
    train = dataclasses.replace(own.train, gradient_accumulation=2)
    own = dataclasses.replace(own, model=model, train=train)
    one, _ = meshes.losses(own, jax.devices()[:1])
    over = dataclasses.replace(own, mesh=meshes.MESHES["data 2, context 2, tensor 2"])
    found, _ = meshes.losses(over, jax.devices())
    np.testing.assert_allclose(found, one, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_of_other_parts_are_those_of_one_device(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    in_devices(8, f"check_variant({name!r})")


# --- Another mesh, or another number of devices ------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_goes_on_on_one_and_on_eight(tiny_run, tmp_path):
    four = tmp_path / "four"
    command = ("train.py", tiny_run.parent / "tiny.toml", "--train.out")
    sizes = ("--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    process = script(*command, four, *sizes, XLA_FLAGS=devices(4))
    assert process.returncode == 0, process.output
    for count, sizes in ((1, ()), (8, ("--mesh.data", "2", "--mesh.context", "4"))):
        run = tmp_path / str(count)
        shutil.copytree(four, run)
        (run / "summary.json").unlink()
        for step in (16, 20, 24):
            shutil.rmtree(run / "checkpoints" / str(step), ignore_errors=True)
        assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "12"
        process = script(*command, run, *sizes, XLA_FLAGS=devices(count))
        assert process.returncode == 0, process.output
        assert "going on at step 12" in " ".join(process.output.split())
        once, again = losses(four), losses(run)
        assert once.keys() == again.keys()
        for key, value in once.items():
            assert again[key] == pytest.approx(value, abs=1e-4), key
        assert json.loads((run / "summary.json").read_text())["steps"] == 24


def test_members_of_an_ablation_lie_on_one_device_each(tmp_path):
    from jaxdecoder.ablation.grid import read

    (tmp_path / "base.toml").write_text("[mesh]\ndata = 1\ntensor = -1\n")
    path = tmp_path / "ablation.toml"
    path.write_text('base = "base.toml"\nseeds = 2\n[factors]\nmodel.n_heads = [1, 2]\n')
    with pytest.raises(UserError, match=r"ablation\.toml: mesh\.tensor = -1: a member"):
        read(path)


@pytest.mark.parametrize("name", ["reference", "rows", "chunked", "portable"])
def test_a_part_of_the_queries_counts_from_its_start(name):
    """Values and gradients of the second half, with scores that read positions."""
    time, half = 128, 64
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.normal(size=(1, time, 2, 16)), "float32") for _ in range(4))
    score = scores.alibi(jnp.array([0.3, 0.05]))

    def whole(q, k, v):
        return flash_attention(
            q, k, v, mask=masks.causal(), score=score, implementation="reference"
        )[:, half:]

    out, pull = jax.vjp(whole, q, k, v)
    dq, dk, dv = pull(dout[:, half:])
    problem, operands = flash.state(q[:, half:], k, v, masks.causal(), score)
    problem = dataclasses.replace(problem, q_start=half)
    implementation = flash.IMPLEMENTATIONS[name]
    if implementation.backward is None:
        mine, pull = jax.vjp(
            lambda o: implementation.forward(problem, flash._freeze(problem, o))[0], operands
        )
        gradients = pull(dout[:, half:])[0]
    else:
        mine, logsumexp = implementation.forward(problem, operands)
        gradients = implementation.backward(problem, operands, mine, logsumexp, dout[:, half:])
    close(
        (mine, gradients.q, gradients.k, gradients.v), (out, dq[:, half:], dk, dv), tolerance=1e-5
    )
