"""Ranks: every launcher's environment is read alike, and no process outlives its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import process_environment
from megaspark.ranks import VARIABLES, Ranks, threads_per_process

NAMES = {"OMP_NUM_THREADS", *(name for row in VARIABLES for name in row)}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Ranks(0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Ranks(5, 8, 1, 4)),  # torchrun
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, Ranks(5, 8, 1, 4)),  # deepspeed
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Ranks(1, 2, 1, 2)),  # by hand, on one host
        (
            {f"OMPI_COMM_WORLD_{name}": n for name, n in (("RANK", "3"), ("SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))},
            Ranks(3, 4, 1, 2),
        ),
        (
            {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
            Ranks(9, 16, 1, 8),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0, 1)),  # the batch script itself
        (  # deepspeed --no_ssh in a step of Slurm's: what is nearer counts
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2",
             "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            Ranks(1, 4, 1, 2),
        ),
    ],
)
def test_launchers_variables(monkeypatch, environment, expected):
    """A launcher whose variables are not known makes every process think that it is alone, and write for all."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == expected
    assert Ranks.from_environment().first == (expected.rank == 0)


def test_threads_are_shared_out(monkeypatch):
    """As many threads as cores in each of many processes make a CPU run several times slower."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(Ranks()) == cores
    assert threads_per_process(Ranks(local_world=2)) == max(1, cores // 2)
    assert threads_per_process(Ranks(local_world=10 * cores)) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_process(Ranks(local_world=2)) == 3
    for nonsense in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert threads_per_process(Ranks()) == cores


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
time.sleep(60)
"""
CHILD = """
import os, time
from megaspark.ranks import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_process_ends_with_its_launcher():
    """A launcher killed with -9 leaves workers that hold their GPUs, and nobody knows."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, env=process_environment())
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 5
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    parent.stdout.close()
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which waits for its status to be read, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


REPORT = """
import json, sys
from megaspark.ranks import Ranks
r = Ranks.from_environment()
open(f"{sys.argv[-1]}/{r.rank}", "w").write(json.dumps([r.rank, r.world, r.local_rank, r.local_world]))
"""


@pytest.mark.launch
def test_deepspeeds_own_launcher(launch, tmp_path):
    """What the launcher really sets, not what we believe: `deepspeed --num_gpus 2`."""
    (tmp_path / "report.py").write_text(REPORT)
    launch(2, tmp_path / "report.py", str(tmp_path), by="deepspeed").checked()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[0, 2, 0, 2]", "[1, 2, 1, 2]"]
