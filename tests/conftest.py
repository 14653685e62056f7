"""Settings of the whole test run: annotations are checked, plots need no screen."""

import atexit
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

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

# Most of the time goes into compiling programs that then run for milliseconds: LLVM is to be quick,
# and XLA is to fuse operations without MLIR's detour, where it can (jax 0.10; later it cannot).
# What a test asks of XLA itself, such as how much memory a program takes, does not depend on it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1",
)

# Before anything of the package is imported: shapes and types in its annotations are checked.
# The numeric tower is PEP 484's: an int will do for a float.
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
