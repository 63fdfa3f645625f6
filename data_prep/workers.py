"""Runs work units on many processes behind one face: this machine's cores, or all ranks of an MPI job.

Under `mpirun -n N python -m mpi4py.futures -m megaspark prep JOB.yaml` the ranks do the work; everywhere else, processes of
this machine, which never outlive the one that started them.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from megaspark.errors import UserError
from megaspark.ranks import end_with_parent

LOCK = ".lock"  # in an output folder, from its first job on

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")

_RANKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by Open MPI's and by MPICH's and Slurm's launchers


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps every other job from writing to the folder `output`; raises UserError where one is at work there already."""
    with open(output / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another job is writing here") from None
        yield


def check_launcher(verb: str) -> None:
    """Raises UserError where an MPI launcher started several jobs that know nothing of each other; `verb`: prep, dedup."""
    ranks = max(int(os.environ.get(name, "1")) for name in _RANKS)
    if ranks > 1 and not _under_mpi():
        raise UserError(
            f"started {ranks} times over by an MPI launcher; to share one job: "
            f"mpirun -n {ranks} python -m mpi4py.futures -m megaspark {verb} JOB.yaml"
        )


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_units(
    function: Callable[[UnitT], ResultT], units: Sequence[UnitT], workers: int, stop: Callable[[], None]
) -> Iterator[ResultT]:
    """Yields function(unit) for all units, in the order in which they finish.

    `function` and its results are pickled. When a unit fails, or the caller gives up, `stop` is called, which should make the
    running units end soon; the rest is not begun, and the error is raised here. A worker that dies is a BrokenExecutor.
    """
    if not _under_mpi() and min(workers, len(units)) <= 1:
        yield from map(function, units)
        return
    executor = _executor(min(workers, len(units)))
    finished = False
    try:
        for future in as_completed([executor.submit(function, unit) for unit in units]):
            yield future.result()
        finished = True
    finally:
        if not finished:
            stop()
        executor.shutdown(wait=True, cancel_futures=not finished)


def _under_mpi() -> bool:
    if "mpi4py" not in sys.modules:
        return False
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_size() > 1


def _executor(workers: int) -> Executor:
    if _under_mpi():
        from mpi4py.futures import MPIPoolExecutor

        return MPIPoolExecutor(main=False)  # the ranks need no copy of the command itself
    # spawn, not fork: the tokenizer libraries hold threads and locks that do not survive a fork.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),))


def _start_worker(parent: int) -> None:
    """Binds a worker's life to its parent's, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    if os.getppid() != parent:  # it died while we started
        os._exit(1)
