"""Settings of the whole test run: annotations are checked, plots need no screen."""

import os

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

os.environ["MPLBACKEND"] = "Agg"

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
