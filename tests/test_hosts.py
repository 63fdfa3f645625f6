"""The user's command on several hosts (namespaces with sshd: tests/hosts/hosts), by every road, and what may befall it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import CHECKOUT, TinyData
from jobs import losses
from namespaces import Hosts, do, kill, make_hosts, openmpi, pdsh

STEPS = 60
pytestmark = [pytest.mark.long, pytest.mark.launch]


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
