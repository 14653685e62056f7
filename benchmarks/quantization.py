"""What quantizing a trained run costs it: loss and bytes of each format, and of ways to round.

    python -m benchmarks.quantization [runs/stories runs/shakespeare_small] [--quick]

Runs that are not there are trained first, from the config of their name. Losses are over the whole
validation split, in nats a token. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.turns import HERE, describe, trained, write
from jaxdecoder.compression.options import Quantize
from jaxdecoder.compression.quantization import quantize
from jaxdecoder.config import load

GROUPS = {"granularity": "group", "group_size": 64}
WAYS: dict[str, dict[str, Any]] = {
    "int8 tensor": {"granularity": "tensor"},
    "int8 channel": {},
    "int8 channel asymmetric": {"symmetric": False},
    "int8 channel, head too": {"include_head": True},
    "int8 channel, W8A8": {"activations": 8},
    "float8_e4m3fn channel": {"format": "float8_e4m3fn"},
    "float8_e5m2 channel": {"format": "float8_e5m2"},
    "int4 channel": {"bits": 4},
    "int4 groups of 64": {"bits": 4, **GROUPS},
    "int4 groups of 64 asymmetric": {"bits": 4, **GROUPS, "symmetric": False},
    "int4 groups of 64, GPTQ": {"bits": 4, **GROUPS, "method": "gptq"},
    "int4 channel, GPTQ": {"bits": 4, "method": "gptq"},
    "int4 groups of 64, fine-tuned": {"bits": 4, **GROUPS, "fine_tune_steps": 200},
}
QUICK = ("int8 channel", "int8 channel, head too", "int4 groups of 64", "int4 groups of 64, GPTQ")


def measure(run: Path, ways: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Loss and bytes of a run, and of what each way makes of it."""
    results: dict[str, Any] = {}
    for number, (way, changes) in enumerate(ways.items()):
        new = folder / f"{run.name}_{number}"
        told = quantize(Quantize(str(run), str(new), **changes), f"benchmark: {way}")
        before, after = told["compression"]["before"], told["compression"]["at_once"]
        results.setdefault("float32", {"loss": before["validation_loss"], "bytes": before["bytes"]})
        # Packing after fine-tuning has another run before it; all are held against the first.
        results[way] = {
            "loss": told["validation_loss"],
            "difference": told["validation_loss"] - results["float32"]["loss"],
            "bytes": after["bytes"],
            "share": after["bytes"] / before["bytes"],
        }
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| | nats more | bytes | of float32's |", "| --- | --- | --- | --- |"]
    for way, row in results.items():
        if way != "float32":
            lines.append(
                f"| {way} | {row['difference']:+.4f} | {row['bytes']:,} | {row['share']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("runs", nargs="*", default=["runs/stories", "runs/shakespeare_small"])
    options.add_argument("--quick", action="store_true", help="four ways only")
    options.add_argument("--out", type=Path, default=HERE / "results" / "quantization.json")
    chosen = options.parse_args()
    ways = {way: WAYS[way] for way in QUICK} if chosen.quick else WAYS
    described, results = describe(), {}
    with tempfile.TemporaryDirectory() as folder:
        for run in chosen.runs:
            name = Path(run).name
            trained(load(HERE.parent / "configs" / f"{name}.toml", ["--train.out", run]))
            results[name] = measure(Path(run), ways, Path(folder))
    for run, found in results.items():
        print(f"\n{run}: {found['float32']['loss']:.4f} nats a token, as floats")
        print(table(found), flush=True)
    write(chosen.out, {**described, "runs": results})


if __name__ == "__main__":
    main()
