"""The rooms of the package: imports point down, and the config names what the dicts hold."""

import ast
import itertools
import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import pytest

from jaxdecoder.compression.divergences import DIVERGENCES
from jaxdecoder.compression.matching import MATCHINGS
from jaxdecoder.config import Config, OptimizerConfig, choices, model, sections
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.layers.attention import ATTENTIONS
from jaxdecoder.layers.block import PLACEMENTS
from jaxdecoder.layers.depth import CONFIDENCES, DEPTHS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS
from jaxdecoder.layers.remat import REMATS
from jaxdecoder.training.optimizers import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxdecoder"

# From the ground up; a room imports from itself and from those before it.
ROOMS = [
    "errors",
    "files",
    "helpers",
    "typing",
    "devices",
    "config",
    "kernels",
    "layers",
    "decoder",
    "decoding",
    "analysis",
    "data",
    "training",
    "sampling",
    "compression",
    "ablation",
    "pretrained",
]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def modules():
    """The package's files, less the root's own, which only names what the package offers."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or room(path)]


def room(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if name == "__init__" else name


def imported_rooms(path):
    """Rooms that a file imports, wherever in it the import stands, and the names it uses."""
    package = (
        ["jaxdecoder", *path.relative_to(PACKAGE).parts[:-1]] if PACKAGE in path.parents else []
    )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxdecoder":
                yield parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_its_own_room_and_those_below(path):
    # What `python -m` runs is a script, as train.py is: it stands above all rooms.
    own = len(ROOMS) if path.name == "__main__.py" else ROOMS.index(room(path))
    for imported in imported_rooms(path):
        assert imported in ROOMS, f"{imported} is no room: import from the room that has it"
        assert ROOMS.index(imported) <= own, f"{imported} stands above {room(path)}"


def test_the_package_has_no_other_rooms():
    assert {room(path) for path in modules()} <= set(ROOMS)


def test_files_that_are_no_code_are_installed_as_well():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = settings["tool"]["setuptools"]["package-data"]
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            patterns = [*data.get("*", ()), *data.get(package, ())]
            assert any(fnmatch(path.name, pattern) for pattern in patterns), path


def test_nothing_imports_a_script():
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.Import):
                assert not scripts & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] not in scripts, path


@pytest.mark.parametrize(
    ("named", "held"),
    [
        (get_args(model.Position), POSITIONS),
        (get_args(model.Norm), NORMS),
        (get_args(model.NormPlacement), PLACEMENTS),
        (get_args(model.Activation), ACTIVATIONS),
        (get_args(model.AttentionName), ATTENTIONS),
        (get_args(model.Layout), LAYOUTS),
        (get_args(model.Depth), DEPTHS),
        (choices(model.ModelConfig, "remat"), REMATS),
        (get_args(model.ExitConfidence), CONFIDENCES),
        (choices(OptimizerConfig, "name"), OPTIMIZERS),
        (choices(OptimizerConfig, "schedule"), SCHEDULES),
        (get_args(sections.Divergence), DIVERGENCES),
        (get_args(sections.Matching)[1:], MATCHINGS),
    ],
    ids=[
        "position",
        "norm",
        "norm_placement",
        "activation",
        "attention",
        "layout",
        "depth",
        "remat",
        "exit_confidence",
        "optimizer",
        "schedule",
        "divergence",
        "matching",
    ],
)
def test_the_config_names_what_the_dict_holds(named, held):
    assert list(named) == list(held)


def test_steps_are_taken_in_one_place():
    """A run, a population, a recovery and a distillation go through one loop."""
    takes = {
        (path.relative_to(PACKAGE).as_posix(), function.name)
        for path in modules()
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "advance"
    }
    # Trials take steps too, which train nothing.
    assert takes == {("training/loop.py", "take_steps"), ("training/tune.py", "_turns")}


def test_files_are_read_in_one_sitting():
    long = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 400
    }
    assert long == {"data/stories/words.py", "kernels/masks.py"}


def test_gated_activations_are_those_the_config_calls_so():
    assert set(model.GATED) == {name for name, entry in ACTIVATIONS.items() if entry.gated}


def test_paired_positions_are_those_with_a_score():
    assert set(model.PAIRED) == {name for name, entry in POSITIONS.items() if entry.score}


def test_every_field_says_what_it_means():
    """`--help` is made of these."""
    classes = [
        node
        for path in (PACKAGE / "config").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Teaching"))
    ]
    assert len(classes) == len(fields(Config)) + 2  # Config itself, and a base
    for section in classes:
        for statement, following in itertools.pairwise([*section.body, ast.Pass()]):
            if isinstance(statement, ast.AnnAssign) and section.name != "Config":
                field = f"{section.name}.{ast.unparse(statement.target)}"
                assert isinstance(following, ast.Expr), field
                assert isinstance(following.value, ast.Constant), field


def test_a_model_on_a_cpu_loads_no_kernels_of_a_gpu():
    """JAX's corners that they need change from version to version, and load slowly."""
    kernels = [f"jaxdecoder.kernels.{name}" for name in ("hopper", "portable", "decode_kernel")]
    unwanted = ("jax.experimental.pallas", *kernels)
    program = f"""
import sys
import jax.numpy as jnp
import jaxdecoder.training.single
from jaxdecoder.config import ModelConfig
from jaxdecoder.decoder import Decoder
config = ModelConfig(vocab_size=9, context_length=256, d_model=16, n_layers=1, n_heads=1)
tokens = jnp.zeros((1, 256), jnp.int32)
params = Decoder(config).init(__import__("jax").random.key(0), tokens)
loaded = [name for name in sys.modules if name.startswith({unwanted})]
assert not loaded, loaded
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=300)
