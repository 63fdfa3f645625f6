"""Progress as people see it: one live line on a terminal that nothing else is mixed into, plain lines anywhere else."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from conftest import CHECKOUT, TinyData, process_environment, tiny_run

PIECE = """
import sys, time
from pathlib import Path
from megaspark.terminals import Terminal
terminal = Terminal(Path(sys.argv[1]))
"""


class Screen:
    """What a terminal of so many columns shows for the bytes written to it: \\r, \\n and wrapping."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.column = columns, [""], 0

    def feed(self, text: str) -> None:
        for character in text:
            if character == "\n":
                self.lines.append("")
            elif character == "\r":
                self.column = 0
            else:
                assert character.isprintable(), repr(character)
                if self.column == self.columns:
                    self.lines.append("")
                    self.column = 0
                line = self.lines[-1].ljust(self.column)
                self.lines[-1] = line[: self.column] + character + line[self.column + 1 :]
                self.column += 1

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines]


def on_terminal(columns: int, *command: str) -> str:
    """Runs a command with a pseudo-terminal of so many columns as stdout and stderr; what it wrote to that, \\r\\n as \\n."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = process_environment()
    environment.pop("COLUMNS", None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment, cwd=CHECKOUT)
    os.close(theirs)
    written = b""
    try:
        while block := os.read(mine, 65536):
            written += block
    except OSError:  # how Linux says that the other end was closed
        pass
    os.close(mine)
    assert child.wait() == 0, written[-3000:]
    return written.decode().replace("\r\n", "\n")


def screen_of(columns: int, code: str, folder: Path) -> list[str]:
    """The screen after a piece of Python that has `terminal`."""
    screen = Screen(columns)
    # The terminal itself begins a line of its own after \n, which a stream of bytes says as \n alone here.
    screen.feed(on_terminal(columns, sys.executable, "-c", PIECE + code, str(folder)).replace("\n", "\r\n"))
    return screen.shown()


def test_the_live_line_is_rewritten_and_what_is_said_stays(tmp_path: Path) -> None:
    """A step's line glued to an evaluation's, or overwritten by it; the rest of a longer line behind a shorter one."""
    code = """
terminal.say("start")
for step in range(1, 4):
    terminal.show(f"step {step} | loss {'9' * (6 - step)}")
    time.sleep(0.15)
terminal.show_for_now("evaluating 1 of 2, which takes rather long")
terminal.show_for_now("evaluating 2 of 2")
terminal.say("validation")
terminal.show("step 4 | loss 1")
terminal.show("step 5 | loss 1")
print("by print")
print("by stderr", file=sys.stderr)
terminal.show("step 6 | loss 1")
terminal.close()
print("end")
"""
    shown = ["start", "step 3 | loss 999", "validation", "step 5 | loss 1", "by print", "by stderr", "step 6 | loss 1", "end", ""]
    assert screen_of(60, code, tmp_path) == shown
    steps = [f"step {step}" for step in range(1, 7)]
    kept = [line for line in (tmp_path / "progress.txt").read_text().splitlines()]
    assert [next(step for step in steps if step in line) for line in kept if "step" in line] == steps
    assert not any("evaluating" in line for line in kept)


def test_a_narrow_terminal_gets_whole_parts(tmp_path: Path) -> None:
    """A line that wraps cannot be rewritten: every step would leave a line behind; and half a figure is a wrong one."""
    code = """
for step in range(1, 30):
    terminal.show(f"step {step} | loss 1.2345 | ETA 0:00:01 | 12,345 tokens/s")
    time.sleep(0.005)
terminal.close()
"""
    assert screen_of(34, code, tmp_path) == ["step 29 | loss 1.2345", ""]
    assert screen_of(36, code, tmp_path) == ["step 29 | loss 1.2345 | ETA 0:00:01", ""]


def test_quick_steps_are_not_all_drawn(tmp_path: Path) -> None:
    """A thousand redraws a second flicker, and over ssh they lag behind; the last one must stand all the same."""
    code = "for step in range(1000): terminal.show(f'step {step}')\nterminal.close()\n"
    written = on_terminal(60, sys.executable, "-c", PIECE + code, str(tmp_path))
    assert written.count("\r") < 100 and written.rstrip().endswith("step 999")
    assert len((tmp_path / "progress.txt").read_text().splitlines()) == 1000


def test_elsewhere_every_step_is_a_line(tmp_path: Path) -> None:
    """A log of carriage returns is one line of megabytes for grep."""
    code = "terminal.show('step 1')\nterminal.show_for_now('going on')\nterminal.show('step 2')\nterminal.say('end')\n"
    command = [sys.executable, "-c", PIECE + code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment(), cwd=CHECKOUT, check=True)
    assert (done.stdout, done.stderr) == ("step 1\nstep 2\nend\n", "")


def test_a_folder_that_cannot_be_written_costs_the_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk must not end a run for the sake of its progress."""
    from megaspark.terminals import Terminal

    terminal = Terminal(tmp_path / "absent")
    terminal.show("step 1")
    terminal.close()
    assert capsys.readouterr().out == "step 1\n"


@pytest.mark.launch
def test_a_run_on_a_terminal(tiny_data: TinyData, tmp_path: Path) -> None:
    """The whole command, as people see it: steps in place, evaluations and the end on lines of their own."""
    config, overrides = tiny_run(tiny_data, tmp_path, run__steps="6", run__eval_every="3", run__save_every="0")
    screen = Screen(150)
    text = on_terminal(150, sys.executable, "-m", "megaspark", "pretrain", "--config", str(config), *overrides)
    screen.feed(text.replace("\n", "\r\n"))
    told = [line.split(" | ")[0] for line in screen.shown() if line.startswith("step ") or "done" in line]
    assert told == ["step 3/6", "step 3", "step 6/6", "step 6", f"{tmp_path}/runs/tiny: done at step 6, 1,152 tokens"]
