"""Settings of the whole test run: annotations are checked, plots need no screen."""

import os

os.environ["MPLBACKEND"] = "Agg"

from jaxtyping import install_import_hook

# Before anything of the package is imported: shapes and types in its annotations are checked.
install_import_hook("jaxdecoder", "beartype.beartype")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")
