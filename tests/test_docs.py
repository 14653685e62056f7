"""The page on variants tells of each of them."""

import re
from pathlib import Path

import pytest

from jaxdecoder.config import ModelConfig
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.depth import DEPTHS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS

PAGE = (Path(__file__).parent.parent / "docs" / "variants.md").read_text(encoding="utf-8")
FAMILIES = {
    "Positions": ("position", POSITIONS),
    "Norms": ("norm", NORMS),
    "Placements": ("norm_placement", PLACEMENTS),
    "Activations": ("activation", ACTIVATIONS),
    "Attentions": ("attention", ATTENTIONS),
    "Depths": ("depth", DEPTHS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_has_its_paragraph_in_the_order_of_its_dict(family):
    field, entries = FAMILIES[family]
    section = re.search(
        rf"^## {family}\n+`(\w+)`: (.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
    )
    assert section is not None
    assert section[1] == field
    assert re.findall(r"^\*\*`(\w+)`\*\* ", section[2], re.MULTILINE) == list(entries)


def test_fields_it_names_exist():
    prefixes = "attention|position|norm|rope|exit|mod"
    named = set(re.findall(rf"`((?:{prefixes})_\w+)`", PAGE))
    assert named <= set(ModelConfig.__dataclass_fields__)
    fields = (name for name in ModelConfig.__dataclass_fields__ if re.match(prefixes, name))
    assert {name for name in fields if "_" in name} - named <= {
        "attention_implementation",
        "attention_projection",
    }
