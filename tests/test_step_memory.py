"""What benchmarks/step_memory.py counts, against counts by hand and against the jaxpr."""

import dataclasses
import functools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compile import compile_for_h200, needs_cuda_packages
from models import SMALL
from test_analysis import products as product_flops

from benchmarks import step_memory
from benchmarks.hlo import Program
from jaxdecoder.config import Config, TrainConfig
from jaxdecoder.data.batches import Batch
from jaxdecoder.training.step import init_state, make_step

TURNS, ROWS, WIDTH = 7, 64, 32


def multiplied(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def for_cpu(function, *shapes, **of_jit):
    return Program(jax.jit(function, **of_jit).lower(*shapes).compile().as_text())


def for_h200(function, *shapes, **of_jit):
    return Program(compile_for_h200(function, *shapes, **of_jit).hlo)


TARGETS = [for_cpu, pytest.param(for_h200, marks=needs_cuda_packages)]


@pytest.mark.parametrize("compiled", TARGETS)
def test_a_loop_counts_as_often_as_it_turns(compiled):
    program = compiled(multiplied, shape(ROWS, WIDTH), shape(TURNS, WIDTH, WIDTH))
    assert program.product_flops() == TURNS * 2 * ROWS * WIDTH * WIDTH
    assert program.products() == TURNS
    # A turn reads x and its own kernel, not all of them, and writes x; tanh may do so once more.
    x, kernel = 4 * ROWS * WIDTH, 4 * WIDTH * WIDTH
    assert TURNS * (2 * x + kernel) <= program.bytes_moved() <= 1.1 * TURNS * (6 * x + 3 * kernel)


@pytest.mark.parametrize("compiled", TARGETS)
def test_an_update_in_place_moves_what_it_writes(compiled):
    def updated(x, row):
        return jax.lax.dynamic_update_slice_in_dim(x, 2 * row, 3, axis=0)

    x = shape(100_000, WIDTH)
    moved = compiled(updated, x, shape(1, WIDTH), donate_argnums=0).bytes_moved()
    assert 2 * 4 * WIDTH <= moved <= 1000


@pytest.mark.parametrize("compiled", TARGETS)
def test_an_element_wise_function_reads_and_writes_once(compiled):
    def added(x, y):
        return jnp.tanh(x) + y

    moved = compiled(added, shape(ROWS, WIDTH), shape(ROWS, WIDTH)).bytes_moved()
    assert moved == 3 * 4 * ROWS * WIDTH


CONFIG = Config(model=SMALL, train=TrainConfig(batch_size=2, steps_per_call=5))


def test_counts_one_step():
    """Products as in the jaxpr, whose optimiser and embedding have none; and not those of 5."""
    figures = step_memory.measure(CONFIG, "cpu")
    config = dataclasses.replace(CONFIG, train=TrainConfig(compute_dtype="float32"))
    state = jax.eval_shape(functools.partial(init_state, config))
    tokens, weights = (jax.ShapeDtypeStruct((2, 8), kind) for kind in (jnp.int32, jnp.float32))
    jaxpr = jax.make_jaxpr(make_step(config))(state, Batch(tokens, tokens, weights))
    assert figures["teraflops"] * 1e12 == pytest.approx(product_flops(jaxpr.jaxpr), rel=0.1)
    held = 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert figures["shared"] * 1e9 == pytest.approx(held, rel=1e-3)
    assert figures["peak"] == pytest.approx(
        figures["arguments"] + figures["results"] - figures["shared"] + figures["temporaries"]
    )
    # Every parameter and moment is read and written, or more.
    assert figures["moved"] * 1e9 > 2 * held


@needs_cuda_packages
def test_counts_one_step_for_an_h200():
    model = dataclasses.replace(SMALL, d_model=64, n_heads=1, context_length=64)
    figures, twice = (
        step_memory.measure(Config(model=model, train=TrainConfig(batch_size=rows)), "h200")
        for rows in (64, 128)
    )
    assert figures["moved"] < twice["moved"] < 2 * figures["moved"]
    assert twice["teraflops"] == pytest.approx(2 * figures["teraflops"])
    assert all(np.isfinite(list(figures.values())))


def test_the_command_keeps_the_rows_of_other_versions(tmp_path, monkeypatch, capsys):
    config = tmp_path / "tiny.toml"
    config.write_text(
        "[model]\nvocab_size = 5\ncontext_length = 4\nd_model = 8\nn_layers = 1\n"
        "n_heads = 2\nremat = true\n[train]\nbatch_size = 1\n"
    )
    out = tmp_path / "out.json"
    for version in ("before", "now", "now"):
        arguments = [str(config), "--targets", "cpu", "--version", version, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["step_memory", *arguments])
        step_memory.main()
    found = [(row["version"], row["config"]) for row in json.loads(out.read_text())["rows"]]
    names = ("as it is", "without recomputed activations")
    assert found == [(version, name) for version in ("before", "now") for name in names]
    monkeypatch.setattr(sys, "argv", ["step_memory", *arguments, "--limit", "1e-9"])
    with pytest.raises(SystemExit, match="does not fit"):
        step_memory.main()
    assert "| cpu | as it is |" in capsys.readouterr().out
