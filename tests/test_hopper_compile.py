"""The Hopper kernels compile for an H200: with tensor core instructions, and without spills."""

import functools
import itertools
import re
import subprocess

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import slow

from benchmarks import hopper_variants
from jaxdecoder.kernels import flash, hopper, masks, scores
from jaxdecoder.kernels.hopper.launch import Sizes

pytestmark = gpu_compile.needs_cuda_packages

TIME, HEADS = 2048, 4
DOCUMENTS = masks.documents(np.repeat([0, 1, 2], [700, 800, 548]))
MASKS = {
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(300),
    "longformer": masks.causal() & (masks.sliding_window(300) | masks.first(100)),
    "strided": masks.causal() & (masks.sliding_window(64) | masks.strided(64)),
    "documents": masks.causal() & DOCUMENTS,
    "fixed_blocks": masks.causal() & masks.fixed_blocks(128, 8),
}
SCORES = {
    "none": None,
    "soft_cap": scores.soft_cap(50.0),
    "alibi": scores.alibi(np.ones(HEADS, np.float32), learned=True),
}
# Every row of the tables of sizes, and what presses hardest on the registers.
CASES = [
    (128, "causal", "none", 0.0, "float16"),
    *[(128, mask, "none", 0.0, "bfloat16") for mask in MASKS],
    *[(64, mask, "none", 0.0, "bfloat16") for mask in ("causal", "documents", "fixed_blocks")],
    *[(width, "documents", score, 0.1, "bfloat16") for width in (64, 128) for score in SCORES],
    (16, "causal", "none", 0.0, "bfloat16"),
    (80, "documents", "alibi", 0.1, "float16"),
]
FEW = [
    (128, "causal", "none", 0.0, "bfloat16"),
    (128, "longformer", "none", 0.0, "bfloat16"),
    (128, "documents", "alibi", 0.1, "bfloat16"),
    (64, "documents", "soft_cap", 0.1, "bfloat16"),
    (80, "documents", "alibi", 0.1, "float16"),
]


@pytest.mark.parametrize(
    ("width", "mask", "score", "rate", "dtype"),
    [*FEW, *slow(*(case for case in CASES if case not in FEW))],
)
def test_uses_tensor_cores_and_spills_nothing(width, mask, score, rate, dtype):
    q = jax.ShapeDtypeStruct((1, TIME, HEADS, width), dtype)
    k = jax.ShapeDtypeStruct((1, TIME, HEADS // 2, width), dtype)

    def gradients(q, k, v, dout):
        def attended(q, k, v):
            return flash.flash_attention(
                q,
                k,
                v,
                mask=MASKS[mask],
                score=SCORES[score],
                dropout_rate=rate,
                dropout_seed=jnp.uint32(1),
                implementation="hopper",
            )

        return jax.vjp(attended, q, k, v)[1](dout)

    record = gpu_compile.compile_for_h200(gradients, q, k, k, q)
    kernels = {kernel.name: kernel for kernel in record.kernels if "mosaic" in kernel.name}
    machine_code = dict(x.split(",", 1) for x in record.log.split(".section\t.text.")[1:])
    assert {"attention_forward", "attention_queries_gradient"} < {
        name.removesuffix("_mosaic_gpu_kernel") for name in kernels
    }
    for name, kernel in kernels.items():
        assert "HGMMA" in machine_code[name]
        # The memory warpgroup gives registers away, and the others take them.
        assert machine_code[name].count("USETMAXREG") >= 2
        assert kernel.stack == kernel.spill_stores == kernel.spill_loads == 0, kernel
    # What ptxas says where it makes asynchronous products wait (C7510), or registers stay.
    for complaint in ("C7510", "serializ", "setmaxnreg"):
        assert complaint not in record.log


# What is to be tried on a card: each of them fits the registers.
VARIANTS = [
    (128, "forward", Sizes(128, 2, turns="early")),
    (128, "forward", Sizes(128, 2, rotated=True, turns="early")),
    (128, "forward", Sizes(64, 4, 3, rotated=True, turns="none")),
    (128, "queries", Sizes(64, 4, rotated=True)),
    (128, "k", Sizes(64, 4, rotated=True)),
    (128, "v", Sizes(64, 4, 3, rotated=True)),
    (64, "forward", Sizes(128, 4, rotated=True, turns="early")),
    (64, "forward", Sizes(128, 4, 3, turns="none")),
    (64, "queries", Sizes(64, 4, 3, rotated=True)),
    (64, "kv", Sizes(64, 4, rotated=True)),
]


@pytest.mark.parametrize(("width", "kernel", "sizes"), [*VARIANTS[1:4], *slow(*VARIANTS[4:])])
def test_variants_spill_nothing_and_wait_for_nothing(width, kernel, sizes):
    found, _ = hopper_variants.measure(kernel, width, sizes)
    assert found.products
    assert not found.spilled_bytes
    assert not found.serialized


@pytest.mark.slow
@pytest.mark.parametrize("rotated", [False, True])
def test_an_early_turn_is_handed_over_while_the_product_is_under_way(rotated):
    """In the machine code: products, the signal, and only then the wait for the products."""

    def order(turns):
        sizes = Sizes(128, 2, rotated=rotated, turns=turns)
        code = hopper_variants.compiled("forward", 128, sizes)[2]
        steps = re.findall(r"HGMMA|SYNCS\.ARRIVE|WARPGROUP\.DEPBAR", code)
        return [step for step, _ in itertools.groupby(steps)]

    under_way = ["HGMMA", "SYNCS.ARRIVE", "WARPGROUP.DEPBAR"]
    for turns, wanted in {"early": True, "late": False}.items():
        steps = order(turns)
        found = [steps[i : i + 3] == under_way for i in range(len(steps))]
        assert any(found) == wanted


@pytest.mark.slow
def test_one_backward_kernel_compiles():
    """Its registers are short, so it spills a little; it is chosen on a card or not at all."""
    found, _ = hopper_variants.measure("qkv", 128, Sizes(64, 2))
    assert found.products == 64  # two bodies of 32: 5 products of 64 keys, of which dq has 128
    assert not found.serialized


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", [*hopper.KERNELS])
def test_candidates_fill_the_shared_memory_and_no_more(width, kernel):
    x = jax.ShapeDtypeStruct((1, TIME, HEADS, width), jnp.bfloat16)
    problem, operands = flash.state(x, x, x, mask=masks.causal())
    candidates = hopper_variants.candidates(kernel, problem, operands)
    if kernel == "qkv" and width == 64:
        assert not candidates
        return
    assert {sizes.rotated for sizes in candidates} == {False, True}
    largest = max(
        candidates, key=lambda s: hopper_variants.shared_bytes(kernel, problem, operands, s)
    )
    call = functools.partial(hopper_variants.call, kernel, masks.causal())
    jax.jit(functools.partial(call, largest)).trace(x, x, x, x).lower(lowering_platforms=("cuda",))


def test_the_compilers_are_those_of_the_chosen_folder():
    assert gpu_compile.CUDA_ROOT is not None
    asked = [str(gpu_compile.CUDA_ROOT / "bin" / "ptxas"), "--version"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    x = jax.ShapeDtypeStruct((1, TIME, HEADS, 64), "bfloat16")

    def attended(q):
        return flash.flash_attention(q, q, q, mask=MASKS["causal"], implementation="hopper")

    record = gpu_compile.compile_for_h200(attended, x)
    assert record.kernels
    assert record.ptxas == set(re.findall(r"V([\d.]+)", said))
