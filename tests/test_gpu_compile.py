"""The kernels compile for an H200, and fit it, on a machine that has none: `make test-cuda`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compile import H200, compile_for_h200, needs_cuda_packages
from models import slow

from jaxdecoder.config import Config, ModelConfig, TrainConfig
from jaxdecoder.data.batches import Batch
from jaxdecoder.decoder import Decoder
from jaxdecoder.decoding import empty_cache, prepare
from jaxdecoder.kernels import flash_attention, masks, portable, scores, tuning
from jaxdecoder.kernels.decode import decode_attention
from jaxdecoder.training.step import init_state, make_step

pytestmark = [
    needs_cuda_packages,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend"),
]

KERNELS = ("forward_kernel", "queries_kernel", "keys_kernel")


def heads(batch, time, n_heads, width, dtype="bfloat16"):
    return jax.ShapeDtypeStruct((batch, time, n_heads, width), dtype)


def gradients(implementation, mask, q, k, v, *operands, score=lambda: None, **arguments):
    def summed(q, k, v, *operands):
        out = flash_attention(
            q, k, v, mask=mask, score=score(*operands), implementation=implementation, **arguments
        )
        return jnp.sum(out.astype(jnp.float32))

    every = tuple(range(3 + len(operands)))
    return jax.value_and_grad(summed, argnums=every)(q, k, v, *operands)


def spilled(record):
    return {k.name: k.spill_stores for k in record.kernels if k.name in KERNELS}


DEFAULTS = [(dtype, width) for dtype in ("bfloat16", "float16") for width in portable.HALF]
DEFAULTS += [("float32", width) for width in portable.SINGLE]
FEW = [("bfloat16", 64), ("float32", 128)]


@pytest.mark.parametrize(
    ("dtype", "width"), [*FEW, *slow(*(case for case in DEFAULTS if case not in FEW))]
)
def test_default_sizes_fit_without_spilling(dtype, width):
    q, k = heads(1, 1024, 8, width, dtype), heads(1, 1024, 2, width, dtype)
    record = compile_for_h200(
        functools.partial(gradients, "portable", masks.causal() & masks.sliding_window(300)),
        q,
        k,
        k,
    )
    assert spilled(record) == dict.fromkeys(KERNELS, 0)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 80), *slow(("float32", 64))])
def test_everything_at_once(dtype, width):
    ids = np.repeat(np.arange(5), 200)

    def attended(segments, q, k, v, table):
        return gradients(
            "portable",
            masks.causal() & masks.documents(ids) & (masks.strided(7) | masks.first(3)),
            q,
            k,
            v,
            table,
            score=lambda x: scores.compose(scores.relative_bias(x), scores.soft_cap(30.0)),
            segment_ids=segments,
            dropout_rate=0.1,
            dropout_seed=jnp.uint32(5),
        )

    k = heads(2, 999, 2, width, dtype)
    segments = jax.ShapeDtypeStruct((2, 999), jnp.int32)
    table = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    record = compile_for_h200(attended, segments, heads(2, 999, 8, width, dtype), k, k, table)
    assert spilled(record).keys() == set(KERNELS)


@pytest.mark.slow
def test_tuned_sizes_compile():
    for key, chosen in tuning.table().items():
        if key.implementation == "portable":
            x = heads(1, 2048, 4, key.width, key.dtype)
            with pytest.MonkeyPatch.context() as patch:
                kernels = {name: portable.Sizes(*sizes) for name, sizes in chosen.items()}
                patch.setattr(portable, "sizes", lambda *_, kernels=kernels: kernels)
                compile_for_h200(functools.partial(gradients, "portable", masks.causal()), x, x, x)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(),
        *slow(masks.everything(), masks.causal() & masks.sliding_window(64)),
    ],
    ids=repr,
)
def test_cudnn_takes_its_masks(mask):
    k = heads(2, 512, 2, 64)
    record = compile_for_h200(
        functools.partial(gradients, "cudnn", mask), heads(2, 512, 8, 64), k, k
    )
    assert "__cudnn$fmhaSoftmax" in record.hlo
    assert "__cudnn$fmhaSoftmaxBackward" in record.hlo


@pytest.mark.parametrize("implementation", ["portable", *slow("cudnn")])
def test_memory_is_linear_in_the_length(implementation):
    """The forward and backward pass of a causal attention of 8 heads of 64."""

    def temporary(time):
        x = heads(1, time, 8, 64)
        record = compile_for_h200(
            functools.partial(gradients, implementation, masks.causal()), x, x, x
        )
        return record.memory.temp_size_in_bytes

    figures = [temporary(time) for time in (32_768, 65_536, 131_072)]
    assert figures[1] < 2.2 * figures[0]
    assert figures[2] < 2.2 * figures[1]
    assert figures[2] < 4 * 131_072 * 8 * 64 * 2  # so many times q


def decoded(q, k, v, allowed, at, held):
    """Keys and values lie as in a cache, heads before slots."""
    return decode_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        allowed,
        scale=0.1,
        score=scores.alibi(np.float32([0.5, 0.2, 0.1, 0.3, 0.4, 0.6])),
        q_index=at,
        k_index=held,
    )


def decode_shapes(dtype, q_time, slots, width):
    cache = jax.ShapeDtypeStruct((4, 2, slots, width), dtype)
    allowed = jax.ShapeDtypeStruct((4, 1, q_time, slots), jnp.bool_)
    at, held = (jax.ShapeDtypeStruct((4, n), jnp.int32) for n in (q_time, slots))
    return heads(4, q_time, 6, width, dtype), cache, cache, allowed, at, held


@pytest.mark.parametrize(
    ("dtype", "q_time", "width"),
    [
        ("bfloat16", 1, 64),
        *slow(("float16", 4, 128), ("float32", 1, 128), ("bfloat16", 1, 256)),
    ],
)
def test_decoding_copies_no_cache(dtype, q_time, width):
    record = compile_for_h200(decoded, *decode_shapes(dtype, q_time, 8192, width))
    assert {k.spill_stores for k in record.kernels if k.name == "decode_kernel"} == {0}
    cache = 4 * 2 * 8192 * width * jnp.dtype(dtype).itemsize
    assert record.memory.temp_size_in_bytes < cache / 2


GPT2 = ModelConfig(
    vocab_size=50_304,
    context_length=1024,
    d_model=768,
    n_layers=12,
    n_heads=12,
    tie_embeddings=True,
    position="learned",
)


@pytest.mark.parametrize(
    ("implementation", "names"),
    [
        ("auto", ("__cudnn$fmhaSoftmax",)),
        *slow(("portable", KERNELS), ("hopper", ("mosaic_gpu",))),
    ],
)
def test_a_training_step_of_gpt2_size_holds_the_kernels(implementation, names):
    """124M parameters, 8 rows of 1,024 tokens, in bfloat16: the kernels, and no T x T array."""

    def compiled(implementation):
        model = dataclasses.replace(GPT2, attention_implementation=implementation)
        train = TrainConfig(compute_dtype="bfloat16", batch_size=8)
        config = Config(model=model, train=train)
        # Traced for the CPU, which a kernel may refuse; the shapes are the same.
        state = jax.eval_shape(lambda: init_state(dataclasses.replace(config, model=GPT2)))
        tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
        weights = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
        return compile_for_h200(make_step(config), state, Batch(tokens, tokens, weights))

    record = compiled(implementation)
    assert all(name in record.hlo for name in names)
    assert "1024,1024]" not in record.hlo
    if implementation == "hopper":
        mosaic = [k for k in record.kernels if "mosaic" in k.name]
        assert mosaic
        assert all(k.spill_stores == k.spill_loads == 0 for k in mosaic)
        assert "HGMMA" in record.log
    print(f"{implementation}: {record.memory.temp_size_in_bytes / 2**20:,.0f} MiB")


def test_a_decoding_step_of_gpt2_size_reads_the_cache_by_the_kernel():
    decoder = Decoder(GPT2, dtype=jnp.bfloat16)

    def fresh(key):
        return prepare(decoder, decoder.init(key, jnp.zeros((1, 2), jnp.int32))["params"])

    def step(session, tokens, cache):
        return session.extend(tokens, cache, last=True)

    # Both are laid out for the device.
    with jax.sharding.use_abstract_mesh(H200):
        session = jax.eval_shape(fresh, jax.random.key(0))
        cache = jax.eval_shape(lambda: empty_cache(GPT2, 8, dtype=jnp.bfloat16))
    record = compile_for_h200(step, session, jax.ShapeDtypeStruct((8, 1), jnp.int32), cache)
    assert record.hlo.count("__gpu$xla.gpu.triton") == GPT2.n_layers
