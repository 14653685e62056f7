"""The benchmarks of attention count right, and take part or say why not."""

import numpy as np
import pytest

from benchmarks import attention, tune_attention
from jaxdecoder.kernels import flash, portable, tuning


def test_a_case_is_measured_or_refused():
    case = attention.Case("window", 1, 64, 2, 16, "float32", False)
    found = attention.measure(case, ["reference", "cudnn"], rounds=2, seconds=0.001)
    assert found["reference"]["error"] < 1e-5
    entries = 64 * 65 / 2
    flops = found["reference"]["tflops"] * 1e12 * found["reference"]["milliseconds"] / 1e3
    np.testing.assert_allclose(flops, 4 * 16 * 2 * entries)
    assert "cannot do this" in found["cudnn"]["cannot"]


def test_block_sizes_are_not_tuned_on_a_cpu():
    with pytest.raises(SystemExit, match="are measured on a GPU"):
        tune_attention.main([])


@pytest.mark.parametrize("kind", tune_attention.KINDS)
def test_tuned_sizes_are_found_again(kind, tmp_path, monkeypatch):
    """From the tuner's key, through the file, to the kernel's choice."""
    problem, operands, _ = tune_attention.problem_of(kind, (1, 2048, 1, 32), "float32")
    key = tuning.key("portable", problem, operands)
    assert (key.mask, key.width) == (kind, 64)
    sizes = dict(
        zip(portable.KERNELS, ([16, 32, 4, 1], [32, 16, 4, 1], [16, 16, 8, 2]), strict=True)
    )
    tuning.write({key: sizes}, tmp_path / "tuned.json")
    written = tuning.table(tmp_path / "tuned.json")
    monkeypatch.setattr(tuning, "table", lambda: written)
    found = portable.sizes(problem, operands)
    assert {name: list(chosen) for name, chosen in found.items()} == sizes


def test_every_row_names_an_implementation():
    assert {key.implementation for key in tuning.table()} <= set(flash.IMPLEMENTATIONS)
