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
from models import REFUSED, REFUSED_DEPTHS, any_config, seeing, shapes, slow, small, zip_cycled

from jaxdecoder import Decoder, analysis
from jaxdecoder.analysis.__main__ import main
from jaxdecoder.config import ConfigError, ModelConfig, load
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.decoding import empty_cache, prepare
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.masked import MASKED
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS

CONFIGS = Path(__file__).parent.parent / "configs"

# The published counts: preset -> (parameters, tokens of the vocabulary).
SEEDS = {
    "shakespeare_nano": (209_729, 65),
    "shakespeare_small": (2_697_281, 65),
    "shakespeare_baby_gpt": (10_788_929, 65),
    "gpt2_124m": (124_439_808, 50_257),
    "gpt2_xl": (1_557_611_200, 50_257),
    "tinygpt": (21_416_593, 145),
    "tinystories_77m": (76_852_305, 50_257),
    "parallel_stacks": (521_695_152, 110_000),
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


def sums(config, tokens):
    """FLOPs that are counted and no matrix product has: those of convolutions."""
    return analysis.forward_flops(config, tokens).get("convolutions", 0)


def not_learned(config):
    """FLOPs that one sequence's gradient is spared: the copying head's values learn nothing."""
    return config.copying * 2 * config.d_model * config.context_length**2


# Every entry of a component with some of another's, or all combinations.
every_or_all = pytest.mark.parametrize(
    "combined", [zip_cycled, *slow(itertools.product)], ids=["every entry", "all pairs"]
)


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

    def test_of_parallel_stacks_are_the_published_ones_less_what_never_reached_the_output(self):
        """Published: 557,365,680, with both kinds of feed-forward and of norms in both stacks."""
        d, n, vocab_size = 512, 32, 110_000
        counts = analysis.parameters(load(CONFIGS / "parallel_stacks.toml").model)

        def linear(d_in, d_out):
            return (d_in + 1) * d_out

        def feed_forward(width):
            return linear(width, 4 * width) + linear(4 * width, width)

        def layer(share):
            return 4 * linear(d, d) + 2 * d + feed_forward(d) + 2 * linear(d, share)

        def norm(width):
            return 2 * width

        extras = feed_forward(d) + feed_forward(4 * d) + 2 * norm(d) + norm(4 * d)
        assert (layer(d // n), layer(4 * d // n), extras) == (3_167_776, 3_217_024, 35_670_528)
        layers = n * (layer(d // n) + layer(4 * d // n))
        ends = vocab_size * d + norm(d) + linear(4 * d, vocab_size)
        published = ends + layers + 2 * extras
        dead = [
            feed_forward(4 * d) + norm(4 * d) + norm(d),  # in stack one: the wide ones, input norm
            feed_forward(d) + norm(d),  # in stack two: the narrow ones
        ]
        assert published == 557_365_680
        assert dead == [33_569_792, 2_100_736]
        assert counts["total"] == published - sum(dead) == 521_695_152
        # The published code drops the input norm of stack two, which its figure shows.
        assert sum(dead) + norm(d) == 35_671_552

    @every_or_all
    def test_are_those_of_the_arrays_for_norms_and_placements(self, combined):
        for norm, placement, layout in combined(list(NORMS), list(PLACEMENTS), list(LAYOUTS)):
            config = small(norm=norm, norm_placement=placement, layout=layout)
            assert analysis.parameters(config)["total"] == held(config), config

    @every_or_all
    def test_are_those_of_the_arrays_for_positions_and_attentions(self, combined):
        pairs = combined(list(POSITIONS), list(ATTENTIONS))
        for position, attention in (pair for pair in pairs if pair not in REFUSED):
            config = small(position=position, **seeing(attention))
            assert analysis.parameters(config)["total"] == held(config), config

    @every_or_all
    def test_are_those_of_the_arrays_for_activations(self, combined):
        switches = list(itertools.product((False, True), (False, True)))
        for activation, (bias, projects) in combined(list(ACTIVATIONS), switches):
            config = small(
                activation=activation, bias=bias, feed_forward_projection=projects, d_ff=None
            )
            assert analysis.parameters(config)["total"] == held(config), config

    def test_of_relative_biases_are_one_a_head_and_bucket_in_every_layer(self):
        config = small(position="t5", n_layers=3, position_buckets=20, position_max_distance=30)
        assert analysis.parameters(config)["positions"] == 3 * 4 * 20
        assert analysis.parameters(small(position="alibi"))["positions"] == 0

    @settings(max_examples=8)
    @given(st.data())
    def test_are_those_of_the_arrays_for_any_config(self, data):
        self.check(data)

    @pytest.mark.slow
    @settings(max_examples=40)
    @given(st.data())
    def test_are_those_of_the_arrays_for_many_configs(self, data):
        self.check(data)

    def check(self, data):
        config = any_config(data.draw)
        counts = analysis.parameters(config)
        arrays = shapes(config)
        assert counts["total"] == sum(leaf.size for leaf in jax.tree.leaves(arrays))
        for part in counts.keys() - {"norms", "total"}:
            assert counts[part] == size_under(arrays, part), (part, config)
        assert ("copying" in counts, "convolutions" in counts) == (
            config.copying,
            bool(config.convolution_width),
        )

    def test_need_a_vocabulary(self):
        with pytest.raises(ConfigError, match=r"model\.vocab_size"):
            analysis.parameters(small(vocab_size=None))


class TestFlops:
    FEW = (
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
            n_kv_heads=2,
            d_head=6,
            **seeing("linformer", "fixed_sparse"),
        ),
        small(n_kv_heads=2, d_head=6, attention="linear"),  # chunks of 3, the last one padded
        small(
            attention_implementation="reference",
            layout="parallel_stacks",
            layers_per_stack=4,
            n_layers=8,
            attention=("sliding_window", "full"),
            activation="geglu",
        ),
        small(
            attention_implementation="reference",
            convolution_width=3,
            copying=True,
            tie_embeddings=True,
            n_layers=1,
        ),
    )
    MORE = (
        small(
            attention_implementation="reference",
            attention_projection=False,
            feed_forward=False,
            norm="rmsnorm",
            n_layers=1,
        ),
        small(
            attention_implementation="reference",
            feed_forward_projection=False,
            d_ff=None,
            activation="geglu",
            norm_placement="parallel",
        ),
        small(n_kv_heads=2, d_head=6, attention="linear", attention_block=32),
        small(
            attention_implementation="reference",
            layout="parallel_stacks",
            n_stacks=3,
            n_layers=6,
            residual=False,
        ),
    )
    NAMES = (
        *("plain", "modern", "linformer", "linear", "stacks", "copying"),
        *("bare", "unprojected", "one chunk", "three stacks"),
    )

    @pytest.mark.parametrize("config", [*FEW, *slow(*MORE)], ids=NAMES)
    def test_are_those_of_the_traced_programs(self, config):
        decoder, batch, length = Decoder(config), 3, config.context_length
        params = shapes(config)
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

        def loss(params, tokens):
            return jnp.sum(decoder.apply({"params": params}, tokens) ** 2)

        forward = analysis.forward_flops(config, length, dense=True)["total"]
        traced = jax.make_jaxpr(loss)(params, tokens)
        assert products(traced.jaxpr) == batch * (forward - sums(config, length))
        gradient = jax.make_jaxpr(jax.grad(loss))(params, tokens)
        learning = 3 * (forward - sums(config, length)) - not_learned(config)
        assert products(gradient.jaxpr) == batch * learning

        per_token = analysis.flops_per_token(config, dense=True)
        assert per_token.prefill["total"] == forward / length
        assert per_token.train["total"] == 3 * forward / length

    @pytest.mark.parametrize(
        "config",
        [
            *FEW,
            small(attention=("sliding_window", "longformer"), attention_dilation=2),
            *slow(*MORE, small(attention=("strided_sparse", "fixed_sparse"))),
        ],
    )
    def test_of_decoding_are_those_of_the_traced_step(self, config):
        decoder = Decoder(config)
        step = jax.make_jaxpr(lambda session, *x: session.extend(*x))(
            jax.eval_shape(lambda params: prepare(decoder, params), shapes(config)),
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
            jax.eval_shape(lambda: empty_cache(config, 1)),
        )
        counted = analysis.flops_per_token(config, dense=True).decode["total"]
        assert products(step.jaxpr) == counted - sums(config, 1)

    def test_of_convolutions_and_copying_are_those_of_every_tap_and_pair(self):
        config = small(convolution_width=3, copying=True, tie_embeddings=True)
        for start in (0, 5):
            flops = analysis.forward_flops(config, 8 - start, start=start)
            # Two layers of two branches; of taps that reach before the text too.
            assert flops["convolutions"] == 2 * (8 - start) * 2 * 2 * 3 * 16
            pairs = sum(range(start + 1, 9))
            assert flops["copying"] == 2 * ((8 - start) * (2 * 16 * 16 + 16) + 2 * 16 * pairs)

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
            apply = partial(decoder.apply, {"params": params}, dropout=0.0)
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
            mask = MASKED[attention].mask(config.resolve())
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
        # A cache has no more than the window.
        assert analysis.flops_per_token(config, dense=True).decode["attention"] == 3 * pair
        full = small(attention="full")
        assert analysis.flops_per_token(full, dense=True).decode["attention"] == 8 * pair

    def test_of_attention_count_the_pairs_of_every_mask(self):
        config = small(attention_globals=1, n_layers=1)
        keys = {  # of queries 0 to 7, in a window, a block or a stride of 3
            "full": (1, 2, 3, 4, 5, 6, 7, 8),
            "sliding_window": (1, 2, 3, 3, 3, 3, 3, 3),
            "longformer": (1, 2, 3, 4, 4, 4, 4, 4),
            "fixed_sparse": (1, 2, 3, 2, 3, 4, 3, 4),
            "strided_sparse": (1, 2, 3, 4, 4, 4, 5, 5),
        }
        assert keys.keys() == ATTENTIONS.keys() - {"linformer", "linear"}
        for attention, counts in keys.items():
            config = dataclasses.replace(config, attention=attention)
            for start in (0, 5):
                flops = analysis.forward_flops(config, 8 - start, start=start)["attention"]
                assert flops == 4 * config.d_model * sum(counts[start:])

    def test_of_linformer_count_what_is_compressed_besides(self):
        config = small(
            attention="linformer", attention_block=2, attention_rank=1, n_layers=1, n_kv_heads=2
        )
        keys = (1, 2, 2, 3, 3, 4, 4, 5)  # the own block's, and one for each before it
        # Blocks that are over when the last query comes: three of all, one of those from 5 on.
        for start, blocks in ((0, 3), (5, 1)):
            flops = analysis.forward_flops(config, 8 - start, start=start)["attention"]
            compressed = 2 * 2 * blocks * 2 * 8  # keys and values, 2 tokens, 8 numbers
            assert flops == 4 * 16 * sum(keys[start:]) + compressed

    def test_of_linear_attention_are_those_of_its_recurrence(self):
        config = small(attention="linear", n_layers=1, n_kv_heads=2)
        token = 2 * (4 * 4 * 4 + 2 * 4 * 4)  # a 4 x 4 state read by 4 heads, and 2 written
        for start in (0, 5):
            flops = analysis.forward_flops(config, 8 - start, start=start)["attention"]
            assert flops == (8 - start) * token

    def test_of_a_text_are_those_of_its_prefill_and_what_follows(self):
        for attention in ATTENTIONS:
            config = small(attention_window=3, **seeing(attention))
            whole = analysis.forward_flops(config, 8)
            begun = analysis.forward_flops(config, 5)
            rest = [analysis.forward_flops(config, 1, start=start) for start in (5, 6, 7)]
            for part in whole:
                assert whole[part] == begun[part] + sum(flops[part] for flops in rest)


class TestBytes:
    def test_of_the_cache_are_those_of_its_arrays(self):
        wirings = (
            {},
            {"layout": "parallel_stacks"},
            {"depth": "mixture_of_depths"},
            {"convolution_width": 3, "copying": True, "tie_embeddings": True},
            {"convolution_width": 1, "feed_forward": False},
        )
        for attention, wiring in itertools.product(ATTENTIONS, wirings):
            if (wiring.get("depth"), attention) in REFUSED_DEPTHS:
                continue
            config = small(
                **wiring,
                n_layers=8,
                n_kv_heads=2,
                d_head=6,
                attention_globals=2,
                **seeing("full", attention),
            )
            for dtype in (jnp.float32, jnp.bfloat16):
                cache = jax.eval_shape(lambda c=config, d=dtype: empty_cache(c, 1, dtype=d))
                size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
                assert analysis.cache_bytes(config, dtype.dtype.itemsize) == size

    def test_of_the_weights_are_four_each(self):
        assert analysis.weight_bytes(small()) == 4 * held(small())


class TestCommand:
    def run(self, monkeypatch, capsys, *arguments):
        monkeypatch.setattr(sys, "argv", ["analysis", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        main()
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


# Module -> the part that its parameters count for.
MODULES = {name: name for name in ("embedding", "positions", "attention", "feed_forward", "head")}
MODULES |= {"skip": "slices", "narrow": "slices"}
MODULES["router"] = "routers"
MODULES |= {"attention_convolution": "convolutions", "feed_forward_convolution": "convolutions"}
MODULES["copying"] = "copying"


def size_under(arrays, name):
    """Parameters of the parts of this name, at the top or in blocks, less the parts inside them."""
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
        if name
        == next((MODULES[e.key] for e in reversed(module_of(path)) if e.key in MODULES), None)
    )


def module_of(path):
    """An array's path less its own name, which may be that of a part."""
    return path[:-1] or path
