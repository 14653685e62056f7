"""On a card: kernels, training, decoding and checkpoints do there what they do on a CPU.

python -m pytest -m gpu
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.card import cases, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend"),
]
STEPS = 20
# A head of 64 and lengths from 128 on, which the kernels take.
SHAPE = {
    "vocab_size": 64,
    "context_length": 256,
    "d_model": 128,
    "n_layers": 2,
    "n_heads": 2,
    "position": "rope",
}


@pytest.fixture(autouse=True)
def a_card():
    """Skips the tests where there is none."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX computes on a {jax.default_backend()} here, and these tests need a GPU")


SOME = {
    "causal": cases.Case(width=128),
    "window, half": cases.Case("window", dtype="float16", batch=2),
    "longformer, narrow": cases.Case("longformer", 16),
    "no keys": cases.Case("future", 80),
    "everything": cases.Case(
        "documents", 48, "float16", score="alibi_and_cap", rate=0.2, segments=True
    ),
    "single": cases.Case("documents", 64, "float32", score="alibi"),
}


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("implementation", ["chunked", "portable", "hopper", "cudnn"])
def test_attention_and_its_gradients_are_the_formula(implementation, name):
    case = SOME[name]._replace(time=333)
    judge(implementation, "reference", case)


@pytest.mark.parametrize("case", cases.DECODING, ids=str)
def test_the_attention_of_decoding_is_the_formula(case):
    judge("decoding, kernel", "decoding, reference", case._replace(time=1000))


def judge(implementation, plain, case):
    from jaxdecoder.errors import UserError

    try:
        found = values.examine(values.Job(implementation, case))
    except UserError as error:
        pytest.skip(str(error))
    said = values.verdict(case, found, values.examine(values.Job(plain, case)))
    # NVIDIA's backward pass adds up in the order that comes.
    may_be = ("good", values.NOT_TO_THE_BIT) if implementation == "cudnn" else ("good",)
    assert said in may_be, found


# --- Models ------------------------------------------------------------------------------------


def a_config():
    from jaxdecoder.config import Config, ModelConfig, OptimizerConfig, TrainConfig

    return Config(
        model=ModelConfig(**SHAPE),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
        train=TrainConfig(batch_size=8),
    )


def trained(steps=STEPS):
    """The state after some steps on random texts of few letters, and the losses on the way."""
    from jaxdecoder.data.batches import Batch
    from jaxdecoder.training.step import init_state, make_step

    config, random = a_config(), np.random.default_rng(0)
    state, step, losses = init_state(config), jax.jit(make_step(config)), []
    for _ in range(steps):
        tokens = random.integers(8, size=(8, config.model.context_length + 1), dtype=np.int32)
        weights = np.ones((8, config.model.context_length), np.float32)
        state, metrics = step(state, Batch(tokens[:, :-1], tokens[:, 1:], weights))
        losses.append(float(metrics.train_loss))
    return state, losses


def test_training_agrees_with_the_cpu():
    pytest.importorskip("pydantic")
    _, losses = trained()
    folder = Path(__file__).parent
    said = subprocess.run(
        [sys.executable, "-c", "import json, test_gpu; print(json.dumps(test_gpu.trained()[1]))"],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)]),
        },
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    on_cpu = json.loads(said.stdout.splitlines()[-1])
    # Eight letters in place of sixty-four: from ln 64 towards ln 8. The CPU computes in float32.
    assert losses[0] == pytest.approx(np.log(64), abs=0.2)
    assert losses[-1] < 2.5
    np.testing.assert_allclose(losses, on_cpu, atol=0.05)


def test_decoding_with_the_cache_gives_the_logits_of_the_whole_text():
    pytest.importorskip("pydantic")
    from jaxdecoder.decoder import Decoder
    from jaxdecoder.decoding import empty_cache, prepare

    # Weights so large that every token sees the ones before it.
    config = dataclasses.replace(a_config().model, initializer="normal", init_std=0.2)
    decoder = Decoder(config, dtype=jnp.bfloat16)
    tokens = np.random.default_rng(1).integers(64, size=(3, 200), dtype=np.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens[:, :2])["params"]
    whole = jax.jit(lambda p, t: decoder.apply({"params": p}, t))(params, tokens)

    @jax.jit
    def extend(params, tokens, cache):
        return prepare(decoder, params).extend(tokens, cache)

    logits, cache, _ = extend(params, tokens[:, :150], empty_cache(config, 3, dtype=jnp.bfloat16))
    parts = [logits]
    for at in range(150, 200):
        logits, cache, _ = extend(params, tokens[:, at : at + 1], cache)
        parts.append(logits)
    found = np.concatenate([np.asarray(part) for part in parts], axis=1)
    np.testing.assert_allclose(found, whole, atol=0.05 * np.abs(whole).max())


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    pytest.importorskip("pydantic")
    from jaxdecoder.training import checkpoints

    state, losses = trained(3)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, 3, state, losses[-1])
        manager.wait_until_finished()
        found = checkpoints.restore_latest(manager, like)
    assert found is not None
    _, back = found
    jax.tree.map(np.testing.assert_array_equal, back, state)
    assert {x.devices() == jax.tree.leaves(state)[0].devices() for x in jax.tree.leaves(back)} == {
        True
    }
