"""Every component is what torch and transformers, or else a naive float64 decoder, have it to be.

The numbers lie in `tests/golden`, written by its `make.py`. The oracles of each entry, a model of
its own name there or `naive`, the decoder of `naive.py` that `test_decoder.py` compares with:

    position        none            torch_pre_norm
    position        learned         gpt2
    position        sinusoidal      torch_post_norm
    position        rope            llama llama_stretched mistral qwen3 gemma2 gptj gpt_neox falcon
    position        alibi           mpt
    position        t5              t5 t5_gated
    norm            layernorm       gpt2 gptj gpt_neox falcon mpt torch_post_norm torch_pre_norm
    norm            rmsnorm         llama mistral qwen3 gemma2 t5
    norm            none            naive
    norm_placement  pre             gpt2 llama torch_pre_norm
    norm_placement  post            torch_post_norm
    norm_placement  sandwich        gemma2
    norm_placement  parallel        gptj gpt_neox falcon
    norm_placement  none            naive
    activation      relu            t5 torch_post_norm
    activation      gelu            gpt2 gptj
    activation      gelu_exact      gpt_neox falcon mpt
    activation      swish           naive
    activation      relu2           naive
    activation      swiglu          llama mistral qwen3
    activation      geglu           gemma2
    activation      reglu           t5_gated
    attention       full            gpt2 llama
    attention       sliding_window  mistral gemma2
    attention       longformer      naive
    attention       fixed_sparse    naive
    attention       strided_sparse  naive
    attention       linformer       naive
    attention       linear          naive
    layout          serial          gpt2 llama
    layout          parallel_stacks naive

What is `naive` there has torch's functions for its parts: the activations one by one, attention
under the mask of every pattern, and Longformer's own code. The switches: `bias` in all and not
(llama), `qkv_bias` (gpt2), `head_bias` (gptj), `tie_embeddings` (gpt2, mpt), `qk_norm` (qwen3),
grouped keys (llama) and a single one (falcon), `logit_softcap` (gemma2), `rope_fraction` (gptj,
gpt_neox), `rope_scaling` (llama_stretched). The gradients of all parameters: gpt2, llama.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import logits_of, seeing, shapes, slow, small

from jaxdecoder import Decoder
from jaxdecoder.config import ModelConfig
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.kernels import flash_attention, masks, scores
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.linear import embedding_initializer, initializers
from jaxdecoder.layers.masked import MASKED
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS

FOLDER = Path(__file__).parent / "golden"
FAMILIES = {
    "position": POSITIONS,
    "norm": NORMS,
    "norm_placement": PLACEMENTS,
    "activation": ACTIVATIONS,
    "attention": ATTENTIONS,
    "layout": LAYOUTS,
}
MODELS = sorted(path.stem for path in FOLDER.glob("*.npz") if "config" in np.load(path).files)


@functools.cache
def golden(name):
    """The arrays of a golden file, in the types that we compute with."""
    types = {"f": np.float32, "i": np.int32, "u": np.int32}
    return {
        key: np.asarray(value, types[value.dtype.kind]) if value.dtype.kind in types else value
        for key, value in np.load(FOLDER / f"{name}.npz").items()
    }


def config_of(name):
    fields = json.loads(str(golden(name)["config"]))
    if isinstance(fields.get("attention"), list):
        fields["attention"] = tuple(fields["attention"])
    return ModelConfig(**fields)


def tree_of(name, row):
    """The numbers of a row as parameters."""
    tree, at = {}, 0
    for path, shape in json.loads(str(golden(name)["index"])).items():
        *folders, leaf = path.split("/")
        branch = functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, tree)
        size = int(np.prod(shape))
        branch[leaf] = row[at : at + size].reshape(shape)
        at += size
    assert at == len(row)
    return tree


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class TestOracles:
    @staticmethod
    def table():
        rows = (line.split() for line in __doc__.splitlines() if line.startswith("    "))
        return {(family, entry): oracles for family, entry, *oracles in rows}

    def test_are_named_for_every_entry(self):
        entries = [(family, entry) for family, held in FAMILIES.items() for entry in held]
        assert list(self.table()) == entries

    def test_have_the_entry_that_they_are_named_for(self):
        for (family, entry), oracles in self.table().items():
            assert oracles
            for oracle in oracles:
                if oracle == "naive":
                    fields = seeing(entry) if family == "attention" else {family: entry}
                    assert naive.defines(small(**fields))
                else:
                    value = getattr(config_of(oracle), family)
                    assert entry in (value if isinstance(value, tuple) else (value,)), oracle


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_give_the_logits_of_the_oracle(self, name):
        file, config = golden(name), config_of(name)
        params = tree_of(name, file["weights"])
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes(config))
        logits = logits_of(Decoder(config), params, file["tokens"])
        assert np.std(file["logits"]) > 0.3
        assert_close(logits, file["logits"])

    def test_are_as_the_naive_decoder_has_them(self, name):
        """Which thereby is held to the oracles as well."""
        file = golden(name)
        params = tree_of(name, file["weights"])
        for tokens, logits in zip(np.asarray(file["tokens"]), file["logits"], strict=True):
            assert_close(naive.decode(config_of(name), params, tokens), logits)


@pytest.mark.parametrize("name", ["llama", *slow("gpt2")])
def test_gradients_of_a_models_loss_are_those_of_the_oracle(name):
    file, decoder = golden(name), Decoder(config_of(name))
    tokens = jnp.asarray(file["tokens"])

    @jax.jit
    def gradient(params):
        def loss(params):
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            return decoder.apply({"params": params}, inputs, targets, method="losses").mean()

        return jax.grad(loss)(params)

    expected = tree_of(name, file["gradients"])
    assert np.std(file["gradients"]) > 0.01
    jax.tree.map(assert_close, gradient(tree_of(name, file["weights"])), expected)


class TestFunctions:
    @pytest.mark.parametrize("name", [name for name, f in ACTIVATIONS.items() if not f.gated])
    def test_activations(self, name):
        file = golden("activations")
        assert_close(ACTIVATIONS[name].function(jnp.asarray(file["x"])), file[name])

    def test_gated_units_gate_by_the_activation_they_are_named_after(self):
        by = {"swiglu": "swish", "geglu": "gelu", "reglu": "relu"}
        assert list(by) == [name for name, f in ACTIVATIONS.items() if f.gated]
        file = golden("activations")
        for name, plain in by.items():
            assert_close(ACTIVATIONS[name].function(jnp.asarray(file["x"])), file[plain])

    def test_soft_cap(self):
        file = golden("activations")
        i = jnp.arange(len(file["x"]))
        assert_close(scores.soft_cap(3.0)(file["x"], 0, 0, i, i), file["capped_at_3"])

    @pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
    def test_norms_and_their_gradients(self, name):
        file = golden("norms")
        module = NORMS[name].new(small(norm_epsilon=1e-5).resolve(), jnp.float32)
        params = {key: file[key] for key in ("scale", "bias") if f"{name}/{key}" in file}

        def norm(params, x):
            return module.apply({"params": params}, x)

        @jax.jit
        def both(params, x, upstream):
            out, backward = jax.vjp(norm, params, x)
            return out, backward(upstream)

        out, (gradients, by_x) = both(params, file["x"], file["upstream"])
        assert_close(out, file[f"{name}/out"])
        # One row is nearly constant, and its gradients by x are large.
        size = np.abs(file[f"{name}/x"]).max(axis=-1, keepdims=True)
        assert_close(by_x / size, file[f"{name}/x"] / size)
        for key, gradient in gradients.items():
            assert_close(gradient, file[f"{name}/{key}"])

    def test_cross_entropy(self):
        file = golden("cross_entropy")
        batch, time, vocab_size = file["logits"].shape
        # A decoder whose blocks add nothing, whose head is the identity, and which has a token for
        # every row of logits.
        config = ModelConfig(
            vocab_size=vocab_size,
            context_length=time,
            d_model=vocab_size,
            n_layers=1,
            position="none",
            norm="none",
        )
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes(config))
        params |= {"head": {"kernel": jnp.eye(vocab_size)}}
        tokens = jnp.arange(vocab_size).reshape(batch, time)

        targets = jnp.asarray(file["targets"])

        def weighed(logits):
            variables = {"params": {**params, "embedding": logits.reshape(vocab_size, -1)}}
            decoder = Decoder(config)
            losses = decoder.apply(variables, tokens, targets, method="losses")
            return jnp.sum(losses * file["weights"]), losses

        gradient, losses = jax.jit(jax.grad(weighed, has_aux=True))(file["logits"])
        np.testing.assert_allclose(losses, file["losses"], rtol=1e-5, atol=1e-5)
        assert_close(gradient, file["gradient"])

    def test_initial_weights(self):
        """Standard deviation and largest size, within what drawing a few thousand leaves open."""
        for name, (std, largest) in golden("initial_weights").items():
            initializer, kind = name.split("/")
            config = small(initializer=initializer, n_layers=3).resolve()
            residual = kind == "residual_kernel"
            kernel, bias = initializers(config, 64, residual_output=residual)
            draw = {"bias": bias, "embedding": embedding_initializer(config)}.get(kind, kernel)
            values = draw(jax.random.key(0), (64, 2000), jnp.float32)
            assert abs(values.std() / std - 1) < 0.03, name
            if initializer == "uniform_fan_in" and kind != "embedding":
                assert abs(jnp.abs(values).max() / largest - 1) < 0.01, name
            else:
                assert jnp.abs(values).max() > 3.5 * std, name


class TestPositions:
    def test_sinusoidal(self):
        table = golden("positions")["sinusoidal"]
        embed = POSITIONS["sinusoidal"].embed(small(d_model=8, n_heads=1).resolve())
        assert_close(embed(jnp.arange(len(table))[None])[0], table)

    def test_slopes_of_alibi(self):
        slopes = np.concatenate([scores.alibi_slopes(heads) for heads in range(1, 13)])
        np.testing.assert_allclose(slopes, golden("positions")["alibi"], rtol=1e-6)

    def test_buckets_of_t5(self):
        found = [name.split("/")[1:] for name in golden("positions") if name.startswith("t5/")]
        assert len(found) > 1
        for buckets, longest in found:
            expected = golden("positions")[f"t5/{buckets}/{longest}"]
            distance = jnp.arange(len(expected))
            bucket = scores.t5_bucket(-distance, int(buckets), int(longest))
            np.testing.assert_array_equal(bucket, expected)


# The patterns that `VISIBLE` of make.py defines.
PATTERNS = {
    "full": small(),
    "sliding_window": small(attention_window=5),
    "longformer": small(attention_window=3, attention_dilation=2, attention_globals=2),
    "fixed_sparse": small(attention_block=4, attention_globals=2),
    "strided_sparse": small(attention_block=4),
}


class TestAttention:
    @pytest.mark.parametrize("name", MASKED)
    @pytest.mark.parametrize("implementation", ["reference", "chunked"])
    def test_under_every_mask_is_that_of_torch(self, name, implementation):
        file = golden("attention")
        mask = MASKED[name].mask(PATTERNS[name].resolve())
        q, k, v = (file[operand] for operand in "qkv")
        attend = functools.partial(flash_attention, mask=mask, implementation=implementation)
        assert_close(jax.jit(attend)(q, k, v), file[name])

    def test_of_longformer_is_its_own_where_it_looks_both_ways(self):
        file = golden("longformer")
        ahead = masks.from_function(lambda q, k: k - q <= 2)
        mask = (masks.sliding_window(3) & ahead) | masks.first(1)
        attend = jax.jit(functools.partial(flash_attention, mask=mask))
        out = attend(*(file[operand] for operand in "qkv"))
        assert_close(out[:, 1:], file["out"])
