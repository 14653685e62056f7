"""The table of broken lines fits the code; none of them is run here."""

import ast
import shlex
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.broken_lines import ROOT, broken_text, entries

ROOMS = (
    *("config", "kernels", "layers", "analysis", "data"),
    *("training", "sampling", "ablation", "compression"),
)


def test_every_line_is_there_once_and_its_fault_can_be_read():
    for entry in entries():
        ast.parse(broken_text(entry), entry.file)
        assert entry.was != entry.becomes


def test_every_room_has_five_properties_at_least():
    found = entries()
    rooms = Counter(entry.room for entry in found)
    assert rooms.keys() == set(ROOMS)
    assert min(rooms.values()) >= 5
    assert len({entry.property for entry in found}) == len(found)
    for entry in found:
        room = "layers" if Path(entry.file).name == "decoder.py" else Path(entry.file).parent.name
        assert room == entry.room
        assert (ROOT / shlex.split(entry.tests)[0]).is_file()


def test_a_line_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="'nowhere' occurs 0 times"):
        broken_text(entries()[0]._replace(was="nowhere"))
