"""Launchers: the way to the first process is found or refused; elders and siblings are told from strangers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from conftest import CHECKOUT, process_environment
from megaspark.errors import UserError
from megaspark.launchers import INTERFACE, _is_pdsh_of, _is_runner, complete_environment, free_port, interface_towards
from megaspark.ranks import VARIABLES, Ranks

SET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", INTERFACE)


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variable is set, and those that a test sets are gone after it."""
    for name in {*SET, *(name for row in VARIABLES for name in row)}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_one_process_needs_nothing() -> None:
    """Without any launcher a port must be found; two runs on one machine must not meet."""
    complete_environment(Ranks())
    assert [os.environ[name] for name in SET[:4]] == ["0", "1", "0", "127.0.0.1"] and INTERFACE not in os.environ
    with socket.socket() as s:
        s.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    assert free_port() != free_port() or free_port() != free_port()


def test_what_was_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own choice of interface or port overruled: nobody would find out why his cluster does not connect."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "12345")
    monkeypatch.setenv(INTERFACE, "ib7")
    complete_environment(Ranks(1, 2, 1, 2))
    assert [os.environ[name] for name in SET] == ["1", "2", "1", "127.0.0.1", "12345", "ib7"]


def test_interface_is_the_one_that_leads_to_the_first_process() -> None:
    """gloo takes the loopback if the host's name leads there: rank 1 dies, rank 0 waits for half an hour."""
    assert interface_towards("127.0.0.1", several_hosts=False) == "lo"
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert interface_towards(entry.address, several_hosts=False) == name


@pytest.mark.parametrize(
    "address, several, words",
    [("127.0.0.1", True, ["loopback", "--master_addr"]), ("nowhere.invalid", False, ["nowhere.invalid", "--master_addr"])],
)
def test_no_way_to_the_first_process_is_refused(address: str, several: bool, words: list[str]) -> None:
    """Half an hour of silence instead of one line."""
    with pytest.raises(UserError) as error:
        interface_towards(address, several)
    assert all(word in str(error.value) for word in words)


def test_launcher_that_does_not_say_where_the_first_process_is() -> None:
    """srun without MASTER_ADDR: every process would wait at a place of its own."""
    with pytest.raises(UserError, match=r"MASTER_ADDR.*cluster\.md"):
        complete_environment(Ranks(1, 2, 0, 1))


LAUNCH_PY = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=AB=", "--node_rank=0", "--master_port=1"]
PDSH = ["pdsh", "-S", "-w", "h1,h2", "export X=1;", "cd /x;", *LAUNCH_PY]


@pytest.mark.parametrize(
    "command, is_runner",
    [
        (["/v/bin/python3", "/v/bin/deepspeed", "--num_gpus", "2", "train.py"], True),
        (["python", "-m", "deepspeed.launcher.runner", "train.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=X"], False),
        (["python", "-u", "train.py", "--config", "deepspeed"], False),
        (["bash", "-c", "deepspeed train.py"], False),
        ([], False),
    ],
)
def test_the_users_command_is_known(command: list[str], is_runner: bool) -> None:
    """Another process watched in its place: the run would stop when that ends, or not stop at all."""
    assert _is_runner(command) == is_runner


def test_pdsh_of_another_job_is_not_ours() -> None:
    """Two jobs on one head node: the end of one must not stop the other."""
    launch = [*LAUNCH_PY, "x.py"]
    assert _is_pdsh_of(PDSH, launch)
    assert not _is_pdsh_of([*PDSH[:-1], "--master_port=2"], launch)
    assert not _is_pdsh_of(["vim", *PDSH[1:]], launch) and not _is_pdsh_of([], launch)
    assert not _is_pdsh_of(PDSH, ["bash"])


WORKER = """
import json, os, sys
from megaspark.launchers import siblings
print(os.getpid(), flush=True)
sys.stdin.readline()
print(json.dumps(siblings()), flush=True)
sys.stdin.readline()
"""
LAUNCH = """
import subprocess, sys
commands = [["--local_rank=0", "a"], ["--local_rank=1", "a"], ["--local_rank=0", "b"]]
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
children = [subprocess.Popen([sys.executable, "-c", sys.argv[1], *words], **pipes) for words in commands]
told = [child.stdout.readline() for child in children]  # all are there
for child in children:
    print(file=child.stdin)
print(*told, *[child.stdout.readline() for child in children])  # and all are there still
"""


def test_siblings_are_those_of_the_same_launch() -> None:
    """Another run under the same shell taken for a part of ours: its end would end us."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, WORKER], env=process_environment(), cwd=CHECKOUT, capture_output=True, text=True, check=True
    )  # fmt: skip
    first, second, _, *found = map(json.loads, done.stdout.split("\n")[:6])
    assert found == [[second], [first], []]
