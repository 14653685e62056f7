"""Configs: TOML in and out, overrides, and what is refused before any compute."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    choices,
    from_dict,
    load,
    to_toml,
)
from jaxdecoder.errors import UserError
from tests.runs import ROOT, script

PRESETS = sorted((ROOT / "configs").glob("*.toml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads_and_survives_a_round_trip(preset):
    config = load(preset)
    assert config.train.out == f"runs/{preset.stem}"
    assert from_dict(tomllib.loads(to_toml(config)), "again") == config


@given(
    n_heads=st.integers(1, 8),
    width=st.integers(1, 8),
    layers=st.integers(1, 6),
    norm=st.sampled_from(choices(ModelConfig, "norm")),
    rate=st.floats(1e-6, 1.0),
    steps=st.integers(1, 10**6),
    path=st.text(min_size=1),
)
def test_any_config_survives_a_round_trip(n_heads, width, layers, norm, rate, steps, path):
    model = ModelConfig(
        d_model=2 * n_heads * width,
        n_heads=n_heads,
        n_layers=2 * layers,
        norm=norm,
        attention=("full", "sliding_window"),
    )
    config = Config(
        model=model,
        data=DataConfig(source="text", path=path),
        optimizer=OptimizerConfig(learning_rate=rate),
        train=TrainConfig(steps=steps),
    )
    resolved = dataclasses.replace(model, vocab_size=9).resolve()
    for each in (config, dataclasses.replace(config, model=resolved)):
        assert from_dict(tomllib.loads(to_toml(each)), "again") == each


def test_the_command_line_has_the_last_word(tmp_path):
    path = written(tmp_path, "[model]\nd_model = 64\nn_heads = 4\n")
    config = load(path, ["--model.n-heads", "8", "--optimizer.learning-rate", "1e-4"])
    assert (config.model.d_model, config.model.n_heads) == (64, 8)
    assert config.optimizer.learning_rate == 1e-4
    # Derived fields follow what they are derived from, whoever set it.
    assert dataclasses.replace(config.model, vocab_size=9).resolve().d_head == 8


def test_gated_units_keep_the_parameters_of_plain_ones():
    plain = ModelConfig(vocab_size=9, d_model=384).resolve().d_ff
    gated = ModelConfig(vocab_size=9, d_model=384, activation="swiglu").resolve().d_ff
    assert 2 * plain == 3 * gated


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_a_feed_forward_without_projection_is_as_wide_as_the_model(activation):
    model = ModelConfig(
        vocab_size=9, d_model=384, activation=activation, feed_forward_projection=False
    )
    assert model.resolve().d_ff == 384
    assert dataclasses.replace(model, d_ff=384).resolve().d_ff == 384


def test_resolving_leaves_nothing_open_and_changes_nothing_given():
    given = ModelConfig(vocab_size=9, n_heads=4, n_kv_heads=2, layout="parallel_stacks")
    resolved = given.resolve()
    derived = {"d_head": 96, "d_ff": 1536, "layers_per_stack": 3}
    in_full = dataclasses.replace(given, **derived)
    assert resolved == in_full
    assert in_full == resolved != given
    assert hash(resolved) == hash(in_full)
    assert resolved.resolve() is resolved
    assert (resolved.query_width, resolved.kv_width) == (384, 192)


def test_an_unknown_vocabulary_resolves_to_nothing():
    with pytest.raises(UserError, match=r"^model\.vocab_size = null"):
        ModelConfig().resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nd_modell = 3", "model.d_modell: unknown key; did you mean model.d_model?"),
        ("[modle]\nd_model = 3", "modle: unknown key; did you mean model?"),
        ("model = 3", "model = 3: must be a table [model]"),
        ('[model]\nd_model = "3"', 'model.d_model = "3": should be a valid integer'),
        ("[model]\nd_model = 6.5", "model.d_model = 6.5: should be a valid integer"),
        ("[model]\nn_heads = true", "model.n_heads = true: should be a valid integer"),
        (
            "[model]\nd_model = 100\nn_heads = 6",
            "model.d_model = 100: not divisible by model.n_heads = 6; 96 or 102 would do",
        ),
        ("[model]\nn_heads = 6\nn_kv_heads = 4", "must divide model.n_heads = 6: one of [1, 2, 3"),
        ('[model]\nnorm = "layernrm"', "should be one of layernorm, rmsnorm, none; layernorm?"),
        ("[model]\ndropout = 1.0", "model.dropout = 1.0: should be less than 1"),
        (
            "[model]\ntie_embeddings = true\nhead_bias = true",
            "model.head_bias = true: a head tied to the embedding has no bias of its own",
        ),
        (
            '[model]\nd_model = 6\nn_heads = 2\nposition = "rope"',
            "model.d_head = 3: rotary positions turn pairs, so the width must be even",
        ),
        (
            '[model]\nd_head = 12\nposition = "rope"\nrope_fraction = 0.25',
            "model.rope_fraction = 0.25: of heads 12 wide it turns 3, which must be an even "
            "number, for rotary positions turn pairs; 0.166667 or 0.333333 would do",
        ),
        ("[model]\nrope_fraction = 1.5", "model.rope_fraction = 1.5: should be less than or equal"),
        ("[model]\nrope_scaling = 0.0", "model.rope_scaling = 0.0: should be greater than 0"),
        (
            '[model]\nposition = "t5"\nposition_max_distance = 16',
            "model.position_max_distance = 16: half of model.position_buckets = 32 hold a single "
            "distance each, so it must be at least 17",
        ),
        (
            '[model]\nattention = "fixed_sparse"\nattention_block = 4\nattention_globals = 5',
            "for fixed_sparse these are tokens of a block, and model.attention_block = 4 has no",
        ),
        (
            "[model]\nd_ff = 1536\nfeed_forward_projection = false",
            "model.d_ff = 1536: with model.feed_forward_projection = false the hidden units are "
            "the output, and must be model.d_model = 384 wide",
        ),
        ("[model]\nattention_dilation = 0", "model.attention_dilation = 0: should be greater"),
        (
            '[model]\nn_layers = 3\nattention = ["full", "sliding_window"]',
            "a pattern's length must divide model.n_layers = 3",
        ),
        ("[train]\nsteps = -5", "train.steps = -5: should be greater than or equal to 0"),
        (
            "[train]\nbatch_size = 10\ngradient_accumulation = 4",
            "train.gradient_accumulation = 4: must divide train.batch_size = 10",
        ),
        ('[data]\nsource = "text"', "the source 'text' needs a path to read from"),
        ("[model]\nd_model = ", "Invalid value"),
    ],
)
def test_mistakes_are_refused_with_file_key_and_remedy(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_missing_config_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "stories.toml").touch()
    with pytest.raises(UserError, match=r"storys\.toml: no such file; did you mean .*stories"):
        load(tmp_path / "storys.toml")


def test_a_mistake_on_the_command_line_is_refused_too(tmp_path):
    with pytest.raises(UserError, match=r"command line: model\.d_model = 100: not divisible"):
        load(written(tmp_path, ""), ["--model.d-model", "100"])
    process = script("train.py", written(tmp_path, ""), "--model.d-modl", "96")
    assert process.returncode != 0
    assert "--model.d-model" in process.output


def test_help_describes_every_field():
    process = script("train.py", "--help", COLUMNS="200")
    assert process.returncode == 0
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            assert f"--{section.name}.{field.name.replace('_', '-')}" in process.output
    assert "Width of the residual stream" in process.output
