"""What a run is told by signals: save and go on, or save and stop. Any process may be told; all of them do it at the same step.

| signal | what it asks |
|---|---|
| SIGTERM, SIGUSR2, SIGHUP | save and stop, exit status 0 |
| SIGINT | save and stop, exit status 130; a second one: stop at once |
| SIGUSR1 | save and go on |

A handler only counts. The counts of all processes are summed together with the loss of the step in which they came
(`Engine.step`), so everybody hears of them at the same step, and it costs no message of its own.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

SAVE = (signal.SIGUSR1,)
STOP = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
AT_ONCE_S = 1.0  # Ctrl-C reaches a process by more than one way; within this time they are one


@dataclass(frozen=True)
class Told:
    """What the processes of a run were asked, summed over all of them: how often to save, to stop, and by Ctrl-C."""

    save: bool = False
    stop: bool = False
    interrupted: bool = False

    @property
    def status(self) -> int:
        """The exit status of a run that stops for it."""
        return INTERRUPTED if self.interrupted else 0


class Requests:
    """Catches the signals from now on; `say` is called with a line about each one.

    A signal that was ignored before (nohup, a shell's background job) stays ignored.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._saves, self._saves_told = 0, 0  # two counters, each written by one side only: no signal is lost in between
        self._stops, self._interrupts = 0, 0
        self._interrupted_at = 0.0
        for number in (*SAVE, *STOP, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def pending(self) -> list[float]:
        """What this process was asked and has not yet passed on: numbers to be summed over all processes, for `heard`."""
        saves = self._saves
        new, self._saves_told = saves - self._saves_told, saves
        return [float(new), float(self._stops), float(self._interrupts)]

    @staticmethod
    def heard(sums: Sequence[float]) -> Told:
        """What the sums of everybody's `pending` ask of everybody."""
        saves, stops, interrupts = sums
        return Told(saves > 0, stops + interrupts > 0, interrupts > 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number in SAVE:
            self._saves += 1
            self._say(f"told to save ({name})")
        elif number in STOP:
            self._stops += 1
            self._say(f"told to save and stop ({name})")
        elif self._interrupts and time.monotonic() > self._interrupted_at + AT_ONCE_S:
            self._say("interrupted again: stopping at once")
            raise KeyboardInterrupt
        elif not self._interrupts:
            self._interrupts, self._interrupted_at = 1, time.monotonic()
            self._say(f"told to save and stop ({name}; once more: at once)")
