"""What is special to parallel stacks; that they are decoders, test_decoder.py shows."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compile import needs_cuda_packages
from jax.sharding import AbstractMesh
from models import logits_of, random_params, random_tokens, shapes, small

from benchmarks.step_memory import measure
from benchmarks.upper_triangle import upper_triangle
from jaxdecoder import Decoder
from jaxdecoder.config import Config, load
from jaxdecoder.sampling.generate import generate
from jaxdecoder.training.runs import load_model
from jaxdecoder.training.sharding import state_sharding
from jaxdecoder.training.single import train
from jaxdecoder.training.step import init_state
from tests.runs import losses, write_config

STACKS = small(layout="parallel_stacks", n_stacks=2, n_layers=4)


def loss_of(config):
    """A weighed sum of the losses, as a function of parameters."""
    tokens, targets = random_tokens(config, 2, 8), random_tokens(config, 2, 8, seed=1)

    def loss(params):
        arguments = {"params": params}, jnp.asarray(tokens), jnp.asarray(targets)
        key = {"dropout": jax.random.key(0)}
        out = Decoder(config).apply(*arguments, dropout=config.dropout, rngs=key, method="losses")
        return jnp.sum(out * jnp.arange(8))

    return loss


def equations(jaxpr):
    """How often each primitive stands in a program, those inside others included."""
    text = str(jaxpr)
    return {name: text.count(f" {name}[") for name in ("dot_general", "scan", "while")}


def test_the_layers_of_a_stack_are_one_computation_however_many_they_are():
    two, eight = (
        equations(jax.make_jaxpr(jax.grad(loss_of(config)))(shapes(config)))
        for config in (dataclasses.replace(STACKS, n_layers=n) for n in (2, 16))
    )
    assert two == eight
    assert two["dot_general"] > 30
    assert two["scan"] == two["while"] == 0


def test_layers_start_from_weights_of_their_own_and_drop_their_own_values():
    config = small(layout="parallel_stacks", n_stacks=1)
    # Quick to compile, see test_initializers.py.
    key = jax.random.key(0, impl="unsafe_rbg")
    params = jax.jit(Decoder(config).init)(key, jnp.zeros((1, 2), jnp.int32))
    kernels = params["params"]["body"]["stack_0"]["blocks"]["block_0"]["skip"]["kernel"]
    rows = np.asarray(kernels).reshape(2, -1)
    assert abs(np.corrcoef(rows)[0, 1]) < 0.5

    alike = jax.tree.map(
        lambda x: jnp.broadcast_to(x[:1], x.shape), params["params"]["body"]["stack_0"]["blocks"]
    )
    params["params"]["body"]["stack_0"]["blocks"] = alike

    def slices(dropout):
        _, state = jax.jit(
            lambda p: Decoder(config).apply(
                p,
                jnp.arange(8)[None],
                dropout=dropout,
                rngs={"dropout": jax.random.key(1)},
                mutable=["intermediates"],
                capture_intermediates=lambda module, _: module.name == "blocks",
            )
        )(params)
        found = state["intermediates"]["body"]["stack_0"]["blocks"]["__call__"][0][0]
        return np.asarray(found)

    same, different = slices(None), slices(0.5)
    assert same.shape == (2, 1, 8, 32)  # layers, batch, time, slice
    np.testing.assert_array_equal(same[0], same[1])
    assert (different[0] != different[1]).mean() > 0.5


def test_fsdp_splits_every_matrix_of_the_stacks():
    config = Config(model=STACKS)
    state = jax.eval_shape(lambda: init_state(config))
    where = state_sharding(state, AbstractMesh((2,), ("fsdp",)), config.architecture)
    placed = zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(where.params),
        strict=True,
    )
    for (path, leaf), sharding in placed:
        share = leaf.size // np.prod(sharding.shard_shape(leaf.shape))
        assert share == (2 if path[-1].key in ("kernel", "embedding") else 1), path


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_and_can_be_sampled(tmp_path):
    path, run, halted = write_config(tmp_path), tmp_path / "run", tmp_path / "halted"
    stacks = ["--model.layout", "parallel_stacks", "--train.steps", "8"]
    stacks += ["--optimizer.state-dtype", "bfloat16"]
    stacks += ["--mesh.data", "1", "--mesh.fsdp", "-1"]
    train(load(path, stacks))
    shutil.copytree(run, halted)
    shutil.rmtree(halted / "checkpoints" / "8")
    train(load(path, [*stacks, "--train.out", str(halted)]))
    assert losses(halted) == losses(run)

    model = load_model(str(halted))
    # Past the context of 16 tokens: learned positions start over.
    chunks = generate(
        model.decoder, model.params, [[1, 2, 3]], max_new_tokens=20, key=jax.random.key(0)
    )
    assert sum(len(chunk[0]) for chunk in chunks) == 20


def test_the_upper_triangle_of_the_benchmark_sees_itself_and_the_future_only():
    params, tokens = random_params(STACKS), random_tokens(STACKS, 1, 8)

    with upper_triangle():
        apply = jax.jit(Decoder(STACKS).apply)
        before = apply({"params": params}, tokens)[0]
        for t in (0, 3, 7):
            changed = tokens.copy()
            changed[0, t] = (changed[0, t] + 1) % STACKS.vocab_size
            moved = np.any(apply({"params": params}, changed)[0] != before, axis=-1)
            assert moved.tolist() == [query <= t for query in range(8)]
    assert np.any(logits_of(Decoder(STACKS), params, tokens)[0] != before)


@needs_cuda_packages
def test_a_step_of_the_preset_fits_in_8_gigabytes():
    config = load(Path("configs") / "parallel_stacks.toml")
    assert (config.train.batch_size, config.model.context_length) == (2, 2048)
    assert measure(config, "h200")["peak"] < 8
