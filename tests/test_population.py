"""Members that train together are the runs they would be alone."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jaxdecoder.ablation import population
from jaxdecoder.ablation import run as ablation
from jaxdecoder.ablation.grid import read
from jaxdecoder.ablation.population import MAPPINGS, most_at_once, program_key
from jaxdecoder.ablation.training import Result, train_members
from jaxdecoder.config import load
from jaxdecoder.errors import UserError
from jaxdecoder.training.runs import load_model
from jaxdecoder.training.single import train
from tests.runs import losses, script, write_config

STEPS = 10


def member(folder: Path, name: str, *overrides: str):
    """The config of a member in a folder that `write_config` has been to."""
    fixed = (
        "--train.steps",
        str(STEPS),
        "--train.evaluate-every",
        "5",
        "--train.checkpoint-every",
        "5",
        # So that calls of one length do.
        "--train.steps-per-call",
        "5",
    )
    return load(folder / "tiny.toml", [*fixed, "--train.out", str(folder / name), *overrides])


OWN = {
    "plain": (),
    "own": (
        *("--train.seed", "3", "--optimizer.learning-rate", "3e-3", "--model.dropout", "0.3"),
        *("--optimizer.weight-decay", "0.5", "--model.init-std", "0.05", "--train.steps", "5"),
    ),
    "wild": ("--optimizer.learning-rate", "1e20"),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder with members that differ in all that members may differ in, trained together."""
    folder = tmp_path_factory.mktemp("together")
    write_config(folder)
    configs = [member(folder, name, *changes) for name, changes in OWN.items()]
    assert len({program_key(config) for config in configs}) == 1
    return folder, configs, train_members(configs, folder)


def assert_near(run, expected):
    """The losses of a run are those expected, up to rounding."""
    found, expected = losses(run), losses(expected)
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key] == pytest.approx(expected[key], abs=1e-4, rel=1e-4), key


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.slow), "own"])
def test_a_member_equals_its_solo_run(together, tmp_path, name):
    """And one that diverges beside it harms it not."""
    folder, configs, results = together
    write_config(tmp_path)
    solo = train(member(tmp_path, "solo", *OWN[name], "--data.cache", configs[0].data.cache))
    assert_near(folder / name, tmp_path / "solo")
    summary = results[list(OWN).index(name)].summary
    for key in ("validation_loss", "train_loss", "steps", "parameters", "bits_per_byte"):
        assert summary[key] == pytest.approx(solo[key], abs=1e-4)


def test_a_member_is_a_run_like_any_other(together):
    folder, _, _ = together
    model = load_model(folder / "own")
    assert model.step == 5
    assert model.config.train.steps == 5


def test_members_at_once_are_members_one_after_another(together, tmp_path, monkeypatch):
    folder, configs, _ = together
    monkeypatch.setitem(MAPPINGS, "cpu", MAPPINGS["gpu"])
    write_config(tmp_path)
    cache = ("--data.cache", configs[0].data.cache)
    names = ("plain", "own")
    train_members([member(tmp_path, n, *OWN[n], *cache) for n in names], tmp_path)
    for name in names:
        assert_near(tmp_path / name, folder / name)


def test_a_diverging_member_is_marked(together):
    folder, _, (fine, _, marked) = together
    assert 1 <= marked.summary["diverged_at"] <= STEPS
    assert marked.summary["validation_loss"] is None
    assert fine.summary["diverged_at"] is None
    steps = [step for step, name in losses(folder / "wild") if name == "train_loss"]
    assert max(steps, default=0) < marked.summary["diverged_at"]


def seeds(folder, count, *changes):
    return [member(folder, f"seed{i}", "--train.seed", str(i), *changes) for i in range(count)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of two members trained together, their results, and the bytes that this took."""
    folder, needed = tmp_path_factory.mktemp("pair"), []
    write_config(folder)
    count = population.memory_needed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "memory_needed", lambda of: needed.append(count(of)) or count(of))
        results = train_members(seeds(folder, 2), folder)
    return folder, results, max(needed)


class TestResults:
    """What is finished is kept, and is what was asked for."""

    def test_are_kept_when_an_ablation_grows(self, pair, tmp_path):
        write_config(tmp_path)
        train_members(seeds(tmp_path, 1), tmp_path)
        files = list((tmp_path / "seed0").rglob("*"))
        before = {path: path.stat().st_mtime_ns for path in files}
        told = []
        found = train_members(
            seeds(tmp_path, 2), tmp_path, report=lambda done, of: told.append((done, of))
        )
        assert before == {path: path.stat().st_mtime_ns for path in files}
        assert told == sorted(told)
        assert told[-1] == (20, 20)
        for ours, theirs in zip(found, pair[1], strict=True):
            assert ours.summary["validation_loss"] == pytest.approx(
                theirs.summary["validation_loss"], abs=1e-4
            )

    @pytest.mark.slow
    def test_that_were_half_written_are_written_again(self, tmp_path):
        write_config(tmp_path)
        (first,) = train_members(seeds(tmp_path, 1), tmp_path)
        # As a kill would leave it: its checkpoint is there, its summary is not.
        (tmp_path / "seed0" / "summary.json").unlink()
        (again,) = train_members(seeds(tmp_path, 1), tmp_path)
        assert again.summary["validation_loss"] == pytest.approx(
            first.summary["validation_loss"], abs=1e-5
        )
        assert load_model(tmp_path / "seed0").step == 10

    def test_of_another_config_or_text_are_refused(self, pair, tmp_path):
        shutil.copytree(pair[0], tmp_path, dirs_exist_ok=True)
        changed = seeds(tmp_path, 1, "--optimizer.weight-decay", "0.3")
        with pytest.raises(UserError, match=r"optimizer\.weight_decay: .* there, 0\.3 here"):
            train_members(changed, tmp_path)
        write_config(tmp_path, text="something else entirely " * 400)
        with pytest.raises(UserError, match="the corpus or the tokenizer is not the one"):
            train_members(seeds(tmp_path, 1), tmp_path)


@pytest.mark.slow
def test_a_member_that_starts_from_a_run_equals_its_solo_run(together, tmp_path):
    folder, configs, _ = together
    write_config(tmp_path)
    start = ("--train.init-from", str(folder / "plain"))
    common = (*start, "--data.cache", configs[0].data.cache)
    solo = train(member(tmp_path, "solo", *common))
    other = member(tmp_path, "other", *common, "--train.seed", "5")
    found, _ = train_members([member(tmp_path, "member", *common), other], tmp_path)
    assert found.summary["validation_loss"] == pytest.approx(solo["validation_loss"], abs=1e-4)
    assert losses(tmp_path / "member") == pytest.approx(losses(tmp_path / "solo"), abs=1e-4)
    first = losses(folder / "plain")[(1, "train_loss")]
    assert losses(tmp_path / "member")[(1, "train_loss")] < first - 0.5


def test_members_that_differ_in_more_have_programs_of_their_own(tmp_path):
    write_config(tmp_path)
    plain = program_key(member(tmp_path, "a"))
    for change in (
        ("--model.norm", "none"),
        ("--train.batch-size", "4"),
        ("--optimizer.name", "lion"),
        ("--optimizer.beta1", "0.8"),
    ):
        assert program_key(member(tmp_path, "a", *change)) != plain


class TestMemory:
    def test_takes_as_many_as_fit(self):
        asked = []

        def need(members):
            asked.append(members)
            return 100 + 10 * members

        assert most_at_once(need, 7, 200, 1, "x") == 7
        assert most_at_once(need, 32, 200, 1, "x") == 10
        # Two devices: a multiple of two.
        assert most_at_once(need, 31, 200, 2, "x") == 10
        assert asked == [7, 32, 1, 32, 2]

    def test_refuses_a_member_that_does_not_fit(self, tmp_path):
        write_config(tmp_path)
        with pytest.raises(UserError, match=r"one member needs .* GB and 0\.00 GB are available"):
            train_members([member(tmp_path, "a")], tmp_path, available=100_000)

    def test_is_what_the_compiler_counts(self, pair, tmp_path):
        """With room for one of two members they train one after another, with the same results."""
        folder, _, needed = pair
        write_config(tmp_path)
        train_members(seeds(tmp_path, 2), tmp_path, available=needed - 1)
        assert [len(list(f.glob("programs/*/*"))) for f in (folder, tmp_path)] == [1, 2]
        for name in ("seed0", "seed1"):
            assert losses(folder / name) == losses(tmp_path / name)


ABLATION = """
base = "tiny.toml"
seeds = 2
learning_rates = [1e-2, 3e-3]
claims = ["norm=layernorm beats norm=none"]
[overrides]
train.steps = 120
train.checkpoint_every = 20
train.evaluate_every = 52
[factors]
model.norm = ["layernorm", "none"]
"""


@pytest.mark.slow
def test_an_ablation_killed_at_any_moment_ends_as_the_undisturbed_one(tmp_path):
    write_config(tmp_path)
    (tmp_path / "x.toml").write_text(ABLATION)
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    process = script("ablate.py", tmp_path / "x.toml", "--out", reference)
    assert process.returncode == 0, process.output

    for lines in (60, 620):
        process = script("ablate.py", tmp_path / "x.toml", "--out", killed, wait=False)
        while lines_written(killed) < lines and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert 0 < lines_written(killed) <= lines_written(reference)
    process = script("ablate.py", tmp_path / "x.toml", "--out", killed)
    assert process.returncode == 0, process.output
    for run in sorted((reference / "members").iterdir()):
        assert losses(killed / "members" / run.name) == losses(run)
    assert verdict_lines(killed) == verdict_lines(reference)

    before = {path: path.stat().st_mtime_ns for path in (killed / "members").rglob("*.jsonl")}
    process = script("ablate.py", tmp_path / "x.toml", "--out", killed)
    assert process.returncode == 0, process.output
    assert before == {path: path.stat().st_mtime_ns for path in before}


def lines_written(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("members/*/metrics.jsonl"))


def verdict_lines(out: Path) -> list[str]:
    lines = (out / "report.md").read_text().splitlines()
    found = [line for line in lines if line.startswith("- **")]
    assert found
    return found


def assert_report_is_whole(out):
    page = (out / "report.html").read_text()
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 2
    for expected in ("norm=layernorm beats norm=none", "Holm", "t interval", "80% of the time"):
        assert expected in page
    assert "python ablate.py" in page
    table = (out / "results.csv").read_text().splitlines()
    assert len(table) == 1 + 2 * 2 * 2
    assert table[0].startswith("model.norm,learning_rate,seed,validation_loss")


def test_the_report_needs_nothing_beside_it(pair, tmp_path, monkeypatch):
    """Of members that stand in for trained ones: their losses are made up."""
    write_config(tmp_path)
    (tmp_path / "x.toml").write_text(ABLATION)
    summary = pair[1][0].summary

    def trained(configs, out, cores, report):
        for config in configs:
            shutil.copytree(pair[0] / "seed0", config.train.out)
        losses = [5 + i / 10 for i in range(len(configs))]
        given = [summary | {"validation_loss": loss, "train_loss": loss - 0.1} for loss in losses]
        model = replace(configs[0].model, vocab_size=257)
        return [
            Result(replace(c, model=model), told) for c, told in zip(configs, given, strict=True)
        ]

    monkeypatch.setattr(ablation, "train_on_cores", trained)
    asked = read(tmp_path / "x.toml", out=tmp_path / "out")
    ablation.run(asked, tmp_path / "out", command="python ablate.py x.toml")
    assert_report_is_whole(tmp_path / "out")


@pytest.mark.slow
def test_the_command_writes_the_report(tmp_path):
    write_config(tmp_path)
    (tmp_path / "x.toml").write_text(ABLATION.replace("= 120", "= 20"))
    process = script("ablate.py", tmp_path / "x.toml", "--out", tmp_path / "out")
    assert process.returncode == 0, process.output
    assert_report_is_whole(tmp_path / "out")
