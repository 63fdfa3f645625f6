"""What a process must know of who started it: where the first process waits, by which interface, and who its elders are.

`deepspeed` (the runner) starts launch.py on each host, itself or through pdsh, and that starts the workers; mpirun and srun
start them directly. What a launcher leaves unsaid is found out here, or refused in one line. No torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import psutil

from megaspark.errors import UserError
from megaspark.ranks import Ranks

INTERFACE = "GLOO_SOCKET_IFNAME"
RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")  # names of the user's command


def complete_environment(ranks: Ranks) -> None:
    """Sets what torch needs to bring the processes together, where the launcher did not: ranks, the meeting place, the interface.

    Raises UserError where the first process cannot be found.
    """
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(ranks.local_rank))
    if "MASTER_ADDR" not in os.environ:
        place = ("127.0.0.1", free_port()) if ranks.world == 1 else _agree_by_mpi()
        os.environ.update(MASTER_ADDR=place[0], MASTER_PORT=str(place[1]))
    os.environ.setdefault("MASTER_PORT", "29500")
    if ranks.world > 1 and INTERFACE not in os.environ:
        os.environ[INTERFACE] = interface_towards(os.environ["MASTER_ADDR"], several_hosts=ranks.world > ranks.local_world)


def interface_towards(address: str, several_hosts: bool) -> str:
    """The network interface that leads to `address`: left to itself, gloo may take one that the other hosts cannot reach.

    Raises UserError where there is none, or where it is the loopback and the processes are on several hosts.
    """
    here = socket.gethostname()
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: the kernel only picks the route
            own = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"{here} finds no way to MASTER_ADDR = {address} ({error}); give another --master_addr") from None
    if several_hosts and own.startswith(("127.", "::1")):
        raise UserError(
            f"MASTER_ADDR = {address} leads {here} to itself by its loopback, which other hosts cannot reach; give --master_addr, "
            "or repair what `hostname -I` and /etc/hosts say"
        )
    interfaces = psutil.net_if_addrs()
    for name, entries in interfaces.items():
        if any(entry.address.partition("%")[0] == own.partition("%")[0] for entry in entries):
            return name
    raise UserError(f"no interface of {here} has the address {own}; set {INTERFACE} to one of {', '.join(interfaces)}")


@cache
def runner() -> int | None:
    """The pid of the `deepspeed` command that this process was started by, if it runs, or ran at the first call, on this host."""
    try:
        elders = psutil.Process().parents()[:5]
        for elder in elders:
            if _is_runner(elder.cmdline()):
                return elder.pid
        for process in psutil.process_iter(["cmdline"]) if elders else ():
            if _is_pdsh_of(process.info["cmdline"] or [], elders[0].cmdline()):
                parent = process.parent()
                return parent.pid if parent and _is_runner(parent.cmdline()) else None
    except psutil.Error:  # somebody ended meanwhile
        pass
    return None


def siblings() -> list[int]:
    """The pids of the other processes of this launch on this host: those with our parent and our command."""
    parent, ours = os.getppid(), _without_rank(psutil.Process().cmdline())
    return [
        process.pid
        for process in psutil.process_iter(["ppid", "cmdline"])
        if process.info["ppid"] == parent and process.pid != os.getpid() and _without_rank(process.info["cmdline"] or []) == ours
    ]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _agree_by_mpi() -> tuple[str, int]:
    """The first process's address and a free port of it, told to all by MPI."""
    mended = "set MASTER_ADDR and MASTER_PORT (docs/cluster.md says where)"
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        raise UserError(f"the launcher started several processes and does not say where the first one is; {mended}")
    try:
        import mpi4py
    except ImportError:
        raise UserError(f"mpirun does not say where the first process is; pip install mpi4py, or {mended}") from None
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    MPI.Init()
    place = MPI.COMM_WORLD.bcast((_own_address(), free_port()) if MPI.COMM_WORLD.Get_rank() == 0 else None)
    MPI.Finalize()  # now: a process that ends without it fails the whole job
    return place


def _own_address() -> str:
    """This host's address that others most likely reach: the one that its default route would send from, else its first."""
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((anywhere, 9))
                return probe.getsockname()[0]
            except OSError:  # no route
                continue
    entries = [entry for found in psutil.net_if_addrs().values() for entry in found if entry.family == socket.AF_INET]
    return next((entry.address for entry in entries if not entry.address.startswith("127.")), "127.0.0.1")


def _is_runner(command: Sequence[str]) -> bool:
    return any(Path(word).name in RUNNERS for word in command[:4])


def _is_pdsh_of(command: Sequence[str], launcher: Sequence[str]) -> bool:
    """Whether `command` is the pdsh that started the launch.py whose command is `launcher`."""
    ours = [word for word in launcher if word.startswith(("--world_info=", "--master_port="))]
    return bool(command) and Path(command[0]).name == "pdsh" and len(ours) == 2 and all(word in command for word in ours)


def _without_rank(command: Sequence[str]) -> list[str]:
    return [word for word in command if not word.startswith("--local_rank=")]
