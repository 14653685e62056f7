"""Tiny runs for the tests of training: a corpus on disk, a config, and scripts to train with."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

CONFIG = """
[model]
context_length = 16
d_model = 16
n_layers = 2
n_heads = 2

[data]
source = "text"
path = "{folder}/corpus.txt"
cache = "{folder}/cache"
tokenizer = "byte"

[optimizer]
learning_rate = 1e-2
ema_decay = 0.9

[train]
steps = 24
batch_size = 8
steps_per_call = 4
evaluate_every = 12
evaluation_batches = 2
checkpoint_every = 4
log_every = 1
keep = 4
out = "{folder}/run"
"""


def write_config(folder: Path, text: str | None = None) -> Path:
    """A config for a tiny run in `folder`, and its corpus: counting in words."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = [" ".join(words[int(digit)] for digit in str(n)) for n in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines) if text is None else text)
    path = folder / "tiny.toml"
    path.write_text(CONFIG.format(folder=folder))
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a tiny run with all there is to write down, trained once for all workers.

    It lies beside its config, tiny.toml. Who would change it takes a copy.
    """
    from filelock import FileLock  # which a machine that has a card need not have

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            said = here(
                *("train.py", write_config(folder), "--train.tensorboard"),
                *("--train.sample-every", "12", "--train.sample-prompt", "one "),
            )
            assert said.returncode == 0, said.output
            (folder / "said.txt").write_text(said.output)
    return folder / "run"


class Said(NamedTuple):
    """What came of a script."""

    returncode: int
    output: str


def here(*arguments: object, stdin: str = "") -> Said:
    """Runs one of the scripts in this process, as `script` does in one of its own."""
    name, *_ = command = [str(argument) for argument in arguments]
    output, status = io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", command)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            importlib.import_module(name.removesuffix(".py")).main()
        except SystemExit as end:
            status = int(end.code or 0)
    return Said(status, output.getvalue())


def script(
    *arguments: object, longest_file: int = 0, wait: bool = True, **environment: str
) -> subprocess.Popen[str]:
    """Runs one of the scripts in a process of its own.

    `longest_file` stands in for a full disk: the system refuses to write files of more bytes.
    """
    command = [sys.executable, *map(str, arguments)]
    if longest_file:
        command = ["sh", "-c", f'ulimit -f {longest_file // 512}; exec "$@"', "sh", *command]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | environment,
    )
    if wait:
        # The whole output is read before the process is asked for its status.
        process.output = process.communicate()[0]  # type: ignore[attr-defined]
    return process


def devices(count: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices, and otherwise those of this one."""
    flags = os.environ.get("XLA_FLAGS", "")
    return f"{flags} --xla_force_host_platform_device_count={count}"


def losses(run: Path) -> dict[tuple[int, str], float]:
    """What metrics.jsonl says of losses and gradients, by step and name; times are left out."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        for name in ("train_loss", "validation_loss", "gradient_norm", "learning_rate"):
            if name in metrics:
                found[metrics["step"], name] = metrics[name]
    return found
