"""The watchdog with real processes: a worker that hangs, is stopped, is killed, or loses those around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import CHECKOUT, process_environment
from megaspark import rank_logs, watchdogs

WORKER = """
import os, re, signal, subprocess, sys, time
from pathlib import Path
from megaspark.rank_logs import RankLog
from megaspark.ranks import Ranks
from megaspark.watchdogs import Watchdog
log = RankLog(Path(sys.argv[1]), Ranks(3, 4))
dog = Watchdog(log.path, log.name, tick_s=0.1)
dog.at("step 7", float(sys.argv[2]))
exec(sys.argv[3])
"""


def start(folder: Path, limit_s: float, code: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(folder), str(limit_s), code]
    return subprocess.Popen(command, env=process_environment(), cwd=CHECKOUT, start_new_session=True, stderr=subprocess.DEVNULL)


def log(folder: Path) -> str:
    return (folder / "logs" / "rank_00003.txt").read_text()


def says(folder: Path, word: str) -> bool:
    """Whether the log says it, at once or within some seconds: a watchdog outlives its worker by a moment."""
    end = time.monotonic() + 10
    while word not in log(folder) and time.monotonic() < end:
        time.sleep(0.05)
    return word in log(folder)


HANGS = {
    "in Python": "time.sleep(60)",
    "in C with the lock held": "re.match('(a+)+$', 'a' * 40 + 'b')",  # no other thread of Python runs meanwhile
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "deaf to SIGABRT": "import faulthandler; faulthandler.disable(); signal.signal(6, signal.SIG_IGN); time.sleep(60)",
}


@pytest.mark.parametrize("how", HANGS)
def test_worker_that_hangs_leaves_its_stacks_and_is_ended(how: str, tmp_path: Path) -> None:
    """A hang that says nothing costs days; a watchdog that needs the worker's help does not bark."""
    child = start(tmp_path, 0.3, HANGS[how])
    assert child.wait(20) == (-signal.SIGKILL if "deaf" in how else -signal.SIGABRT)
    text = log(tmp_path)
    assert "rank 3 (watchdog): HANGS: silent for 0.3 s in step 7" in text and 'File "<string>"' in text
    assert ("State: T" in text) == (how == "stopped")
    assert "ended by its watchdog in step 7" in text


def test_worker_that_is_only_slow_goes_on(tmp_path: Path) -> None:
    """A run ended for one slow step; and told so, that somebody may raise the limit."""
    child = start(tmp_path, 0.3, "time.sleep(0.5); dog.at('step 8', 0); time.sleep(1.2); dog.dismiss()")
    assert child.wait(20) == 0
    assert "HANGS" in log(tmp_path) and "went on after" in log(tmp_path) and "killed" not in log(tmp_path)


def test_suspended_job_is_not_taken_to_hang(tmp_path: Path) -> None:
    """Slurm suspends a job for hours, Ctrl-Z for a lunch: woken up, it must not be shot."""
    child = start(tmp_path, 0.8, "print('up', file=open(sys.argv[1] + '/up', 'w')); time.sleep(0.5); dog.dismiss()")
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.killpg(child.pid, signal.SIGCONT)
    assert child.wait(20) == 0 and "HANGS" not in log(tmp_path)


def test_killed_worker_has_its_last_word(tmp_path: Path) -> None:
    """The kernel out of memory, or a kill -9: the process itself cannot say it; one that ended by itself has said all."""
    start(tmp_path, 60, "os.kill(os.getpid(), signal.SIGKILL)").wait(20)
    assert says(tmp_path, "rank 3 (watchdog): killed in step 7: by kill -9")
    start(tmp_path / "well", 60, "dog.dismiss()").wait(20)
    time.sleep(0.5)
    assert log(tmp_path / "well") == ""


def test_worker_whose_launcher_was_killed(tmp_path: Path) -> None:
    """`deepspeed` says 0 when its launch.py was killed: the runner must be ended before it can."""
    code = (
        "from megaspark.ranks import end_with_parent; end_with_parent(); dog.watch('runner', int(sys.argv[4])); "
        "print(end='', file=open(sys.argv[1] + '/up', 'w')); time.sleep(60)"
    )
    runner = subprocess.Popen(["sleep", "60"])
    worker = [sys.executable, "-c", WORKER, str(tmp_path), "60", code, str(runner.pid)]
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({worker})"], env=process_environment(), cwd=CHECKOUT
    )
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # for the watchdog to read whom to watch
    launcher.kill()
    launcher.wait()
    assert runner.wait(10) == -signal.SIGTERM
    assert says(tmp_path, "killed in step 7: its launcher was killed")


OTHERS = {
    "runner": (-signal.SIGTERM, "told to save and stop: the deepspeed command that started it has ended"),
    "sibling": (-signal.SIGABRT, "another process of this host has ended"),
}


@pytest.mark.parametrize("when", ["while it is watched", "before"])
@pytest.mark.parametrize("kind", OTHERS)
def test_worker_that_loses_those_around_it(kind: str, when: str, tmp_path: Path) -> None:
    """Workers that train on after `deepspeed` was killed; or wait for ten minutes for one that is dead."""
    status, word = OTHERS[kind]
    wait = "other.wait(); " if when == "before" else ""
    code = f"other = subprocess.Popen(['sleep', '0.3']); {wait}dog.watch('{kind}', other.pid); time.sleep(60)"
    assert start(tmp_path, 60, code).wait(20) == status
    assert says(tmp_path, word)


def test_stopped_watchdog_does_not_stop_the_worker(tmp_path: Path) -> None:
    """A pipe that nobody reads fills up after some thousand steps, and the worker would wait for ever."""
    code = "dog._process.send_signal(19); [dog.at(f'step {i}', 0) for i in range(20000)]; dog._process.kill()"
    assert start(tmp_path, 60, code).wait(20) == 0


def test_one_signal_for_stacks() -> None:
    """The log catches the signal that the watchdog sends: another would end the worker without any stack."""
    assert rank_logs.STACKS is watchdogs.STACKS
