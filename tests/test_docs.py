"""The page on variants tells of each of them, and shows it."""

import dataclasses
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from jaxdecoder.compression import options
from jaxdecoder.config import ModelConfig
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.depth import DEPTHS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS
from tests.runs import script

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
PAGE = (DOCS / "variants.md").read_text(encoding="utf-8")
FAMILIES = {
    "Positions": ("position", POSITIONS),
    "Norms": ("norm", NORMS),
    "Placements": ("norm_placement", PLACEMENTS),
    "Activations": ("activation", ACTIVATIONS),
    "Attentions": ("attention", ATTENTIONS),
    "Layouts": ("layout", LAYOUTS),
    "Depths": ("depth", DEPTHS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_has_its_paragraph_and_picture_in_the_order_of_its_dict(family):
    field, entries = FAMILIES[family]
    section = re.search(
        rf"^## {family}\n+`(\w+)`: (.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
    )
    assert section is not None
    assert section[1] == field
    paragraph = r"^\*\*`(\w+)`\*\* "
    assert re.findall(paragraph, section[2], re.MULTILINE) == list(entries)
    # A picture is a line of its own below the paragraph.
    shown = re.findall(
        paragraph + r"(?:.+\n)+\n!\[.+\]\(pictures/(.+)\)\n", section[2], re.MULTILINE
    )
    assert shown == [(entry, f"{field}_{entry}.svg") for entry in entries]


def test_pictures_are_those_that_the_page_shows():
    shown = set(re.findall(r"\(pictures/(.+?)\)", PAGE))
    assert {path.name for path in PICTURES.iterdir()} == shown
    assert max(path.stat().st_size for path in PICTURES.iterdir()) < 25_000


def read(picture):
    """A picture's words and its numbers. Processors differ in the last digits of the numbers, and
    in the names that matplotlib makes of them."""
    names = list(dict.fromkeys(re.findall(r"\bp[0-9a-f]{10}\b", picture)))
    for place, name in enumerate(names):
        picture = picture.replace(name, f"name {place}")
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return re.split(number, picture), [float(x) for x in re.findall(number, picture)]


@pytest.mark.slow
def test_pictures_are_up_to_date(tmp_path):
    # In a process where types are not checked: stand-ins for arrays pass through the placements.
    # Compiled as they were when drawn: an erf of other instructions is not quite the same.
    process = script("-m", "docs.draw", tmp_path, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert process.returncode == 0, process.output
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in PICTURES.iterdir()}
    assert drawn.keys() == kept.keys()
    for name, picture in drawn.items():
        if f"Matplotlib v{matplotlib.__version__}," in kept[name]:
            (words, numbers), (kept_words, kept_numbers) = map(read, (picture, kept[name]))
            told = f"{name} is out of date: python -m docs.draw"
            assert words == kept_words, told
            np.testing.assert_allclose(numbers, kept_numbers, rtol=0, atol=0.005, err_msg=told)


def test_fields_it_names_exist():
    prefixes = "attention|position|norm|rope|exit|mod|convolution"
    named = set(re.findall(rf"`((?:{prefixes})_\w+)`", PAGE))
    assert named <= set(ModelConfig.__dataclass_fields__)
    fields = (name for name in ModelConfig.__dataclass_fields__ if re.match(prefixes, name))
    assert {name for name in fields if "_" in name} - named <= {
        "attention_implementation",
        "attention_projection",
    }
    # Sections of fields that choose among no entries.
    for field in ("convolution_width", "copying"):
        assert re.search(rf"^## .+\n+`{field}`: ", PAGE, re.MULTILINE)


def test_options_of_compression_that_it_names_exist():
    page = (DOCS / "compression.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(options).values() if dataclasses.is_dataclass(kind)]
    fields = {field.name.replace("_", "-") for kind in kinds for field in dataclasses.fields(kind)}
    prose = re.sub(r"^python (train|sample)\.py .*$", "", page, flags=re.MULTILINE)
    named = set(re.findall(r"--(?:no-)?([a-z][a-z-]+)", prose))
    assert named - fields == {"help"}
    # Every pass and every method of pruning is told of.
    for name in (*options.PRUNING, "distill", "quantize", "dequantize", "chart"):
        assert f"`{name}`" in page or f"compress.py {name} " in page, name


@pytest.mark.slow
def test_findings_are_what_the_committed_results_say(tmp_path):
    out = tmp_path / "findings.md"
    process = script("-m", "docs.findings", "--out", out)
    assert process.returncode == 0, process.output
    assert out.read_text() == (DOCS / "findings.md").read_text()
