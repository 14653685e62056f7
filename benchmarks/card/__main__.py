"""Examines a card: right values, speed of training, attention and decoding, the best block sizes.

    python -m benchmarks.card [--minutes 8] [--out runs/card] [--parts values training ...]
    python -m benchmarks.card --quick       # every part at tiny sizes, on a CPU too

The parts run in order of worth, each in a process of its own and for its share of the minutes; what
one leaves goes to the next. Each writes its report and its log to the folder as it goes, and
`card.md` there is the whole in tables. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks.card.machine import cuda_root
from benchmarks.card.runner import Part, module, run_all, run_part
from benchmarks.turns import HERE

SHARES = {
    "values": 0.2,
    "training": 0.26,
    "attention": 0.2,
    "decoding": 0.1,
    "tuning": 0.1,
    "baby_gpt": 0.14,
}
MACHINE_SECONDS = 60.0


def environment(scratch: str) -> dict[str, str]:
    """That of the parts, which begin with no compiled programs and keep theirs for one another."""
    found = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": f"{scratch}/jax",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        # A part that is killed cannot clear up.
        "TMPDIR": scratch,
        "PYTHONUNBUFFERED": "1",
    }
    if "CUDA_ROOT" not in found and (root := cuda_root()) is not None:
        found["CUDA_ROOT"] = root
    if "CUDA_ROOT" in found:  # Mosaic takes the first ptxas on the PATH
        found["PATH"] = os.pathsep.join([str(Path(found["CUDA_ROOT"]) / "bin"), found["PATH"]])
    here = str(HERE.parent)
    paths = [here, *filter(None, [found.get("PYTHONPATH")])]
    return {**found, "PYTHONPATH": os.pathsep.join(paths)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("runs/card"))
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a look")
    options = parser.parse_args(arguments)
    more = ["--quick"] if options.quick else []
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jaxdecoder-card-") as scratch:
        around = environment(scratch)
        machine = Part("machine", 0.0, module("machine"))
        described = run_part(machine, options.out, MACHINE_SECONDS, more, around)
        print((options.out / "machine.log").read_text(), flush=True)
        parts = [Part(name, SHARES[name], module(name)) for name in options.parts]
        run_all(parts, options.out, options.minutes, more, around, described.report)
    print(f"wrote {options.out / 'card.md'}")


if __name__ == "__main__":
    main()
