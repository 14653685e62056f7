"""Whether a test run is for a card, and what its processes are told before they load JAX."""

from __future__ import annotations

from _pytest.mark.expression import Expression

# On a CPU most of the time goes into compiling programs that then run for milliseconds: LLVM is to
# be quick, and XLA is to fuse operations without MLIR's detour, where it can (jax 0.10; later it
# cannot). What a test asks of XLA itself, such as how much memory a program takes, does not depend
# on it. On a card kernels compiled so would spill their registers.
FOR_A_CPU = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1",
}
# Other processes may use the card as well.
FOR_A_CARD = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def is_for_a_card(marks: str) -> bool:
    """Whether pytest's `-m` asks for tests that need a GPU, and not for those without a mark."""
    return _selects(marks, "gpu") and not _selects(marks)


def _selects(marks: str, *held: str) -> bool:
    """Whether a test that holds these marks is selected."""
    return not marks or Expression.compile(marks).evaluate(lambda name, **_: name in held)


def settings(marks: str) -> dict[str, str]:
    """Environment variables, where they are not set already."""
    return FOR_A_CARD if is_for_a_card(marks) else FOR_A_CPU


def has_tests_for_it(text: str) -> bool:
    """Whether a test module is to be collected for a card.

    The others may need packages that a machine with a card has not.
    """
    return "pytest.mark.gpu" in text
