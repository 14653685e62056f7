"""Every implementation of attention is the formula, gradients too, whatever surrounds the call."""

import functools
import os
import subprocess
import sys
from typing import Any, NamedTuple, get_args

import attention_reference as naive
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_compile import H200
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import slow

from jaxdecoder.config import model
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import chunked, flash, flash_attention, masks, portable, rows, scores
from jaxdecoder.kernels.device import Device
from tests.runs import devices

ON_CPU = ("reference", "rows", "chunked", "portable")
every_implementation = pytest.mark.parametrize("implementation", ON_CPU)
# The reference is plain JAX operations, which every transformation of JAX's takes.
every_operation = pytest.mark.parametrize(
    "implementation", [*slow("reference"), "rows", "chunked", "portable"]
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks small enough that short sequences have many, empty, full and partial."""
    sixteen = dict.fromkeys(portable.KERNELS, portable.Sizes(16, 16, 4, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "BLOCK", 16)
        patch.setattr(rows, "BLOCK", 16)
        patch.setattr(portable, "sizes", lambda *_: sixteen)
        yield


# --- The cases ---------------------------------------------------------------------------------


def near_or_even(q, k):
    return (jnp.abs(q - k) < 3) | (k % 2 == 0)


IDS = np.repeat([4, 7, 4, 1], [9, 14, 3, 300])
MASKS = {
    "everything": (masks.everything(), lambda q, k: True),
    "causal": (masks.causal(), lambda q, k: k <= q),
    "window": (masks.causal() & masks.sliding_window(5), lambda q, k: q - 5 < k <= q),
    "window_and_first": (
        masks.causal() & (masks.sliding_window(18) | masks.first(3)),
        lambda q, k: k <= q and (q - k < 18 or k < 3),
    ),
    "strictly_future": (~masks.causal(), lambda q, k: k > q),
    "strided": (masks.causal() & masks.strided(3), lambda q, k: k <= q and (q - k) % 3 == 0),
    "documents": (
        masks.causal() & masks.documents(IDS),
        lambda q, k: k <= q and IDS[q] == IDS[k],
    ),
    "a_function": (
        masks.from_function(near_or_even),
        lambda q, k: abs(q - k) < 3 or k % 2 == 0,
    ),
}


def scale_by_operand(score, batch, head, q_index, k_index, factor):
    return score * factor + batch


def hidden(q, k):
    """Whole rows of blocks, and all keys of a few queries."""
    return ((q % 3 == 1) & (k < 20)) | (q % 7 == 5)


def hide(score, batch, head, q_index, k_index):
    return jnp.where(hidden(q_index, k_index), -jnp.inf, score)


def over_distance(score, batch, head, q_index, k_index):
    """Infinite, or no number, where a query meets its own position."""
    return score / jnp.abs(q_index - k_index)


def made_of(*shapes):
    return lambda random, heads: [jnp.float32(random.normal(size=(heads, *s))) for s in shapes]


# Operands, ours of them, and the formula's.
SCORES = {
    "none": (made_of(), lambda: None, naive.NO_SCORE),
    "soft_cap": (made_of(), lambda: scores.soft_cap(2.0), naive.capped(naive.NO_SCORE, 2.0)),
    "alibi": (made_of(()), lambda x: scores.alibi(x, learned=True), naive.ALIBI),
    "bias": (made_of((5,)), scores.relative_bias, naive.BIAS),
    "bias_then_cap": (
        made_of((5,)),
        lambda x: scores.compose(scores.relative_bias(x), scores.soft_cap(3.0)),
        naive.capped(naive.BIAS, 3.0),
    ),
    "a_function": (
        made_of(()),
        lambda x: scores.from_function(scale_by_operand, x, learned=True),
        naive.WITH_BATCH,
    ),
    "hides_keys": (
        made_of(),
        lambda: scores.from_function(hide),
        naive.Score(
            lambda s, b, h, q, k: np.where(hidden(q, k), -np.inf, s),
            lambda s, b, h, q, k: np.where(hidden(q, k), 0.0, 1.0),
            lambda *_: [],
        ),
    ),
}
# Not for every mask: they have no value somewhere.
SCORES_OF_THE_FUTURE = {
    "over_distance": (
        made_of(),
        lambda: scores.from_function(over_distance),
        naive.Score(
            lambda s, b, h, q, k: s / np.maximum(naive.distance(q, k), 1),
            lambda s, b, h, q, k: 1 / np.maximum(naive.distance(q, k), 1),
            lambda *_: [],
        ),
    )
}
DRAWN = list(SCORES)
SCORES |= SCORES_OF_THE_FUTURE


class Case(NamedTuple):
    batch: int = 2
    q_time: int = 37
    k_time: int = 37
    kv_heads: int = 2
    group: int = 2
    width: int = 16
    dtype: str = "float32"
    mask: str = "causal"
    score: str = "none"
    rate: float = 0.0
    segments: bool = False
    seed: int = 0


@st.composite
def cases(draw):
    q_time = draw(st.integers(1, 60))
    return Case(
        batch=draw(st.integers(1, 3)),
        q_time=q_time,
        k_time=draw(st.one_of(st.just(q_time), st.integers(1, 60))),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([16, 24, 64])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        mask=draw(st.sampled_from(list(MASKS))),
        score=draw(st.sampled_from(DRAWN)),
        rate=draw(st.sampled_from([0.0, 0.3])),
        segments=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


class Made(NamedTuple):
    q: Any
    k: Any
    v: Any
    dout: Any
    operands: Any
    segments: Any


def make(case):
    random = np.random.default_rng(case.seed)
    heads = case.kv_heads * case.group
    q_shape = (case.batch, case.q_time, heads, case.width)
    k_shape = (case.batch, case.k_time, case.kv_heads, case.width)
    shapes = (q_shape, k_shape, k_shape, q_shape)
    arrays = [jnp.asarray(random.normal(size=shape), case.dtype) for shape in shapes]
    operands = SCORES[case.score][0](random, heads)
    times = (case.q_time, case.k_time)
    ids = tuple(np.sort(random.integers(0, 3, (case.batch, time))) for time in times)
    return Made(*arrays, operands, ids if case.segments else None)


def attend(case, implementation, q, k, v, operands, segments=None):
    return flash_attention(
        q,
        k,
        v,
        mask=MASKS[case.mask][0],
        score=SCORES[case.score][1](*operands),
        segment_ids=None if segments is None else tuple(map(jnp.asarray, segments)),
        dropout_rate=case.rate,
        dropout_seed=jnp.uint32(case.seed),
        implementation=implementation,
    )


def ours(case, implementation, made):
    def attended(q, k, v, operands):
        return attend(case, implementation, q, k, v, operands, made.segments)

    @jax.jit
    def both(dout, *arguments):
        out, pull = jax.vjp(attended, *arguments)
        return out, pull(dout)

    out, (dq, dk, dv, doperands) = both(made.dout, made.q, made.k, made.v, made.operands)
    return out, {"q": dq, "k": dk, "v": dv, "score": doperands}


def expected(case, made):
    formula = MASKS[case.mask][1]
    allowed = np.array([[formula(q, k) for k in range(case.k_time)] for q in range(case.q_time)])
    return naive.attention(
        made.q,
        made.k,
        made.v,
        allowed,
        scale=case.width**-0.5,
        score=SCORES[case.score][2],
        operands=made.operands,
        rate=case.rate,
        seed=case.seed,
        segments=made.segments,
        dout=made.dout,
    )


def close(found, wanted, tolerance):
    """Within `tolerance` of an array's largest entry, or, where all are small, of what cancelled.

    Half precision rounds the output, of size 1, before the gradients subtract it.
    """
    least = 0.1 if tolerance <= 1e-5 else 1.0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = max(np.abs(b).max(), least)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path)
        )


# --- Values and gradients ----------------------------------------------------------------------


# Each case compiles anew: few are drawn, and none are shrunk.
@pytest.mark.slow
@every_implementation
@settings(max_examples=6, phases=[Phase.explicit, Phase.generate])
@given(case=cases())
def test_is_the_formula_with_its_gradients(implementation, case):
    made = make(case)
    found = ours(case, implementation, made)
    assert found[0].dtype == case.dtype
    close(found, expected(case, made), TOLERANCE[case.dtype])


EVERYTHING_AT_ONCE = Case(
    mask="documents", score="bias_then_cap", rate=0.2, segments=True, group=3, seed=5
)
NO_KEYS = Case(mask="strictly_future", score="alibi", q_time=40, k_time=33)
HALF = Case(
    mask="window_and_first", score="a_function", dtype="bfloat16", batch=3, k_time=52, width=24
)


# Rows without a score in the first blocks, or in any, where the mask leaves nothing to check.
HIDDEN = Case(mask="everything", score="hides_keys", q_time=48, k_time=48)
# Slopes that are infinite where the mask allows nothing.
SINGULAR = Case(mask="strictly_future", score="over_distance", q_time=40, k_time=33)


@every_implementation
@pytest.mark.parametrize(
    "case",
    [EVERYTHING_AT_ONCE, NO_KEYS, HALF, HIDDEN, SINGULAR],
    ids=["everything_at_once", "no_keys", "half_precision", "hidden", "singular"],
)
def test_hard_cases(implementation, case):
    made = make(case)
    out, gradients = ours(case, implementation, made)
    close((out, gradients), expected(case, made), TOLERANCE[case.dtype])
    if case is NO_KEYS:
        assert not np.any(out[:, 32:])
        assert not np.any(gradients["q"][:, 32:])


@pytest.mark.parametrize("implementation", ["chunked", "portable"])
def test_default_blocks(implementation, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(chunked, "BLOCK", 128)
    case = Case(batch=1, q_time=150, k_time=150, kv_heads=1, group=1, width=32, mask="window")
    made = make(case)
    close(ours(case, implementation, made), expected(case, made), 1e-5)


def test_documents_below_an_or_are_looked_up():
    case = Case(mask="window")
    made = make(case)
    mask = masks.causal() & (masks.documents(IDS) | masks.first(2))
    attended = jax.jit(
        functools.partial(flash_attention, mask=mask), static_argnames="implementation"
    )
    found, wanted = (
        attended(made.q, made.k, made.v, implementation=name) for name in ("chunked", "reference")
    )
    close(found, wanted, 1e-5)


@every_implementation
def test_drops_what_its_hash_says(implementation):
    """Values that are one-hot in the key make the output the attention weights themselves."""
    time, rate, seed = 32, 0.4, 9
    zeros = np.zeros((2, time, 3, time), np.float32)
    attended = functools.partial(
        flash_attention,
        mask=masks.everything(),
        dropout_rate=rate,
        dropout_seed=np.uint32(seed),
        implementation=implementation,
    )
    out = jax.jit(attended)(zeros, zeros, zeros + np.eye(time, dtype=np.float32)[:, None])
    at = np.ix_(*map(np.arange, (2, 3, time, time)))
    kept = naive.kept(seed, rate, *at)
    assert 0.55 < kept.mean() < 0.65
    weights = np.asarray(out).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(weights, kept / time / (1 - rate), rtol=1e-6)


# --- Whatever surrounds the call ---------------------------------------------------------------

SURROUNDED = Case(score="bias", rate=0.1, q_time=20, k_time=20, seed=3)


def loss(implementation, q, k, v, operands, segments=None):
    return jnp.sum(attend(SURROUNDED, implementation, q, k, v, operands, segments) ** 2)


@functools.cache
def gradient_of_loss(implementation):
    return jax.jit(jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2, 3)))


@functools.cache
def unrolled():
    """Members of a population that are computed one by one, with the reference."""
    made = make(SURROUNDED)
    members = jnp.stack([made.q, made.q * 2]), [jnp.stack([x, -x]) for x in made.operands]

    def loss(q, operands):
        for _ in range(2):
            q = q + attend(SURROUNDED, "reference", q, made.k, made.v, operands)
        return jnp.sum(q**2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return made, members, [gradients(*jax.tree.map(lambda x, i=i: x[i], members)) for i in (0, 1)]


@every_operation
def test_inside_vmap_scan_and_remat(implementation):
    made, members, wanted = unrolled()

    def attended(q, operands):
        return attend(SURROUNDED, implementation, q, made.k, made.v, operands)

    def looped(q, operands):
        def step(x, _):
            return x + jax.checkpoint(attended)(x, operands), None

        return jnp.sum(jax.lax.scan(step, q, None, length=2)[0] ** 2)

    found = jax.jit(jax.vmap(jax.grad(looped, argnums=(0, 1))))(*members)
    for i in range(2):
        close(jax.tree.map(lambda x, i=i: x[i], found), wanted[i], 1e-5)


@pytest.mark.parametrize("implementation", [*slow("reference", "rows", "chunked"), "portable"])
def test_exports(implementation):
    made = make(SURROUNDED)
    arguments = (made.q, made.k, made.v, made.operands)
    exported = jax.export.export(gradient_of_loss(implementation))(*arguments)
    close(exported.call(*arguments), gradient_of_loss(implementation)(*arguments), 1e-6)


def check_shards():
    """Under `shard_map`: batch entries apart, then heads apart, with what they share."""
    made = make(SURROUNDED._replace(segments=True))
    arguments = (made.q, made.k, made.v, made.operands, tuple(map(jnp.asarray, made.segments)))
    case = SURROUNDED._replace(rate=0.0)  # dropout counts from the start of a shard
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    by_batch = (P("x"), P("x"), P("x"), P(), P("x"))
    by_head = (P(None, None, "x"),) * 3 + (P("x"), P())

    def gradient(attended):
        squared = jax.grad(lambda *a: jnp.sum(attended(*a) ** 2), argnums=(0, 1, 2, 3))
        return jax.jit(squared)(*arguments)

    wanted = gradient(functools.partial(attend, case, "reference"))
    for implementation in ON_CPU:
        for specs in (by_batch, by_head):
            # JAX's interpreter of Pallas kernels does not follow what varies over a mesh.
            sharded = jax.shard_map(
                functools.partial(attend, case, implementation),
                mesh=mesh,
                in_specs=specs,
                out_specs=specs[0],
                check_vma=implementation != "portable",
            )
            close(gradient(sharded), wanted, 1e-5)
    check_stays_sharded("chunked", SURROUNDED, NamedSharding(mesh, P("x")))
    by_head = NamedSharding(mesh, by_head[0])
    one_key_head = SURROUNDED._replace(kv_heads=1)
    check_stays_sharded("portable", one_key_head, by_head, of_keys=NamedSharding(mesh, P()))


def check_jit():
    """What is sharded by batch entries or by heads stays so."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    by_batch, by_head = NamedSharding(mesh, P("x")), NamedSharding(mesh, P(None, None, "x"))
    check_stays_sharded("portable", SURROUNDED, by_batch)
    check_stays_sharded("portable", SURROUNDED, by_head)


def check_stays_sharded(implementation, case, sharding, of_keys=None):
    """Nothing is gathered, and every device drops, and scores, as if it were the only one."""
    shardings = sharding, of_keys or sharding, of_keys or sharding

    def compiled(function, *arrays):
        done = jax.jit(function).lower(*arrays, made.operands).compile()
        text = done.as_text()
        moved = [w for w in ("all-gather", "all-to-all", "collective-permute") if w in text]
        assert not moved, (implementation, sharding.spec, moved)
        return done

    made = make(case)
    ours, reference = gradient_of_loss(implementation), gradient_of_loss("reference")
    arrays = made.q, made.k, made.v
    placed = jax.device_put(arrays, shardings)
    found = compiled(ours, *placed)(*placed, made.operands)
    for x, wanted in zip(found, shardings, strict=False):
        assert x.sharding.is_equivalent_to(wanted, 4)
    close(found, reference(*arrays, made.operands), 1e-5)

    # A population is vmapped, and its members may be on different devices.
    if implementation == "portable" and sharding.spec[0] == "x":
        members = [jnp.stack([x, -x]) for x in arrays]
        placed = [jax.device_put(x, sharding) for x in members]
        mapped = compiled(jax.vmap(ours, in_axes=(0, 0, 0, None)), *placed)
        found = mapped(*placed, made.operands)
        for i in range(2):
            one = reference(*(x[i] for x in members), made.operands)
            close(jax.tree.map(lambda x, i=i: x[i], found), one, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["check_jit", "check_shards"])
def test_over_two_devices(check):
    folder = os.path.dirname(__file__)
    environment = os.environ | {
        "XLA_FLAGS": devices(2),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([folder, os.path.dirname(folder)]),
    }
    command = f"import test_flash_attention as t; t.{check}()"
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)


# --- Kernels for a GPU, without one ------------------------------------------------------------


def lowered_for_gpu(case, implementation="portable"):
    made = jax.eval_shape(lambda: make(case)[:5])
    with jax.sharding.use_abstract_mesh(H200):

        def gradients(q, k, v, dout, operands):
            attended = functools.partial(attend, case, implementation)
            return jax.vjp(attended, q, k, v, operands)[1](dout)

        traced = jax.jit(gradients).trace(*made)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("bfloat16", 64),
        ("float32", 80),
        ("float16", 256),
        *slow(("bfloat16", 80), ("bfloat16", 256), ("float32", 64)),
        *slow(("float32", 256), ("float16", 64), ("float16", 80)),
    ],
)
def test_portable_kernels_lower_to_triton(dtype, width):
    case = Case(width=width, dtype=dtype, q_time=300, k_time=300, score="bias", rate=0.1)
    assert (
        lowered_for_gpu(case._replace(mask="documents")).count("stablehlo.custom_call @__gpu") == 3
    )


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_portable_kernels_lower_inside_shard_map():
    spec = P("x")
    case = Case(q_time=64, k_time=64)

    def attended(q, k, v):
        return jax.shard_map(
            lambda *a: attend(case, "portable", *a, ()),
            mesh=H200,
            in_specs=spec,
            out_specs=spec,
        )(q, k, v)

    arrays = [
        jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16, sharding=NamedSharding(H200, spec))
    ] * 3
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(attended).trace(*arrays)
        assert "@__gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


# --- Memory, and the choice --------------------------------------------------------------------


def test_memory_is_linear_in_the_length():
    def temporary(time):
        x = jax.ShapeDtypeStruct((1, time, 8, 64), jnp.float32)

        def summed(q, k, v):
            return flash_attention(q, k, v, mask=masks.causal()).sum()

        compiled = jax.jit(jax.grad(summed, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(65_536), temporary(131_072)
    assert long < 2.1 * short
    assert long < 8 * 131_072 * 8 * 64 * 4  # so many times q


GPU = Device("gpu", "NVIDIA H200")
CPU = Device("cpu", "cpu")


@pytest.mark.parametrize(
    ("device", "time", "case", "chosen"),
    [
        (CPU, 32, Case(), "reference"),
        (CPU, 256, Case(), "rows"),
        (CPU, 1024, Case(), "chunked"),
        (GPU, 1024, Case(mask="strided"), "hopper"),
        (GPU, 1024, Case(mask="strided", width=256), "portable"),
        (GPU, 1024, Case(width=272), "chunked"),
    ],
)
def test_auto_chooses_by_device_and_shape(device, time, case, chosen):
    x = jax.ShapeDtypeStruct((1, time, 2, case.width), jnp.bfloat16)
    problem, operands = flash.state(x, x, x, mask=MASKS[case.mask][0])
    choice = flash.choose(problem, operands, device=device)
    assert choice.name == chosen
    assert choice.reason


def test_the_config_names_every_implementation():
    assert {"auto", *flash.IMPLEMENTATIONS} == set(get_args(model.Implementation))


def test_explains_its_choice(capsys):
    q = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
    jax.eval_shape(functools.partial(flash_attention, mask=masks.causal(), explain=True), q, q, q)
    assert capsys.readouterr().out.startswith("attention: reference, because ")


# --- Refusals ----------------------------------------------------------------------------------

LOOKED_UP = jnp.arange(64) % 5 == 0
Q = np.zeros((2, 8, 4, 16), np.float32)
IMPURE = iter(range(10**6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q must have the axes \(batch, time, heads, width\)"),
        ({"q": Q.astype(int)}, "q must be of a floating type, not int64"),
        ({"k": Q.astype(np.float16)}, "of one type, not q float32, k float16"),
        ({"v": Q[:, :4]}, "k and v must have the same shape"),
        ({"k": Q[:1], "v": Q[:1]}, "must agree in batch and width"),
        ({"k": Q[:, :, :3], "v": Q[:, :, :3]}, "4 heads of q must be a multiple of the 3"),
        ({"mask": lambda q, k: (q + k + next(IMPURE)) % 2 == 0}, "gave different answers"),
        ({"mask": lambda q, k: q + k}, "returned int32, not bool"),
        ({"mask": masks.documents([0, 1])}, "ids for 2 positions, but there are 8 queries"),
        ({"score": lambda s: s}, "A score function is pure"),
        ({"score": scores.alibi(np.ones(3))}, "first axis must be the 4 query heads"),
        ({"segment_ids": np.zeros((2, 7), int)}, r"integers \(2, 8\), not int64 \(2, 7\)"),
        ({"segment_ids": np.zeros((2, 8))}, "segment_ids must be integers"),
        ({"dropout_rate": 1.0}, r"must lie in \[0, 1\), not 1.0"),
        ({"dropout_rate": 0.1, "dropout_seed": jax.random.key(0)}, "must be one uint32"),
        ({"scale": "large"}, "scale must be a number known before tracing"),
        ({"implementation": "quick"}, "no implementation 'quick'; there are auto, reference"),
        (
            {"implementation": "portable", "mask": lambda q, k: LOOKED_UP[k] | (q == k)},
            "portable cannot do this, because the mask reads an array.*These can: auto, reference",
        ),
        (
            {"implementation": "portable", "mask": masks.documents([0] * 8) | masks.causal()},
            "no array to look documents up in",
        ),
        (
            {"implementation": "portable", "q": (wide := np.zeros((1, 8, 1, 512), np.float32))}
            | {"k": wide, "v": wide},
            "its heads may be 256 wide, not 512",
        ),
    ],
)
def test_refuses_clearly(change, message):
    arguments = {"q": Q, "k": Q, "v": Q, "mask": masks.causal()} | change
    with pytest.raises(UserError, match=message):
        flash_attention(**arguments)
