"""Where a run's progress is read by people: a line a step, in the run's progress.txt and on stdout.

Where stdout is a terminal the line of the step is rewritten in place, so that what else is said stays in sight.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

PROGRESS = "progress.txt"
SEPARATOR = " | "  # between the parts of a line, the most wanted first
REDRAW_S = 0.1  # quicker, and it could not be read; what comes in between is drawn when the line is left


class Terminal:
    """Lines that stay, and a live one. Whoever else writes to stdout or stderr begins on a line of his own.

    The file gets every line with the time in front, over all starts of a run.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] | None = None
        with suppress(OSError):  # a full disk: the file is not worth the run
            self._file = (folder / PROGRESS).open("ab", buffering=0)
        self._out, self._error = sys.stdout, sys.stderr
        self.live = self._out.isatty()
        self._text, self._stays = "", True
        self._drawn, self._drawn_at = 0, 0.0  # characters on the line, since when
        if self.live:
            sys.stdout, sys.stderr = _Neighbour(self, sys.stdout), _Neighbour(self, sys.stderr)

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self._note(text)
        self.leave_line()
        self._write(f"{text}\n")

    def show(self, text: str) -> None:
        """Tells how a step went: in the place of the step before on a terminal, as a line of its own elsewhere."""
        self._note(text)
        if self.live:
            self._show(text, stays=True)
        else:
            self._write(f"{text}\n")

    def show_for_now(self, text: str) -> None:
        """Tells, on a terminal only, how far something is that will say more when it is done."""
        if self.live:
            self._show(text, stays=False)

    def leave_line(self) -> None:
        """Ends the live line, if there is one: what it told of a step stays, what was for now vanishes."""
        if self._text:
            if self._stays:
                self._draw(self._text, "\n")
            else:
                self._draw("", "\r")
            self._text, self._drawn = "", 0

    def close(self) -> None:
        """Ends the line and gives the streams back."""
        self.leave_line()
        sys.stdout, sys.stderr = self._out, self._error
        if self._file:
            self._file.close()

    def _show(self, text: str, stays: bool) -> None:
        if stays != self._stays:
            self.leave_line()
        self._text, self._stays = text, stays
        if time.monotonic() >= self._drawn_at + REDRAW_S or not self._drawn:
            self._draw(text)

    def _draw(self, text: str, end: str = "") -> None:
        """One write, with nothing cleared before it: no flicker. A line that wrapped could not be gone back to, so parts that
        do not fit are left off at its end."""
        width = max(1, shutil.get_terminal_size().columns - 1)
        if len(text) > width:
            text = text[: width + len(SEPARATOR)].rpartition(SEPARATOR)[0] or text[:width]
        self._write(f"\r{text.ljust(min(self._drawn, width))}{end}")
        self._drawn, self._drawn_at = len(text), time.monotonic()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _note(self, text: str) -> None:
        if self._file:
            with suppress(OSError):
                self._file.write(f"{datetime.now().isoformat(' ', 'seconds')} {text}\n".encode(errors="backslashreplace"))


class _Neighbour:
    """A stream of others, which leaves the live line before it writes."""

    def __init__(self, terminal: Terminal, stream: Any) -> None:
        self._terminal, self._stream = terminal, stream

    def write(self, text: str) -> int:
        """As a text stream's."""
        self._terminal.leave_line()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
