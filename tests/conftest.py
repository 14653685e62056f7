"""Settings of the whole test run: annotations are checked, plots need no screen, and JAX computes
on the CPU, unless `-m gpu` asks for the tests that need a card."""

import atexit
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from tests import card

os.environ["MPLBACKEND"] = "Agg"

LARGEST = 2**30  # bytes of compiled programs that are kept between runs


def kept_programs() -> str:
    """The folder of compiled programs, of which the oldest go when there are too many.

    JAX keeps apart what another version, flag or processor would compile otherwise.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = caches / "jaxdecoder" / "test-programs"
        folder = root / importlib.metadata.version("jax")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # it can be written to
            pass
        size = 0
        programs = [(file, file.stat()) for file in root.rglob("*-cache")]
        for file, stat in sorted(programs, key=lambda held: -held[1].st_mtime):
            size += stat.st_size
            if size > LARGEST:
                file.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # no home, or none of our own
        temporary = tempfile.mkdtemp(prefix="jaxdecoder-tests-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return temporary
    return str(folder)


if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the scripts that tests start inherit it: what one compiled, no other compiles.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = kept_programs()
# The smallest too: reading one back is quicker than compiling it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_configure(config):
    # JAX is not loaded yet, and the workers inherit it.
    for name, value in card.settings(config.getoption("markexpr")).items():
        os.environ.setdefault(name, value)


def pytest_ignore_collect(collection_path, config):
    if collection_path.suffix != ".py" or not card.is_for_a_card(config.getoption("markexpr")):
        return None
    return True if not card.has_tests_for_it(collection_path.read_text()) else None


# Before anything of the package is imported: shapes and types in its annotations are checked.
# The numeric tower is PEP 484's: an int will do for a float.
if importlib.util.find_spec("beartype") is not None:
    install_import_hook(
        "jaxdecoder", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

from tests.runs import tiny_run  # noqa: E402, F401
