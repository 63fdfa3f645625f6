"""A small process beside each worker that sees what the worker cannot: that it hangs, that its launcher, or its neighbour, is gone.

The worker says over a pipe where it is and how long that may take. The watchdog
- writes the stacks of a worker that has been silent for longer into its log, twice, and ends it (SIGABRT, else SIGKILL),
- tells a worker to save and stop (SIGTERM) when the `deepspeed` command that started it, or whoever reads its output, is gone,
- ends a worker that is silent after another process of its host has ended in mid-run (NCCL would wait on for ten minutes),
- lets `deepspeed` fail when launch.py was killed, which it takes for success,
- writes the last word of a worker that was killed and could not.

A thread would see none of this while the worker holds Python's lock in C, or is stopped. The process runs this file alone, with
the standard library only: `python -I -S watchdogs.py PID PARENT LOG NAME TICK_S`, the pipe as its standard input.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

TICK_S = 1.0
GRACE_TICKS = 5  # between the two looks at a silent worker's stacks: one that was only slow goes on in it
DYING_TOGETHER_MS = 200
DEATH_TICKS = 3  # what a worker gets to end by itself before it is killed
STACKS = signal.SIGQUIT  # has a worker write the stacks of all its threads into its log; it goes on


class Watchdog:
    """The worker's end: starts the watchdog of this process and keeps it quiet."""

    def __init__(self, log: Path, name: str, tick_s: float = TICK_S) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(os.getppid()), str(log), name, str(tick_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
        assert self._process.stdin
        self._pipe = self._process.stdin
        os.set_blocking(self._pipe.fileno(), False)  # never wait for one that was stopped

    def at(self, place: str, limit_s: float) -> None:
        """Says where the worker is ("step 12") and how many seconds it may stay silent there; 0: for ever."""
        self._send(f"at {limit_s} {place}")

    def watch(self, kind: str, pid: int) -> None:
        """Has it watch a further process: the "runner" that started everything, or a "sibling" on this host."""
        self._send(f"{kind} {pid}")

    def dismiss(self) -> None:
        """The worker ends, and has said why."""
        self._send("done")

    def _send(self, text: str) -> None:
        with suppress(OSError):  # it was killed; nothing that it would do is needed to train
            self._pipe.write(f"{text}\n".encode())


class _Watch:
    """The watchdog's end: everything that it knows of its worker."""

    def __init__(self, worker: int, parent: int, log: str, name: str, tick_s: float) -> None:
        self.tick_s = tick_s
        self.worker, self.name, self.log = worker, name, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.worker_fd = _open(worker)
        self.place, self.limit_s, self.silent_ticks = "its start", 0.0, 0
        self.unread, self.mourned_ticks, self.told_to_stop = b"", 0, False
        self.launcher_gone = False
        self.others: dict[int, str] = {}  # by pidfd: what it is to the worker
        self.poll = select.poll()
        self.poll.register(0, select.POLLIN)
        self.poll.register(1, 0)  # nothing but that its other end was closed
        self._add("launcher", parent)

    def run(self) -> None:
        """Until the worker has ended."""
        while True:
            events = dict(self.poll.poll(self.tick_s * 1000))
            if events.get(1, 0) & (select.POLLERR | select.POLLHUP):
                self.poll.unregister(1)
                self._tell_to_stop("nobody reads its output any more")
            for fd in self.others.keys() & events.keys():
                self._gone(fd)
            if 0 in events and not self._read():
                return
            if not events:
                self._tick()

    def _read(self) -> bool:
        """Takes in what the worker says; False when there is no more to come."""
        text = os.read(0, 65536)
        if not text:
            self.poll.unregister(0)
            for fd in self.others.keys() & dict(self.poll.poll(DYING_TOGETHER_MS)).keys():  # whose end was the other's?
                self._gone(fd)
            why = "its launcher was killed" if self.launcher_gone else "by kill -9, or the kernel had no memory left"
            self._say(f"killed in {self.place}: {why}")
            return False
        *lines, self.unread = (self.unread + text).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "done":
                return False
            if word == "at":
                limit, _, self.place = rest.partition(" ")
                if self.silent_ticks * self.tick_s >= self.limit_s > 0:
                    self._say(f"went on after {self.silent_ticks * self.tick_s:g} s: run.hang_after_s is short for this run")
                self.limit_s, self.silent_ticks, self.mourned_ticks = float(limit), 0, min(1, self.mourned_ticks)
            else:
                self._add(word, int(rest))
        return True

    def _tick(self) -> None:
        # Seconds are counted, not read off a clock: a job that is suspended as a whole (by Slurm, by Ctrl-Z) must not be found
        # hanging when it wakes up.
        self.silent_ticks += 1
        if self.mourned_ticks and self.limit_s:
            self.mourned_ticks += 1
            if self.mourned_ticks > GRACE_TICKS:
                self._end("another process of this host has ended")
        silent_s = self.silent_ticks * self.tick_s
        if 0 < self.limit_s <= silent_s < self.limit_s + self.tick_s:
            self._say(f"HANGS: silent for {self.limit_s:g} s in {self.place}, {self._state()}; its stacks follow")
            self._signal(STACKS)
        if 0 < self.limit_s <= silent_s - GRACE_TICKS * self.tick_s:
            self._end(f"silent for {silent_s:g} s")

    def _gone(self, fd: int) -> None:
        """A process that was watched has ended."""
        self.poll.unregister(fd)
        self._lost(self.others.pop(fd))
        os.close(fd)

    def _lost(self, kind: str) -> None:
        if kind == "sibling":
            self.mourned_ticks = max(1, self.mourned_ticks)
        elif kind == "runner":
            self._tell_to_stop("the deepspeed command that started it has ended")
        elif kind == "launcher":
            # launch.py was killed, and the worker with it (PR_SET_PDEATHSIG). The runner, which is on its way out now, would
            # say 0, as if all had gone well.
            self.launcher_gone = True
            for other, what in self.others.items():
                if what == "runner":
                    _send_signal(other, signal.SIGTERM)

    def _add(self, kind: str, pid: int) -> None:
        if (fd := _open(pid)) >= 0:
            self.others[fd] = kind
            self.poll.register(fd, select.POLLIN)
        elif kind != "launcher":  # of a container's first process the parent is not to be seen
            self._lost(kind)

    def _tell_to_stop(self, why: str) -> None:
        if not self.told_to_stop:
            self.told_to_stop = True
            self._say(f"is told to save and stop: {why}")
            self._signal(signal.SIGTERM)

    def _end(self, why: str) -> None:
        """Ends the worker: its stacks once more and SIGABRT, which a launcher shows as such; no gigabytes of core file."""
        self._say(f"ended by its watchdog in {self.place}: {why}")
        hard = resource.prlimit(self.worker, resource.RLIMIT_CORE)[1]
        resource.prlimit(self.worker, resource.RLIMIT_CORE, (0, hard))
        self._signal(signal.SIGABRT)
        self._signal(signal.SIGCONT)  # one that was stopped tells its stacks now, and ends
        gone = select.poll()
        gone.register(self.worker_fd, select.POLLIN)
        if not gone.poll(DEATH_TICKS * self.tick_s * 1000):
            self._signal(signal.SIGKILL)
        os._exit(0)

    def _state(self) -> str:
        """What the kernel says that the worker does."""
        try:
            with open(f"/proc/{self.worker}/status") as file:
                return next(line.strip().replace("\t", " ") for line in file if line.startswith("State:"))
        except (OSError, StopIteration):
            return "State: unknown"

    def _signal(self, number: int) -> None:
        _send_signal(self.worker_fd, number)

    def _say(self, text: str) -> None:
        with suppress(OSError):
            os.write(self.log, f"{datetime.now().isoformat(' ', 'milliseconds')} {self.name} (watchdog): {text}\n".encode())


def _open(pid: int) -> int:
    """A handle on a process that stays its own when the number is used again; -1 if it has ended."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _send_signal(fd: int, number: int) -> None:
    with suppress(OSError):  # it has ended
        signal.pidfd_send_signal(fd, number)


def main(argv: list[str]) -> None:
    """The watchdog process: `PID PARENT LOG NAME TICK_S`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)  # what ends the worker ends us, by the pipe
    _Watch(int(argv[0]), int(argv[1]), argv[2], argv[3], float(argv[4])).run()


if __name__ == "__main__":
    main(sys.argv[1:])
