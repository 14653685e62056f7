"""The problems of the part `values`, in order of worth, and the formula's answers in float64.

The answers are those of `tests/attention_reference.py`, which is NumPy and shares no code with the
package; masks are written out a second time here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CAP = 50.0


class Case(NamedTuple):
    """One attention problem."""

    mask: str = "causal"
    width: int = 64
    dtype: str = "bfloat16"
    time: int = 1000
    score: str = "none"
    rate: float = 0.0
    segments: bool = False
    batch: int = 1
    heads: int = 8
    kv_heads: int = 2
    q_time: int | None = None
    """as many queries as keys when left out"""

    def __str__(self) -> str:
        extras = [self.score] if self.score != "none" else []
        extras += [f"dropout {self.rate:g}"] if self.rate else []
        extras += ["segment_ids"] if self.segments else []
        return ", ".join([self.mask, *extras, f"T {self.time}", f"width {self.width}", self.dtype])


CASES = (
    Case(width=128),
    Case(),
    Case("window", batch=2),
    Case("documents", width=128),
    Case("longformer"),
    Case(dtype="float16"),
    Case(width=80),
    Case(width=48),
    Case(width=16),
    Case("future"),
    Case(rate=0.2, batch=2),
    Case(score="alibi"),
    Case(score="cap", width=128),
    Case(segments=True, batch=2),
    Case(width=128, time=4096, heads=4, kv_heads=1),
    Case("documents", 80, "float16", score="alibi_and_cap", rate=0.2, segments=True),
    Case("window", time=4096, heads=4, kv_heads=1),
    Case("future", 128, "float16"),
    Case("longformer", 16, "float16"),
    # Only some implementations know float32.
    Case(dtype="float32"),
    Case("longformer", 128, "float32", score="alibi"),
    Case("documents", 48, "float32", rate=0.2, segments=True),
    Case("future", 16, "float32", score="cap"),
)
# What the kernels are ordered otherwise for.
OF_VARIANTS = (*CASES[:4], Case(width=128, time=4096, heads=4, kv_heads=1))
# A query of each row, to a cache with holes.
CACHE = Case("cache", q_time=1, batch=2)
DECODING = (
    CACHE._replace(time=8192),
    CACHE._replace(time=8192, width=128, score="alibi_and_cap"),
    CACHE._replace(dtype="float16", width=16, kv_heads=8),
    CACHE._replace(dtype="float32"),
)


def quick(case: Case) -> Case:
    """The same kind of case, small."""
    return case._replace(time=min(70, case.time), heads=2, kv_heads=1, width=min(case.width, 32))


def window(time: int) -> int:
    return max(4, time // 5)


GLOBALS = 4


def documents(time: int) -> np.ndarray:
    """Five documents of unequal lengths."""
    return np.searchsorted(np.array([0.11, 0.3, 0.55, 0.61]) * time, np.arange(time))


def allowed(case: Case) -> np.ndarray:
    """Which key each query may see, by the formulas."""
    q, k = np.arange(case.q_time or case.time)[:, None], np.arange(case.time)[None, :]
    if case.mask == "cache":
        return np.random.default_rng(5).random((len(q), case.time)) < 0.8
    ids = documents(case.time)
    near = q - k < window(case.time)
    return {
        "causal": k <= q,
        "window": (k <= q) & near,
        "longformer": (k <= q) & (near | (k < GLOBALS)),
        "documents": (k <= q) & (ids[:, None] == ids[None, :]),
        "future": k > q,
    }[case.mask]


def our_mask(case: Case) -> Any:
    """The same mask as a value of the package."""
    from jaxdecoder.kernels import masks

    near = masks.sliding_window(window(case.time))
    return {
        "causal": masks.causal(),
        "window": masks.causal() & near,
        "longformer": masks.causal() & (near | masks.first(GLOBALS)),
        "documents": masks.causal() & masks.documents(documents(case.time)),
        "future": ~masks.causal(),
    }[case.mask]


def our_score(case: Case, slopes: Any) -> Any:
    """The score function as a value of the package."""
    from jaxdecoder.kernels import scores

    return {
        "none": lambda: None,
        "alibi": lambda: scores.alibi(slopes, learned=True),
        "cap": lambda: scores.soft_cap(CAP),
        "alibi_and_cap": lambda: scores.compose(
            scores.alibi(slopes, learned=True), scores.soft_cap(CAP)
        ),
    }[case.score]()


class Made(NamedTuple):
    """A case's arrays, as they are once rounded to its type."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    slopes: np.ndarray
    """float32 (heads,), of ALiBi where there is any"""
    segments: np.ndarray | None
    """int32 (batch, time)"""


def make(case: Case) -> Made:
    import jax.numpy as jnp

    random = np.random.default_rng(3)
    q_shape = (case.batch, case.q_time or case.time, case.heads, case.width)
    k_shape = (case.batch, case.time, case.kv_heads, case.width)
    # Scores of a trained model's size, so that the softmax and the cap have something to do.
    q, k, v, dout = (
        factor * random.standard_normal(shape, np.float32)
        for factor, shape in zip((3, 1, 1, 1), (q_shape, k_shape, k_shape, q_shape), strict=True)
    )
    rounded = (np.asarray(jnp.asarray(x, case.dtype)) for x in (q, k, v, dout))
    slopes = np.float32(np.exp2(-1 - np.arange(case.heads) % 8))
    ids = np.sort(random.integers(0, 4, (case.batch, case.time)), axis=1).astype(np.int32)
    return Made(*rounded, slopes, ids if case.segments else None)


DROPOUT_SEED = 11


def expected(case: Case, made: Made) -> dict[str, np.ndarray]:
    """The output and the gradients, by name, in float64; decoding has no gradients."""
    naive = formula()
    score = {
        "none": naive.NO_SCORE,
        "alibi": naive.ALIBI,
        "cap": naive.capped(naive.NO_SCORE, CAP),
        "alibi_and_cap": naive.capped(naive.ALIBI, CAP),
    }[case.score]
    out, gradients = naive.attention(
        *made[:3],
        allowed(case),
        scale=case.width**-0.5,
        score=score,
        operands=[made.slopes] if "alibi" in case.score else [],
        rate=case.rate,
        seed=DROPOUT_SEED,
        segments=None if made.segments is None else (made.segments, made.segments),
        dout=made.dout,
    )
    found = {"out": out, "dq": gradients["q"], "dk": gradients["k"], "dv": gradients["v"]}
    if gradients["score"]:
        (found["dscore"],) = gradients["score"]
    return {"out": out} if case.mask == "cache" else found


def formula() -> Any:
    """The module `tests/attention_reference.py`, wherever this was started from."""
    path = Path(__file__).resolve().parents[2] / "tests" / "attention_reference.py"
    spec = importlib.util.spec_from_file_location("attention_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
