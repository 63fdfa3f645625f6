"""Which process this is among how many, from the environment that every launcher sets. No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1  # linux/prctl.h

# What launchers say of a process: its rank, how many there are, and both on its host. The first that says the number decides;
# Slurm's are those of a step, which srun sets: in a batch script itself, SLURM_NTASKS counts processes that are not there.
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),  # DeepSpeed's launch.py
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun
)


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world` in all, `local_rank` of `local_world` on this host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Reads what torchrun, DeepSpeed's launcher, Open MPI or srun say in the environment; else one process."""
        said = [row for row in VARIABLES if os.environ.get(row[1])]
        rows = [row for row in said if row[1] == said[0][1]] or [VARIABLES[0]]
        rank, world, local_rank, local_world = next((row for row in rows if os.environ.get(row[3])), rows[0])
        count = int(os.environ.get(world) or 1)
        here = (os.environ.get(local_world) or str(count)).partition("(")[0].partition(",")[0]  # Slurm: "8(x2)", or "8,7"
        return cls(int(os.environ.get(rank, 0)), count, int(os.environ.get(local_rank, 0)), int(here))

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
