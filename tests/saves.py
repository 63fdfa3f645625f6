"""What tests of checkpoints share: random states cut into fragments, and threads that stand for processes."""

from __future__ import annotations

import math
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaspark.checkpoint_writers import save
from megaspark.fragments import STATE, Fragment

SHAPES = {"a.weight": (3, 5), "b.weight": (7,), "c": (1,), "d.weight": (4, 2, 3)}
State = dict[str, dict[str, Tensor]]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A real file system of `size` ("1m") at `folder`; gives a function that changes its size."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield lambda new: subprocess.run(["mount", "-o", f"remount,size={new}", folder], check=True) and None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def random_state(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> State:
    """By parameter and kind: 1-D fp32, with every bit pattern that a float may have but NaN."""
    generator = torch.Generator().manual_seed(seed)
    return {name: {kind: torch.randn(math.prod(shape), generator=generator) for kind in STATE} for name, shape in shapes.items()}


def cut(state: State, cuts: dict[str, list[int]], shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[list[Fragment]]:
    """The state as fragments, element ranges [0, c1), [c1, c2) ... of each parameter going to processes 0, 1 ..."""
    out: list[list[Fragment]] = [[] for _ in range(1 + max(map(len, cuts.values()), default=0))]
    for name, shape in shapes.items():
        bounds = [0, *sorted(cuts.get(name, [])), math.prod(shape)]
        for rank, (start, end) in enumerate(pairwise(bounds)):
            tensors = {kind: state[name][kind][start:end].clone() for kind in STATE}
            out[rank].append(Fragment(name, shape, start, end - start, tensors))
    return out


class Processes:
    """Threads that stand for the processes of a save: `gather` waits for all and gives everybody everybody's value."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.values = count, threading.Barrier(count, timeout=30), [None] * count

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            out = list(self.values)
            self.barrier.wait()
            return out

        return gather

    def save(self, folder: Path, state: dict[str, Any], held: list[list[Fragment]]) -> list[Any]:
        """What `save` returned, or raised, in each process."""
        return self.each(lambda rank: save(folder, state, held[rank], rank, self.gather(rank)))

    def each(self, action: Callable[[int], Any]) -> list[Any]:
        """What an action returned, or raised, in each process."""
        results: list[Any] = [None] * self.count

        def work(rank: int) -> None:
            try:
                results[rank] = action(rank)
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def save_whole(folder: Path, state: State, step: int = 5, cuts: dict[str, list[int]] | None = None) -> Path:
    held = cut(state, cuts or {})
    assert Processes(len(held)).save(folder, {"step": step, "seed": 7}, held) == [None] * len(held)
    return folder


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.view(torch.int32), y.view(torch.int32))
