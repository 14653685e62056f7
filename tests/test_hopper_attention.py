"""The Hopper kernels are the formula in Mosaic's interpreter, and refuse what they cannot do."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec
from test_flash_attention import (
    H200 as H200_MESH,
)
from test_flash_attention import (
    MASKS,
    SCORES,
    TOLERANCE,
    Case,
    close,
    expected,
    lowered_for_gpu,
    make,
)

from jaxdecoder.kernels import flash, hopper, masks, scores
from jaxdecoder.kernels.problem import Device

H200 = Device("gpu", "NVIDIA H200")
HALF = Case(batch=1, kv_heads=1, group=1, dtype="bfloat16")
# Several blocks of queries and of keys, ragged ones among them, and all that a kernel can be asked.
INTERPRETED = {
    "longformer": HALF._replace(q_time=130, k_time=300, mask="window_and_first", width=48),
    "everything_at_once": HALF._replace(
        batch=2,
        q_time=133,
        k_time=150,
        group=2,
        dtype="float16",
        mask="documents",
        score="alibi",
        rate=0.2,
        segments=True,
        seed=5,
    ),
    "no_keys": HALF._replace(q_time=140, k_time=67, mask="strictly_future", score="a_function"),
}


def state(case, made):
    segments = None if made.segments is None else tuple(map(jnp.asarray, made.segments))
    return flash.state(
        made.q,
        made.k,
        made.v,
        mask=MASKS[case.mask][0],
        score=SCORES[case.score][1](*made.operands),
        segment_ids=segments,
        dropout_rate=case.rate,
        dropout_seed=jnp.uint32(case.seed),
    )


def check_interpreted():
    """Run where XLA has threads enough: the interpreter's warpgroups wait for one another."""
    interpret = plgpu.InterpretGPUParams()
    for name, case in INTERPRETED.items():
        made = make(case)
        problem, operands = state(case, made)
        out, logsumexp = hopper.forward(problem, operands, interpret)
        found = hopper.backward(problem, operands, out, logsumexp, made.dout, interpret)
        score = [x for x in found.score if x is not None]
        gradients = {"q": found.q, "k": found.k, "v": found.v, "score": score}
        assert {x.dtype for x in (out, found.q, found.k, found.v)} == {jnp.dtype(case.dtype)}
        close((out, gradients), expected(case, made), TOLERANCE[case.dtype])
        if name == "everything_at_once":
            # As a device of several has it: a part of the batch, which keeps its number.
            part = operands._replace(
                **{name: getattr(operands, name)[1:] for name in ("q", "k", "v")},
                **{name: getattr(operands, name)[-1:] for name in ("q_segments", "k_segments")},
                batch_index=jnp.array([1]),
                head_index=jnp.arange(operands.q.shape[2]),
            )
            np.testing.assert_array_equal(hopper.forward(problem, part, interpret)[0], out[1:])
        if name == "no_keys":
            assert not np.any(out[:, 66:])
            assert np.all(logsumexp[:, :, 66:] == -np.inf)


# The interpreter of 0.10 knows no layouts.
@pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason=f"the interpreter of Mosaic kernels in jax {jax.__version__} lacks what they use",
)
def test_is_the_formula_with_its_gradients_interpreted():
    folder = os.path.dirname(__file__)
    environment = os.environ | {
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([folder, os.path.dirname(folder)]),
    }
    command = "import test_hopper_attention as t; t.check_interpreted()"
    subprocess.run([sys.executable, "-c", command], check=True, env=environment, timeout=600)


def refusal(mask=None, score=None, width=64, dtype="bfloat16", device=H200):
    x = jax.ShapeDtypeStruct((1, 256, 4, width), dtype)
    mask = masks.causal() if mask is None else mask
    problem, operands = flash.state(x, x, x, mask=mask, score=score)
    return hopper.IMPLEMENTATION.refuses(problem, operands, device)


def sorted_scores(score, batch, head, q_index, k_index):
    return jnp.sort(score, axis=1)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"device": Device("gpu", "NVIDIA A100-SXM4-80GB")}, "for Hopper GPUs, not for a NVIDIA A"),
        ({"device": Device("cpu", "cpu")}, "for Hopper GPUs"),
        ({"dtype": "float32"}, "bfloat16 and float16, not in float32"),
        ({"width": 72}, "multiples of 16 wide, up to 128, not 72"),
        ({"width": 256}, "up to 128, not 256"),
        ({"score": scores.relative_bias(np.ones((4, 32)))}, "number a head, not 32"),
        (
            {"mask": masks.first(3) | masks.documents(np.zeros(256, np.int32))},
            "unless they are joined by &",
        ),
        ({"score": sorted_scores}, "cannot compile its mask and score for one"),
    ],
)
def test_refuses(asked, reason):
    assert reason in refusal(**asked)


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
@pytest.mark.parametrize("score", ["none", "soft_cap", "alibi", "a_function"])
def test_takes_any_score_on_a_hopper_card(kind, score):
    operands, ours, _ = SCORES[score]
    made = ours(*operands(np.random.default_rng(0), 4))
    assert refusal(score=made, device=Device("gpu", kind)) is None


@pytest.mark.parametrize("mask", sorted(set(MASKS) - {"documents"}))
def test_takes_any_mask_of_positions(mask):
    assert refusal(MASKS[mask][0]) is None


def test_auto_chooses_it_on_a_hopper_card_and_says_why_not():
    x = jax.ShapeDtypeStruct((1, 256, 4, 64), jnp.bfloat16)
    choice = flash.choose(*flash.state(x, x, x, mask=masks.causal()), device=H200)
    assert choice.name == "hopper"
    x = jax.ShapeDtypeStruct((1, 256, 4, 256), jnp.bfloat16)
    choice = flash.choose(*flash.state(x, x, x, mask=masks.causal()), device=H200)
    assert choice.name == "portable"
    assert "hopper cannot, because its heads" in choice.reason


@pytest.mark.parametrize("case", [*INTERPRETED.values(), HALF._replace(width=128)])
def test_lowers_for_a_gpu(case):
    text = lowered_for_gpu(case, "hopper")
    assert text.count("custom_call @mosaic_gpu") in (3, 4)


def test_lowers_inside_vmap_scan_remat_and_shard_map():
    x = jax.ShapeDtypeStruct((2, 2, 64, 4, 64), jnp.bfloat16)

    def attended(q, k, v):
        return flash.flash_attention(q, k, v, mask=masks.causal(), implementation="hopper")

    def looped(q, k, v):
        def step(x, _):
            return x + jax.checkpoint(attended)(x, k, v), None

        return jax.lax.scan(step, q, None, length=2)[0]

    def sharded(q, k, v):
        return jax.shard_map(
            looped, mesh=H200_MESH, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x")
        )(q, k, v)

    def loss(q, k, v):
        return jnp.sum(jax.vmap(sharded)(q, k, v).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(H200_MESH):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
