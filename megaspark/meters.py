"""What a training run tells of itself: one line of figures a step, in metrics.jsonl, in TensorBoard and on the terminal.

A figure that was not measured is null. JSON knows no NaN: a value that is not finite is null too, and a second key
(`loss_nonfinite: "nan"`) says what it was.
"""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from megaspark.flops import Flops
from megaspark.manifests import write_atomically
from megaspark.terminals import SEPARATOR

METRICS = "metrics.jsonl"
LATEST_STEPS, LATEST_PAUSES = 100, 4  # from which the time left is estimated
Line = dict[str, Any]


class StepMeter:
    """Turns what a step did into its line of figures; the time is from the last `line` or `restart` to this one.

    `flops` are a token's, `peak_flops` the FLOP/s of all devices together (None: unknown, no MFU), `tokens` those of a step.
    """

    def __init__(
        self, flops: Flops, peak_flops: float | None, tokens: int, memory_bytes: Callable[[], int | None] | None = None
    ) -> None:
        self.flops, self.peak_flops, self.tokens = flops, peak_flops, tokens
        self.memory_bytes = memory_bytes or peak_memory_bytes
        self._since = time.perf_counter()

    @property
    def since_s(self) -> float:
        """Seconds since the last step, or since `restart`."""
        return time.perf_counter() - self._since

    def restart(self) -> float:
        """Begins the next step's time now: what went before (an evaluation, a checkpoint) is no training time. Returns its s."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    def line(self, *, step: int, tokens: int, loss: float, lr: float, grad_norm: float | None, joules: float | None) -> Line:
        """The figures of one optimizer step; `tokens` are those read so far, `joules` this step's, None if not measured."""
        now = time.perf_counter()
        step_s, self._since = now - self._since, now
        tokens_per_s = self.tokens / step_s
        flops_per_s = tokens_per_s * self.flops.litespark
        return {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_s": step_s,
            "tokens_per_s": tokens_per_s,
            "flops_per_s": flops_per_s,
            "flops_per_s_causal": tokens_per_s * self.flops.causal,
            "mfu": flops_per_s / self.peak_flops if self.peak_flops else None,
            "joules": joules,
            "joules_per_token": None if joules is None else joules / self.tokens,
            "memory_bytes": self.memory_bytes(),
        }


class Pauses(NamedTuple):
    """What interrupts training after every `every`-th step (0: after none) and, if `at_end`, after the last one."""

    every: int
    at_end: bool

    def left(self, step: int, last: int) -> int:
        """How many are to come when `step` was just taken, its own included."""
        regular = last // self.every - (step - 1) // self.every if self.every else 0
        return regular + (self.at_end and not (self.every and last % self.every == 0))


class TimeLeft:
    """When the last step, and every evaluation and save until then, will be done, if they last as the latest ones did."""

    def __init__(self, last: int, pauses: Mapping[str, Pauses]) -> None:
        self.last, self.pauses = last, pauses
        self._took: dict[str, deque[float]] = {kind: deque(maxlen=LATEST_PAUSES) for kind in pauses}
        self.steps_change()

    def steps_change(self) -> None:
        """Steps are of another length from now on."""
        self._steps: deque[float] = deque(maxlen=LATEST_STEPS)
        self._first_s: float | None = None  # the first one compiles and allocates: nobody takes it for the others but alone

    def stepped(self, seconds: float) -> None:
        """Takes in what a step lasted."""
        if self._first_s is None:
            self._first_s = seconds
        else:
            self._steps.append(seconds)

    def paused(self, kind: str, seconds: float) -> None:
        """Takes in what an evaluation or a save lasted."""
        self._took[kind].append(seconds)

    def told(self, step: int) -> str:
        """The time left after `step`; with a + where evaluations or saves come that nobody has timed in this start."""
        seconds, more = (self.last - step) * _mean(self._steps or [self._first_s or 0.0]), False
        for kind, pauses in self.pauses.items():
            if count := pauses.left(step, self.last):
                took = self._took[kind]
                seconds, more = seconds + count * _mean(took), more or not took
        return f"{timedelta(seconds=round(seconds))}{'+' if more else ''}"


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class MetricsLog:
    """Appends lines to `folder`/metrics.jsonl, each written through at once, and their numbers to TensorBoard.

    On a full disk, as one is while a save fails on it, lines wait in memory until there is room again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / METRICS
        self._file: io.FileIO | None = None
        self._waiting = b""
        self._board: Any = None
        self._purge_step: int | None = None

    def keep_until(self, step: int) -> int:
        """Drops the lines after `step`, and whatever a crash left half written; returns how many. To be called on resume.

        TensorBoard leaves them out too, once the next line is written.
        """
        self.close()
        self._purge_step = step + 1
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
        if len(kept) < len(lines):
            write_atomically(self.path, b"".join(kept))
        return len(lines) - len(kept)

    def last_step(self) -> int:
        """The last step of which there is a line; 0 if there is none."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        return max((found for line in lines if (found := _step_of(line)) is not None), default=0)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line; those of an evaluation carry `split`."""
        self._waiting += to_json(line).encode() + b"\n"
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held open until close)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._tensorboard(line)
        except OSError as error:  # a full disk must not stop the run; TensorBoard's thread ends with it and tells us here
            waiting = self._waiting.count(b"\n")
            text = f"{self.folder}: METRICS NOT WRITTEN: {error}; {waiting} lines wait in memory, the run goes on"
            print(text, file=sys.stderr, flush=True)
            if not self._waiting:
                self._board, self._purge_step = None, None

    def close(self) -> None:
        """Flushes and closes both."""
        self._close_file()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
            self._board = None

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _tensorboard(self, line: Mapping[str, Any]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and it brings torch

            self._board = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        group = line.get("split", "train")
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(f"{group}/{name}", value, line["step"])


def to_json(line: Mapping[str, Any]) -> str:
    """One line of strict JSON; a value that is not finite becomes null, with its name under `<key>_nonfinite`."""
    out: Line = {}
    for key, value in line.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        out[key] = value if finite else None
        if not finite:
            out[f"{key}_nonfinite"] = str(value)
    return json.dumps(out, allow_nan=False)


def terminal_line(line: Mapping[str, Any], last_step: int, time_left: str) -> str:
    """A step's figures in one readable line, without those not measured; what a narrow terminal should show comes first."""
    parts = [f"step {line['step']:,}/{last_step:,}", f"loss {line['loss']:.4f}", f"ETA {time_left}"]
    if "skipped" in line:
        parts.append(f"SKIPPED: {line['skipped']}")
    parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    if line["joules_per_token"] is not None:
        parts.append(f"{line['joules_per_token']:.3g} J/token")
    parts.append(f"lr {line['lr']:.2e}")
    if line["grad_norm"] is not None:
        parts.append(f"grad norm {line['grad_norm']:.3f}")
    return SEPARATOR.join(parts)


def evaluation_line(step: int, lines: Mapping[str, Line], seconds: float) -> str:
    """An evaluation's figures in one readable line: of all sources together, then the loss of each, if there are several."""
    *sources, (whole, total) = lines.items()
    parts = [f"step {step:,}", f"{whole} loss {total['loss']:.4f}"]
    if total["bits_per_byte"] is not None:
        parts.append(f"{total['bits_per_byte']:.4f} bits/byte")
    if len(sources) > 1:
        parts.append(", ".join(f"{split.removeprefix(f'{whole}/')} {line['loss']:.4f}" for split, line in sources))
    return SEPARATOR.join([*parts, f"{total['samples']:,} samples in {seconds:,.1f} s"])


def peak_memory_bytes() -> int | None:
    """The most that this process held: of GPU memory if it uses a GPU (torch's allocator), else of RAM; None if unknown."""
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0][1]) * 1024 if found else None  # getrusage's figure would hold that of the parent too


def _step_of(line: bytes) -> int | None:
    """The step of a line; None if the line is torn or no line of ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
