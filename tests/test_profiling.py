"""A profiled run has a trace and a page that gives each part of the model its time."""

from __future__ import annotations

import pytest

from jaxdecoder.config import load
from jaxdecoder.training.profiling import Place, place, places, summarise
from jaxdecoder.training.single import train
from tests.runs import losses, write_config

FORWARD = "jit(several)/while/body/eval_jaxpr/jvp(Decoder.losses)/Decoder.passed/body/eval_jaxpr/"
BACKWARD = FORWARD.replace("jvp(Decoder.losses)", "transpose(jvp(Decoder.losses))")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            f"{FORWARD}blocks/block_0/attention/mixing/bqhgw,bkhw->bhgqk/dot_general",
            ("attention/mixing", "forward"),
        ),
        (
            f"{FORWARD}blocks/block_0/attention/mixing/jit(_where)/select_n",
            ("attention/mixing", "forward"),
        ),
        (
            f"{BACKWARD}blocks/block_0/feed_forward/down/dot_general;{FORWARD}x/add",
            ("feed_forward/down", "backward"),
        ),
        (f"{FORWARD}blocks/block_0/add", ("loss and residual stream", "forward")),
        (
            "jit(several)/while/body/transpose(jvp(Decoder.losses))/rematted_computation/"
            "Decoder.passed/body/final_norm/rsqrt",
            ("final_norm", "backward"),
        ),
        ("jit(several)/while/body/eval_jaxpr/sqrt", ("optimiser", "update")),
    ],
)
def test_an_instruction_belongs_to_a_module(path, expected):
    if "rematted" in path:
        expected = (expected[0], "recomputed")
    assert place(path) == Place(*expected)


def test_containers_are_not_counted_and_shares_add_up():
    text = "\n".join(
        f'  %{name} = f32[2]{{0}} {kind}(%x), metadata={{op_name="{FORWARD}head/dot"}}'
        for name, kind in (("dot.1", "dot"), ("while.2", "while"), ("fusion.3", "fusion"))
    )
    known = places(text)
    assert set(known) == {"dot.1", "fusion.3"}
    page = summarise({"dot.1": 0.006, "fusion.3": 0.002, "while.2": 9.0, "other": 9.0}, known, 2)
    assert "4.00 ms of work a step" in page
    assert "75.0%" in page
    assert "while.2" not in page


def test_a_profiled_run_says_where_its_time_goes_and_loses_nothing(tiny_run, tmp_path, capsys):
    train(load(tiny_run.parent / "tiny.toml", ["--train.out", str(tmp_path), "--train.profile"]))
    page = (tmp_path / "profile" / "profile.html").read_text()
    for part in ("attention/mixing", "feed_forward/up", "attention_norm", "optimiser", "backward"):
        assert part in page
    assert "steps 9 to 12 are traced" in " ".join(capsys.readouterr().out.split())
    assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))
    assert losses(tmp_path) == losses(tiny_run)


def test_a_run_too_short_to_profile_ends_its_trace(tmp_path):
    config = load(write_config(tmp_path), ["--train.profile", "--train.steps", "8"])
    train(config)
    assert not (tmp_path / "run" / "profile" / "profile.html").exists()
    train(load(write_config(tmp_path), ["--train.profile", "--train.steps", "24"]))
