"""Every decoder is causal, cached, trainable, and the same as a naive one."""

import dataclasses
import functools
from itertools import product

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import (
    REFUSED,
    REFUSED_DEPTHS,
    SMALL,
    covering_configs,
    logits_of,
    name_of,
    random_params,
    seeing,
    shapes,
    slow,
    small,
    telling,
)

from jaxdecoder import Decoder
from jaxdecoder.config import ConfigError
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.decoding import empty_cache, prepare
from jaxdecoder.layers import cache as caches
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.cache import Cursor
from jaxdecoder.layers.depth import DEPTHS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.positions import POSITIONS

SWITCHED = [
    small(residual=False, attention_projection=False, head_bias=True, norm_epsilon=1e-3),
    small(residual="attention", norm_placement="post", feed_forward_projection=False, d_ff=None),
    small(residual="feed_forward", norm_placement="sandwich", layout="parallel_stacks", n_layers=4),
    small(feed_forward_projection=False, d_ff=None, activation="relu"),
    small(feed_forward_projection=False, d_ff=16, activation="swiglu", bias=False),
    small(feed_forward=False, bias=False, tie_embeddings=True, norm_placement="parallel"),
    small(
        position="rope",
        rope_base=50.0,
        qkv_bias=True,
        qk_norm=True,
        n_kv_heads=2,
        d_head=6,
        logit_softcap=2.0,
        attention=("full", "sliding_window"),
        attention_window=3,
    ),
    small(
        position="none",
        n_kv_heads=1,
        n_layers=4,
        attention=("sliding_window", "full"),
        attention_window=4,
        d_model=12,
    ),
    small(
        position="rope",
        rope_fraction=0.5,
        rope_scaling=4.0,
        d_head=8,
        attention=("longformer", "fixed_sparse"),
        attention_window=2,
        attention_dilation=2,
        attention_globals=2,
        attention_block=5,
    ),
    small(
        position="t5",
        position_buckets=6,
        position_max_distance=7,
        attention=("strided_sparse", "full"),
        attention_block=4,
    ),
    small(
        position="alibi",
        n_heads=6,
        n_kv_heads=3,
        d_head=4,
        attention=("longformer", "fixed_sparse"),
        attention_window=5,
        attention_globals=0,
    ),
    small(
        position="rope",
        rope_fraction=0.5,
        n_kv_heads=2,
        d_head=8,
        qk_norm=True,
        attention=("linformer", "linear"),
        attention_block=2,
        attention_rank=1,
    ),
    small(position="t5", attention="linformer", attention_block=4, attention_rank=3),
]
STACKED = [
    small(
        layout="parallel_stacks",
        n_stacks=1,
        layers_per_stack=2,
        residual=False,
        norm_placement="none",
        attention_projection=False,
        head_bias=True,
        logit_softcap=2.0,
        n_layers=2,
    ),
    small(
        layout="parallel_stacks",
        n_stacks=3,
        n_layers=12,
        attention=("full", "strided_sparse"),
        position="rope",
        qkv_bias=True,
        qk_norm=True,
        feed_forward=False,
        bias=False,
        n_kv_heads=2,
        norm="rmsnorm",
        norm_placement="sandwich",
        remat="everything",
    ),
]
CONFIGS = [*covering_configs(), *SWITCHED, *STACKED]
FEW = telling(CONFIGS)
TIME = SMALL.context_length
PREFILLED = TIME - 2


# --- What the tests run, compiled once for each config -------------------------------------------


@functools.cache
def model(config):
    """A decoder and parameters of which none is special."""
    return Decoder(config), random_params(config)


@functools.partial(jax.jit, static_argnums=0)
def run(decoder, params, tokens, weights):
    """Gradients of the weighted sum of logits, and the logits."""

    def weighed(params):
        logits = decoder.apply({"params": params}, tokens)
        return jnp.sum(logits * weights), logits

    return jax.grad(weighed, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(0, 4))
def decode(decoder, params, tokens, start, chunks):
    """Logits of a stream of left-padded rows: these chunks, then token by token."""
    session = prepare(decoder, params)
    empty = session.empty_cache(tokens.shape[0])
    cache, at, parts = empty._replace(cursor=Cursor(empty.cursor.length, start)), 0, []
    for chunk in chunks:
        logits, cache, _ = session.extend(tokens[:, at : at + chunk], cache)
        parts.append(logits)
        at += chunk

    def step(cache, token):
        logits, cache, _ = session.extend(token[:, None], cache)
        return cache, logits[:, 0]

    if at < tokens.shape[1]:
        cache, rest = jax.lax.scan(step, cache, tokens[:, at:].T)
        parts.append(rest.swapaxes(0, 1))
    return jnp.concatenate(parts, axis=1)


def two_rows(config):
    """Two rows of tokens, distinct within a row, that use the whole vocabulary together."""
    order = np.random.default_rng(1).permutation(config.vocab_size)
    return np.stack([order[:TIME], order[-TIME:]]).astype(np.int32)


@pytest.fixture(
    scope="module", params=[*FEW, *slow(*(c for c in CONFIGS if c not in FEW))], ids=name_of
)
def config(request):
    return request.param


# --- The tests -----------------------------------------------------------------------------------


def test_every_entry_and_pair_is_among_the_configs():
    configs = covering_configs()
    assert {(c.norm, c.norm_placement) for c in configs} >= {
        (norm, placement)
        for norm in ("layernorm", "rmsnorm", "none")
        for placement in ("pre", "post", "sandwich", "parallel", "none")
    }
    assert {(c.position, attention) for c in configs for attention in c.attention_pattern} == {
        (position, attention) for position in POSITIONS for attention in ATTENTIONS
    } - REFUSED.keys()
    assert {(c.activation, c.layout) for c in configs} >= set(product(ACTIVATIONS, LAYOUTS))
    assert {c.depth for c in configs} == DEPTHS.keys()
    for few in (configs, FEW):
        assert {c.copying for c in few} == {bool(c.convolution_width) for c in few} == {True, False}


class TestEveryDecoder:
    def test_leaves_logits_before_a_changed_token_to_the_bit(self, config):
        decoder, params = model(config)
        tokens, weights = two_rows(config), np.zeros((2, TIME, config.vocab_size), np.float32)
        _, before = run(decoder, params, tokens, weights)
        for t in range(TIME):
            changed = tokens.copy()
            changed[0, t] = (changed[0, t] + 1) % config.vocab_size
            _, after = run(decoder, params, changed, weights)
            assert after[0, :t].tobytes() == before[0, :t].tobytes()
            assert after[1].tobytes() == before[1].tobytes()
            assert np.abs(after[0, t] - before[0, t]).max() > 0

    def test_has_no_gradient_from_a_logit_to_a_later_token(self, config):
        if config.copying:
            pytest.skip("it must be tied, and every row of the embedding is read by the head")
        config = dataclasses.replace(config, tie_embeddings=False)
        decoder, params = model(config)
        tokens = two_rows(config)
        for t in range(TIME):
            weights = np.zeros((2, TIME, config.vocab_size), np.float32)
            weights[0, t] = np.arange(config.vocab_size) + 1
            gradients, _ = run(decoder, params, tokens, weights)
            reached = np.any(gradients["embedding"][tokens[0]] != 0, axis=-1)
            assert not reached[t + 1 :].any()
            assert reached[t]
            assert t == 0 or reached[:t].any()

    def test_gives_every_parameter_a_gradient(self, config):
        decoder, params = model(config)
        tokens = two_rows(config)
        weights = np.random.default_rng(2).normal(size=(2, TIME, config.vocab_size))
        gradients, logits = run(decoder, params, tokens, weights.astype(np.float32))
        assert np.isfinite(logits).all()
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            layers = gradient.shape[0] if "blocks" in [entry.key for entry in path] else 1
            by_layer = np.asarray(gradient).reshape(layers, -1)
            assert np.isfinite(by_layer).all(), path
            # A unit of a relu may be off for all of these tokens, but not most of them.
            assert ((by_layer != 0).mean(axis=1) > 0.5).all(), path

    def test_decodes_with_its_cache_what_the_full_pass_gives(self, config):
        decoder, params = model(config)
        tokens = two_rows(config)
        decoded = decode(decoder, params, *streams(tokens), (PREFILLED,))
        _, full = run(decoder, params, tokens, np.zeros((2, TIME, config.vocab_size), np.float32))
        assert_close(decoded[0, :TIME], full[0])
        # The second row is padded by three, so it is three tokens behind.
        assert_close(decoded[1, 3:TIME], full[1, : TIME - 3])

    def test_goes_on_past_the_context_as_through_a_sliding_window(self, config):
        if not POSITIONS[config.position].slides:
            pytest.skip("decoding starts over instead")
        if not naive.defines(config):
            pytest.skip("a component has no naive definition")
        decoder, params = model(config)
        tokens, start = streams(two_rows(config))
        decoded = decode(decoder, params, tokens, start, (PREFILLED,))
        for row, first in enumerate(start):
            expected = naive.decode(config, params, tokens[row, first:], window=TIME)
            assert_close(decoded[row, first:], expected)

    def test_equals_the_naive_decoder(self, config):
        if not naive.defines(config):
            pytest.skip("a component has no naive definition")
        decoder, params = model(config)
        tokens = two_rows(config)
        _, logits = run(decoder, params, tokens, np.zeros((2, TIME, config.vocab_size), np.float32))
        for row in range(2):
            assert_close(logits[row], naive.decode(config, params, tokens[row]))


@pytest.mark.parametrize("config", SWITCHED[:6], ids=name_of)
def test_switches_do_what_they_do_in_the_naive_decoder(config):
    """Without the gradients and the cache of every decoder above, whose programs take longer."""
    _, params = model(config)
    tokens = two_rows(config)
    logits = logits_of(Decoder(config), params, tokens)
    for row in range(2):
        assert_close(logits[row], naive.decode(config, params, tokens[row]))


def assert_close(actual, expected):
    """Equal within 1e-4 of the logits' size, which without norms may be thousands."""
    size = max(1.0, float(np.sqrt(np.mean(np.square(expected)))))
    np.testing.assert_allclose(actual / size, expected / size, atol=1e-4, rtol=0)


def streams(tokens):
    """Two left-padded rows, more than twice the context long, whose first tokens are these."""
    stream = np.concatenate([tokens, tokens[:, ::-1], tokens[:, : TIME // 2]], axis=1)
    start = np.array([0, 3], np.int32)
    padded = np.zeros_like(stream)
    for row, first in enumerate(start):
        padded[row, first:] = stream[row, : stream.shape[1] - first]
    return padded, start


class TestCache:
    # Every mechanism in one model.
    CONFIG = small(
        position="rope",
        attention=tuple(ATTENTIONS),
        n_layers=len(ATTENTIONS),
        attention_dilation=2,
        attention_globals=2,
        attention_window=2,
        attention_block=4,
        norm="rmsnorm",
    )

    @pytest.mark.parametrize("chunks", [(4, 16), *slow(((3, 1, 7, 5),), ((2, 16),))], ids=str)
    def test_takes_chunks_of_any_length_wherever_it_stands(self, chunks):
        """Chunks longer than the rings, than blocks and than the context, in rows that differ.

        The convolutions reach back over whole chunks, and the copying head has a ring too.
        """
        config = dataclasses.replace(
            self.CONFIG, convolution_width=6, copying=True, tie_embeddings=True
        )
        decoder, params = model(config)
        tokens, start = streams(two_rows(config))
        decoded = decode(decoder, params, tokens, start, chunks)
        for row, first in enumerate(start):
            expected = naive.decode(config, params, tokens[row, first:], window=TIME)
            assert_close(decoded[row, first:], expected)

    def test_does_not_grow_past_what_the_mechanism_sees(self):
        held = {  # numbers a row; a token's keys and values are 32, a state 4 x (16 + 4)
            "full": 8 * 32,
            "sliding_window": 2 * 32,
            "longformer": (3 + 2) * 32,  # a window of 2 spans 3, and the first 2
            "fixed_sparse": 8 * 32,  # a block of 4, and 2 of either block: no fewer than all
            "strided_sparse": 8 * 32,
            "linformer": (4 + 2 * 2) * 32,  # a block of 4, and 2 slots for either block
            "linear": 4 * (16 + 4),
        }
        for attention, count in held.items():
            config = dataclasses.replace(self.CONFIG, attention=attention, attention_rank=2)
            cache = jax.eval_shape(lambda c=config: empty_cache(c, 3))
            for layer in cache.layers:
                assert sum(leaf.size for leaf in jax.tree.leaves(layer)) == 3 * count, attention
        one = dataclasses.replace(self.CONFIG, attention="fixed_sparse", attention_globals=1)
        assert one.attention_block + 2 == empty_cache(one, 1).layers[0][0].k.shape[2]

    @pytest.mark.parametrize("attention", ["linformer", "linear"])
    def test_adds_up_in_float32_whatever_the_dtype(self, attention):
        cache = empty_cache(small(**seeing(attention)), 1, dtype=jnp.bfloat16).layers[0]
        sums = cache.compressed if attention == "linformer" else cache
        assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
        if attention == "linformer":
            assert {leaf.dtype for leaf in cache.exact} == {jnp.dtype("bfloat16")}

    @pytest.mark.parametrize("attention", ["full", "sliding_window", "longformer"])
    def test_is_the_same_in_parts(self, attention, monkeypatch):
        # A window of 4 makes parts of one slot, a context of 8 parts of two; pinned slots none.
        config = small(**seeing(attention), attention_window=4, position="rope", n_kv_heads=2)
        decoder, params = Decoder(config), random_params(config)
        tokens = jnp.asarray(np.random.default_rng(3).integers(0, 13, (2, 3 * TIME)))
        start = jnp.asarray([0, 2])
        uncut = jax.jit(functools.partial(decode.__wrapped__, decoder, chunks=(5, 1)))
        whole = uncut(params, tokens, start)
        monkeypatch.setattr(caches, "SHORTEST", 1)
        cut = jax.jit(functools.partial(decode.__wrapped__, decoder, chunks=(5, 1)))
        layers = empty_cache(config, 2).layers
        assert {len(layer) for layer in layers} == {1 if attention == "longformer" else 4}
        np.testing.assert_allclose(cut(params, tokens, start), whole, rtol=1e-4, atol=1e-5)

    def test_holds_the_context_in_the_dtype_asked_for(self):
        cache = empty_cache(small(n_kv_heads=2), 5, dtype=jnp.bfloat16)
        leaves = jax.tree.leaves(cache.layers)
        assert {leaf.shape for leaf in leaves} == {(5, 2, TIME, 4)}
        assert sum(leaf.size for leaf in leaves) == 2 * 2 * 5 * TIME * 2 * 4
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


class TestCompiledFully:
    """Once with all the compiler's passes, which the others do without."""

    def test_is_causal_to_the_bit(self):
        decoder, params = model(SMALL)
        apply = jax.jit(decoder.apply)
        tokens = two_rows(SMALL)[:1]
        before = apply({"params": params}, tokens)
        for t in range(TIME):
            changed = tokens.copy()
            changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
            after = apply({"params": params}, changed)
            assert after[0, :t].tobytes() == before[0, :t].tobytes()
            assert np.abs(after[0, t] - before[0, t]).max() > 0


class TestGradients:
    def test_vanish_for_a_key_bias_only_where_softmax_cancels_it(self):
        """A bias shared by all keys moves all scores of a query alike, unless it is turned by
        position or normalised; then no gradient reaches it."""
        for changes, cancels in ({"position": "none"}, True), ({"position": "rope"}, False):
            config = small(qkv_bias=True, n_layers=1, **changes)
            decoder, params = model(config)
            weights = np.random.default_rng(2).normal(size=(2, TIME, 13)).astype(np.float32)
            gradients, _ = run(decoder, params, two_rows(config), weights)
            attention = gradients["body"]["blocks"]["block_0"]["attention"]
            size = {name: np.abs(attention[name]["bias"]).max() for name in ("query", "key")}
            assert (size["key"] < 1e-4 * size["query"]) == cancels
            assert size["query"] > 0.01

    @pytest.mark.parametrize("implementation", ["reference", *slow("chunked")])
    def test_of_relative_biases_are_the_slopes_of_the_naive_decoder(self, implementation):
        config = small(position="t5", attention_implementation=implementation)
        decoder, params = model(config)
        tokens = two_rows(config)
        weights = np.random.default_rng(2).normal(size=(2, TIME, 13)).astype(np.float32)
        gradients, _ = run(decoder, params, tokens, weights)
        params = naive.to_float64(params)
        bias = params["body"]["blocks"]["block_0"]["attention"]["positions"]["bias"]
        assert bias.shape == (2, 4, 4)  # layers, heads, buckets

        def loss():
            logits = [naive.decode(config, params, row) for row in tokens]
            return np.sum(weights * np.stack(logits))

        slopes = np.empty_like(bias)
        for entry in np.ndindex(bias.shape):
            middle, step = bias[entry], 1e-4
            bias[entry] = middle + step
            above = loss()
            bias[entry] = middle - step
            slopes[entry] = (above - loss()) / (2 * step)
            bias[entry] = middle
        learned = gradients["body"]["blocks"]["block_0"]["attention"]["positions"]["bias"]
        assert np.abs(slopes).min() > 1e-4
        np.testing.assert_allclose(learned, slopes, rtol=1e-3, atol=1e-3)


class TestPrecision:
    @pytest.mark.parametrize("position", ["rope", *slow("alibi", "t5")])
    def test_of_bfloat16_compute_is_close_to_float32(self, position):
        config = small(position=position, norm="rmsnorm", activation="swiglu", n_kv_heads=2)
        params = random_params(config)
        tokens = two_rows(config)
        exact = logits_of(Decoder(config), params, tokens)
        rough = logits_of(Decoder(config, dtype=jnp.bfloat16), params, tokens)
        assert exact.dtype == rough.dtype == jnp.float32
        error = np.sqrt(np.mean((rough - exact) ** 2) / np.mean(exact**2))
        assert 1e-4 < error < 0.03

    def test_of_parameters_is_float32_whatever_the_compute(self):
        key, tokens = jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
        arrays = jax.eval_shape(Decoder(SMALL, dtype=jnp.bfloat16).init, key, tokens)
        assert {leaf.dtype for leaf in jax.tree.leaves(arrays)} == {jnp.dtype("float32")}


STACKS = {"layout": "parallel_stacks"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"d_model": 18}, "model.d_model"),
            ({"n_kv_heads": 3}, "model.n_kv_heads"),
            ({"attention": ("full", "sliding_window"), "n_layers": 3}, "model.attention"),
            ({"attention": ()}, "model.attention"),
            ({"position": "rope", "d_head": 5}, "model.d_head"),
            ({"position": "rope", "d_head": 6, "rope_fraction": 0.5}, "model.rope_fraction"),
            ({"position": "rope", "d_head": 6, "rope_fraction": 0.4}, "model.rope_fraction"),
            ({"position": "rope", "rope_fraction": 0.01}, "model.rope_fraction"),
            ({"position": "t5", "position_buckets": 1}, "model.position_buckets"),
            ({"position": "t5", "position_max_distance": 2}, "model.position_max_distance"),
            ({"attention": "fixed_sparse", "attention_globals": 4}, "model.attention_globals"),
            ({"attention": "linformer"}, r"model.attention_block = 3: .* = 8.*; 2 or 4 would"),
            ({"attention": "linformer", "attention_block": 8}, r"two at least; 2 or 4 would do"),
            (
                {"attention": "linformer", "attention_block": 2, "attention_rank": 3},
                r"model.attention_rank = 3: .* = 2 have no more",
            ),
            ({"attention_projection": False, "d_head": 5}, "model.attention_projection"),
            ({"residual": "attention", "norm_placement": "parallel"}, "model.residual"),
            ({"feed_forward_projection": False, "d_ff": 24}, "model.d_ff"),
            ({"copying": True}, "model.copying = true: .*model.tie_embeddings = true would do"),
            (
                {"copying": True, "tie_embeddings": True, "depth": "early_exit"},
                'model.copying = true: .*"early_exit" stop before',
            ),
            (
                {**STACKS, "n_layers": 4, "convolution_width": 3},
                'model.convolution_width = 3: .*model.layout = "parallel_stacks"',
            ),
            (
                {"depth": "early_exit", "convolution_width": 3},
                'model.convolution_width = 3: .*model.depth = "early_exit"',
            ),
            (
                {"depth": "mixture_of_depths", "convolution_width": 3},
                'model.convolution_width = 3: .*model.depth = "mixture_of_depths"',
            ),
            ({**STACKS, "n_layers": 3}, "model.n_layers = 3.*2 or 4 would do"),
            ({**STACKS, "layers_per_stack": 2}, "model.n_layers = 2.*are 4"),
            ({**STACKS, "n_layers": 12}, "model.d_model = 16.*12 or 18 would do"),
            ({**STACKS, "tie_embeddings": True}, "model.tie_embeddings = true.*4 times as wide"),
            ({**STACKS, "n_layers": 4, "attention": ("full",) * 4}, "model.layers_per_stack = 2"),
        ],
    )
    def test_of_a_config_name_its_key(self, changes, key):
        with pytest.raises(ConfigError, match=key):
            small(**changes)

    def test_of_pairs_name_the_key_and_the_reason(self):
        for (position, attention), key in REFUSED.items():
            for pattern in (attention, ("full", attention)):
                with pytest.raises(ConfigError, match=rf'^{key} = .*"linear" never has one; none'):
                    small(position=position, **seeing(*np.atleast_1d(pattern).tolist()))
        for (depth, other), key in REFUSED_DEPTHS.items():
            field = "layout" if other in LAYOUTS else "attention"
            fields = {"layout": other} if field == "layout" else seeing(other)
            with pytest.raises(ConfigError, match=rf'^{key} = "{depth}": .*"{other}"'):
                small(depth=depth, **fields)

    def test_of_a_decoder_name_the_key(self):
        with pytest.raises(ConfigError, match=r"model\.vocab_size"):
            shapes(small(vocab_size=None))
        with pytest.raises(ConfigError, match=r"model\.context_length.*9 tokens"):
            jax.eval_shape(
                lambda p, t: Decoder(SMALL).apply({"params": p}, t),
                shapes(SMALL),
                jax.ShapeDtypeStruct((1, 9), jnp.int32),
            )
