"""What is counted in closed form is what the arrays and the traced programs hold."""

import dataclasses
import itertools
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shapes, small

from jaxdecoder import Decoder, analysis
from jaxdecoder.config import ConfigError, ModelConfig, choices, load
from jaxdecoder.decoder import empty_cache
from jaxdecoder.layers.attention import ATTENTIONS, MASKS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS

CONFIGS = Path(__file__).parent.parent / "configs"

# The published counts: preset -> (parameters, tokens of the vocabulary).
SEEDS = {
    "shakespeare_nano": (209_729, 65),
    "shakespeare_small": (2_697_281, 65),
    "shakespeare_baby_gpt": (10_788_929, 65),
    "tinygpt": (21_416_593, 145),
    "tinystories_77m": (76_852_305, 50_257),
}


def held(config):
    """Parameters in the arrays that `init` would make."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config)))


def products(jaxpr):
    """FLOPs of the matrix products of a traced program, 2 a multiply-add, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in summed)
        assert equation.primitive.name not in ("while", "cond", "conv_general_dilated")
        inner = sum(products(inner) for inner in inner_jaxprs(equation))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def inner_jaxprs(equation):
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
        if is_jaxpr(value):
            yield getattr(value, "jaxpr", value)


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


class TestTables:
    @pytest.mark.parametrize(
        ("table", "components"),
        [
            (analysis.POSITION_PARAMETERS, POSITIONS),
            (analysis.NORM_PARAMETERS, NORMS),
            (analysis.PLACEMENT_NORMS, PLACEMENTS),
            (analysis.HIDDEN_MATRICES, ACTIVATIONS),
            (analysis.ATTENTION_COSTS, ATTENTIONS),
        ],
        ids=["positions", "norms", "placements", "activations", "attentions"],
    )
    def test_have_a_row_for_every_entry(self, table, components):
        assert table.keys() == components.keys()


class TestParameters:
    @pytest.mark.parametrize("name", SEEDS)
    def test_of_a_seed_are_its_own_to_the_unit(self, name):
        count, vocab_size = SEEDS[name]
        config = load(CONFIGS / f"{name}.toml", ["--model.vocab-size", str(vocab_size)]).model
        assert analysis.parameters(config)["total"] == count
        assert held(config) == count

    def test_are_told_by_part(self):
        # The seed block at D 64, T 32, V 65, added up by hand.
        d = 64
        config = ModelConfig(
            vocab_size=65,
            context_length=32,
            d_model=d,
            n_layers=4,
            n_heads=4,
            activation="relu",
            head_bias=True,
        )
        assert analysis.parameters(config) == {
            "embedding": 65 * d,
            "positions": 32 * d,
            "attention": 4 * (4 * d * d + d),
            "feed_forward": 4 * (8 * d * d + 4 * d + d),
            "norms": 9 * 2 * d,
            "head": 65 * d + 65,
            "total": 209_729,
        }

    def test_are_those_of_the_arrays_for_every_norm_and_placement(self):
        for norm, placement in itertools.product(NORMS, PLACEMENTS):
            config = small(norm=norm, norm_placement=placement)
            assert analysis.parameters(config)["total"] == held(config), config

    def test_are_those_of_the_arrays_for_every_position_and_attention(self):
        for position, attention in itertools.product(POSITIONS, ATTENTIONS):
            config = small(position=position, attention=attention)
            assert analysis.parameters(config)["total"] == held(config), config

    def test_are_those_of_the_arrays_for_every_activation(self):
        for activation, bias in itertools.product(ACTIVATIONS, (False, True)):
            config = small(activation=activation, bias=bias)
            assert analysis.parameters(config)["total"] == held(config), config

    def test_of_relative_biases_are_one_a_head_and_bucket_in_every_layer(self):
        config = small(position="t5", n_layers=3, position_buckets=20, position_max_distance=30)
        assert analysis.parameters(config)["positions"] == 3 * 4 * 20
        assert analysis.parameters(small(position="alibi"))["positions"] == 0

    @settings(max_examples=40)
    @given(st.data())
    def test_are_those_of_the_arrays_for_any_config(self, data):
        config = any_config(data.draw)
        counts = analysis.parameters(config)
        arrays = shapes(config)
        assert counts["total"] == sum(leaf.size for leaf in jax.tree.leaves(arrays))
        for part in PARTS:
            counted = counts.get("routers", 0) if part == "router" else counts[part]
            assert counted == size_under(arrays, part), (part, config)

    def test_need_a_vocabulary(self):
        with pytest.raises(ConfigError, match=r"model\.vocab_size"):
            analysis.parameters(small(vocab_size=None))


class TestFlops:
    CASES = (
        small(attention_implementation="reference"),
        small(
            attention_implementation="reference",
            position="rope",
            activation="swiglu",
            n_kv_heads=2,
            d_head=8,
            qk_norm=True,
            tie_embeddings=True,
            n_layers=4,
            attention=("full", "sliding_window"),
            attention_window=3,
        ),
        small(
            attention_implementation="reference",
            attention_projection=False,
            feed_forward=False,
            norm="rmsnorm",
            n_layers=1,
        ),
    )

    @pytest.mark.parametrize("config", CASES, ids=["plain", "modern", "bare"])
    def test_are_those_of_the_traced_programs(self, config):
        decoder, batch, length = Decoder(config), 3, config.context_length
        params = shapes(config)
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

        def loss(params, tokens):
            return jnp.sum(decoder.apply({"params": params}, tokens) ** 2)

        forward = analysis.forward_flops(config, length, dense=True)["total"]
        assert products(jax.make_jaxpr(loss)(params, tokens).jaxpr) == batch * forward
        gradient = jax.make_jaxpr(jax.grad(loss))(params, tokens)
        assert products(gradient.jaxpr) == 3 * batch * forward

        per_token = analysis.flops_per_token(config, dense=True)
        assert per_token.prefill["total"] == forward / length
        assert per_token.train["total"] == 3 * forward / length

    @pytest.mark.parametrize("config", CASES[:2], ids=["plain", "modern"])
    def test_of_decoding_are_those_of_the_traced_step(self, config):
        decoder = Decoder(config)
        step = jax.make_jaxpr(lambda *x: decoder.apply(x[0], *x[1:], method="extend"))(
            {"params": shapes(config)},
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
            jax.eval_shape(lambda: empty_cache(config, 1)),
        )
        assert products(step.jaxpr) == analysis.flops_per_token(config, dense=True).decode["total"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"depth": "early_exit", "n_layers": 4, "exit_every": 2},
            {"depth": "mixture_of_depths", "n_layers": 4, "mod_capacity": 0.4},
            {"depth": "mixture_of_depths", "mod_every": 1, "feed_forward": False},
        ],
    )
    def test_of_training_a_dynamic_depth_are_those_of_the_traced_program(self, changes):
        config, batch = small(attention_implementation="reference", **changes), 3
        decoder, length = Decoder(config), config.context_length
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

        def loss(params, tokens):
            apply = partial(decoder.apply, {"params": params}, deterministic=False)
            return jnp.sum(apply(tokens, tokens, method="losses"))

        traced = jax.make_jaxpr(loss)(shapes(config), tokens)
        forward = analysis.forward_flops(config, length, dense=True, training=True)["total"]
        assert products(traced.jaxpr) == batch * forward
        per_token = analysis.flops_per_token(config, dense=True).train["total"]
        assert per_token == 3 * forward / length

    def test_of_tokens_chosen_at_random_count_the_pairs_that_are_left(self):
        """The mean over all ways to choose 3 of 8 tokens."""
        for attention in ("full", "sliding_window"):
            config = small(
                attention=attention, depth="mixture_of_depths", mod_every=1, mod_capacity=3 / 8
            )
            mask = MASKS[attention](config)
            ways = list(itertools.combinations(range(8), 3))
            pairs = sum(bool(mask(q, k)) for way in ways for q in way for k in way) / len(ways)
            flops = analysis.forward_flops(config, 8, training=True)["attention"]
            assert flops == pytest.approx(4 * config.d_model * config.n_layers * pairs)

    def test_of_stopping_early_are_those_of_the_blocks_and_exits_passed(self):
        config = small(depth="early_exit", n_layers=4, exit_minimum=2, n_kv_heads=2, vocab_size=11)
        d, keys = config.d_model, 8
        block = 2 * (2 * d * d + 2 * d * 8 + 2 * d * 24) + 4 * d * keys
        fill, head = 2 * 2 * d * 8, 2 * d * 11
        for depth, heads in ((2, 1), (3, 2), (4, 3), (2.5, 1.5)):
            flops = analysis.early_exit_flops(config, depth, start=7)
            assert flops["total"] == depth * block + (4 - depth) * fill + heads * head

    def test_of_attention_count_allowed_pairs_only(self):
        config = small(attention="sliding_window", attention_window=3)
        pair = 4 * config.d_model * config.n_layers
        # Queries 0 to 7 see 1, 2, 3, 3, 3, 3, 3, 3 keys.
        assert analysis.forward_flops(config, 8)["attention"] == 21 * pair
        assert analysis.forward_flops(config, 8, dense=True)["attention"] == 64 * pair
        assert analysis.flops_per_token(config).decode["attention"] == 3 * pair
        assert analysis.flops_per_token(config, dense=True).decode["attention"] == 8 * pair

    def test_of_attention_count_the_pairs_of_every_mechanism(self):
        config = small(attention_globals=1, n_layers=1)
        keys = {  # of queries 0 to 7, in a window, a block or a stride of 3
            "full": (1, 2, 3, 4, 5, 6, 7, 8),
            "sliding_window": (1, 2, 3, 3, 3, 3, 3, 3),
            "longformer": (1, 2, 3, 4, 4, 4, 4, 4),
            "fixed_sparse": (1, 2, 3, 2, 3, 4, 3, 4),
            "strided_sparse": (1, 2, 3, 4, 4, 4, 5, 5),
        }
        assert keys.keys() == ATTENTIONS.keys()
        for attention, counts in keys.items():
            config = dataclasses.replace(config, attention=attention)
            for start in (0, 5):
                flops = analysis.forward_flops(config, 8 - start, start=start)["attention"]
                assert flops == 4 * config.d_model * sum(counts[start:])

    def test_of_a_text_are_those_of_its_prefill_and_what_follows(self):
        for attention in ATTENTIONS:
            config = small(attention=attention, attention_window=3)
            whole = analysis.forward_flops(config, 8)
            begun = analysis.forward_flops(config, 5)
            rest = [analysis.forward_flops(config, 1, start=start) for start in (5, 6, 7)]
            for part in whole:
                assert whole[part] == begun[part] + sum(flops[part] for flops in rest)


class TestBytes:
    def test_of_the_cache_are_those_of_its_arrays(self):
        for config in (
            small(),
            small(n_kv_heads=2, d_head=6, attention=("full", "sliding_window")),
            small(depth="mixture_of_depths", n_layers=4),
        ):
            for dtype in (jnp.float32, jnp.bfloat16):
                cache = jax.eval_shape(lambda c=config, d=dtype: empty_cache(c, 1, dtype=d))
                leaves = jax.tree.leaves(cache.layers)
                size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
                assert analysis.cache_bytes(config, dtype.dtype.itemsize) == size

    def test_of_the_weights_are_four_each(self):
        assert analysis.weight_bytes(small()) == 4 * held(small())


class TestCommand:
    def run(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["analysis", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        analysis.main()
        return capsys.readouterr().out

    def test_prints_the_counts(self, monkeypatch, capsys):
        printed = self.run(
            monkeypatch, capsys, CONFIGS / "shakespeare_nano.toml", "--model.vocab-size", "65"
        )
        for expected in ("209,729", "1.255 M", "838,916", "bfloat16", "dense"):
            assert expected in printed

    def test_asks_for_a_vocabulary_that_only_the_corpus_knows(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            self.run(monkeypatch, capsys, CONFIGS / "shakespeare_nano.toml")
        assert "--model.vocab-size" in capsys.readouterr().err

    def test_knows_the_vocabularies_of_fixed_tokenizers(self, tmp_path):
        path = tmp_path / "x.toml"
        for tokenizer, size in {"gpt2": 50257, "byte": 257}.items():
            path.write_text(f'[data]\ntokenizer = "{tokenizer}"\n')
            assert analysis.with_vocab_size(load(path), "x.toml").vocab_size == size
        path.write_text('[model]\nvocab_size = 11\n[data]\ntokenizer = "bpe"\n')
        assert analysis.with_vocab_size(load(path), "x.toml").vocab_size == 11

    def test_tells_how_it_is_used(self, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            self.run(monkeypatch, capsys)
        assert "usage" in capsys.readouterr().err


def any_config(draw):
    """A random small config that is allowed."""
    n_heads = draw(st.sampled_from([1, 2, 4]))
    width = draw(st.sampled_from([2, 4, 6]))
    projects = draw(st.booleans())
    pattern = draw(st.lists(st.sampled_from(list(ATTENTIONS)), min_size=1, max_size=2))
    switches = {
        name: draw(st.booleans())
        for name in (
            "tie_embeddings",
            "bias",
            "qkv_bias",
            "head_bias",
            "qk_norm",
            "residual",
            "feed_forward",
        )
    }
    switches["head_bias"] &= not switches["tie_embeddings"]  # refused together
    return ModelConfig(
        vocab_size=draw(st.integers(1, 20)),
        context_length=draw(st.integers(2, 12)),
        d_model=draw(st.integers(2, 20)) if projects else n_heads * width,
        n_layers=len(pattern) * draw(st.integers(1, 2)) * 2,
        depth=draw(st.sampled_from(choices(ModelConfig, "depth"))),
        mod_every=draw(st.integers(1, 2)),
        n_heads=n_heads,
        n_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n_heads % n == 0])),
        d_head=width,
        d_ff=draw(st.none() | st.integers(1, 30)),
        position=draw(st.sampled_from(choices(ModelConfig, "position"))),
        norm=draw(st.sampled_from(choices(ModelConfig, "norm"))),
        norm_placement=draw(st.sampled_from(choices(ModelConfig, "norm_placement"))),
        activation=draw(st.sampled_from(choices(ModelConfig, "activation"))),
        attention=tuple(pattern),
        attention_projection=projects,
        **switches,
    )


PARTS = ("embedding", "positions", "attention", "feed_forward", "head", "router")


def size_under(arrays, name):
    """Parameters of the parts of this name, at the top or in blocks, less the parts inside them."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
        if name == next((e.key for e in reversed(module_of(path)) if e.key in PARTS), None)
    )


def module_of(path):
    """An array's path less its own name, which may be that of a part."""
    return path[:-1] or path
