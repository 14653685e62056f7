"""The benchmarks of attention count right, and take part or say why not."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import attention, tune_attention
from jaxdecoder.kernels import flash, hopper, portable, scores, tuning
from jaxdecoder.kernels.hopper.launch import TOTALS, Sizes


def test_a_case_is_measured_or_refused():
    case = attention.Case("window", 1, 64, 2, 16, "float32", False)
    found = attention.measure(case, ["reference", "cudnn"], rounds=2, seconds=0.001)
    assert found["reference"]["error"] < 1e-5
    entries = 64 * 65 / 2
    flops = found["reference"]["tflops"] * 1e12 * found["reference"]["milliseconds"] / 1e3
    np.testing.assert_allclose(flops, 4 * 16 * 2 * entries)
    assert "cannot do this" in found["cudnn"]["cannot"]


def test_by_default_it_asks_what_matters_and_takes_minutes():
    chosen = attention.cases_of(attention.options_of([]), "bfloat16")
    case, names = chosen[0]
    assert (case.mask, case.time, case.width, case.backward) == ("causal", 16384, 128, False)
    assert "cudnn" in names
    assert len(chosen) < 20
    for case, names in chosen:
        # FlexAttention compiles for many seconds, and tells something of sparse masks alone.
        assert ("torch flex" in names) == (case.mask != "causal")
    full = attention.cases_of(attention.options_of(["--full"]), "bfloat16")
    assert len(full) == 96
    assert full[0][1] == list(attention.PARTICIPANTS)
    (only,) = {
        tuple(n)
        for _, n in attention.cases_of(attention.options_of(["--only", "hopper"]), "bfloat16")
    }
    assert only == ("hopper",)


def row(mask, length, backward, **milliseconds):
    results = {name.replace("_", " "): {"milliseconds": ms} for name, ms in milliseconds.items()}
    return {
        "mask": mask,
        "time": length,
        "width": 128,
        "backward": backward,
        "results": {**results, "tokamax": {"cannot": "it is not installed"}},
    }


def test_goals_are_ratios_of_the_best_of_our_kernels():
    rows = [
        row("causal", 16384, False, hopper=2.0, portable=4.0, cudnn=1.0, chunked=0.1),
        row("window", 32768, True, hopper=3.0, portable=1.5, torch_flex=3.0),
        row("causal", 32768, True, hopper=12.0),
    ]
    assert attention.goals(rows) == {
        "causal / cudnn, forward, T 16384, width 128": 0.5,
        "window / torch flex, forward+backward, T 32768, width 128": 2.0,
        "window / our dense causal, forward+backward, T 32768, width 128": 8.0,
    }


def test_no_case_begins_after_the_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention, "measure", None)
    attention.main(["--quick", "--minutes", "0", "--full", "--out", str(tmp_path / "speed")])
    assert "the minutes are over" in capsys.readouterr().out


TINY = (
    *("--widths", "16", "--dtypes", "float32", "--time", "384", "--batch", "1"),
    *("--model-width", "16", "--rounds", "1", "--count", "1", "--candidates", "2"),
)


def way(names, monkeypatch, wrong=None, unordered=()):
    """A stand-in for an implementation: a kernel takes as long as its sizes and its name say."""

    def launches(problem, known):
        def right(q, sizes):
            return {"out": known.right["out"] + (sizes == wrong)}

        return dict.fromkeys(names, (right, (known.operands.q,)))

    def compiled(kernel, sizes):
        if sizes == (0, 0):
            raise ValueError("too large")
        return tune_attention.Call(sizes, kernel[0](*kernel[1], sizes=sizes))

    monkeypatch.setattr(tune_attention, "compiled", compiled)
    monkeypatch.setattr(tune_attention, "timed", lambda run, count: run[0])
    return tune_attention.Tuned(
        lambda *_: [(2, 1), (1, 5), (0, 0)],
        launches,
        tune_attention.KINDS,
        (tuple(names),),
        unordered,
    )


def test_tuning_writes_a_file_that_is_not_there_and_only_whole_rows(tmp_path, monkeypatch):
    out = tmp_path / "tuned.json"
    made = way(portable.KERNELS, monkeypatch)
    monkeypatch.setattr(tune_attention, "IMPLEMENTATIONS", {"portable": made})
    options = tune_attention.options_of([*TINY, "--out", str(out), "--candidates", "3"])
    search = tune_attention.search(options)
    next(search), next(search), next(search)
    assert not out.exists()  # the last kernel of the row is told of before it is written
    assert next(search).key.mask == "partial"
    (key,) = written = tuning.table(out)
    assert key.mask == "full"
    assert written[key] == {name: [1, 5] for name in portable.KERNELS}
    search.close()


def test_what_computes_something_else_is_passed_over(monkeypatch, capsys):
    made = way(["forward"], monkeypatch, wrong=(1, 5))
    problem, known = tune_attention.problem_of(
        tune_attention.KINDS["full"], (1, 8, 1, 16), "float32"
    )
    kernel = made.kernels(problem, known)["forward"]
    found = tune_attention.fastest(kernel, made.candidates(), known.right, 1, 1)
    assert found == ((2, 1), 2000.0)
    said = capsys.readouterr().out
    assert "(1, 5): wrong values" in said
    assert "(0, 0): ValueError" in said


def test_the_quickest_way_to_do_it_all_is_taken():
    def found(**milliseconds):
        return {n: tune_attention.Found(None, n, [ms], ms) for n, ms in milliseconds.items()}

    hopper = tune_attention.IMPLEMENTATIONS["hopper"]
    times = found(forward=1, queries=4, kv=6, k=3, v=2, qkv=8)
    chosen = tune_attention.chosen_of(hopper, times, False)
    assert chosen == {"forward": [1], "queries": [4], "k": [3], "v": [2]}
    assert tune_attention.chosen_of(hopper, times, True) == {"forward": [1], "qkv": [8]}
    del times["v"]
    assert tune_attention.chosen_of(hopper, times, False)["kv"] == [6]
    assert tune_attention.chosen_of(hopper, found(forward=1, queries=4), True) is None


@pytest.mark.parametrize("implementation", tune_attention.IMPLEMENTATIONS)
def test_the_kernels_that_are_tuned_compute_what_the_implementation_does(implementation):
    """In each way to do it all, everything that a layer asks for is computed once."""
    how = tune_attention.IMPLEMENTATIONS[implementation]
    problem, known = tune_attention.problem_of(how.kinds["full"], (1, 64, 1, 128), "bfloat16")
    kernels = how.kernels(problem, known)
    for names in (*how.whole, *how.unordered):
        if not set(names) <= kernels.keys():
            assert not TOTALS
            continue
        computed = []
        for name in names:
            function, arguments = kernels[name]
            sizes = how.candidates(name, problem, known.operands)[0]
            shapes = jax.eval_shape(functools.partial(function, sizes=sizes), *arguments)
            computed += shapes
            for array, shape in shapes.items():
                assert shape.shape == known.right[array].shape
                assert shape.dtype == known.right[array].dtype
        assert sorted(computed) == ["k", "out", "q", "v"]


@pytest.mark.parametrize("implementation", tune_attention.IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", tune_attention.KINDS)
def test_kinds_are_what_they_are_called(implementation, kind):
    mask = tune_attention.IMPLEMENTATIONS[implementation].kinds[kind]
    problem, known = tune_attention.problem_of(mask, (1, 2048, 1, 64), "bfloat16")
    assert tuning.key(implementation, problem, known.operands).mask == kind
    if implementation == "hopper":
        assert hopper.is_plain(problem)


def test_tuning_begins_no_kernel_after_the_minutes(tmp_path):
    options = tune_attention.options_of(
        [*TINY, "--minutes", "0", "--out", str(tmp_path / "tuned.json")]
    )
    assert list(tune_attention.search(options)) == []
    assert not options.out.exists()


def test_block_sizes_are_not_tuned_on_a_cpu():
    with pytest.raises(SystemExit, match="are measured on a GPU"):
        tune_attention.main([])


@pytest.mark.parametrize("kind", tune_attention.KINDS)
def test_tuned_sizes_are_found_again(kind, tmp_path, monkeypatch):
    """From the tuner's key, through the file, to the kernel's choice."""
    mask = tune_attention.KINDS[kind]
    problem, known = tune_attention.problem_of(mask, (1, 2048, 1, 32), "float32")
    operands = known.operands
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


def test_tuned_variants_of_hopper_are_found_again_where_they_were_tuned(tmp_path, monkeypatch):
    mask = tune_attention.PLAIN_KINDS["full"]
    problem, known = tune_attention.problem_of(mask, (1, 256, 1, 128), "bfloat16")
    operands = known.operands
    sizes = {"forward": [128, 2, 2, True, "early"], "queries": [64, 2], "kv": [64, 2]}
    tuning.write({tuning.key("hopper", problem, operands): sizes}, tmp_path / "tuned.json")
    written = tuning.table(tmp_path / "tuned.json")
    monkeypatch.setattr(tuning, "table", lambda: written)
    assert hopper.sizes(problem, operands)["forward"] == Sizes(128, 2, 2, True, "early")
    q = operands.q
    scored, _ = flash.state(q, q, q, mask=mask, score=scores.soft_cap(3.0))
    assert hopper.sizes(scored, operands) == hopper.OTHERS[128]


def test_every_row_names_an_implementation():
    assert {key.implementation for key in tuning.table()} <= set(flash.IMPLEMENTATIONS)
