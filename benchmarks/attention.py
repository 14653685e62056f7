"""Attention on a GPU against its peers, in one run on one card: time and TFLOP/s.

    python -m benchmarks.attention [--minutes 3]      # the cases that matter most, in this order
    python -m benchmarks.attention --full [--times 1024 32768] [--widths 64] [--masks causal]
    python -m benchmarks.attention --quick            # small sizes, on a CPU too

All that can do a case take turns, in random data of bfloat16 (float32 on a CPU), and the median
counts. TFLOP/s are those of the allowed entries alone: 4 x width for each forward, and 3.5 times
that with the backward pass. `error` is the relative distance from a float32 reference, forward.
Peers that are not installed are left out: Tokamax, and PyTorch, whose scaled_dot_product_attention
and compiled FlexAttention are used. Writes a table, JSON, with what we aim at as ratios, and, of a
full run, a plot; the full run takes hours.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# JAX and PyTorch share the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention_torch, turns
from benchmarks.attention_torch import GLOBALS, WINDOW, Cannot
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import flash, flash_attention, masks

DOCUMENTS = 8
LARGEST_SCORES = 2**33  # bytes of float32 scores that plain XLA may hold


class Case(NamedTuple):
    """One attention problem."""

    mask: str
    batch: int
    time: int
    heads: int
    width: int
    dtype: str
    backward: bool

    def __str__(self) -> str:
        both = "forward+backward" if self.backward else "forward"
        return f"{self.mask}, {both}, T {self.time}, width {self.width}"


class Made(NamedTuple):
    """A case's arrays: q, k, v and the gradient of the output, (batch, time, heads, width)."""

    arrays: tuple[np.ndarray, ...]
    mask: masks.Mask
    documents: np.ndarray
    """int32 (time,)"""


Run = Callable[[int], Callable[[], np.ndarray]]
"""Computes that many times and waits; what it returns fetches the last output, as float32."""


def documents(time: int) -> np.ndarray:
    """Documents of random lengths, packed."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, time), DOCUMENTS - 1, False))
    return np.searchsorted(cuts, np.arange(time), side="right").astype(np.int32)


MASKS: dict[str, Callable[[int], masks.Mask]] = {
    "causal": lambda time: masks.causal(),
    "window": lambda time: masks.causal() & masks.sliding_window(WINDOW),
    "longformer": lambda time: (
        masks.causal() & (masks.sliding_window(WINDOW) | masks.first(GLOBALS))
    ),
    "documents": lambda time: masks.causal() & masks.documents(documents(time)),
}


def make(case: Case) -> Made:
    """The arrays of a case, of which every implementation gets the same."""
    shape = case.batch, case.time, case.heads, case.width
    return Made(normal(shape), MASKS[case.mask](case.time), documents(case.time))


@functools.lru_cache(maxsize=1)
def normal(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Four arrays of random numbers, which take a while and are the same for every mask."""
    random = np.random.default_rng(1)
    return tuple(random.standard_normal(shape, np.float32) for _ in range(4))


# --- Who takes part ----------------------------------------------------------------------------


def jax_run(case: Case, made: Made, attention: Callable[..., Any]) -> Run:
    """Runs attention(q, k, v), of JAX arrays."""
    *qkv, dout = (jnp.asarray(x, case.dtype) for x in made.arrays)

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(dout)

    function = jax.jit(both if case.backward else lambda q, k, v, _: (attention(q, k, v), ()))
    function = function.lower(*qkv, dout).compile()

    def run(count: int) -> Callable[[], np.ndarray]:
        for _ in range(count):
            out, gradients = function(*qkv, dout)
        jax.block_until_ready((out, gradients))
        return lambda: np.asarray(out, np.float32)

    return run


def ours(implementation: str) -> Callable[[Case, Made], Run]:
    def start(case: Case, made: Made) -> Run:
        def attention(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(q, k, v, mask=made.mask, implementation=implementation)

        scores = 4 * case.batch * case.heads * case.time**2
        if implementation == "reference" and scores > LARGEST_SCORES:
            raise Cannot(f"its scores would take {scores / 2**30:.0f} GiB")
        if implementation == "portable" and jax.default_backend() == "cpu":
            raise Cannot("on a CPU it is only interpreted")
        try:
            return jax_run(case, made, attention)
        except UserError as error:
            raise Cannot(str(error)) from error

    return start


def tokamax(case: Case, made: Made) -> Run:
    try:
        import tokamax as library
    except ImportError as error:
        raise Cannot("it is not installed") from error
    if case.mask not in ("causal", "window"):
        raise Cannot("it has no such mask but as an array")
    window = (WINDOW - 1, 0) if case.mask == "window" else None

    def attention(q: Any, k: Any, v: Any) -> Any:
        return library.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation="mosaic"
        )

    return jax_run(case, made, attention)


PARTICIPANTS: dict[str, Callable[[Case, Made], Run]] = {
    **{name: ours(name) for name in flash.IMPLEMENTATIONS},
    "tokamax": tokamax,
    "torch sdpa": attention_torch.sdpa,
    "torch flex": attention_torch.flex,
}
OURS = [name for name in flash.IMPLEMENTATIONS if name not in ("cudnn", "reference")]
# Who matters, by whether the mask is dense; `chunked` is for CPUs, and FlexAttention for the rest.
RIVALS = {
    True: ["hopper", "portable", "cudnn", "tokamax", "torch sdpa"],
    False: ["hopper", "portable", "cudnn", "torch flex"],
}
# What is asked first: mask, length, width, whether with the backward pass.
FIRST = [
    ("causal", 16384, 128, False),
    ("causal", 16384, 128, True),
    ("window", 32768, 128, True),
    ("causal", 32768, 128, True),
    ("documents", 16384, 128, True),
    ("longformer", 16384, 128, True),
    ("causal", 16384, 64, False),
    ("causal", 16384, 64, True),
    ("window", 32768, 64, True),
    ("causal", 32768, 64, True),
    ("documents", 16384, 64, True),
    ("longformer", 16384, 64, True),
    ("window", 16384, 128, False),
    ("causal", 4096, 128, True),
    ("causal", 1024, 64, True),
]


# --- The measurement ---------------------------------------------------------------------------


def calls(run: Run, seconds: float) -> int:
    """How many calls take about that long."""
    start = time.perf_counter()
    run(1)
    once = time.perf_counter() - start
    return max(1, int(seconds / once))


def timed(run: Run, count: int) -> float:
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


@functools.lru_cache(maxsize=2)
def exact(case: Case) -> np.ndarray:
    """The output in float32. XLA's plain softmax may have no room, but `chunked` is exact too."""
    made = make(case)

    def attention(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q, k, v, mask=made.mask, implementation="chunked")

    with jax.default_matmul_precision("highest"):
        return jax_run(case, made, attention)(1)()


def measure(
    case: Case,
    names: list[str],
    rounds: int,
    seconds: float,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Milliseconds, TFLOP/s and error of each participant, or why there are none.

    `begin` is told of each before it runs for the first time.
    """
    made, expected = make(case), exact(case._replace(dtype="float32", backward=False))
    runs: dict[str, Run] = {}
    results: dict[str, Any] = {}
    for name in names:
        begin(name)
        try:
            run = PARTICIPANTS[name](case, made)
            out = run(2)()
        except Cannot as error:
            results[name] = {"cannot": str(error)}
        except Exception as error:  # a peer's own failure is a result, too
            results[name] = {"cannot": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        else:
            runs[name] = run
            error_size = np.linalg.norm(out - expected) / np.linalg.norm(expected)
            results[name] = {"error": float(error_size)}
    counts = {name: calls(run, seconds) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(timed(run, counts[name]))
    entries = masks.allowed_entries(made.mask, case.time, case.time)
    flops = 4 * case.width * case.heads * case.batch * entries * (3.5 if case.backward else 1)
    for name, times in taken.items():
        median = statistics.median(times)
        spread = (max(times) - min(times)) / median
        results[name] |= {
            "milliseconds": 1e3 * median,
            "spread": spread,
            "tflops": flops / median / 1e12,
        }
    return results


def compared(results: dict[str, Any]) -> str:
    """How much faster the best of our own kernels is than each of the others."""
    rates = {name: found["tflops"] for name, found in results.items() if "tflops" in found}
    best = max((name for name in OURS if name in rates), key=lambda name: rates[name], default="")
    others = [
        f"{rates[best] / rate:.2f} x {name}" for name, rate in rates.items() if name not in OURS
    ]
    return f"  {best}: {', '.join(others)}" if best and others else ""


def table(case: Case, results: dict[str, Any]) -> str:
    lines = [f"{case} (batch {case.batch}, {case.heads} heads, {case.dtype})"]
    for name, found in results.items():
        if "cannot" in found:
            lines.append(f"  {name:12} - {found['cannot'][:100]}")
        else:
            lines.append(
                f"  {name:12} {found['milliseconds']:10.3f} ms {found['tflops']:8.2f} TFLOP/s"
                f"  spread {found['spread']:.0%}  error {found['error']:.1e}"
            )
    return "\n".join(filter(None, [*lines, compared(results)]))


def goals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What we aim at, as far as these rows tell: the rate of the best of our kernels over a peer's.

    Of the window it is the rate of whole rows of queries over our own under the dense causal mask.
    """

    def best(found: dict[str, Any], names: list[str], measure: Callable[..., float]) -> float:
        held = [measure(found[n]) for n in names if "milliseconds" in found.get(n, {})]
        return max(held, default=math.nan)

    def rate(found: dict[str, Any]) -> float:
        return 1 / found["milliseconds"]

    ratios = {}
    ours = [name for name in OURS if name != "chunked"]
    shapes = {(r["mask"], r["time"], r["width"], r["backward"]): r["results"] for r in rows}
    for (mask, length, width, backward), found in shapes.items():
        both = "forward+backward" if backward else "forward"
        peer = "cudnn" if mask == "causal" else "torch flex"
        where = f"{both}, T {length}, width {width}"
        ratios[f"{mask} / {peer}, {where}"] = best(found, ours, rate) / best(found, [peer], rate)
        dense = shapes.get(("causal", length, width, backward))
        if mask == "window" and dense is not None:
            own = best(found, ours, rate) / best(dense, ours, rate)
            ratios[f"window / our dense causal, {where}"] = own
    return {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s over the length: a row of panels for each mask, a line for each participant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = sorted({(row["width"], row["backward"]) for row in rows})
    names = list(dict.fromkeys(row["mask"] for row in rows))
    figure, panels = plt.subplots(
        len(names), len(columns), figsize=(4 * len(columns), 3 * len(names)), squeeze=False
    )
    colours = {name: f"C{i}" for i, name in enumerate(PARTICIPANTS)}
    for line, mask in zip(panels, names, strict=True):
        for panel, (width, backward) in zip(line, columns, strict=True):
            chosen = [
                row
                for row in rows
                if (row["mask"], row["width"], row["backward"]) == (mask, width, backward)
            ]
            for name, colour in colours.items():
                points = [
                    (row["time"], row["results"][name]["tflops"])
                    for row in chosen
                    if "tflops" in row["results"].get(name, {})
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
            both = "forward+backward" if backward else "forward"
            panel.set_title(f"{mask}, width {width}, {both}", fontsize=9)
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.set_xlabel("length")
            panel.set_ylabel("TFLOP/s of allowed entries")
            panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def cases_of(options: argparse.Namespace, dtype: str) -> list[tuple[Case, list[str]]]:
    """The cases, and who takes part in each."""

    def case(mask: str, length: int, width: int, backward: bool) -> Case:
        batch, heads = max(1, options.tokens // length), options.model_width // width
        return Case(mask, batch, length, heads, width, dtype, backward)

    if options.full or options.quick:
        shapes = itertools.product(options.widths, options.masks, (False, True), options.times)
        chosen = [case(mask, time, width, both) for width, mask, both, time in shapes]
        return [(case, options.only or list(PARTICIPANTS)) for case in chosen]
    chosen = [case(*shape) for shape in FIRST]
    return [(case, options.only or RIVALS[case.mask == "causal"]) for case in chosen]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after these")
    parser.add_argument("--full", action="store_true", help="every length, width and mask")
    parser.add_argument("--times", type=int, nargs="+", default=lengths, help="of a full run")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="of a full run")
    parser.add_argument(
        "--masks", nargs="+", choices=MASKS, default=list(MASKS), help="of a full run"
    )
    parser.add_argument("--only", nargs="+", choices=PARTICIPANTS)
    parser.add_argument("--tokens", type=int, default=32768, help="batch x time")
    parser.add_argument("--model-width", type=int, default=2048, help="heads x width")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.03, help="of one turn, about")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.times, options.widths, options.rounds = [512], [64], 3
        options.tokens, options.model_width = 1024, 128
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    started = time.monotonic()
    device = jax.devices()[0]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    report = {
        **turns.machine(),
        "device": device.device_kind,
        "versions": {"jax": jax.__version__, **attention_torch.versions()},
        "rows": [],
        "goals": {},
    }
    print({name: report[name] for name in report if name not in ("rows", "goals")}, flush=True)
    turns.write(options.out.with_suffix(".json"), report)
    for case, names in cases_of(options, dtype):
        if time.monotonic() - started > 60 * options.minutes:
            print("the minutes are over")
            break
        results = measure(case, names, options.rounds, options.seconds)
        print(table(case, results), flush=True)
        report["rows"].append({**case._asdict(), "results": results})
        report["goals"] = goals(report["rows"])
        turns.write(options.out.with_suffix(".json"), report)
    for name, ratio in report["goals"].items():
        print(f"{ratio:6.2f}  {name}")
    if report["rows"] and (options.full or options.quick):
        plot(report["rows"], options.out.with_suffix(".png"))
    print(f"wrote {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
