"""What is computed again in the backward pass changes memory and time, and no result."""

import dataclasses
import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_params, random_tokens, slow, small
from test_analysis import products

from jaxdecoder import Decoder
from jaxdecoder.config import from_dict, load, to_dict
from jaxdecoder.layers.remat import REMATS

ROWS, TIME = 4, 64
DEEP = functools.partial(small, n_layers=4, d_model=32, d_ff=96, context_length=TIME, dropout=0.25)
CASES = {
    "serial": DEEP(),
    "convolved": DEEP(convolution_width=2, norm_placement="parallel"),
    "stacks": DEEP(layout="parallel_stacks"),
    "early_exit": DEEP(depth="early_exit", exit_every=2),
    "mixture_of_depths": DEEP(depth="mixture_of_depths"),
}


def loss_of(config):
    """The loss that training minimises, dropout included, as a function of parameters."""
    tokens, targets = (jnp.asarray(random_tokens(config, ROWS, TIME, seed=n)) for n in (0, 1))

    def loss(params):
        keys = {"dropout": jax.random.key(0)}
        given = {"dropout": config.dropout, "rngs": keys, "method": "losses"}
        return jnp.mean(Decoder(config).apply({"params": params}, tokens, targets, **given))

    return loss


@pytest.mark.parametrize(
    "name", ["serial", "stacks", *slow("convolved", "early_exit", "mixture_of_depths")]
)
def test_policies_give_the_same_gradients_in_ever_less_memory(name):
    params = random_params(CASES[name])
    losses, gradients, kept, memory, work = [], [], [], [], []
    for remat in REMATS:
        loss_of_params = loss_of(dataclasses.replace(CASES[name], remat=remat))
        function = jax.value_and_grad(loss_of_params)
        pulled = jax.eval_shape(lambda p, f=loss_of_params: jax.vjp(f, p)[1], params)
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pulled)))
        program = jax.jit(function).lower(params).compile()
        loss, gradient = program(params)
        losses.append(loss)
        gradients.append(gradient)
        memory.append(program.memory_analysis().temp_size_in_bytes)
        work.append(products(jax.make_jaxpr(function)(params).jaxpr))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    for each in gradients[1:]:
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(gradients[0]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    # From none to everything: less is kept for the backward pass, in less memory; more products.
    assert all(itertools.starmap(operator.ge, itertools.pairwise(kept))), kept
    assert kept[2] < kept[0] / 1.5
    if jax.__version_info__ >= (0, 11):  # the compiler of jax 0.10 undoes some of it on a CPU
        assert all(itertools.starmap(operator.gt, itertools.pairwise(memory))), memory
        assert memory[2] < memory[0] / 1.5
    assert all(itertools.starmap(operator.le, itertools.pairwise(work))), work
    assert work[3] >= work[2] > 1.05 * work[0]


def test_a_run_of_before_policies_had_names_still_loads(tmp_path):
    for was, now in ((True, "block"), (False, "none")):
        assert from_dict({"model": {"remat": was}}, "config.toml").model.remat == now
    path = tmp_path / "config.toml"
    path.write_text("[model]\nremat = true\n")
    config = load(path, ["--model.n-layers", "2"])
    assert to_dict(config)["model"]["remat"] == "block"
    assert load(path, ["--model.remat", "dots"]).model.remat == "dots"
