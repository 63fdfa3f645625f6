"""Which process this is among how many, from the environment that every launcher sets. No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world` in all, `local_rank` of `local_world` on this host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (DeepSpeed's launcher: LOCAL_SIZE); else one process."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world
        return cls(int(os.environ.get("RANK", 0)), world, int(os.environ.get("LOCAL_RANK", 0)), int(local_world))

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0


def threads_per_process(ranks: Ranks) -> int:
    """CPU threads that this process may use: its share of the cores this host grants, unless OMP_NUM_THREADS says otherwise."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world)


def end_with_parent() -> None:
    """Asks the kernel to end this process when its parent dies, so that a killed launcher leaves no orphan (Linux)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGKILL)
