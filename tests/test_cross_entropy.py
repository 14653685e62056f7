"""The loss of the head against float64 NumPy, in one piece and in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdecoder.kernels import cross_entropy as module
from jaxdecoder.kernels.cross_entropy import ACCELERATOR, CPU, TILE, cross_entropy, head_logits
from jaxdecoder.kernels.device import Device


def inputs(batch, time, width, vocab, *, bias=True, seed=0):
    """Features, kernel, bias and targets, and the weights of the losses in a sum."""
    draw = np.random.default_rng(seed)
    return (
        draw.normal(size=(batch, time, width)).astype(np.float32),
        draw.normal(size=(width, vocab)).astype(np.float32),
        draw.normal(size=vocab).astype(np.float32) if bias else None,
        draw.integers(vocab, size=(batch, time), dtype=np.int32),
        draw.normal(size=(batch, time)).astype(np.float32),
    )


def reference(features, kernel, bias, targets, weights, softcap=None):
    """Losses, and the gradients of their weighted sum, by the textbook in float64."""
    x, k = features.astype(np.float64), kernel.astype(np.float64)
    raw = x @ k + (0 if bias is None else bias.astype(np.float64))
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    p = odds / odds.sum(-1, keepdims=True)
    onehot = np.eye(k.shape[1])[targets]
    losses = -np.log((p * onehot).sum(-1))
    slope = (p - onehot) * weights[..., None]
    if softcap is not None:
        slope = slope / np.cosh(raw / softcap) ** 2
    gradients = slope @ k.T, np.einsum("btw,btv->wv", x, slope), slope.sum((0, 1))
    return losses, gradients if bias is not None else (*gradients[:2], None)


def differentiated(
    features,
    kernel,
    bias,
    targets,
    weights,
    softcap=None,
    chunk=None,
    tile=None,
    wrapped_by=lambda f: f,
):
    """The same of the operation."""

    def weighed(features, kernel, bias):
        losses = cross_entropy(
            features, kernel, bias, targets, logit_softcap=softcap, chunk=chunk, tile=tile
        )
        return jnp.sum(losses * weights), losses

    gradients, losses = jax.grad(wrapped_by(weighed), (0, 1, 2), has_aux=True)(
        features, kernel, bias
    )
    return losses, gradients


ours = jax.jit(differentiated, static_argnums=(5, 6, 7))


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        size = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64) / size, b / size, atol=tolerance)


shapes = st.tuples(*(st.integers(1, n) for n in (3, 5, 9, 40)))
softcaps = st.sampled_from([None, 2.0])


# Each case compiles anew.
@settings(max_examples=3)
@given(shapes, st.integers(1, 41), st.booleans(), softcaps)
def test_is_the_textbooks_for_any_shape_and_chunk(shape, chunk, bias, softcap):
    arrays = inputs(*shape, bias=bias, seed=chunk)
    assert_close(ours(*arrays, softcap, chunk), reference(*arrays, softcap))


@pytest.mark.slow
@settings(max_examples=12)
@given(shapes, st.integers(1, 41), st.booleans(), softcaps)
def test_is_the_textbooks_for_many_shapes_and_chunks(shape, chunk, bias, softcap):
    arrays = inputs(*shape, bias=bias, seed=chunk)
    assert_close(ours(*arrays, softcap, chunk), reference(*arrays, softcap))


@pytest.mark.parametrize(("bias", "softcap"), [(True, 2.0), (False, None)])
def test_is_the_textbooks_in_chunks_the_last_of_which_is_short(bias, softcap):
    arrays = inputs(2, 5, 7, 38, bias=bias)
    assert_close(ours(*arrays, softcap, 11), reference(*arrays, softcap))


# A vocabulary of 38 in tiles of 8: whole, in two chunks of 24 and in five of 8.
@pytest.mark.parametrize("chunk", [None, 20, 8])
@pytest.mark.parametrize(("bias", "softcap"), [(True, 2.0), (False, None)])
def test_is_the_textbooks_when_the_vocabulary_is_filled_up(chunk, bias, softcap):
    features, kernel, biases, *rest = inputs(2, 5, 7, 38, bias=bias)
    # Logits so low that one of 0, as a column of zeros has it, would be all that counts, and that
    # its exponential would overflow.
    features[..., 0], kernel[0] = 1, -100
    arrays = (features, kernel, biases, *rest)
    assert_close(ours(*arrays, softcap, chunk, 8), reference(*arrays, softcap), 1e-3)


@pytest.mark.parametrize("chunk", [None, 16])
def test_filled_up_bfloat16_is_summed_in_float32(chunk):
    features, *rest = inputs(2, 16, 64, 38)
    rounded = [x.astype(jnp.bfloat16) for x in (features, *rest[:2])]
    losses, gradients = ours(jnp.asarray(rounded[0]), *rest, None, chunk, 8)
    assert [x.dtype.name for x in (losses, *gradients)] == ["float32", "bfloat16", *["float32"] * 2]
    exact = reference(*(x.astype(np.float32) for x in rounded), *rest[2:])
    assert_close(losses, exact[0], 1e-5)
    assert_close(gradients, exact[1], 1e-2)


@pytest.fixture
def gpu(monkeypatch):
    """What is traced is traced for a GPU."""
    monkeypatch.setattr(module, "current_device", lambda: Device("gpu", "NVIDIA H200"))


def product_widths(jaxpr):
    """The columns of every product, loops looked into."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape[-1]
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from product_widths(getattr(value, "jaxpr", value))


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


@pytest.mark.parametrize(("vocab", "chunk"), [(65, None), (50_257, None), (50_257, 10_000)])
def test_a_gpus_products_have_whole_tiles(gpu, vocab, chunk):
    arrays = inputs(1, TILE, TILE, 5)
    kernel, bias = jnp.zeros((TILE, vocab)), jnp.zeros(vocab)
    traced = jax.make_jaxpr(functools.partial(differentiated, chunk=chunk))(
        arrays[0], kernel, bias, *arrays[3:]
    )
    widths = list(product_widths(traced.jaxpr))
    assert len(widths) == 3 if chunk is None else len(widths) == 4
    assert all(width % TILE == 0 for width in widths)
    if chunk is not None:
        assert max(widths) <= chunk + TILE


def test_the_logits_of_a_gpu_have_the_true_vocabulary(gpu):
    features, kernel, bias, *_ = inputs(2, TILE, 7, 65)
    assert set(product_widths(jax.make_jaxpr(head_logits)(features, kernel, bias).jaxpr)) == {TILE}
    logits = jax.jit(head_logits)(features, kernel, bias)
    assert logits.shape == (2, TILE, 65)
    assert_close(logits, features.astype(np.float64) @ kernel + bias)
    # Decoding has few rows, and reads the kernel where it is.
    few = jax.make_jaxpr(head_logits)(features[:, :3], kernel, bias)
    assert set(product_widths(few.jaxpr)) == {65}


class Card:
    platform = "gpu"

    def __init__(self, stats):
        self.memory_stats = lambda: stats


@pytest.mark.parametrize("stats", [None, {}, {"bytes_limit": 105_750_000_000}])
def test_a_gpus_limits_are_shares_of_its_memory(gpu, monkeypatch, stats):
    """Of one that is not here, of three quarters of what its data sheet says."""
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(jax, "local_devices", lambda: [Card(stats)])
    assert module.device_limits() == (1_652_343_750, 206_542_968)
    monkeypatch.setattr(jax, "local_devices", lambda: [Card({"bytes_limit": 6_400_000})])
    assert module.device_limits() == (100_000, 12_500)


def test_is_right_where_the_exponentials_would_overflow():
    features, *rest = inputs(2, 3, 4, 10)
    arrays = (100 * features, *rest)
    losses, gradients = ours(*arrays, None, 3)
    assert np.isfinite(losses).all()
    with np.errstate(divide="ignore"):
        assert_close((gradients,), (reference(*arrays)[1],), 1e-4)


@pytest.mark.parametrize("chunk", [3, None])
def test_of_bfloat16_features_is_summed_in_float32(chunk):
    features, *rest = inputs(2, 16, 64, 10)
    rounded = [None if x is None else x.astype(jnp.bfloat16) for x in (features, *rest[:2])]
    losses, gradients = ours(jnp.asarray(rounded[0]), *rest, None, chunk)
    assert losses.dtype == jnp.float32
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == gradients[2].dtype == jnp.float32
    exact = reference(*(x.astype(np.float32) for x in rounded), *rest[2:])
    # Sums in bfloat16 would be off by 1e-2; its factors, once rounded, are the reference's own.
    assert_close(losses, exact[0], 1e-5)
    assert_close(gradients, exact[1], 1e-2)


def test_of_a_tied_head_has_the_gradient_of_the_embedding():
    features, kernel, _, targets, weights = inputs(2, 3, 4, 10, bias=False)

    @jax.jit
    def gradient(embedding, features, targets, weights):
        def tied(embedding):
            losses = cross_entropy(features, embedding.T, None, targets, chunk=4)
            return jnp.sum(losses * weights)

        return jax.grad(tied)(embedding)

    expected = reference(features, kernel, None, targets, weights)[1][1].T
    assert_close(gradient(kernel.T, features, targets, weights), expected)


def test_works_under_vmap_and_remat():
    members = [inputs(2, 3, 4, 10, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *members)
    rematted = functools.partial(differentiated, softcap=2.0, chunk=4, wrapped_by=jax.checkpoint)
    losses, gradients = jax.jit(jax.vmap(rematted))(*stacked)
    for i, member in enumerate(members):
        assert_close(
            jax.tree.map(lambda x, i=i: x[i], (losses, gradients)), reference(*member, 2.0)
        )


def test_leaves_a_sharded_batch_where_it_is():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    arrays = inputs(2 * mesh.size, 3, 4, 10)
    where = [NamedSharding(mesh, P(*names)) for names in (["data"], [], [], ["data"], ["data"])]
    placed = jax.device_put(arrays, tuple(where))
    assert_close(ours(*placed, None, 4), reference(*arrays))


def memory(tokens, width, vocab, chunk=None):
    """Temporary bytes of losses and gradients, as XLA plans them."""
    shapes = [
        ((1, tokens, width), jnp.float32),
        ((width, vocab), jnp.float32),
        ((vocab,), jnp.float32),
    ]
    shapes += [((1, tokens), jnp.int32), ((1, tokens), jnp.float32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = ours.lower(*arguments, None, chunk).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_needs_memory_for_one_chunk_of_logits_whatever_the_vocabulary():
    tokens, width, vocab = 256, 8, 2**17
    whole, chunk = 4 * tokens * vocab, 4 * CPU.chunk
    assert memory(tokens, width, vocab, chunk=vocab) > whole
    used = memory(tokens, width, vocab)
    assert used < 6 * chunk < whole / 4
    # Twice the vocabulary costs a part of the kernel's size more, if anything, and no logits.
    assert memory(tokens, width, 2 * vocab) < used + 4 * width * vocab
    per_column = (memory(tokens, width, vocab, 2048) - memory(tokens, width, vocab, 1024)) / 1024
    assert 4 * tokens <= per_column <= 6 * 4 * tokens


def test_takes_few_logits_in_one_piece():
    """Those of the character models, say: then it is what optax makes of the logits."""
    vocab = CPU.whole // 256
    assert "scan" not in str(jaxpr(256, vocab))
    assert "scan" in str(jaxpr(256, 2 * vocab))
    assert CPU.chunk < CPU.whole < ACCELERATOR.whole < module.USUAL_MEMORY // 64


def jaxpr(tokens, vocab):
    zeros = jnp.zeros
    arguments = zeros((1, tokens, 2)), zeros((2, vocab)), None, zeros((1, tokens), jnp.int32)
    return jax.make_jaxpr(cross_entropy)(*arguments)
