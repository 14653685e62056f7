"""Settings of the whole test run: annotations are checked, plots need no screen."""

import atexit
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

os.environ["MPLBACKEND"] = "Agg"

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the scripts that tests start inherit it: what one compiled, no other compiles.
    folder = tempfile.mkdtemp(prefix="jaxdecoder-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

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
