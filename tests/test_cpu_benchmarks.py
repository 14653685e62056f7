"""The benchmarks of training on a CPU count and measure what they say."""

from __future__ import annotations

import pytest

from benchmarks import cpu_limit
from benchmarks.train_cpu import SHAPES
from jaxdecoder import analysis
from jaxdecoder.config import ModelConfig

PARTS = {
    "attention_projections": ("query, key, value, out",),
    "feed_forward": ("up", "down"),
    "head": ("head",),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_those_of_the_model(name, passes):
    shape = dict(SHAPES[name])
    batch = shape.pop("batch_size")
    counted = analysis.forward_flops(ModelConfig(**shape), shape["context_length"])
    flops = {p.name: p.flops for p in cpu_limit.products(SHAPES[name], passes)}
    for part, names in PARTS.items():
        assert sum(flops[n] for n in names) == batch * counted[part]
    # Half of all pairs, where a query sees itself and those before it.
    pairs = flops["scores"] + flops["mixing"]
    assert pairs == pytest.approx(batch * counted["attention"], rel=2 / shape["context_length"])


def test_a_step_is_held_against_its_products_and_its_traffic(monkeypatch, capsys):
    tiny = {**SHAPES["small"], "batch_size": 2, "context_length": 16, "n_layers": 1, "d_model": 16}
    monkeypatch.setitem(cpu_limit.SHAPES, "small", tiny)
    monkeypatch.setattr(cpu_limit, "sweep", lambda: 1e9)
    found = cpu_limit.limit("small", 2)
    said = capsys.readouterr().out
    assert all(product.name in said for product in cpu_limit.products(tiny, 2))
    parts = sum(found["bytes"].values()) / 1e9 * 1e3
    assert found["rest_milliseconds"] == pytest.approx(parts)
    assert found["product_milliseconds"] > 0
    assert found["step_milliseconds"] > 0
