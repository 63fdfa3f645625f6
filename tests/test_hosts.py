"""The user's command on several hosts (namespaces with sshd: tests/hosts/hosts), by every road, and what may befall it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from conftest import CHECKOUT, TinyData, tiny_run
from jobs import Job, losses

HOSTS = CHECKOUT / "tests" / "hosts" / "hosts"
TOOLS = ("ip", "sshd", "pdsh", "nsenter", "unshare", "setpriv")
STEPS = 60
pytestmark = [pytest.mark.long, pytest.mark.launch]


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
        for hosts in range(1, count + 1):
            (self.home / f"hosts{hosts}").write_text("".join(f"h{i + 1} slots=1\n" for i in range(hosts)))
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
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    allowed = not missing and subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True)
    if missing or (allowed and allowed.returncode) or os.geteuid():
        pytest.skip(f"needs root, the right to make namespaces, and {', '.join(missing) or 'nothing more'}")
    folder.chmod(0o755)
    try:
        yield Hosts(folder, count, data)
    finally:
        subprocess.run([HOSTS, "down", folder], check=True)


@pytest.fixture(scope="module")
def two(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    yield from make_hosts(tmp_path_factory.mktemp("two"), 2, tiny_data)


@pytest.fixture(scope="module")
def four(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    yield from make_hosts(tmp_path_factory.mktemp("four"), 4, tiny_data)


COMMON = [f"run.steps={STEPS}", "run.save_every=10", "run.hang_after_s=8"]


@pytest.fixture(scope="module")
def undisturbed(two: Hosts) -> dict[int, float]:
    """The losses of a run on both hosts that nothing happened to."""
    job = two.start(pdsh(2), "whole", *COMMON)
    assert job.ends_within(240) == 0, job.told()
    assert len(losses(job.run)) == STEPS
    return losses(job.run)


def pdsh(hosts: int) -> list[str]:
    return ["deepspeed", "--hostfile", f"/opt/home/hosts{hosts}"]


def openmpi(hosts: int) -> list[str]:
    return [*pdsh(hosts), "--launcher", "openmpi"]


# ---- every road


@pytest.mark.parametrize("launcher", [pdsh, openmpi])
def test_installed_without_a_checkout(
    launcher: Callable[[int], list[str]], two: Hosts, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    """What an installed user has: no checkout in sight, started as a module from the home folder."""
    for name in ("megaspark", "kernels", "data_prep", "tools", "ds_configs"):  # a copy: building leaves things in the sources
        shutil.copytree(CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tmp_path)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--upgrade", "--target", str(two.home / "site"), str(tmp_path)], check=True)
    two.own()
    job = two.start(launcher(2), f"installed-{launcher.__name__}", *COMMON, site="/opt/home/site")
    assert job.ends_within(240) == 0, job.told()
    assert losses(job.run) == undisturbed


def test_openmpi_by_path(two: Hosts, undisturbed: dict[int, float]) -> None:
    """mpirun starts the workers itself and says nothing of where the first one is; each would train alone."""
    job = two.start(openmpi(2), "by-openmpi", *COMMON)
    assert job.ends_within(240) == 0, job.told()
    assert losses(job.run) == undisturbed


def test_hostfile_of_one_host(two: Hosts, undisturbed: dict[int, float]) -> None:
    """DeepSpeed then leaves pdsh out, but not the address that it found by ssh."""
    job = two.start(pdsh(1), "single", "run.steps=3")
    assert job.ends_within(120) == 0, job.told()
    alone = losses(job.run)
    assert all(abs(alone[step] - undisturbed[step]) < 1e-5 * abs(alone[step]) for step in (1, 2)) and len(alone) == 3


def test_started_by_hand_on_each_host(two: Hosts, undisturbed: dict[int, float]) -> None:
    """Where there is no ssh between hosts: --no_ssh --node_rank on each."""
    jobs = []
    for host in (1, 2):
        by_hand = [*pdsh(2), "--no_ssh", "--node_rank", str(host - 1), "--master_addr", "h1"]
        jobs.append(two.start(by_hand, "by-hand", *COMMON, on=host))
    assert [job.ends_within(240) for job in jobs] == [0, 0], jobs[0].told()
    assert losses(jobs[0].run) == undisturbed


@pytest.mark.parametrize("launcher", [pdsh, openmpi])
def test_four_hosts(four: Hosts, launcher: Callable[[int], list[str]]) -> None:
    """More hosts than fit into one exchange between two: the interface, the ranks, the end of all four."""
    name = f"four-{launcher.__name__}"
    job = four.start(launcher(4), name, "run.steps=6", "run.global_batch=8", "deepspeed=zero3.json")
    assert job.ends_within(400) == 0, job.told()
    assert len(losses(job.run)) == 6 and "as pid" in job.logs() and all(f"on h{i}" in job.logs() for i in (1, 2, 3, 4))


def test_loopback_as_meeting_place_is_refused(two: Hosts) -> None:
    """h1 calls itself localhost: rank 1 waits for rank 0 on its own host, for half an hour."""
    job = two.start([*pdsh(2), "--master_addr", "127.0.0.1"], "loopback", "run.steps=2")
    assert job.ends_within(120) != 0
    assert "MASTER_ADDR = 127.0.0.1" in job.told() and not job.run.exists()


# ---- faults


def kill(number: signal.Signals, whom: str) -> Callable[[Hosts, Job], None]:
    """A signal to `deepspeed` or mpirun (both on h1), or to launch.py or the worker of h2."""
    host, words = {
        "deepspeed": (1, ["/opt/venv/bin/python", "/opt/venv/bin/deepspeed"]),
        "mpirun": (1, ["prterun"]),  # what Open MPI 5's turns itself into
        "launch.py": (2, ["/opt/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch"]),
        "worker": (2, ["/opt/venv/bin/python", "-u", "megaspark/pretrain.py"]),
    }[whom]

    def harm(hosts: Hosts, job: Job) -> None:
        commands = [(process, process.info["cmdline"]) for process in job.processes()]
        found = [process for process, said in commands if said[: len(words)] == words or Path(said[0]).name == words[0]]
        [process] = [process for process in found if hosts.host_of(process) == host]
        process.send_signal(number)

    return harm


def do(verb: str) -> Callable[[Hosts, Job], None]:
    return lambda hosts, job: hosts.do(verb, 2)


DRILLS = {
    "kill -9 of a worker": (kill(signal.SIGKILL, "worker"), "killed in step"),
    "kill -9 of launch.py": (kill(signal.SIGKILL, "launch.py"), "its launcher was killed"),
    "kill -9 of mpirun": (kill(signal.SIGKILL, "mpirun"), "its launcher was killed"),
    "kill -9 of deepspeed": (kill(signal.SIGKILL, "deepspeed"), "stopped at step"),
    "SIGTERM to deepspeed": (kill(signal.SIGTERM, "deepspeed"), "stopped at step"),
    "SIGINT to deepspeed": (kill(signal.SIGINT, "deepspeed"), "stopped at step"),
    "a rank stopped": (kill(signal.SIGSTOP, "worker"), "State: T (stopped)"),
    "cable cut": (do("cut"), "HANGS"),
    "host lost": (do("lose"), "HANGS"),
}


@pytest.mark.parametrize("launcher", [pdsh, openmpi])
@pytest.mark.parametrize("drill", DRILLS)
def test_fault_on_two_hosts_leaves_nothing_behind_and_the_run_goes_on(
    drill: str, launcher: Callable[[int], list[str]], two: Hosts, undisturbed: dict[int, float]
) -> None:
    """Workers that train, or wait, on a host that nobody looks at; a `deepspeed` that never returns, or returns 0."""
    harm, word = DRILLS[drill]
    if drill.endswith("mpirun" if launcher is pdsh else "launch.py"):
        pytest.skip("not a part of this launcher")
    name = f"{launcher.__name__}-{drill.replace(' ', '-').replace('.', '')}"
    job = two.start(launcher(2), name, *COMMON)
    job.wait_for_step(12)
    harm(two, job)
    try:
        status = job.ends_within(120)
    finally:
        if drill == "cable cut":
            two.do("mend", 2)
        if drill == "host lost":
            two.do("down")
            time.sleep(1)
            two.up()
            two.own()
    print(f"{name}: exit status {status}\n{job.told()}")
    assert word in job.logs() and status != 0
    assert 12 <= max(losses(job.run)) < STEPS, "nothing was tested"
    again = two.start(launcher(2), name, *COMMON)
    assert again.ends_within(240) == 0, again.told()
    assert losses(job.run) == undisturbed
