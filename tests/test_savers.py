"""Saves in the background: what is written is the moment of the save, and only whole checkpoints get a name."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megaspark.checkpoint import Checkpoint, newest, step_folder, step_folders
from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment
from megaspark.savers import HostCopy, Saver
from saves import SHAPES, Processes, State, cut, random_state, same_bits, small_disk

CUTS = {"a.weight": [4], "d.weight": [0], "b.weight": [7]}


class Loop:
    """The training loops of some processes, as far as a saver sees them."""

    def __init__(self, run: Path, state: State, keep: tuple[int, int] = (0, 0), behind: bool = True) -> None:
        self.run, self.held = run, cut(state, CUTS)
        self.processes = Processes(len(self.held))
        gathers = [self.processes.gather(rank) for rank in range(len(self.held))]
        self.savers = [Saver(run, r, gathers[r], keep, self.held[r] if behind else None) for r in range(len(gathers))]

    def save(self, step: int, wait: bool = False) -> list[Any]:
        return self.processes.each(lambda rank: self.savers[rank].save({"step": step}, self.held[rank], wait))

    def step(self) -> bool:
        """One more step of training: the weights change, and the numbers are summed; whether anybody is writing."""
        for fragment in (fragment for held in self.held for fragment in held):
            for tensor in fragment.tensors.values():
                tensor.add_(1)
        summed = [float(sum(saver.pending()[0] for saver in self.savers))]
        assert self.processes.each(lambda rank: self.savers[rank].heard(summed)) == [None] * len(self.savers)
        return summed[0] > 0

    def finish(self) -> list[Any]:
        return self.processes.each(lambda rank: self.savers[rank].finish())


def holds(folder: Path, state: State, plus: int = 0) -> bool:
    """Whether a checkpoint is whole and of this state, with so much added."""
    found = Checkpoint(folder)
    same = all(same_bits(found.read(n, kind), state[n][kind] + plus if plus else state[n][kind]) for n in SHAPES for kind in STATE)
    return same and found.problem() is None


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


def test_what_is_written_is_the_moment_of_the_save(tmp_path: Path) -> None:
    """A checkpoint of weights from after step 7 with moments from after step 8: nobody would ever notice."""
    state = random_state(1)
    loop = Loop(tmp_path, state)
    assert loop.save(7) == [True, True]
    while loop.step():
        pass
    wait_for(tmp_path / "latest")  # named without anybody waiting for it
    assert loop.finish() == [True, True]
    assert holds(step_folder(tmp_path, 7), state) and newest(tmp_path).step == 7


def test_nobody_goes_on_while_another_writes(tmp_path: Path) -> None:
    """All would stand still until the slowest process's disk is done: the stall that writing in the background is to avoid."""
    loop = Loop(tmp_path, random_state(1))
    loop.save(7)
    for saver in loop.savers:
        assert saver._writer is not None
        saver._writer.join()
    for saver in loop.savers:
        saver.heard([1.0])  # one after the other: who meets the others here waits for ever
        assert saver._current is not None and not step_folders(tmp_path)
    assert not loop.step()
    assert loop.finish() == [True, True] and newest(tmp_path).step == 7


@pytest.mark.parametrize("behind", [True, False])
def test_saved_at_the_end_is_there_at_the_end(tmp_path: Path, behind: bool) -> None:
    """The last save of a run must not be left to a thread that dies with the process."""
    state = random_state(2)
    loop = Loop(tmp_path, state, behind=behind)
    assert loop.save(9, wait=True) == [True, True]
    assert holds(step_folder(tmp_path, 9), state) and newest(tmp_path).step == 9
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
@hypothesis_settings(max_examples=15, deadline=None)
def test_saves_come_one_after_the_other(tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[int, bool]]) -> None:
    """However soon the next save comes, waited for or not: the copy of one must not be overwritten by the next, none lost."""
    run, state = tmp_path_factory.mktemp("run"), random_state(3)
    loop = Loop(run, state)
    for number, (steps, wait) in enumerate(plan):
        assert loop.save(number, wait) == [True, True]
        for _ in range(steps):
            loop.step()
    assert loop.finish() == [True, True]
    changed = 0
    for number, (steps, _) in enumerate(plan):
        wanted = {name: {kind: tensor.clone() for kind, tensor in kinds.items()} for name, kinds in state.items()}
        for _ in range(changed):
            for tensor in (tensor for kinds in wanted.values() for tensor in kinds.values()):
                tensor.add_(1)
        assert holds(step_folder(run, number), wanted)
        changed += steps
    assert newest(run).step == len(plan) - 1


def test_save_that_has_to_wait_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two saves at once would need two copies; a run that stands still for its disk should know why."""
    loop = Loop(tmp_path, random_state(4))
    loop.save(1)
    loop.save(2, wait=True)
    said = capsys.readouterr().out
    assert re.search(r"the save of step 2 waited \d+\.\d s until step_00000001 was written", said), said
    assert re.search(r"step_00000002: 0\.0 MB written in \d+\.\d\d s, the run stood still for \d+\.\d\d s", said), said
    assert len(step_folders(tmp_path)) == 2


def test_newest_and_every_mth_are_kept(tmp_path: Path) -> None:
    """A run of weeks: room on the disk for a few checkpoints, and milestones to come back to."""
    loop = Loop(tmp_path, random_state(5), keep=(2, 30))
    for step in range(10, 90, 10):
        loop.save(step)
    loop.finish()
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [80, 70, 60, 30]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_memory_is_taken_once(tmp_path: Path) -> None:
    """A copy made anew at every save costs three times the stall, and memory that fails in the middle of the night."""
    held = cut(random_state(6), {})[0]
    copy = HostCopy(held)
    first, second = copy.take(held), copy.take(held)
    for fragment in held:
        for tensor in fragment.tensors.values():
            tensor.zero_()
    assert all(same_bits(f.tensors[kind], random_state(6)[f.name][kind]) for f in second for kind in STATE)
    assert copy.bytes == 12 * sum(fragment.length for fragment in held)
    assert [f.tensors[k].data_ptr() for f in first for k in STATE] == [f.tensors[k].data_ptr() for f in second for k in STATE]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for f in first for t in f.tensors.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_on_a_gpu_is_copied_to_pinned_memory() -> None:
    """A copy that the GPU has not finished yet when the optimizer goes on would mix two steps."""
    x = torch.arange(1 << 24, dtype=torch.float32, device="cuda")
    held = [Fragment("w", (len(x),), 0, len(x), {kind: x for kind in STATE})]
    copy = HostCopy(held)
    copied = copy.take(held)[0]
    x.zero_()
    torch.cuda.synchronize()
    assert copied.tensors["master"].is_pinned() and torch.equal(copied.tensors["exp_avg"], torch.arange(1.0 * len(x)))


# ---- a disk that is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A run folder on a file system of 1 MB, and what changes its size."""
    with small_disk(tmp_path / "run", "1m") as resize:
        yield tmp_path / "run", resize


def test_full_disk_in_the_thread_stops_nothing_but_the_save(disk: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """An error in a thread is one that nobody sees: a week of training without a checkpoint."""
    run, resize = disk
    held = [[Fragment("w", (60_000,), 30_000 * r, 30_000, {kind: torch.rand(30_000) for kind in STATE})] for r in (0, 1)]
    loop = Loop(run, random_state(0))
    loop.held = held
    for rank, saver in enumerate(loop.savers):
        saver.copy = HostCopy(held[rank])
    loop.save(1)
    assert loop.finish() == [True, True]
    loop.save(2)  # 720 kB: no room for a second
    while loop.step():
        pass
    assert loop.finish() == [False, False]
    said = capsys.readouterr().out
    assert said.count("CHECKPOINT NOT WRITTEN") == 1 and "No space left" in said and "step_00000002" in said, said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
    assert newest(run).step == 1 and newest(run).problem() is None
    resize("8m")
    loop.save(3)
    assert loop.finish() == [True, True] and newest(run).step == 3 and newest(run).problem() is None


def test_disk_too_full_for_the_index_is_told(disk: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Everybody's file fits, and then the few bytes that make them a checkpoint do not."""
    run, _ = disk
    loop = Loop(run, random_state(7))
    assert loop.save(1, wait=True) == [True, True]
    loop.save(2)
    for saver in loop.savers:
        assert saver._writer is not None
        saver._writer.join()
    with (run / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    loop.step()
    assert loop.finish() == [False, False]
    assert "CHECKPOINT NOT WRITTEN" in capsys.readouterr().out
    assert newest(run).step == 1 and [path.name for path in step_folders(run)] == ["step_00000001"]
    (run / "filler").unlink()
    assert loop.save(3, wait=True) == [True, True]


def test_no_memory_for_the_copy_is_a_users_mistake() -> None:
    """Out of memory in mid-run, with a stack trace, instead of a word at the start."""
    huge = torch.empty(1).expand(1 << 50)
    held = [Fragment("w", (1 << 50,), 0, 1 << 50, {kind: huge for kind in STATE})]
    with pytest.raises(UserError, match=r"save_async=false"):
        HostCopy(held)
