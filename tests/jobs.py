"""A run that faults are injected into: started as users do, found process by process, its end awaited, its traces read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from conftest import CHECKOUT, free_port, process_environment

PRETRAIN = CHECKOUT / "megaspark" / "pretrain.py"
BIG = ["model.hidden=512", "model.ffn=4096", "optim.lr=1.0e-4", "optim.min_lr=1.0e-5"]  # 151 MB of state: its write takes a while


class Job:
    """A command that trains into `run`; the processes that belong to it have `mark` in their command lines."""

    def __init__(self, command: Sequence[str], run: Path, mark: str, env: dict[str, str] | None = None) -> None:
        self.run, self.mark = run, mark
        self.output = run.parent.parent / f"{run.name}-output"
        with self.output.open("a") as file:
            self.child = subprocess.Popen(
                command, start_new_session=True, env=env, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                preexec_fn=_hear_signals,
            )  # fmt: skip

    def wait_for_step(self, step: int) -> None:
        """Until that many steps are done."""
        end = time.monotonic() + 180
        while max(losses(self.run), default=0) < step:
            assert self.child.poll() is None and time.monotonic() < end, self.told()
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """All that live of it: the runner, launch.py, the workers, their watchdogs."""
        return [p for p in psutil.process_iter(["cmdline", "status"]) if self._ours(p) and p.pid != os.getpid()]

    def _ours(self, process: psutil.Process) -> bool:
        named = any(self.mark in word for word in process.info["cmdline"] or [])
        return named and process.info["status"] != psutil.STATUS_ZOMBIE

    def launcher(self) -> psutil.Process:
        """launch.py, or the first one of several."""
        return next(p for p in self.processes() if p.info["cmdline"][1:4] == ["-u", "-m", "deepspeed.launcher.launch"])

    def worker(self, rank: int) -> psutil.Process:
        """The worker with that rank."""
        said = ("RANK", "OMPI_COMM_WORLD_RANK")
        return next(p for p in self.processes() if is_worker(p) and str(rank) in map(p.environ().get, said))

    def ends_within(self, seconds: float) -> int:
        """The exit status, once nothing is left; else everything is killed and the test fails."""
        end = time.monotonic() + seconds
        try:
            while self.child.poll() is None or self.processes():
                assert time.monotonic() < end, f"{[p.info['cmdline'] for p in self.processes()]} live on\n{self.told()}"
                time.sleep(0.1)
        finally:
            for process in self.processes():
                process.kill()
        return self.child.wait()

    def logs(self) -> str:
        """What all ranks said, one after the other."""
        return "\n".join(path.read_text() for path in sorted(self.run.glob("logs/*")))

    def told(self) -> str:
        """The end of the output, and the logs of all ranks."""
        return f"{self.output.read_text()[-3000:]}\n{self.logs()}"


def deepspeed_job(folder: Path, config: Path, *overrides: str) -> Job:
    """A 2-process run under `deepspeed`, in a session of its own."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    command += [str(PRETRAIN), "--config", str(config), *overrides]
    return Job(command, folder / "runs" / "tiny", str(folder), process_environment())


def _hear_signals() -> None:
    """What nohup, or a script's &, has a test ignore, the run would ignore too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def is_worker(process: psutil.Process) -> bool:
    """Whether it trains: a Python that runs pretrain.py, neither launch.py nor `deepspeed` nor mpirun."""
    command = process.info["cmdline"]
    return len(command) > 2 and "python" in command[0] and command[1] == "-u" and command[2].endswith("pretrain.py")


def log(run: Path, rank: int) -> str:
    """What a rank said."""
    return (run / "logs" / f"rank_{rank:05d}.txt").read_text()


def losses(run: Path) -> dict[int, float]:
    """Loss by step, as stored; a torn last line is left out."""
    found = {}
    for text in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "split" not in line:
            found[line["step"]] = line["loss"]
    return found
