"""What `jaxdecoder` offers by name: it is there, is typed, costs nothing until used, and works."""

import ast
import re
import textwrap
from importlib import import_module
from pathlib import Path

import pytest

import jaxdecoder
from jaxdecoder import generate, load_run
from tests.runs import ROOT, here, script

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {
    "README": re.search(r"## In a notebook\n\n```python\n(.*?)```", README, re.DOTALL)[1],
    "docstring": textwrap.dedent(
        "\n".join(re.findall("^    .*", jaxdecoder.__doc__, re.MULTILINE))
    ),
}


def typed() -> dict[str, object]:
    """What type checkers take each name for."""
    source = Path(jaxdecoder.__file__).read_text(encoding="utf-8")
    (block,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {
        alias.asname or alias.name: getattr(import_module(statement.module), alias.name)
        for statement in block.body
        for alias in statement.names
    }


def test_every_name_is_there_and_is_what_type_checkers_take_it_for():
    assert {name: getattr(jaxdecoder, name) for name in jaxdecoder.__all__} == typed()
    assert set(jaxdecoder.__all__) <= set(dir(jaxdecoder))
    assert (Path(jaxdecoder.__file__).parent / "py.typed").exists()


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(AttributeError, match="'jaxdecoder' has no attribute 'nowhere'"):
        jaxdecoder.nowhere  # noqa: B018


def test_jax_is_loaded_only_when_it_is_needed():
    code = "import sys, jaxdecoder; print('jax' in sys.modules)"
    code += "; jaxdecoder.load('configs/demo.toml'); print('jax' in sys.modules)"
    code += "; jaxdecoder.Decoder; print('jax' in sys.modules)"
    assert script("-c", code).output.split() == ["False", "False", "True"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs(tiny_run, capsys, example):
    names = {}
    exec(EXAMPLES[example].replace("runs/demo", str(tiny_run)), names)
    assert capsys.readouterr().out.startswith("Once upon a time")
    if "logits" in names:
        assert names["logits"].shape == (1, 16, 257)


def test_a_text_is_what_the_script_prints(tiny_run):
    told = generate(load_run(tiny_run), "one ", max_new_tokens=40, temperature=1.5, seed=3)
    asked = "--max-new-tokens", "40", "--temperature", "1.5", "--seed", "3"
    assert here("sample.py", tiny_run, "--prompt", "one ", *asked).output == told + "\n"
