"""A run's checkpoints while it trains: copied aside in a moment, written by a thread, made valid when every process has written.

The thread takes part in nothing that processes do together. Each process adds "mine is not written yet" to the numbers that are
summed in every step anyway (`Engine.step`); at the first step at which nobody says so, the processes tell each other what they
wrote, and the first one makes the checkpoint valid, in a thread too. Two saves are never under way at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from megaspark.checkpoint import step_folder
from megaspark.checkpoint_writers import Save, attempt, note_latest, prune
from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment


class HostCopy:
    """Memory for a copy of all that a process holds: 12 bytes an element, taken and touched once, pinned for a GPU's state."""

    def __init__(self, held: Iterable[Fragment]) -> None:
        held = list(held)
        elements = len(STATE) * sum(fragment.length for fragment in held)
        self.pinned = any(tensor.is_cuda for fragment in held for tensor in fragment.tensors.values())
        try:
            self._memory = torch.empty(elements, dtype=torch.float32, pin_memory=self.pinned).zero_()
        except (RuntimeError, MemoryError):
            need = f"{elements * 4 / 1e9:,.1f} GB of this host's memory for this process's copy"
            raise UserError(f"run.save_async = true needs {need}, which are not there; set run.save_async=false") from None

    @property
    def bytes(self) -> int:
        """What it takes of the host's memory."""
        return self._memory.nbytes

    def take(self, held: Iterable[Fragment]) -> list[Fragment]:
        """Copies them, and gives them as fragments of the copy, which stays as it is until the next `take`."""
        out, end = [], 0
        originals, copies = [], []
        for fragment in held:
            views = {}
            for kind in STATE:
                views[kind] = self._memory.narrow(0, end, fragment.length)
                end += fragment.length
            originals += [fragment.tensors[kind].detach() for kind in STATE]
            copies += views.values()
            out.append(replace(fragment, tensors=views))
        if self.pinned:
            for copy, original in zip(copies, originals, strict=True):
                copy.copy_(original, non_blocking=True)
            torch.cuda.synchronize()
        else:  # one core alone does not fill the memory's bus, and torch's copy is no faster on two
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                for _ in pool.map(lambda copy, original: np.copyto(copy.numpy(), original.numpy()), copies, originals):
                    pass
        return out


class Saver:
    """Writes a run's checkpoints, keeps the newest, and tells of each. Every process calls it alike, at the same steps.

    gather: everybody's value on everybody. keep_last, keep_every: as of `prune`. reserve: what this process holds, if saves are
    to be written in the background; the memory for its copy is taken now, not hours later.
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        gather: Callable[[Any], list[Any]],
        keep: tuple[int, int],
        reserve: Iterable[Fragment] | None = None,
    ) -> None:
        self.run, self.rank, self.gather, self.keep = run, rank, gather, keep
        self.copy = None if reserve is None else HostCopy(reserve)
        self._current: Save | None = None  # begun, and not yet collected; the same on all processes
        self._writer: Thread | None = None
        self._completer: Thread | None = None  # of the first process
        self._open = False  # whether a save's outcome has still to be told to all; the same on all processes
        self._written = True
        self._began = self._stood_still_s = 0.0

    def save(self, state: dict[str, Any], held: Iterable[Fragment], wait: bool) -> bool:
        """Begins the checkpoint of state["step"], and ends it too where `wait` or nothing was reserved; whether all went well."""
        self._wait_for_previous(state["step"])
        self._began = time.perf_counter()
        saving = Save(step_folder(self.run, state["step"]), state, self.rank, self.gather)
        if saving.begin():
            self._tell(saving)
            self._written = False
            return False
        self._current = saving
        if wait or self.copy is None:
            saving.write(held)
            return self.finish()
        copied = self.copy.take(held)
        self._writer = Thread(target=saving.write, args=(copied,), name="checkpoint", daemon=True)
        self._writer.start()
        self._stood_still_s = time.perf_counter() - self._began
        return True

    def pending(self) -> list[float]:
        """Whether this process is still writing: a number to be summed over all processes, for `heard`."""
        return [float(self._writer is not None and self._writer.is_alive())]

    def heard(self, sums: Sequence[float]) -> None:
        """Goes on with the save that is under way once nobody is writing any more, as the sums of everybody's `pending` tell."""
        if self._current is None or sums[0]:
            return
        started = time.perf_counter()
        saving = self._collect()
        if self.rank == 0 and saving.problem is None:
            self._stood_still_s += time.perf_counter() - started
            self._completer = Thread(target=self._complete, args=(saving,), name="checkpoint", daemon=True)
            self._completer.start()

    def finish(self) -> bool:
        """Waits until nothing is under way; whether the last save was written."""
        if self._current is not None:
            saving = self._collect()
            if self.rank == 0 and saving.problem is None:
                self._stood_still_s = time.perf_counter() - self._began
                self._complete(saving)
        if self._open:
            if self._completer is not None:
                self._completer.join()
                self._completer = None
            self._open = False
            self._written = self.gather(self._written)[0]
        return self._written

    def _wait_for_previous(self, step: int) -> None:
        """Two saves at once would need the memory of two copies."""
        started, slow = time.perf_counter(), self._current
        self.finish()
        if slow is not None:
            waited_s = time.perf_counter() - started
            self._say(f"the save of step {step} waited {waited_s:.1f} s until {slow.folder.name} was written: they are too close")

    def _collect(self) -> Save:
        """Waits for this process's own part, and hears from all the others."""
        saving, self._current, self._open = self._current, None, True
        assert saving is not None
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._written = saving.collect() is None
        if saving.problem:
            self._tell(saving)
        return saving

    def _complete(self, saving: Save) -> None:
        """What only the first process does, from its loop or from a thread: index, name, `latest`, and room for the next."""
        saving.complete()
        self._written = saving.problem is None
        self._tell(saving)
        if self._written and (problem := attempt(lambda: (note_latest(self.run, saving.folder), prune(self.run, *self.keep)))):
            self._written = False
            self._say(f"{saving.folder} is whole, but `latest` does not name it or older ones are still there: {problem}")

    def _tell(self, saving: Save) -> None:
        if saving.problem:
            told = f"CHECKPOINT NOT WRITTEN: {saving.folder}: {saving.problem}; the run goes on, older checkpoints are untouched"
        else:
            took_s = time.perf_counter() - self._began
            told = f"{saving.folder.name}: {saving.file_bytes / 1e6:,.1f} MB written in {took_s:.2f} s"
            told += f", the run stood still for {self._stood_still_s:.2f} s"
        self._say(told)

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)
