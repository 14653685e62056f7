"""Runs of several processes: any mesh over them, and what becomes of them when one dies."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from jaxdecoder.errors import UserError
from jaxdecoder.training.devices import DEATH, HEARTBEAT_SECONDS, hosts
from tests.runs import script
from tests.test_devices import assert_losses_of_one


def together(count, tiny_run, out, *arguments):
    """Starts so many processes that are one run."""
    config = tiny_run.parent / "tiny.toml"
    return processes_of(count, "train.py", config, "--train.out", out, *arguments)


def processes_of(count, *arguments):
    """Starts so many processes that know of one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        script(
            *arguments,
            wait=False,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(index),
        )
        for index in range(count)
    ]


def finished(processes):
    """What the processes said, once all have ended well."""
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


def mesh(**sizes):
    """The arguments of a mesh, whose other sizes are 1."""
    whole = {"data": 1} | sizes
    return list(itertools.chain(*((f"--mesh.{axis}", str(size)) for axis, size in whole.items())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (2, {"data": 2}),
        (2, {"context": 2}),  # each needs all rows, and half of every row
        (4, {"fsdp": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_several_processes_give_the_losses_of_one(tiny_run, tmp_path, count, sizes):
    said = finished(together(count, tiny_run, tmp_path, *mesh(**sizes)))
    assert f"on {count} cpu devices (" in " ".join(said[0].split())
    assert not any("training tokens" in other for other in said[1:])  # the first speaks for all
    assert_losses_of_one(tmp_path, tiny_run)


ROWS = """
from jaxdecoder.config import Config
from jaxdecoder.config.sections import MeshConfig
from jaxdecoder.training.devices import set_up
from jaxdecoder.training.sharding import batch_sharding, make_mesh, rows_needed
set_up(Config())
for mesh in MeshConfig(), MeshConfig(data=2, context=2), MeshConfig(tensor=2, fsdp=2, data=1):
    rows = rows_needed(batch_sharding(make_mesh(Config(mesh=mesh))), 32)
    print(rows.start, rows.stop)
"""


@pytest.mark.slow
def test_a_process_reads_only_the_rows_that_its_devices_need():
    said = finished(processes_of(4, "-c", ROWS))
    found = [[line for line in each.splitlines() if line[0].isdigit()] for each in said]
    quarters, halves = ("0 8", "8 16", "16 24", "24 32"), ("0 16", "0 16", "16 32", "16 32")
    assert found == [list(each) for each in zip(quarters, halves, halves, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["first", "second"])
def test_when_one_dies_the_other_ends_and_a_relaunch_resumes(tiny_run, tmp_path, victim):
    arguments = ("--train.steps", "24", "--mesh.data", "2")
    processes = together(2, tiny_run, tmp_path, *arguments)
    checkpoint = Path(tmp_path, "checkpoints", "8")
    while not checkpoint.is_dir():
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    said, _ = processes[1 - victim].communicate(timeout=60 + HEARTBEAT_SECONDS)
    assert time.monotonic() - began < 60
    assert processes[1 - victim].returncode != 0
    assert said.endswith(DEATH + "\n")
    assert not Path(tmp_path, "summary.json").exists()
    processes[victim].communicate()
    finished(together(2, tiny_run, tmp_path, *arguments))
    assert_losses_of_one(tmp_path, tiny_run)


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "here:1"}
SAID = {"coordinator_address": "here:1", "num_processes": 4, "process_id": 2}
SRUN = {"SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        (SRUN, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        (ADDRESS | SRUN, {"coordinator_address": "here:1"}),
        (ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}, SAID),
        (ADDRESS | {"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, SAID),
    ],
)
def test_variables_say_whether_there_are_other_processes(environment, told):
    assert hosts(environment) == told


@pytest.mark.parametrize("more", [{}, {"JAX_NUM_PROCESSES": "4"}, {"JAX_PROCESS_ID": "first"}])
def test_an_address_alone_is_refused(more):
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers"):
        hosts(ADDRESS | more)
