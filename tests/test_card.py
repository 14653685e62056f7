"""The examination of a card: its runner, its parts at tiny sizes, and the settings of its tests."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from benchmarks.card import __main__ as examination
from benchmarks.card import (
    attention,
    baby_gpt,
    cases,
    machine,
    runner,
    sides,
    training,
    values,
    workers,
)
from benchmarks.card.runner import Part
from benchmarks.card.task import Task
from jaxdecoder.analysis import parameters
from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels import flash, hopper, masks
from tests import card
from tests.runs import ROOT

# --- The runner --------------------------------------------------------------------------------


def fake(name, *lines, share=1.0):
    """A part that is a few lines of Python; `out` is where its report goes."""
    head = "import json, pathlib, subprocess, sys, time; out = pathlib.Path(sys.argv[2])"
    return Part(name, share, (sys.executable, "-c", "\n".join([head, *lines])))


WRITES = "out.write_text(json.dumps({'tables': [{'title': 't', 'columns': ['n'], 'rows': [[7]]}]}))"


def run_parts(folder, *parts, seconds=30.0, more=()):
    runner.run_all(parts, folder, seconds / 60, more, machine={"kind": "a card", "tables": []})
    return json.loads((folder / "card.json").read_text())


def test_parts_that_hang_crash_or_write_half_a_report_cost_the_others_nothing(tmp_path):
    child = tmp_path / "child"
    parts = [
        fake("whole", WRITES, "print('all is well')"),
        fake(
            "hangs",
            WRITES,
            "kid = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
            f"pathlib.Path({str(child)!r}).write_text(str(kid.pid))",
            "print('about to hang', flush=True)",
            "time.sleep(600)",
            share=0.05,
        ),
        fake("crashes", "print('so far')", "raise ValueError('no good')"),
        fake("half", "out.write_text('{\"tables\": [')"),
        fake("absent", "print('skipped: no such package')", "sys.exit(77)"),
    ]
    # Only the part that hangs has little time; what the first leaves goes to it.
    summary = run_parts(tmp_path, *parts[1:], parts[0], seconds=240)
    found = {part["name"]: part for part in summary["parts"]}
    assert {name: part["outcome"] for name, part in found.items()} == {
        "hangs": "ran out of time",
        "crashes": "failed",
        "half": "ended",
        "absent": "skipped",
        "whole": "ended",
    }
    assert found["crashes"]["said"] == "ValueError: no good"
    assert found["absent"]["said"] == "skipped: no such package"
    assert found["hangs"]["said"] == "about to hang"
    assert found["half"]["report"] is None
    assert found["hangs"]["seconds"] < found["hangs"]["limit"] + 5
    # What it had found is kept, and what it had started is gone.
    assert found["hangs"]["report"]["tables"][0]["rows"] == [[7]]
    assert is_gone(int(child.read_text()))
    text = (tmp_path / "card.md").read_text()
    assert '- kind: "a card"' in text
    assert "| hangs | ran out of time |" in text
    assert "## whole: t\n\n| n |\n| --- |\n| 7 |" in text


def is_gone(process):
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_what_a_part_leaves_goes_to_the_next(tmp_path):
    first, second = fake("first", WRITES), fake("second", WRITES, share=2.0)
    summary = run_parts(tmp_path, first, second, seconds=90)
    limits = [part["limit"] for part in summary["parts"]]
    assert 29 < limits[0] <= 30
    # The second may take its own 60 seconds and most of the first's 30.
    assert 60 < limits[1] <= 90
    assert summary["parts"][1]["limit"] == pytest.approx(90 - summary["parts"][0]["seconds"], abs=1)


def test_a_part_is_told_to_end_before_it_would_be_killed(tmp_path):
    told = fake("told", "out.write_text(json.dumps({'arguments': sys.argv[1:]}))")
    summary = run_parts(tmp_path, told, seconds=40, more=["--quick"])
    arguments = summary["parts"][0]["report"]["arguments"]
    assert arguments[0] == "--out"
    assert arguments[-1] == "--quick"
    assert 30 < float(arguments[arguments.index("--seconds") + 1]) < 35


def test_reports_hold_what_json_has_no_word_for(tmp_path):
    task = Task(tmp_path / "deep" / "report.json", seconds=10)
    task.row("numbers", a=float("nan"), b=1.5)
    task.row("numbers", a=None, b=float("inf"))
    (table,) = json.loads(task.out.read_text())["tables"]
    assert table == {
        "title": "numbers",
        "columns": ["a", "b"],
        "rows": [["nan", 1.5], [None, "inf"]],
    }


def test_children_are_told_where_cuda_is_unless_they_know(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(machine, "DEFAULT_CUDA", tmp_path / "nowhere")
    assert "CUDA_ROOT" not in examination.environment("scratch")
    monkeypatch.setattr(machine, "DEFAULT_CUDA", tmp_path)
    # The folder of pip's packages without ptxas, as PyTorch leaves it, and with it.
    (tmp_path / "nvidia/cu13/bin").mkdir(parents=True)
    assert examination.environment("scratch")["CUDA_ROOT"] == str(tmp_path)
    first, *_ = examination.environment("scratch")["PATH"].split(os.pathsep)
    assert first == str(tmp_path / "bin")
    (tmp_path / "nvidia/cu13/bin/ptxas").touch()
    assert "CUDA_ROOT" not in examination.environment("scratch")
    monkeypatch.setenv("CUDA_ROOT", "/mine")
    assert examination.environment("scratch")["CUDA_ROOT"] == "/mine"


# --- Speed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_an_unknown_card_is_unknown(name, wanted):
    assert training.peak(name) == wanted


def test_the_peer_has_as_many_parameters():
    torch_gpt = pytest.importorskip("benchmarks.torch_gpt", exc_type=ImportError)
    for name in training.SHAPES:
        shape = training.shape_of(name, quick=True)
        model = ModelConfig(**{key: n for key, n in shape.items() if key != "batch_size"})
        theirs = sum(x.numel() for x in torch_gpt.GPT(shape).parameters())
        assert theirs == parameters(model)["total"]


SIDE = """
import sys
from benchmarks.card.sides import answering

with answering() as answer:
    print("what libraries print is no answer")
    answer(ready=True)
    for n, line in enumerate(sys.stdin):
        if sys.argv[1] == "stops" and n == 1:
            raise ValueError("no more")
        answer(seconds=float(line) * n)
"""


def test_sides_take_turns_until_one_goes():
    both = {name: sides.Side([sys.executable, "-c", SIDE, name]) for name in ("stays", "stops")}
    try:
        assert [side.answer(60) for side in both.values()] == [{"ready": True}] * 2
        taken = sides.turns(both, 5, rounds=3, seconds=60)
        assert taken == {"stays": [0.0, 5.0, 10.0]}
        with pytest.raises(sides.Gone, match="ended with status 1"):
            both["stops"].answer(60)
        with pytest.raises(sides.Gone, match="no answer in 0 s"):
            both["stays"].answer(0.0)
    finally:
        for side in both.values():
            side.stop()


def test_what_is_compiled_is_left_out_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [{"step": 250 * n, "validation_loss": 2.0, "seconds": 40 + 5 * n} for n in (1, 2, 4)]
    path.write_text("\n".join(map(json.dumps, written)) + '\n{"step": 1001, "va')
    assert baby_gpt.lines(path) == written
    # The first 250 steps took 45 seconds, 5 of them for the steps.
    assert baby_gpt.without_compilation(written) == 20
    assert baby_gpt.without_compilation(written[:1]) is None
    assert baby_gpt.lines(tmp_path / "none") == []


# --- The values --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["causal", "window", "longformer", "documents", "future"])
def test_masks_of_the_cases_are_the_formulas(mask):
    case = cases.Case(mask, time=40)
    at = np.arange(case.time)
    ours = cases.our_mask(case)(at[:, None], at[None, :])
    np.testing.assert_array_equal(ours, cases.allowed(case))
    assert cases.allowed(case).any()


def test_the_cases_cover_what_may_go_wrong():
    every = cases.CASES
    assert {case.mask for case in every} == {
        *("causal", "window", "longformer", "documents", "future")
    }
    half = [case for case in every if case.dtype != "float32"]
    assert {case.width for case in half} == {16, 48, 64, 80, 128}
    assert {case.time for case in every} == {1000, 4096}
    assert {case.dtype for case in every} == {"bfloat16", "float16", "float32"}
    assert {case.score for case in every} == {"none", "alibi", "cap", "alibi_and_cap"}
    assert all(case.heads == 4 * case.kv_heads for case in every)
    assert any(case.rate for case in every)
    assert any(case.segments for case in every)
    assert all(not cases.allowed(case)[-1].any() for case in every if case.mask == "future")


SMALL = cases.Case("future", 16, "bfloat16", 40, "alibi_and_cap", 0.2, True, 1, 2, 1)


def test_a_right_answer_is_good_and_a_wrong_one_is_not(monkeypatch):
    found = values.examine(values.Job("chunked", SMALL))
    assert found["errors"].keys() == {"out", "dq", "dk", "dv", "dscore"}
    plain = values.examine(values.Job("reference", SMALL))
    assert values.verdict(SMALL, found, plain) == "good"
    assert values.verdict(SMALL, found | {"repeats": False}, plain) == values.NOT_TO_THE_BIT
    assert values.verdict(SMALL, found | {"nan": {"dq": 1}}, plain) == "NaN"
    far = found["errors"] | {"dk": 5 * max(2**-8, plain["errors"]["dk"])}
    assert values.verdict(SMALL, found | {"errors": far}, plain) == "dk is far"
    assert values.verdict(SMALL, {"cannot": "why"}, plain) == "cannot: why"
    # A wrong formula is noticed.
    monkeypatch.setattr(cases, "CAP", 5.0)
    right = cases.expected(SMALL, cases.make(SMALL))
    monkeypatch.setattr(cases, "expected", lambda case, made: right)
    monkeypatch.setattr(cases, "CAP", 50.0)
    wrong = values.examine(values.Job("chunked", SMALL))
    assert values.verdict(SMALL, wrong, plain).endswith("is far")
    assert values.verdict(SMALL, wrong, wrong).endswith("is far")  # all are wrong alike


def test_what_an_implementation_comes_to_is_counted():
    good = {"errors": {"out": 1e-3}, "nan": {"out": 0}, "repeats": True}
    by_name = {
        "reference": good,
        "portable": good | {"repeats": False},
        "hopper": good | {"nan": {"out": 1}},
        "cudnn": {"cannot": "why"},
    }
    found = values.tables({"one": by_name, "two": {"hopper": {"failed": "it hung"}}}, ONE_AND_TWO)
    assert found[0]["rows"] == [
        ["reference", 1, 0, 0, 0],
        ["portable", 0, 1, 0, 0],
        ["hopper", 0, 0, 0, 2],
        ["cudnn", 0, 0, 1, 0],
    ]
    assert [row[:3] for row in found[1]["rows"]][-1] == ["two", "hopper", "it hung"]


ONE_AND_TWO = {"one": SMALL, "two": SMALL}


def test_variants_of_the_hopper_kernels_are_ordered_as_their_names_say():
    default = hopper.sizes
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), "bfloat16")
    problem, operands = flash.state(x, x, x, mask=masks.causal())
    try:
        chosen = {}
        for name in (*values.VARIANTS, "hopper"):
            values.order_hopper(name)
            chosen[name] = hopper.sizes(problem, operands)
    finally:
        hopper.sizes = default
    assert chosen["hopper"] == default(problem, operands)
    assert all(sizes.rotated for sizes in chosen["hopper, rotated"].values())
    assert all(sizes.turns == "early" for sizes in chosen["hopper, early"].values())
    assert all(sizes.consumers == 3 for sizes in chosen["hopper, three"].values())
    assert chosen["hopper, whole"].keys() == {"forward", "qkv"}
    assert {case.width for case in values.cases_for("hopper, whole")} == {64, 128}


def test_what_ptxas_complains_of_is_counted():
    log = (
        "ptxas info: (C7510) Potential Performance Loss: wgmma.mma_async are serialized\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
    )
    found = values.complaints(log + log)
    assert sorted(found.values()) == [2, 2]
    assert found["kernels that spill registers"] == 2
    assert not values.complaints("ptxas info: Used 168 registers, 0 bytes spill stores\n")


def test_decoding_from_a_cache_is_the_formula():
    case = cases.quick(cases.DECODING[1])
    for implementation in ("reference", "kernel"):
        found = values.examine(values.Job(f"decoding, {implementation}", case))
        assert found["errors"].keys() == {"out"}
        assert values.verdict(case, found, None) == "good"


# --- Processes that are started again ----------------------------------------------------------

STAND_IN = """
import json, os, pathlib, sys, time
from benchmarks.card.workers import DEAD, Lines

lines = Lines(pathlib.Path(sys.argv[1]))
for job in json.loads(sys.argv[2]):
    lines.say(job)
    for name in [name for name in job[0].split(",") if name not in job[1]]:
        lines.say(job, at=name)
        if name == "hangs":
            time.sleep(600)
        if name == "dies":
            os._exit(9)
        if name == "breaks the device":
            os._exit(DEAD)
    lines.say(job, found={"did": job})
    if job[0] == "told of its failure":
        os._exit(DEAD)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module whose jobs are names and who sits out; names behave as they are called."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return "stand_in"


def all_found(worker):
    found, until = [], time.monotonic() + 60
    while worker.process is not None and time.monotonic() < until:
        time.sleep(0.05)
        found += worker.look(most=3.0)
    worker.stop()
    return found


def test_a_process_that_hangs_or_dies_goes_on_after_the_job(tmp_path, stand_in):
    names = ("well", "hangs", "dies", "told of its failure", "well again")
    jobs = [[name, []] for name in names]
    found = all_found(workers.Worker(stand_in, list(jobs), tmp_path / "lines", list))
    assert found == [
        (["well", []], {"did": ["well", []]}),
        (["hangs", []], {"failed": "it hung"}),
        (["dies", []], {"failed": "it ended with status 9"}),
        (["told of its failure", []], {"did": ["told of its failure", []]}),
        (["well again", []], {"did": ["well again", []]}),
    ]


def test_who_breaks_the_card_sits_out_the_rest(tmp_path, stand_in):
    class Job(NamedTuple):
        names: str
        banned: tuple[str, ...] = ()

    def job_of(told):
        return Job(told[0], tuple(told[1]))

    both = ("ours,breaks the device,others", "breaks the device,dies,others")
    worker = attention.Attention(
        stand_in, [Job(names) for names in both], tmp_path / "lines", job_of
    )
    found = [result for _, result in all_found(worker)]
    assert found == [
        {"banned": "breaks the device", "why": "it ended with status 3"},
        {"did": [both[0], ["breaks the device"]]},
        {"banned": "dies", "why": "it ended with status 9"},
        {"did": [both[1], ["breaks the device", "dies"]]},
    ]


# --- Everything, at tiny sizes -----------------------------------------------------------------

ABSENT = ("pydantic", "tyro", "tomli_w", "beartype")


def without(folder, *names):
    """The environment of processes in which these packages cannot be imported."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {names}:\n"
        "            raise ModuleNotFoundError(name + ' is not to be had')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}


def started(*arguments, environment):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_values_and_attention_need_no_packages_that_read_a_config(tmp_path):
    environment = without(tmp_path, *ABSENT)
    out = tmp_path / "values.json"
    said = started("benchmarks.card.values", "--out", out, "--quick", environment=environment)
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith("0 cases are not good; 0 were not reached\n")
    report = json.loads(out.read_text())
    (portable,) = (row for row in report["tables"][0]["rows"] if row[0] == "portable")
    assert portable == ["portable", 2, 0, 0, 0]
    said = started(
        *("benchmarks.attention", "--quick", "--masks", "window", "--out", tmp_path / "speed"),
        environment=environment,
    )
    assert said.returncode == 0, said.stderr
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["backward"] for row in rows] == [False, True]


@pytest.mark.parametrize("name", ["training", "decoding", "baby_gpt"])
def test_parts_that_need_absent_packages_say_so_in_a_line(tmp_path, name):
    said = started(
        *(f"benchmarks.card.{name}", "--out", tmp_path / "report.json", "--quick"),
        environment=without(tmp_path, *ABSENT),
    )
    assert said.returncode == 77
    assert said.stdout == "skipped: pydantic, tyro, tomli_w must be installed\n"


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes(tmp_path):
    said = started(
        *("benchmarks.card", "--quick", "--minutes", "10", "--out", tmp_path),
        environment=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert said.returncode == 0, said.stderr
    summary = json.loads((tmp_path / "card.json").read_text())
    assert summary["machine"]["platform"] == "cpu"
    corpus = (ROOT / ".cache" / "tinyshakespeare.txt").exists()
    for part in summary["parts"]:
        wanted = "skipped" if part["name"] == "baby_gpt" and not corpus else "ended"
        assert part["outcome"] == wanted, (part["name"], part["said"])
        assert wanted == "skipped" or part["report"]["tables"]
    assert [part["name"] for part in summary["parts"]] == list(examination.SHARES)
    assert json.loads((tmp_path / "tuned.json").read_text())


# --- The settings of tests on a card -----------------------------------------------------------


@pytest.mark.parametrize(
    ("marks", "wanted"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("slow or gpu", True),
        ("", False),
        ("not gpu", False),
        ("not slow", False),
        ("not slow and not gpu", False),
        ("not (slow or gpu)", False),
        ("slow", False),
    ],
)
def test_a_run_is_for_a_card_if_the_tests_that_need_one_are_asked_for(marks, wanted):
    assert card.is_for_a_card(marks) == wanted
    # On a card, kernels that are not optimised would spill.
    assert ("JAX_DISABLE_MOST_OPTIMIZATIONS" not in card.settings(marks)) == wanted
    assert (card.settings(marks).get("JAX_PLATFORMS") != "cpu") == wanted


def test_this_run_is_for_a_cpu():
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
