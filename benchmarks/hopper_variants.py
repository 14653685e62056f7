"""What NVIDIA's assembler makes of every variant of the Hopper kernels; it needs no GPU.

    .venv-cuda/bin/python -m benchmarks.hopper_variants [--widths 64 128]

For each kernel of causal attention, and each way to cut and order it (`hopper.launch.Sizes`):
registers of a thread while it computes, bytes of shared memory of a block, bytes spilled to memory,
instructions in all, and of those the matrix products (HGMMA), the special functions (MUFU) and the
floating-point ones. Instructions of every loop are counted once, however often it runs. A variant
that spills, or whose products are made to wait for one another, is marked. `CUDA_ROOT` chooses the
compilers (`make test-cuda` has two). Writes JSON and a table to benchmarks/results/, by the version
of the assembler.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.kernels import flash, hopper, masks
from jaxdecoder.kernels.hopper.launch import REGISTERS, SHARED_BYTES, Launch, Sizes
from jaxdecoder.kernels.problem import Operands, Problem

HERE = Path(__file__).resolve().parent
TIME, HEADS = 2048, 4
DEEPEST = 4
FLOATING = re.compile(r"\b(FFMA|FMUL|FADD|FMNMX|FSEL|F2FP\S*)\b")
COMPLAINTS = ("C7510", "serializ", "setmaxnreg")


def candidates(kernel: str, problem: Problem, operands: Operands) -> list[Sizes]:
    """Ways to cut and order a kernel, each as deep as its shared memory allows."""
    turns = ("late", "early", "none") if kernel == "forward" else ("late",)
    found = []
    for columns, consumers, rotated, turn in itertools.product(
        (64, 128), REGISTERS, (False, True), turns
    ):
        if kernel == "forward" and consumers > 2 and turn != "none":
            continue  # turns are for two
        if kernel == "qkv" and (consumers > 2 or columns > 64 or operands.q.shape[-1] % 128):
            continue  # each of two has half the width, in whole tiles
        sizes = Sizes(columns, DEEPEST, consumers, rotated, turn)
        while sizes.depth > 1 and shared_bytes(kernel, problem, operands, sizes) > SHARED_BYTES:
            sizes = sizes._replace(depth=sizes.depth - 1)
        if sizes.depth > 1:
            found.append(sizes)
    return found


def shared_bytes(kernel: str, problem: Problem, operands: Operands, sizes: Sizes) -> int:
    """Of a block of a kernel: forward, queries, kv, k or v."""
    launch = Launch(hopper.KERNELS[kernel], problem, operands, sizes, None)
    return launch.shared_bytes()


def call(kernel: str, mask: masks.Mask, sizes: Sizes, q: Any, k: Any, v: Any, dout: Any) -> Any:
    """Runs one kernel on operands, and whatever prepares them."""
    problem, operands = flash.state(q, k, v, mask=mask)
    if kernel == "forward":
        return hopper.forward(problem, operands, chosen=sizes)
    logsumexp = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
    rows = hopper.rows_of_queries(operands, dout, logsumexp, dout)
    if kernel == "queries":
        return hopper.gradient_of_queries(problem, operands, dout, rows, chosen=sizes)
    return hopper.gradient_of_keys(problem, operands, dout, rows, kernel, chosen=sizes)


@dataclasses.dataclass(frozen=True)
class Found:
    """What is said of a kernel."""

    registers: int
    shared_bytes: int
    spilled_bytes: int
    serialized: bool
    instructions: int
    products: int
    special: int
    floating: int


def compiled(kernel: str, width: int, sizes: Sizes) -> tuple[Any, Any, str]:
    """All that was said (`gpu_compile.Record`), of the kernel alone, and its machine code."""
    from gpu_compile import compile_for_h200

    x = jax.ShapeDtypeStruct((1, TIME, HEADS, width), jnp.bfloat16)
    record = compile_for_h200(functools.partial(call, kernel, masks.causal(), sizes), x, x, x, x)
    [report] = {k for k in record.kernels if "mosaic" in k.name}
    code = dict(part.split(",", 1) for part in record.log.split(".section\t.text.")[1:])
    return record, report, code[report.name]


def measure(kernel: str, width: int, sizes: Sizes) -> tuple[Found, frozenset[str]]:
    """It, and the versions of the assembler that was used."""
    record, report, text = compiled(kernel, width, sizes)
    x = jax.ShapeDtypeStruct((1, TIME, HEADS, width), jnp.bfloat16)
    problem, operands = flash.state(x, x, x, mask=masks.causal())
    found = Found(
        registers=REGISTERS[sizes.consumers][1],
        shared_bytes=shared_bytes(kernel, problem, operands, sizes),
        spilled_bytes=report.spill_stores,
        serialized=any(complaint in record.log for complaint in COMPLAINTS),
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", text, re.MULTILINE)),
        products=text.count("HGMMA"),
        special=text.count("MUFU"),
        floating=len(FLOATING.findall(text)),
    )
    return found, record.ptxas


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    ways = [
        f"{row['columns']} columns",
        f"depth {row['depth']}",
        f"{row['consumers']} warpgroups",
        *(["rotated"] if row["rotated"] else []),
        *([f"turns {row['turns']}"] if row["kernel"] == "forward" else []),
    ]
    bad = "serialized" if row["serialized"] else row["spilled_bytes"] or "-"
    numbers = (row[x] for x in ("instructions", "products", "special", "floating"))
    cells = [row["width"], row["kernel"], ", ".join(ways), row["registers"]]
    cells += [f"{row['shared_bytes'] / 1024:.0f}", bad, *numbers]
    return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| width | kernel | variant | registers | shared KiB | spilled bytes | instructions | HGMMA "
    "| MUFU | floating |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main(arguments: list[str] | None = None) -> None:
    """Prints and writes a row for each width, kernel and variant."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    jax.config.update("jax_platforms", "cpu")  # it compiles, and runs nothing
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kernels", nargs="+", choices=hopper.KERNELS, default=[*hopper.KERNELS])
    parser.add_argument("--out", type=Path, default=HERE / "results", help="a folder")
    options = parser.parse_args(arguments)
    from benchmarks.turns import write

    rows, lines, versions = [], [HEADER], set()
    print(HEADER, flush=True)
    for width, kernel in itertools.product(options.widths, options.kernels):
        x = jax.ShapeDtypeStruct((1, TIME, HEADS, width), jnp.bfloat16)
        for sizes in candidates(kernel, *flash.state(x, x, x, mask=masks.causal())):
            found, used = measure(kernel, width, sizes)
            versions |= used
            row = {"width": width, "kernel": kernel, **sizes._asdict()}
            rows.append({**row, **dataclasses.asdict(found)})
            lines.append(line(rows[-1]))
            print(lines[-1], flush=True)
    assembler = " and ".join(sorted(versions))
    about = {"jax": jax.__version__, "ptxas": assembler, "target": "H200"}
    out = options.out / f"hopper_variants_ptxas_{assembler.replace(' ', '_')}"
    write(out.with_name(f"{out.name}.json"), {**about, "rows": rows})
    said = ", ".join(f"{name} {value}" for name, value in about.items())
    out.with_name(f"{out.name}.md").write_text(f"{said}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
