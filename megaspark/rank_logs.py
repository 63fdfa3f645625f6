"""What every process of a run says for itself, in one folder: logs/rank_00000.txt, over all its starts.

Few lines, none of them in a step that goes well: where and as what it started, the signals it got, the traceback or the stacks
that it ended with, how it ended. `metrics.jsonl` and the terminal tell of the training.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from megaspark.ranks import Ranks
from megaspark.watchdogs import STACKS

LOGS = "logs"


class RankLog:
    """A process's own log. Stacks are written into it on a crash in C (SIGSEGV, SIGABRT, ...) and on SIGQUIT."""

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self.path = run / LOGS / f"rank_{ranks.rank:05d}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.name = f"rank {ranks.rank}"
        # Held open for ever and unbuffered: written by signal handlers, and by C code when Python cannot run any more.
        self.file = self.path.open("ab", buffering=0)
        faulthandler.enable(self.file)
        faulthandler.register(STACKS, self.file, all_threads=True)
        sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)

    def say(self, text: str) -> None:
        """Writes a line, or several, with the time and the rank in front of the first."""
        with suppress(OSError):  # a full disk: the log is not worth the run
            self.file.write(line(self.name, text))

    def say_traceback(self, where: str) -> None:
        """Writes the exception that is being handled."""
        self.say(f"failed in {where} on {socket.gethostname()}\n{traceback.format_exc().rstrip()}")


def line(name: str, text: str) -> bytes:
    """A line of a log as it is stored."""
    return f"{datetime.now().isoformat(' ', 'milliseconds')} {name}: {text}\n".encode(errors="backslashreplace")


class Steady:
    """A terminal that may go away: what cannot be written any more (the ssh connection broke, the pager was closed) is dropped.

    Otherwise the first step told after it would end the run with BrokenPipeError.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a text stream's."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a text stream's."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def pid_and_host() -> str:
    """This process's name among those of all hosts."""
    return f"pid {os.getpid()} on {socket.gethostname()}"
