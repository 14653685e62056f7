"""The Hopper kernels are the formula in Mosaic's interpreter, and refuse what they cannot do."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec
from models import slow
from test_flash_attention import (
    H200 as H200_MESH,
)
from test_flash_attention import (
    MASKS,
    SCORES,
    TOLERANCE,
    Case,
    cases,
    close,
    expected,
    lowered_for_gpu,
    make,
    ours,
)

from jaxdecoder.kernels import flash, hopper, masks, scores
from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.dropout import scaled
from jaxdecoder.kernels.hopper import lowering
from jaxdecoder.kernels.hopper.launch import Launch, Sizes

H200 = Device("gpu", "NVIDIA H200")
PHASES = (Phase.explicit, Phase.generate)  # to shrink an example would take an hour
DTYPES = ("bfloat16", "float16")
TAKEN = ("none", "soft_cap", "alibi", "a_function", "hides_keys")
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
    "hidden": HALF._replace(q_time=130, k_time=256, mask="everything", score="hides_keys"),
    "singular": HALF._replace(
        q_time=140, k_time=150, mask="strictly_future", score="over_distance", dtype="float16"
    ),
}


# Every way to order a kernel, and every number of compute warpgroups.
VARIANTS = {
    "early": {"turns": "early"},
    "no_turns": {"turns": "none"},
    "rotated": {"rotated": True},
    "rotated_early": {"rotated": True, "turns": "early"},
    "three": {"consumers": 3, "turns": "none"},
    "three_rotated": {"consumers": 3, "turns": "none", "rotated": True},
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


def check(case, variant=None):
    """Values and gradients in the interpreter against the formula's."""
    interpret = plgpu.InterpretGPUParams()
    made = make(case)
    problem, operands = state(case, made)
    chosen = hopper.sizes(problem, operands)
    if variant == "whole":
        chosen = {"forward": chosen["forward"], "qkv": Sizes(64, 2)}
    elif variant is not None:
        chosen = {name: sizes._replace(**variant) for name, sizes in chosen.items()}
    out, logsumexp = hopper.forward(problem, operands, interpret, chosen["forward"])
    # The operation scales what dropout leaves; the kernels do not.
    dout = scaled(jnp.asarray(made.dout), case.rate)
    found = hopper.backward(problem, operands, out, logsumexp, dout, interpret, chosen)
    score = [x for x in found.score if x is not None]
    gradients = {"q": found.q, "k": found.k, "v": found.v, "score": score}
    assert {x.dtype for x in (out, found.q, found.k, found.v)} == {jnp.dtype(case.dtype)}
    wanted, of_formula = expected(case, made)
    # A score's own gradient sums up terms that cancel, and what the output lost when it was rounded
    # to half precision does not; so it is held to that of another implementation, which rounds too.
    _, of_chunked = ours(case, "chunked", made)
    of_formula = {**of_formula, "score": of_chunked["score"]}
    close((scaled(out, case.rate), gradients), (wanted, of_formula), TOLERANCE[case.dtype])
    return problem, operands, out, logsumexp


# These two run where XLA has threads enough: the interpreter's warpgroups wait for one another.


def check_interpreted(*names):
    for name in names:
        problem, operands, out, logsumexp = check(INTERPRETED[name])
        if name == "everything_at_once":
            # As a device of several has it: a part of the batch, which keeps its number.
            part = operands._replace(
                **{name: getattr(operands, name)[1:] for name in ("q", "k", "v")},
                **{name: getattr(operands, name)[-1:] for name in ("q_segments", "k_segments")},
                batch_index=jnp.array([1]),
                head_index=jnp.arange(operands.q.shape[2]),
            )
            interpret = plgpu.InterpretGPUParams()
            np.testing.assert_array_equal(hopper.forward(problem, part, interpret)[0], out[1:])
        if name == "no_keys":
            assert not np.any(out[:, 66:])
            assert np.all(logsumexp[:, :, 66:] == -np.inf)


# What one backward kernel takes: heads of 128, and no numbers to learn.
WHOLE = (
    HALF._replace(q_time=130, k_time=300, mask="window_and_first", width=128),
    HALF._replace(
        q_time=140, k_time=150, group=2, mask="causal", width=128, rate=0.2, segments=True
    ),
)


def check_whole():
    for case in WHOLE:
        check(case, "whole")


def check_variant(name):
    for case in INTERPRETED.values():
        check(case, VARIANTS[name])


@settings(
    max_examples=int(os.environ.get("JAXDECODER_EXAMPLES", "20")), phases=PHASES, deadline=None
)
@given(case=cases(), dtype=st.sampled_from(DTYPES), score=st.sampled_from(TAKEN))
def check_drawn(case, dtype, score):
    check(case._replace(dtype=dtype, score=score, width=-(-case.width // 16) * 16))


# The interpreter of 0.10 knows no layouts.
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason=f"the interpreter of Mosaic kernels in jax {jax.__version__} lacks what they use",
)


@needs_interpreter
@pytest.mark.parametrize(
    "names", [("everything_at_once",), *slow((("longformer", "no_keys", "hidden", "singular"),))]
)
def test_is_the_formula_with_its_gradients_interpreted(names):
    interpreted(f"check_interpreted(*{names})")


@needs_interpreter
@pytest.mark.parametrize("name", ["rotated", *slow(*(x for x in VARIANTS if x != "rotated"))])
def test_every_variant_is_the_formula_interpreted(name):
    interpreted(f"check_variant({name!r})")


def test_tanh_is_exact_enough_for_a_soft_cap():
    """Of a cap of 50, 50 times the error is all that a score is off by."""
    x = np.concatenate([np.linspace(-12, 12, 100_001), [-1e30, -200.0, 200.0, 1e30]])
    x = np.float32(x)
    found = jax.jit(lowering.tanh)(x)
    np.testing.assert_allclose(found, np.tanh(np.float64(x)), rtol=0, atol=2e-7)


@needs_interpreter
@pytest.mark.slow
def test_one_backward_kernel_is_the_formula_interpreted():
    interpreted("check_whole()")


@needs_interpreter
@pytest.mark.slow
def test_is_the_formula_for_any_problem_interpreted():
    interpreted("check_drawn()")


def interpreted(check):
    folder = os.path.dirname(__file__)
    environment = os.environ | {
        "NPROC": "16",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([folder, os.path.dirname(folder)]),
    }
    command = f"import test_hopper_attention as t; t.{check}"
    subprocess.run([sys.executable, "-c", command], check=True, env=environment, timeout=1200)


@pytest.mark.parametrize("kernel", hopper.KERNELS)
def test_traced_segments_leave_blocks_out(kernel):
    """Of a causal mask, only blocks in which some query meets its own document are walked."""
    time = 1024
    cuts = [[256, 700], [100, 101]]
    ids = np.stack([np.searchsorted(x, np.arange(time), side="right") for x in cuts])
    x = jnp.zeros((2, time, 1, 64), jnp.bfloat16)
    problem, operands = flash.state(x, x, x, mask=masks.causal(), segment_ids=jnp.asarray(ids))
    launch = Launch(hopper.KERNELS[kernel], problem, operands, Sizes(64, 2), None)
    work = launch.work(operands)
    at = np.arange(time)
    allowed = (at[:, None] >= at) & (ids[:, :, None] == ids[:, None])
    blocks = (2, time // launch.q_block, launch.q_block, time // launch.k_block, launch.k_block)
    walked = allowed.reshape(blocks).any(axis=(2, 4))
    if launch.kernel.rows_are_keys:
        walked = walked.swapaxes(1, 2)
    np.testing.assert_array_equal(work.counts, walked.sum(2))
    for entry, row in np.ndindex(*work.counts.shape):
        columns = work.indices[entry, row, : work.counts[entry, row]]
        np.testing.assert_array_equal(np.sort(columns), np.flatnonzero(walked[entry, row]))


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


@pytest.mark.parametrize(("version", "refused"), [(12080, True), (12091, False), (None, False)])
def test_refuses_compilers_that_get_it_wrong(version, refused, monkeypatch):
    monkeypatch.setattr(hopper, "cuda_version", lambda: version)
    assert (refusal() is not None) == refused


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


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_lowers_for_a_gpu(name):
    case = HALF._replace(width=128, mask="window")
    problem, operands = state(case, make(case))
    sizes = hopper.sizes(problem, operands)
    chosen = {kernel: chosen._replace(**VARIANTS[name]) for kernel, chosen in sizes.items()}

    def both(operands, dout):
        out, logsumexp = hopper.forward(problem, operands, chosen=chosen["forward"])
        return hopper.backward(problem, operands, out, logsumexp, dout, chosen=chosen)

    traced = jax.jit(both).trace(operands, operands.q)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        (Sizes(64, 2, 3), "only two warpgroups take turns"),
        (Sizes(64, 1, rotated=True), "two steps are held at a time"),
    ],
)
def test_sizes_that_would_hang_are_refused(sizes, why):
    x = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    problem, operands = flash.state(x, x, x, mask=masks.causal())
    with pytest.raises(ValueError, match=why):
        Launch(hopper.KERNELS["forward"], problem, operands, sizes, None).shared_bytes()


@needs_interpreter  # nor has jax 0.10 a place for results that start as zeros
def test_one_backward_kernel_lowers_for_a_gpu():
    case = WHOLE[1]
    problem, operands = state(case, make(case))
    logsumexp = jnp.zeros((case.batch, case.kv_heads * case.group, case.q_time))
    backward = functools.partial(hopper.backward, problem, chosen={"qkv": Sizes(64, 2)})
    traced = jax.jit(backward).trace(operands, operands.q, logsumexp, operands.q)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("output_operand_aliases = [#") == 1


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=needs_interpreter)])
def test_lowers_inside_vmap_scan_remat_and_shard_map(whole, monkeypatch):
    x = jax.ShapeDtypeStruct((2, 2, 64, 4, 128), jnp.bfloat16)
    if whole:
        sizes = {"forward": Sizes(128, 2), "qkv": Sizes(64, 2)}
        monkeypatch.setattr(hopper, "sizes", lambda *_: sizes)

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
