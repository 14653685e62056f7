"""How a CPU takes steps is chosen by measurement, kept, and taken over by a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from jaxdecoder.config import from_dict, load, read_toml
from jaxdecoder.errors import UserError
from jaxdecoder.training import tune
from jaxdecoder.training.tune import UNSAID, Form, form_of, quickest, tuned, with_form
from tests.runs import losses, script, write_config

DEFAULTS = from_dict({}, "defaults")
CHANGES = [{"attention": "rows"}, {"passes": 2}, {"passes": 4}, {"devices": 2}]


class Timed:
    """Takes what `seconds` says of its form; counts how many are open."""

    open = 0

    def __init__(self, seconds, config):
        self.taken = seconds(form_of(config))
        if self.taken is None:
            raise UserError("no memory")
        Timed.open += 1
        assert Timed.open <= 2, "two at a time need memory, three need more"

    def seconds(self):
        return self.taken

    def close(self):
        Timed.open -= 1


def choose(seconds):
    said = []
    form, milliseconds = quickest(
        DEFAULTS, CHANGES, lambda config: Timed(seconds, config), said.append
    )
    assert Timed.open == 0
    return form, milliseconds, said


def test_the_quickest_combination_is_taken():
    costs = {"auto": 9.0, "rows": 3.0, 1: 5.0, 2: 4.0, 4: 4.5}
    form, milliseconds, said = choose(
        lambda f: costs[f.attention] + costs[f.passes] + (2.0 if f.devices else 0.0)
    )
    assert form == Form("rows", 2, 0)
    assert milliseconds[str(form)] == pytest.approx(7000)
    assert len(said) == len(CHANGES)


def test_a_gain_within_the_noise_is_none():
    form, _, _ = choose(lambda f: 1.0 if f == UNSAID else 1 / (tune.MARGIN - 0.01))
    assert form == UNSAID


def test_a_form_that_cannot_run_is_told_and_left_out():
    form, milliseconds, said = choose(lambda f: None if f.attention == "rows" else 1.0 / f.passes)
    assert form == Form("auto", 4, 0)
    assert "no memory" in said[0]
    assert not any("rows" in name for name in milliseconds)


def test_only_what_is_left_at_its_default_is_tried():
    model = dataclasses.replace(DEFAULTS.model, context_length=256)
    long = dataclasses.replace(DEFAULTS, model=model)
    kinds = [next(iter(change)) for change in tune.others(long, 2)]
    assert set(kinds) == {"attention", "passes", "devices"}
    for said in (Form("chunked", 1, 0), Form("auto", 2, 0), Form("auto", 1, 1)):
        left = [next(iter(change)) for change in tune.others(with_form(long, said), 2)]
        assert len(set(left)) == 2
        name = next(n for n in Form._fields if getattr(said, n) != getattr(UNSAID, n))
        assert name not in left
    model = dataclasses.replace(DEFAULTS.model, context_length=64)
    short = tune.others(dataclasses.replace(DEFAULTS, model=model), 2)
    assert "attention" not in [next(iter(change)) for change in short]


def test_short_runs_are_not_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_only_a_cpu", lambda: True)
    config = load(write_config(tmp_path))
    assert tuned(config, say=pytest.fail) == config


def test_a_choice_is_kept_and_a_run_that_goes_on_keeps_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_only_a_cpu", lambda: True)
    monkeypatch.setattr(tune, "REPAYS", 0)
    trials = []

    def trial(objective, config):
        trials.append(form_of(config))
        return Timed(lambda form: 1.0 / form.passes, config)

    monkeypatch.setattr(tune, "_Process", trial)
    config = load(write_config(tmp_path))
    chosen = tuned(config, say=lambda text: None)
    assert chosen.train.gradient_accumulation == 4
    assert trials
    trials.clear()
    assert tuned(config, say=lambda text: None) == chosen
    assert not trials
    # Another shape is measured anew, and a file that cannot be read as well.
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=32))
    tuned(wider, say=lambda text: None)
    assert trials
    (kept,) = [p for p in (tmp_path / "cache" / "forms").iterdir() if "4" in p.read_text()][:1]
    for path in (tmp_path / "cache" / "forms").iterdir():
        path.write_text(kept.read_text()[:10])
    trials.clear()
    assert tuned(config, say=lambda text: None) == chosen
    assert trials
    off = dataclasses.replace(config, train=dataclasses.replace(config.train, tune=False))
    assert tuned(off, say=pytest.fail) == off


@pytest.mark.slow
def test_real_trials_choose_and_a_killed_run_goes_on_in_its_form(tmp_path):
    path = write_config(tmp_path)
    program = (
        "import sys; from jaxdecoder.training import tune; tune.REPAYS = 0; "
        "tune.MARGIN = float(sys.argv.pop(1)); import train; train.main()"
    )
    # However quick it is, another form is taken once: the choice is not about speed here.
    first = script("-c", program, "0.01", path, "--train.steps", "12")
    assert first.returncode == 0, first.output
    assert "tune: trials on" in first.output
    chosen = form_of(from_dict(read_toml(tmp_path / "run" / "config.toml"), "run"))
    assert chosen.passes == 4
    assert chosen.devices == 2 or tune.cores() == [0]
    (kept,) = (tmp_path / "cache" / "forms").iterdir()
    assert json.loads(kept.read_text())["form"] == chosen._asdict()
    assert all(map(math.isfinite, losses(tmp_path / "run").values()))
    kept.unlink()
    again = script("train.py", path, "--train.steps", "12")
    assert again.returncode == 0, again.output
    assert "tune:" not in again.output
