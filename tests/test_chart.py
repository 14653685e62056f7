"""The chart of what models cost: its front, and its page from real runs."""

from __future__ import annotations

import csv
import html
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from jaxdecoder.compression import chart
from jaxdecoder.compression.chart import COSTS, Point, as_html, front
from jaxdecoder.config import DataConfig
from jaxdecoder.data import tokenizers, vocabularies
from jaxdecoder.files import as_page
from tests.runs import here, script

small = st.integers(1, 4)


@given(st.lists(st.tuples(small, small, small), min_size=1, max_size=12))
def test_the_front_is_made_of_those_that_no_other_beats(numbers):
    points = [
        Point(str(i), loss, loss, cost, cost, cost, speed)
        for i, (loss, cost, speed) in enumerate(numbers)
    ]
    for name in COSTS:
        best = front(points, name)
        for point in points:
            mine = getattr(point, name)
            better = [
                other
                for other in points
                if other.loss <= point.loss
                and (getattr(other, name) - mine) * COSTS[name].better >= 0
                and (other.loss, getattr(other, name)) != (point.loss, mine)
            ]
            assert (point in best) == (not better)
        prices = [getattr(point, name) * COSTS[name].better for point in best]
        assert prices == sorted(prices, reverse=True)


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """Three runs: a plain one, one with early exits, and one of another tokenizer."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("plain", "exits", "letters"):
        shutil.copytree(tiny_run, folder / name)
    # Its weights are those of the plain model.
    config = folder / "exits" / "config.toml"
    config.write_text(config.read_text().replace('depth = "fixed"', 'depth = "early_exit"'))
    text = (tiny_run.parent / "corpus.txt").read_text()
    letters = vocabularies.build(DataConfig(tokenizer="char"), lambda: [text])
    tokenizers.save(letters, folder / "letters" / "tokenizer.json")
    return folder


def test_a_page_shows_the_text_as_it_is():
    odd = """<b> & 'c' "d" {{ e }}"""
    page = as_html([Point(odd, *[1] * 6)], "loss", b"picture", odd)
    assert "<b>" not in page
    assert html.unescape(page).count(odd) == 2  # the model and the command
    template = Path(chart.__file__).with_name("chart.html.jinja")
    with pytest.raises(UndefinedError, match="note"):
        as_page(template, picture=b"", headings=[], rows=[])


def test_what_makes_pages_is_loaded_only_then():
    code = "import sys, jaxdecoder.ablation.report, jaxdecoder.compression.chart"
    said = script("-c", f"{code}; print('jinja2' in sys.modules)")
    assert said.output == "False\n"


def table(path):
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_a_page_a_table_and_a_picture_come_of_runs(runs, tmp_path):
    """Those of different tokenizers meet in bits a byte."""
    out = tmp_path / "new" / "chart.html"
    said = here("compress.py", "chart", runs / "plain", runs / "letters", "--out", out)
    assert said.returncode == 0, said.output
    page = out.read_text()
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 1
    rows = table(out.with_suffix(".csv"))
    assert list(rows) == ["plain", "letters"]
    assert float(rows["plain"]["bytes"]) == 4 * float(rows["plain"]["parameters"])
    assert "bits a byte" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_model_with_early_exits_makes_several_points(runs, tmp_path):
    out = tmp_path / "chart.html"
    said = here("compress.py", "chart", runs / "plain", runs / "exits", "--out", out)
    assert said.returncode == 0, said.output
    rows = table(out.with_suffix(".csv"))
    assert list(rows) == ["plain", "exits at 1", "exits at 0.9"]
    # A token that may stop early does no more than one that may not.
    assert float(rows["exits at 0.9"]["flops"]) <= float(rows["exits at 1"]["flops"])
    assert "nats a token" in out.with_suffix(".md").read_text()


def test_mistakes_are_told(runs, tmp_path):
    said = here("compress.py", "chart", tmp_path / "nowhere")
    assert said.returncode == 1
    assert "not a run folder" in said.output
    said = here("compress.py", "chart")
    assert said.returncode == 1
    assert "which runs?" in said.output
    said = here("compress.py", "chart", runs / "plain", "--out", tmp_path / "chart.pdf")
    assert said.returncode == 1
    assert ".html" in said.output
