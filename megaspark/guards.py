"""What stands around a run's loop: its log, its watchdog, the signals that it obeys, and the lock on its folder."""

from __future__ import annotations

import errno
import fcntl
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from megaspark import __version__, launchers
from megaspark.errors import UserError
from megaspark.rank_logs import RankLog, pid_and_host
from megaspark.ranks import Ranks, end_with_parent
from megaspark.signals import Requests
from megaspark.watchdogs import Watchdog

SLOW = 4  # a start, the first step (it compiles), an evaluation and a save may last so many times as long as a step
CLAIM_WAIT_S = 120.0  # a run that was told to stop saves first; NFS frees a lost host's locks after 90 s

_claims: dict[Path, IO[bytes]] = {}


class Guard:
    """Watches over this process of a run from its start to its end: `with Guard(...) as guard`, then `guard.at(place)`.

    hang_after_s: the longest that a step may take; 0: no limit.
    """

    def __init__(self, folder: Path, ranks: Ranks, hang_after_s: float) -> None:
        self.ranks, self.hang_after_s, self.place = ranks, hang_after_s, "its start"
        self.log = RankLog(folder, ranks)
        self.log.say(f"starts, {ranks.rank + 1} of {ranks.world}, as {pid_and_host()}, megaspark {__version__}")
        self.requests = Requests(self.log.say)
        self._watchdog = Watchdog(self.log.path, self.log.name)
        self._met_siblings = ranks.local_world == 1
        self.at(self.place, slow=True)
        if (runner := launchers.runner()) is not None:
            self._watchdog.watch("runner", runner)
            end_with_parent()  # launch.py; of a process alone it may be a shell, which it outlives

    def at(self, place: str, slow: bool = False) -> None:
        """Says what this process does from now on, and whether that may last longer than a step."""
        self.place = place
        self._watchdog.at(place, self.hang_after_s * (SLOW if slow else 1))
        if not slow and not self._met_siblings:  # after a first step all are there
            self._met_siblings = True
            for pid in launchers.siblings():
                self._watchdog.watch("sibling", pid)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.log.say_traceback(self.place)
        self._watchdog.dismiss()


def claim(run: Path, wait_s: float = CLAIM_WAIT_S) -> None:
    """Takes a run folder, if it exists, for this process until it ends; raises UserError if another still has it after `wait_s`.

    The lock is on the folder's config.yaml, so that looking into a folder leaves nothing in it.
    """
    path = run / "config.yaml"
    if path in _claims or not path.exists():
        return
    file = path.open("r+b")  # NFS gives the lock to writers only
    end, said = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                print(f"{path} cannot be locked ({error}): make sure that only one run writes into {run}", file=sys.stderr)
            elif time.monotonic() < end:
                if not said:
                    print(f"{run} is in use by a run that has not ended yet: waiting up to {wait_s:g} s for it", flush=True)
                said = True
                time.sleep(0.2)
                continue
            else:
                raise UserError(f"{run} is in use by another run (its logs/ say on which host); choose another run.name") from None
        _claims[path] = file
        return
