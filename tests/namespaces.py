"""Several hosts on this machine, for tests: made of namespaces (tests/hosts/hosts), used as a user uses a cluster, and harmed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import psutil
import pytest

from conftest import CHECKOUT, TinyData, tiny_run
from jobs import Job

HOSTS = CHECKOUT / "tests" / "hosts" / "hosts"
TOOLS = ("ip", "sshd", "pdsh", "nsenter", "unshare", "setpriv")


class Hosts:
    """Some running hosts h1, h2 ...; each can be lost and comes back with all the others."""

    def __init__(self, folder: Path, count: int, data: TinyData) -> None:
        self.folder, self.count = folder, count
        self.home = folder / "home"
        self.up()
        for path in (data.train, data.validation):
            shutil.copytree(path, self.home / path.name)
        config, _ = tiny_run(data, self.home)
        text = config.read_text().replace(str(data.train), "/opt/home/train").replace(str(data.validation), "/opt/home/validation")
        config.write_text(text.replace(str(self.home), "/opt/home"))
        for hosts, slots in product(range(1, count + 1), (1, 2)):
            lines = [f"h{i + 1} slots={slots}\n" for i in range(hosts)]
            (self.home / f"hosts{hosts}x{slots}").write_text("".join(lines))
        self.own()

    def up(self) -> None:
        environment = {**os.environ, "VENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run([HOSTS, "up", self.folder, str(self.count)], check=True, env=environment)

    def own(self) -> None:
        """What this test put into the home belongs to its user."""
        subprocess.run(["chown", "-R", "4242:4242", str(self.home)], check=True)

    def do(self, verb: str, *arguments: object) -> None:
        subprocess.run([HOSTS, verb, self.folder, *map(str, arguments)], check=True)

    def start(self, launcher: list[str], name: str, *overrides: str, on: int = 1, site: str = "") -> Job:
        """The user's command, typed on a host in the checkout, or in the home with the package installed in the folder `site`."""
        what = ["--module", "megaspark.pretrain"] if site else ["megaspark/pretrain.py"]
        places = [f"--chdir=/opt/{'home' if site else 'checkout'}", *([f"PYTHONPATH={site}"] if site else [])]
        command = ["env", *places, "OMP_NUM_THREADS=1", "/opt/venv/bin/python", "/opt/venv/bin/deepspeed", *launcher[1:], *what]
        command += ["--config", "/opt/home/run.yaml", f"run.name={name}", "run.eval_every=0", *overrides]
        return Job([str(HOSTS), "in", str(self.folder), str(on), *command], self.home / "runs" / name, name)

    def host_of(self, process: psutil.Process) -> int:
        """On which host a process runs."""
        inits = [(self.folder / f"host{i + 1}.init").read_text().strip() for i in range(self.count)]
        return 1 + [os.readlink(f"/proc/{init}/ns/pid") for init in inits].index(os.readlink(f"/proc/{process.pid}/ns/pid"))


def make_hosts(folder: Path, count: int, data: TinyData) -> Iterator[Hosts]:
    """For a fixture: running hosts, gone at its end; skips the test, with the reason, where there can be none."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    allowed = not missing and subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True)
    if missing or (allowed and allowed.returncode) or os.geteuid():
        pytest.skip(f"needs root, the right to make namespaces, and {', '.join(missing) or 'nothing more'}")
    folder.chmod(0o755)
    try:
        yield Hosts(folder, count, data)
    finally:
        subprocess.run([HOSTS, "down", folder], check=True)


def pdsh(hosts: int, slots: int = 1) -> list[str]:
    """The user's command up to the script: so many hosts with so many processes each."""
    return ["deepspeed", "--hostfile", f"/opt/home/hosts{hosts}x{slots}"]


def openmpi(hosts: int) -> list[str]:
    """The same by mpirun."""
    return [*pdsh(hosts), "--launcher", "openmpi"]


def kill(number: signal.Signals, whom: str, on: int = 0) -> Callable[[Hosts, Job], None]:
    """A signal to `deepspeed` or mpirun (both on h1), or to launch.py or the only worker of a host (h2, unless said otherwise)."""
    host, words = {
        "deepspeed": (1, ["/opt/venv/bin/python", "/opt/venv/bin/deepspeed"]),
        "mpirun": (1, ["prterun"]),  # what Open MPI 5's turns itself into
        "launch.py": (2, ["/opt/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch"]),
        "worker": (2, ["/opt/venv/bin/python", "-u", "megaspark/pretrain.py"]),
    }[whom]

    def harm(hosts: Hosts, job: Job) -> None:
        commands = [(process, process.info["cmdline"]) for process in job.processes()]
        found = [process for process, said in commands if said[: len(words)] == words or Path(said[0]).name == words[0]]
        [process] = [process for process in found if hosts.host_of(process) == (on or host)]
        process.send_signal(number)

    return harm


def do(verb: str) -> Callable[[Hosts, Job], None]:
    """A verb of tests/hosts/hosts, done to h2."""
    return lambda hosts, job: hosts.do(verb, 2)
