"""What is told of a training step's memory before it runs."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from gpu_compile import needs_cuda_packages
from models import slow, small

from jaxdecoder.analysis import fitting
from jaxdecoder.analysis.__main__ import main
from jaxdecoder.analysis.memory import Memory, by_closed_form
from jaxdecoder.config import Config, DataConfig, OptimizerConfig, TrainConfig, load
from jaxdecoder.data.tokens import prepare
from jaxdecoder.devices import DEVICES, memory_fraction, of_kind
from jaxdecoder.errors import UserError
from jaxdecoder.training import ahead, memory
from jaxdecoder.training.single import Alone
from jaxdecoder.training.step import next_token

ROOT = Path(__file__).parent.parent
CPU, H200 = DEVICES["cpu"], DEVICES["h200"]
XL = ROOT / "configs" / "gpt2_xl.toml"

WIDE = functools.partial(small, vocab_size=260, d_model=64, d_ff=128, context_length=64)
CASES = {
    "plain": Config(model=WIDE(), train=TrainConfig(batch_size=8, steps_per_call=5)),
    "saving": Config(
        model=WIDE(n_layers=4, remat="dots", layout="parallel_stacks"),
        optimizer=OptimizerConfig(state_dtype="bfloat16", ema_decay=0.9),
        train=TrainConfig(batch_size=8, gradient_accumulation=4, steps_per_call=1),
    ),
    "muon": Config(
        model=WIDE(n_layers=4, remat="block", depth="mixture_of_depths"),
        optimizer=OptimizerConfig(name="muon"),
        train=TrainConfig(batch_size=4),
    ),
}


@pytest.mark.parametrize("name", ["plain", *slow("saving", "muon")])
def test_what_is_told_is_what_the_real_call_takes(name, tmp_path):
    data = DataConfig(tokenizer="byte", stories_bytes=20_000, cache=str(tmp_path))
    config = dataclasses.replace(CASES[name], data=data)
    told = memory.told(config, CPU)
    corpus = prepare(data)
    alone = Alone(config, corpus, next_token(config))
    taken = []
    call = alone._call

    def compiled(state, batches, constants):
        program = call.lower(state, batches, constants).compile()
        taken.append(memory.peak(program.memory_analysis()))
        return program(state, batches, constants)

    alone._call = compiled
    state = alone.start(None)
    held = {part: size_of(getattr(state, part)) for part in ("params", "optimizer", "ema")}
    alone.advance(state, alone.batches(0, alone.steps_per_call))
    assert told.total == pytest.approx(taken[0], rel=0.03)
    assert told.weights == held["params"]
    assert told.moments == pytest.approx(held["optimizer"], abs=8)
    assert told.average == held["ema"]
    assert told.batch == alone.steps_per_call * config.train.batch_size * 64 * 12
    assert told.activations > 0


def size_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@needs_cuda_packages
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "block", "everything"])
@pytest.mark.parametrize("layout", ["serial", "parallel_stacks"])
def test_the_closed_form_is_near_what_xla_counts_for_a_gpu(layout, remat):
    model = small(vocab_size=4096, context_length=512, d_model=256, d_ff=1024)
    model = dataclasses.replace(model, n_layers=8, layout=layout, remat=remat)
    config = Config(model=model, train=TrainConfig(batch_size=16, steps_per_call=1))
    told, estimated = memory.told(config, H200), memory.estimated(config, H200)
    assert estimated.total == pytest.approx(told.total, rel=0.25)


def test_the_closed_form_counts_what_is_kept_by_hand():
    config = load(XL)
    found = by_closed_form(config, H200, steps=1)
    parameters = 1_557_611_200
    assert found[:3] == (4 * parameters, 8 * parameters, 0)
    assert found.gradients == 8 * parameters  # of a pass, and their sum
    # 16 sequences a pass: stream, queries, keys and values, output, hidden units, their output.
    tokens, d = 16 * 1024, 1600
    kept = 2 * tokens * 48 * d * (1 + 3 + 1 + 4 + 1)
    assert found.activations == pytest.approx(kept, rel=0.05)
    split = load(
        XL, ["--mesh.data", "1", "--mesh.fsdp", "-1", "--optimizer.state-dtype", "bfloat16"]
    )
    assert by_closed_form(split, H200, 1, 8)[:2] == (parameters // 2, parameters // 2)


def told_by_hand(config, devices):
    """State of 10 bytes a part; a row keeps 8 bytes, or fewer; passes sum their gradients."""
    t = config.train
    kept = {"none": 8, "dots": 6, "block": 4, "everything": 2}[config.model.remat]
    moments = 20 if config.optimizer.state_dtype == "float32" else 10
    split = config.mesh.sizes(devices)["fsdp"]
    gradients = 20 if t.gradient_accumulation > 1 else 10
    rows = t.batch_size // t.gradient_accumulation // devices
    return Memory(10 // split, moments // split, 0, 0, gradients // split, kept * rows)


FEW = Config(model=small(), train=TrainConfig(batch_size=16))


def tried(room, config=FEW, **options):
    return [
        (attempt.command, attempt.devices, needed.total)
        for attempt, needed in fitting.attempts(config, 1, room, told_by_hand, **options)
    ]


def test_the_first_version_that_fits_ends_the_search():
    assert told_by_hand(FEW, 1).total == 168
    dots, block, everything = (f"--model.remat {name}" for name in ("dots", "block", "everything"))
    policies = [(dots, 1, 136), (block, 1, 104), (everything, 1, 72)]
    passes = f"{everything} --train.gradient-accumulation"
    halved = "--optimizer.state-dtype bfloat16"
    assert tried(room=140) == policies[:1]
    # 2 passes seem not to fit, and are not tried.
    assert tried(room=60) == [*policies, (f"{passes} 4", 1, 58)]
    assert tried(room=45) == [*policies, (f"{passes} 16", 1, 52), (f"{passes} 16 {halved}", 1, 42)]
    # Two devices take as many rows each in half as many passes.
    assert tried(room=30)[-2:] == [
        (f"{passes} 16 {halved}", 1, 42),
        (f"{passes} 8 {halved} --mesh.data 1 --mesh.fsdp -1", 2, 22),
    ]
    assert tried(room=30, more=())[-1][1:] == (1, 42)
    kept = dataclasses.replace(FEW, model=small(remat="everything"))
    assert tried(room=70, config=kept)[0][0] == "--train.gradient-accumulation 2"


def test_the_largest_batch_is_the_last_power_of_two_that_fits():
    larger, needed = fitting.largest_batch(FEW, 1, 700, told_by_hand)
    assert (larger.command, needed.total) == ("--train.batch-size 64", 552)
    assert fitting.largest_batch(FEW, 1, 290, told_by_hand) is None


def said(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["analysis", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("jaxdecoder.analysis.__main__._prepare", lambda count: None)
    main()
    return capsys.readouterr().out


def test_the_command_says_what_fits(capsys, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(ahead, "can_compile", lambda: False)
    told = said(capsys, monkeypatch, XL, "--device", "h200")
    assert "Estimated in closed form, not counted by XLA: jax's CUDA packages" in told
    assert "It fits: 56.80 GB of 105.75 GB." in told
    assert "A larger batch fits: --train.batch-size 1024" in told
    told = said(capsys, monkeypatch, XL, "--device", "rtx4090")
    lines = [line.split(":")[0].strip() for line in told.split("Tried:\n")[1].splitlines()]
    assert lines[:2] == ["--model.remat block", "--model.remat everything"]
    assert lines[-1].endswith("--mesh.fsdp -1, on 2 devices"), lines
    assert told.rstrip().endswith(", fits")


def test_the_command_counts_by_xla_on_the_cpu(capsys, monkeypatch, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(
        "[model]\nvocab_size = 5\ncontext_length = 4\nd_model = 8\nn_layers = 1\nn_heads = 2\n"
        "[train]\nbatch_size = 1\n"
    )
    monkeypatch.setattr(fitting, "largest_batch", lambda *a: None)
    told = said(capsys, monkeypatch, path, "--device", "cpu")
    assert "Counted by XLA." in told
    assert "It fits: 0.00 GB of" in told


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"does not divide over 3 devices.*; 18 would"):
        memory.estimated(FEW, H200, 3)


def test_help_and_the_table_of_devices_need_no_jax():
    program = """
import runpy, sys
from jaxdecoder.devices import DEVICES
sys.argv = ["analysis", "--help"]
try:
    runpy.run_module("jaxdecoder.analysis", run_name="__main__")
except SystemExit as ended:
    assert not ended.code
assert "jax" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True
    )
    assert "rtx4090" in done.stdout


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("cpu", "cpu"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_devices_are_known_by_their_kind(kind, name):
    assert of_kind(kind) is (DEVICES[name] if name else None)


def test_jax_takes_its_share_of_a_gpu(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert H200.usable == 70_500_000_000
    assert memory_fraction({}) == memory_fraction({"XLA_PYTHON_CLIENT_MEM_FRACTION": "x"}) == 0.75
    assert CPU.usable == CPU.memory > 10**9
