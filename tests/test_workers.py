"""Members that a process for each core trains are those that one process trains."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.ablation import workers
from jaxdecoder.ablation.population import program_key
from jaxdecoder.ablation.workers import shares, train_on_cores
from jaxdecoder.config import Config, ModelConfig, TrainConfig
from jaxdecoder.errors import UserError
from jaxdecoder.training.devices import cores
from tests.runs import write_config
from tests.test_population import assert_near, member, pair, seeds  # noqa: F401

CORES = (cores() * 2)[:2]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(1, 9))
def test_every_member_goes_to_one_worker_and_none_is_idle(depths, count):
    configs = [
        Config(model=ModelConfig(n_layers=n), train=TrainConfig(out=str(i)))
        for i, n in enumerate(depths)
    ]
    parts = shares(configs, count)
    assert sorted(c.train.out for part in parts for c in part) == sorted(
        config.train.out for config in configs
    )
    assert all(len({program_key(config) for config in part}) == 1 for part in parts)
    assert len(parts) >= min(count, len(set(depths)))
    if len(set(depths)) == 1:
        assert len(parts) == min(count, len(configs))
    # Nothing is compiled twice but what would leave workers idle.
    assert len(parts) < len(set(depths)) + count


@pytest.mark.slow
def test_workers_leave_what_one_process_leaves(pair, tmp_path):  # noqa: F811
    one, expected, _ = pair
    write_config(tmp_path)
    asked = seeds(tmp_path, 2, "--data.cache", expected[0].config.data.cache)
    told = []
    found = train_on_cores(asked, tmp_path, CORES, report=lambda done, of: told.append((done, of)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.config.model == theirs.config.model
        assert ours.config.train.seed == theirs.config.train.seed
        for key in ("validation_loss", "train_loss", "steps", "parameters"):
            assert ours.summary[key] == pytest.approx(theirs.summary[key], abs=1e-4)
    for name in ("seed0", "seed1"):
        assert_near(tmp_path / name, one / name)
    assert told == sorted(told)
    assert told[-1] == (20, 20)


def test_what_a_worker_refuses_is_refused(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setattr(workers, "memory_available", lambda devices: 2000)
    with pytest.raises(UserError, match=r"one member needs .* available"):
        train_on_cores(seeds(tmp_path, 1), tmp_path, CORES[:1])
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_was_killed_is_not_waited_for(tmp_path):
    write_config(tmp_path)
    # Two of one program, one of another.
    asked = seeds(tmp_path, 2, "--train.steps", "50")
    asked.append(member(tmp_path, "other", "--train.steps", "50", "--model.norm", "none"))

    def kill(done, of):
        for child in multiprocessing.active_children():
            os.kill(child.pid, 9)

    with pytest.raises(UserError, match="status -9"):
        train_on_cores(asked, tmp_path, CORES, report=kill)
    assert not multiprocessing.active_children()
    # What is there is gone on from.
    assert all(result.summary["steps"] == 50 for result in train_on_cores(asked, tmp_path, CORES))
