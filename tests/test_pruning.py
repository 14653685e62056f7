"""compress.py prune and sensitivity: runs of runs, that train, resume and prune further."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdecoder.compression.criteria import CRITERIA
from jaxdecoder.compression.importance import MEASURES
from jaxdecoder.compression.options import (
    OPTIONS_FOR,
    PRUNING,
    ByCriterion,
    ByGates,
    Groups,
    Heads,
    Prune,
    Sensitivity,
)
from jaxdecoder.compression.parts import PARTS
from jaxdecoder.compression.passes import corpus_of
from jaxdecoder.compression.pruning import (
    check,
    check_rewind,
    made,
    prune,
    recovery,
)
from jaxdecoder.compression.sensitivity import sensitivity
from jaxdecoder.compression.sparsity import NEEDS
from jaxdecoder.config import CompressionConfig, to_toml
from jaxdecoder.data.batches import Feed
from jaxdecoder.errors import UserError
from jaxdecoder.layers.tree import body_matrices
from jaxdecoder.training.evaluation import make_evaluator
from jaxdecoder.training.runs import load_model, read_config
from jaxdecoder.training.single import train
from jaxdecoder.training.sparsity import SCOPES, count_of
from jaxdecoder.training.step import init_state
from tests.runs import here, losses, script
from tests.test_resume import assert_same_bits, final_state

COMMAND = "python compress.py prune RUN NEW"


@pytest.fixture(scope="module")
def given(tiny_run):
    """A trained run's model, and its corpus."""
    model = load_model(tiny_run)
    config, corpus = corpus_of(model, tiny_run)
    return model._replace(config=config), corpus


def matrices_of(params):
    return {path: np.asarray(x) for path, x in body_matrices(params).items()}


def after(model, made):
    """The model that a pass has made of one."""
    decoder = model.decoder.clone(config=made.config.model)
    return model._replace(config=made.config, decoder=decoder, params=made.params)


def test_the_options_name_what_the_dicts_hold():
    def names(cls, field):
        kind = get_type_hints(cls)[field]
        return get_args(get_args(kind)[0] if type(None) in get_args(kind) else kind)

    assert names(Prune, "method") == tuple(PRUNING)
    assert [kind.method for kind in PRUNING.values()] == [*PRUNING]
    assert {*PARTS} < {*PRUNING}
    assert names(ByCriterion, "scope") == names(CompressionConfig, "sparsity_scope") == (*SCOPES,)
    assert names(Groups, "criterion") == names(Sensitivity, "criterion") == tuple(CRITERIA)
    assert names(ByGates, "importance") == names(Sensitivity, "importance") == tuple(MEASURES)
    assert NEEDS.keys() == OPTIONS_FOR.keys()


def asked(run, method="wanda", **options):
    """The options of a method that makes a run of one."""
    if hasattr(PRUNING[method], "calibration_tokens"):
        options = {"calibration_tokens": 256, **options}
    return PRUNING[method](str(run), "new", **options)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_is_a_method_and_ranks_groups(name, tiny_run, given):
    """Within its own scope, if none is given; weights that stay are as they were."""
    model = given[0]
    halved = made(asked(tiny_run, name, sparsity=0.5), *given)
    told = halved.notes["pruning"]
    assert (told["method"], told["scope"]) == (name, CRITERIA[name].scope)
    assert told["zeros"] * 2 == told["weights"]
    grouped = made(asked(tiny_run, "n-m", criterion=name), *given)
    for path, weights in matrices_of(grouped.params).items():
        stays = (weights != 0).swapaxes(-1, -2).reshape(-1, 4)
        assert (stays.sum(axis=1) == 2).all()
        before = np.asarray(body_matrices(model.params)[path])
        np.testing.assert_array_equal(weights[weights != 0], before[weights != 0])


def test_wanda_zeroes_half_of_each_unit_and_trains_from_there(tiny_run, given):
    options = asked(tiny_run, sparsity=0.5, recover_steps=40)
    config, params, notes = made(options, *given)
    told = notes["pruning"]
    assert told["scope"] == "output"
    assert told["zeros"] * 2 == told["weights"]
    for weights in matrices_of(params).values():
        assert (np.sum(weights == 0, axis=-2) * 2 == weights.shape[-2]).all()
    assert config.compression.keep_zeros
    assert config.train.steps == 40
    rate = given[0].config.optimizer.learning_rate
    assert config.optimizer == dataclasses.replace(
        given[0].config.optimizer, schedule="linear", warmup_steps=2, final_fraction=0.0
    )
    slower = recovery(dataclasses.replace(options, learning_rate=rate / 4), given[0].config, 40)
    assert slower.learning_rate == rate / 4


def test_pruning_twice_equals_pruning_once_to_the_product(tiny_run, given):
    def cut(model, sparsity):
        options = asked(tiny_run, "magnitude", sparsity=sparsity)
        return after(model, made(options, model, given[1]))

    twice, once = cut(cut(given[0], 0.5), 0.5), cut(given[0], 0.75)
    jax.tree.map(np.testing.assert_array_equal, twice.params, once.params)


@pytest.mark.slow
def test_parts_go_one_after_another_and_the_config_says_so(tiny_run, given):
    model, corpus = given
    before = model.config.model
    fields = {"layers": "n_layers", "heads": "n_heads", "width": "d_model"}
    for method, field in fields.items():
        options = asked(tiny_run, method, sparsity=0.5)
        result = made(options, model, corpus)
        assert getattr(result.config.model, field) * 2 == getattr(before, field)
        told = result.notes["pruning"]
        assert told["after"] * 2 == told["before"]
        gone = {np.shape(numbers)[-1] for numbers in told["removed"].values()}
        assert gone == {told["before"] - told["after"]}
        model = after(model, result)
    shapes = jax.tree.map(np.shape, model.params)
    fresh = jax.eval_shape(lambda: init_state(model.config).params)
    assert shapes == jax.tree.map(lambda x: x.shape, fresh)


@pytest.mark.slow
def test_a_gradual_run_that_is_stopped_ends_with_the_same_bits(tiny_run, given, tmp_path):
    """Zeros grow by the schedule, in the average of the weights too, and the dense start, though
    its loss is lower, is not what the run is loaded as."""
    out = tmp_path / "gradual"
    said = here(
        *("compress.py", "prune", tiny_run, out, "--method", "magnitude", "--sparsity", "0.9"),
        *("--recover-steps", "20", "--gradual", "--gradual-every", "3"),
    )
    assert said.returncode == 0, said.output
    config = read_config(out)
    assert (config.compression.sparsity, config.compression.sparsity_end) == (0.9, 12)
    sparse = load_model(out)
    assert sparse.step >= 12
    ours = matrices_of(sparse.params)
    for weights in ours.values():
        for layer in weights:
            assert np.sum(layer == 0) == count_of(0.9, layer.size)
    told = json.loads((out / "summary.json").read_text())["compression"]
    assert told["pruning"]["zeros"] == 0
    assert told["after"]["zeros"] == sum(np.sum(weights == 0) for weights in ours.values())

    end, known = final_state(out), losses(out)
    for step in ("12", "16", "20"):
        shutil.rmtree(out / "checkpoints" / step)
    train(config)
    assert losses(out) == known
    assert_same_bits(final_state(out), end)

    # The next pass counts from what is zero.
    again = asked(out, "random", sparsity=0.5)
    model = sparse._replace(config=corpus_of(sparse, out)[0])
    for weights in matrices_of(made(again, model, given[1]).params).values():
        assert np.mean(weights == 0) == pytest.approx(0.95, abs=0.01)


def test_a_lottery_ticket_is_the_mask_of_the_end_and_the_weights_of_the_beginning(
    tiny_run, given, tmp_path
):
    model, corpus = given
    trained = matrices_of(model.params)
    first = jax.jit(lambda: init_state(model.config).params)()
    middle = load_model(tiny_run, 16).params
    for step, then in {0: first, 16: middle}.items():
        options = asked(tiny_run, "magnitude", sparsity=0.5, rewind=step)
        result = made(options, model, corpus)
        for path, weights in matrices_of(result.params).items():
            for place in np.ndindex(weights.shape[:-2]):
                size = np.abs(trained[path][place])
                kept = size >= np.sort(size.ravel())[size.size // 2]
                expected = np.where(kept, body_matrices(then)[path][place], 0)
                np.testing.assert_array_equal(weights[place], expected)
        np.testing.assert_array_equal(result.params["embedding"], then["embedding"])
        # It trains as the run did, for the steps that it had left.
        assert result.config.optimizer == model.config.optimizer
        assert result.config.train.steps == 24 - step


def test_a_step_that_there_is_no_going_back_to_is_refused(tiny_run, given, tmp_path):
    options = asked(tiny_run, "magnitude", sparsity=0.5, rewind=5)
    config = read_config(tiny_run)
    with pytest.raises(UserError, match="checkpoints of these steps: 12, 16, 20, 24; 0, its"):
        check_rewind(options, config)
    # A run that began from another one: its own step 0 is nowhere.
    begun = tmp_path / "begun"
    begun.mkdir()
    recipe = dataclasses.replace(config.compression, recipe=("python compress.py prune a b",))
    (begun / "config.toml").write_text(to_toml(dataclasses.replace(config, compression=recipe)))
    options = dataclasses.replace(options, run=str(begun), rewind=0)
    with pytest.raises(UserError, match="came from another run, so they cannot be drawn again"):
        check_rewind(options, config)
    check_rewind(dataclasses.replace(options, rewind_run=str(tiny_run)), config)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=32))
    with pytest.raises(UserError, match=r"another model:\n  model\.d_ff"):
        check_rewind(dataclasses.replace(options, rewind_run=str(tiny_run)), wider)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.2}, "--sparsity 1.2: must be between 0 and 1"),
        ({"sparsity": 0.0}, "--sparsity 0.0: must be between 0 and 1"),
        ({"sparsity": 0.0, "method": "layers"}, "--sparsity 0.0: must be between 0 and 1"),
        ({"n": 4, "method": "n-m"}, "--n 4: must be between 0 and --m 4"),
        ({"m": 2, "method": "n-m"}, "give --n as well"),
        ({"m": 1, "method": "n-m"}, "--m 1: must be 2 or more"),
        ({"sparsity": 0.5, "recover_steps": -1}, "--recover-steps -1: must be 0 or more"),
        ({"sparsity": 0.5, "learning_rate": 0.0}, "--learning-rate 0.0: must be more than 0"),
        ({"sparsity": 0.5, "seed": -1, "method": "random"}, "--seed -1: must be from 0 to"),
        ({"sparsity": 0.5, "rewind_run": "x"}, "give --rewind as well"),
        ({"sparsity": 0.5, "gradual": True, "method": "magnitude"}, "give --recover-steps"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        check(asked("run", **options))


@pytest.mark.parametrize("method", PRUNING)
def test_each_method_has_its_own_options_and_help(method):
    """A flag of other methods alone is refused with the method's name."""
    command = ("compress.py", "prune", "--method", method)
    own = {field.name for field in dataclasses.fields(PRUNING[method])}
    others = {field.name for kind in PRUNING.values() for field in dataclasses.fields(kind)} - own
    told = here(*command, "--help")
    assert told == here("compress.py", "prune", f"--method={method}", "--help")
    assert told.returncode == 0
    flags = re.findall(r"^\W{1,3}--([a-z][a-z-]*)", told.output, re.MULTILINE)
    shown = {flag.replace("-", "_") for flag in flags}
    assert shown == own - {"run", "out"}
    assert f"(default: {method})" in told.output
    share = ("--sparsity", "0.5") if "sparsity" in own else ()
    for name in others:
        flag = f"--{name.replace('_', '-')}"
        said = here(*command, "run", "out", *share, flag, "1")
        assert said.returncode == 2
        assert f"Unrecognized options: {flag}" in said.output
        assert f"--method {method}" in said.output


def test_options_are_read_without_jax():
    read = "import sys, jaxdecoder.compression.options; assert 'jax' not in sys.modules"
    said = script("-c", read)
    assert said.returncode == 0, said.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "Missing from compress.py prune --method wanda"),
        ("--method neuron --importance gates", "argument --method: invalid choice"),
        ("--method n-m --sparsity 0.5", "Unrecognized options: --sparsity"),
        ("--method heads --sparsity 0.5 --scope global", "Unrecognized options: --scope"),
        ("--method layers --sparsity 0.5 --importance gates", "Unrecognized options: --importance"),
        ("--method magnitude --sparsity 0.5 --seed 1", "Unrecognized options: --seed"),
        ("--sparsity 0.5 --gradual", "Unrecognized options: --gradual"),
        ("--sparsity 0.5 --seed 1", "Unrecognized options: --seed"),
    ],
)
def test_a_command_that_its_method_does_not_know_is_refused(given, message):
    said = here("compress.py", "prune", "run", "out", *given.split())
    assert said.returncode == 2
    assert message in said.output


def test_what_a_run_cannot_lose_is_refused_before_anything_is_computed(tiny_run, tmp_path):
    refused = Heads(str(tiny_run), str(tmp_path / "new"), sparsity=0.1)
    with pytest.raises(UserError, match=r"of 2, none would go; 0\.5 to 0\.5 would do"):
        prune(refused, COMMAND)
    assert not (tmp_path / "new").exists()


def test_groups_that_do_not_divide_are_refused(tiny_run, given):
    options = asked(tiny_run, "n-m", m=3)
    with pytest.raises(UserError, match=r"--m 3: .* has 16 inputs"):
        made(options, *given)


def test_the_scan_tells_what_each_matrix_and_each_part_costs_alone(tiny_run, given, tmp_path):
    out = tmp_path / "scan.png"
    options = Sensitivity(
        str(tiny_run),
        str(out),
        sparsities=(0.5,),
        batches=2,
        scope="matrix",
        criterion="magnitude",
        calibration_tokens=256,
    )
    rows = sensitivity(options, "python compress.py sensitivity RUN")
    assert {(row.layer, row.part) for row in rows} == {
        (layer, part)
        for layer in ("0", "1")
        for part in ("query", "key", "value", "out", "up", "down", "heads", "neurons", "whole")
    }
    assert out.read_bytes()[:4] == b"\x89PNG"
    with out.with_suffix(".csv").open(newline="") as file:
        assert [line["part"] for line in csv.DictReader(file)] == [row.part for row in rows]
    assert out.with_suffix(".md").read_text().count("\n| ") == len(rows) + 2
    # What the scan says of one, pruning that one says.
    model, corpus = given
    params = unflatten_dict(flatten_dict(model.params))
    up = params["body"]["blocks"]["block_0"]["feed_forward"]["up"]
    kernel = np.array(up["kernel"])
    size = np.abs(kernel[1])
    kernel[1][size < np.median(size)] = 0
    up["kernel"] = kernel
    text = list(Feed.of(model.config, corpus, "validation").fixed(2))
    loss = make_evaluator(model.decoder)(params, text)
    (row,) = [row for row in rows if (row.layer, row.part) == ("1", "up")]
    assert row.loss == pytest.approx(loss, abs=1e-6)
