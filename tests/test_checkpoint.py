"""Checkpoints: any split in, any split out, bit for bit; whatever is damaged or half is never taken for whole."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import CHECKOUT, process_environment
from megaspark import checkpoint_writers
from megaspark.checkpoint import (
    INDEX,
    BadCheckpoint,
    Checkpoint,
    load,
    newest,
    step_folder,
    step_folders,
)
from megaspark.checkpoint_writers import note_latest, prune
from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment
from saves import SHAPES, Processes, cut, random_state, same_bits, save_whole, small_disk

CUTS = st.fixed_dictionaries({name: st.lists(st.integers(0, math.prod(shape)), max_size=3) for name, shape in SHAPES.items()})


@given(CUTS, CUTS, st.integers(0, 2**32))
@hypothesis_settings(max_examples=40, deadline=None)
def test_any_split_in_any_split_out(tmp_path_factory, cuts_in, cuts_out, seed):
    """A fragment read at the wrong offset, a moment for a master, an empty piece: the layout would change the training."""
    state = random_state(seed)
    folder = save_whole(step_folder(tmp_path_factory.mktemp("run"), 5), state, cuts=cuts_in)
    checkpoint = Checkpoint(folder)
    assert (checkpoint.step, checkpoint.state["seed"], checkpoint.problem()) == (5, 7, None)
    assert checkpoint.shapes == SHAPES
    for held in cut(random_state(seed + 1), cuts_out):
        load(checkpoint, held)
        for fragment in held:
            for kind in STATE:
                expected = state[fragment.name][kind][fragment.start : fragment.start + fragment.length]
                assert same_bits(fragment.tensors[kind], expected)
    for name, shape in SHAPES.items():
        assert same_bits(checkpoint.tensor(name), state[name]["master"].view(shape))


@given(CUTS, st.integers(1, 60), st.integers(1, 5))
@hypothesis_settings(max_examples=30, deadline=None)
def test_several_files_a_process(tmp_path_factory, cuts, file_elements, files_at_most):
    """A large process's state is cut into files, in the middle of parameters: an element twice, or in none, or in the wrong one."""
    state, run = random_state(8), tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writers, "FILE_ELEMENTS", file_elements)
        patch.setattr(checkpoint_writers, "FILES_AT_MOST", files_at_most)
        checkpoint = Checkpoint(save_whole(step_folder(run, 5), state, cuts=cuts))
    assert checkpoint.problem() is None
    for name in SHAPES:
        assert all(same_bits(checkpoint.read(name, kind), state[name][kind]) for kind in STATE)
    by_rank = [[n for n in checkpoint.files if n.startswith(f"rank_{rank:05d}")] for rank in range(len(cut(state, cuts)))]
    for rank, held in enumerate(cut(state, cuts)):
        elements = sum(fragment.length for fragment in held)
        assert len(by_rank[rank]) == min(files_at_most, -(-elements // file_elements))
        sizes = [sum(p.length for ps in checkpoint.pieces.values() for p in ps if p.file == name) for name in by_rank[rank]]
        assert sum(sizes) == elements and (not sizes or max(sizes) - min(sizes) <= 1)


def test_odd_bit_patterns_survive(tmp_path):
    """Denormals, infinities, the sign of zero, a NaN's payload: a checkpoint is bits, not numbers."""
    bits = torch.tensor([0, -(2**31), 1, 0x7F800000, 0x7FC00001, -1], dtype=torch.int32)
    tensors = {kind: bits.view(torch.float32).clone() for kind in STATE}
    held = [[Fragment("w", (6,), 0, 6, tensors)]]
    assert Processes(1).save(tmp_path / "step_00000001", {"step": 1}, held) == [None]
    assert torch.equal(Checkpoint(tmp_path / "step_00000001").read("w").view(torch.int32), bits)


def test_loading_writes_through_views(tmp_path):
    """The fragments are windows on the engine's own buffers: what is beside them must not change."""
    state = random_state(1)
    checkpoint = Checkpoint(save_whole(step_folder(tmp_path, 5), state))
    buffers = {kind: torch.full((20,), 9.0) for kind in STATE}
    load(checkpoint, [Fragment("b.weight", (7,), 2, 4, {kind: buffer.narrow(0, 8, 4) for kind, buffer in buffers.items()})])
    for kind, buffer in buffers.items():
        assert same_bits(buffer[8:12], state["b.weight"][kind][2:6])
        assert (buffer[:8] == 9).all() and (buffer[12:] == 9).all()


def test_equal_state_gives_equal_bytes(tmp_path):
    """Same input, same bytes: a time or a random name in a checkpoint would hide real differences."""
    folders = [save_whole(tmp_path / name / "step_00000005", random_state(1), cuts={"a.weight": [4]}) for name in "xy"]
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and set(files[0]) == {INDEX, "rank_00000.safetensors", "rank_00001.safetensors"}


# ---- damage


@given(st.integers(0, 10**9), st.integers(0, 7))
@hypothesis_settings(max_examples=40, deadline=None)
def test_flipped_bit_anywhere_in_a_tensor_file_is_found(tmp_path_factory, place, bit):
    """One wrong bit in a moment trains on, a little differently."""
    folder = save_whole(step_folder(tmp_path_factory.mktemp("run"), 5), random_state(1), cuts={"a.weight": [4]})
    path = folder / f"rank_0000{place % 2}.safetensors"
    content = bytearray(path.read_bytes())
    content[place // 2 % len(content)] ^= 1 << bit
    path.write_bytes(content)
    assert str(path) in (Checkpoint(folder).problem() or "")


@given(st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_truncated_file_is_named(tmp_path_factory, data):
    """A file cut at any byte: torch says "failed finding central directory" and not which file."""
    folder = save_whole(step_folder(tmp_path_factory.mktemp("run"), 5), random_state(1))
    path = folder / data.draw(st.sampled_from([INDEX, "rank_00000.safetensors"]))
    content = path.read_bytes()
    # An index without its last bracket is damaged; without its last line end it would still be whole.
    path.write_bytes(content[: data.draw(st.integers(0, len(content.rstrip()) - 1))])
    if path.name == INDEX:
        with pytest.raises(BadCheckpoint, match=INDEX):
            Checkpoint(folder)
        return
    checkpoint = Checkpoint(folder)
    assert str(path) in checkpoint.problem()
    with pytest.raises(BadCheckpoint, match=r"rank_00000\.safetensors"):
        checkpoint.read("a.weight")


def test_missing_renamed_and_exchanged_files_are_named(tmp_path):
    """Files of one checkpoint mixed up while they were copied: all there, all whole, and wrong."""
    folder = save_whole(step_folder(tmp_path, 5), random_state(1), cuts={"a.weight": [4], "b.weight": [3]})
    one, two = folder / "rank_00000.safetensors", folder / "rank_00001.safetensors"
    one.rename(folder / "x")
    assert Checkpoint(folder).problem() == f"{one} is missing"
    with pytest.raises(BadCheckpoint, match=r"rank_00000\.safetensors"):
        Checkpoint(folder).read("a.weight")
    two.rename(one)
    (folder / "x").rename(two)
    assert Checkpoint(folder).problem() is not None
    assert Checkpoint(folder).problem(files=[]) is None


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return folder


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gap": lambda i: i["parameters"]["a.weight"]["fragments"].pop(1),
    "gap at the start": lambda i: i["parameters"]["a.weight"]["fragments"].pop(0),
    "gap at the end": lambda i: i["parameters"]["a.weight"]["fragments"].pop(),
    "overlap": lambda i: i["parameters"]["a.weight"]["fragments"][0].__setitem__(2, 5),
    "twice": lambda i: i["parameters"]["a.weight"]["fragments"].append(i["parameters"]["a.weight"]["fragments"][0]),
    "another shape": lambda i: i["parameters"]["a.weight"].update(shape=[3, 6]),
    "negative length": lambda i: i["parameters"]["a.weight"]["fragments"][0].__setitem__(2, -4),
    "unlisted file": lambda i: i["files"].pop("rank_00000.safetensors"),
    "foreign format": lambda i: i.update(format=99),
    "no step": lambda i: i["state"].pop("step"),
    "no files": lambda i: i.pop("files"),
    "fragments are no list": lambda i: i["parameters"]["a.weight"].update(fragments=3),
    "parameters are no mapping": lambda i: i.update(parameters=[]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_index_that_does_not_cover_every_element_is_refused(tmp_path, edit):
    """Elements that no file holds would keep the random numbers that the memory held."""
    folder = save_whole(step_folder(tmp_path, 5), random_state(1), cuts={"a.weight": [4, 9]})
    with pytest.raises(BadCheckpoint, match=INDEX):
        Checkpoint(edited(folder, EDITS[edit]))


def test_fragments_with_a_gap_are_not_saved(tmp_path):
    """A process that forgets a piece: found at the save, told to everybody, and nobody hangs or keeps a half folder."""
    held = cut(random_state(1), {"a.weight": [4]})
    held[1] = []
    results = Processes(2).save(step_folder(tmp_path, 5), {"step": 5}, held)
    assert all(isinstance(result, str) and "a.weight" in result for result in results), results
    assert list((tmp_path / "checkpoints").iterdir()) == []


# ---- failing and killed saves

SAVE_FOR_EVER = """
import sys
from pathlib import Path
import torch
from megaspark.checkpoint import step_folder
from megaspark.checkpoint_writers import note_latest, prune, save
from megaspark.fragments import STATE, Fragment
run, size = Path(sys.argv[1]), int(sys.argv[2])
for step in range(1, 10**6):
    tensors = {kind: torch.full((size,), float(step)) for kind in STATE}
    problem = save(step_folder(run, step), {"step": step}, [Fragment("w", (size,), 0, size, tensors)], 0, lambda x: [x])
    print(problem or step, flush=True)
    if problem:
        break
    note_latest(run, step_folder(run, step))
    prune(run, 2)
"""


# The same by a run's saver, in the background: the loop goes on changing what is saved.
SAVE_BEHIND_FOR_EVER = """
import sys, time
from pathlib import Path
import torch
from megaspark.fragments import STATE, Fragment
from megaspark.savers import Saver
run, size = Path(sys.argv[1]), int(sys.argv[2])
held = [Fragment("w", (size,), 0, size, {kind: torch.zeros(size) for kind in STATE})]
saver = Saver(run, 0, lambda x: [x], (2, 0), held)
for step in range(1, 10**6):
    for tensor in held[0].tensors.values():
        tensor.fill_(step)
    if step % 3 == 0:
        began = saver.save({"step": step}, held, wait=False)
        print(step, flush=True)
    time.sleep(0.002)
    saver.heard(saver.pending())
"""


@pytest.mark.parametrize("how", [SAVE_FOR_EVER, SAVE_BEHIND_FOR_EVER], ids=["waited for", "behind"])
@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.008, 0.02])
def test_killed_save_leaves_only_whole_checkpoints(tmp_path, delay_s, how):
    """kill -9 at any moment of saving, noting and pruning: what bears a final name, and what `latest` names, is whole."""
    child = subprocess.Popen(
        [sys.executable, "-c", how, str(tmp_path), str(1 << 19)], stdout=subprocess.PIPE, text=True,
        env=process_environment(), cwd=CHECKOUT,
    )  # fmt: skip
    while len(step_folders(tmp_path)) < 2:
        assert child.stdout.readline()
    time.sleep(delay_s)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folders = step_folders(tmp_path)
    assert 2 <= len(folders) <= 3
    for folder in folders:
        checkpoint = Checkpoint(folder)
        assert checkpoint.problem() is None
        assert (checkpoint.read("w") == float(folder.name[5:])).all()
    assert newest(tmp_path).problem() is None
    # Started again, the same save goes through over whatever the killed one left.
    save_whole(step_folder(tmp_path, int(folders[0].name[5:]) + 1), random_state(1))


def fill_disk(folder: Path, run_python: Callable[..., Any]) -> str:
    """Saves 512 kB checkpoints on a full disk, or under a limit on file sizes, until one fails; returns what was said."""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 18}, {1 << 18}))\n"
    done = run_python((limited if folder.name == "limited" else "") + SAVE_FOR_EVER, str(folder), str(1 << 15))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_save_that_hits_a_limit_leaves_the_old_ones(tmp_path, run_python):
    """A file that may not grow further: the error is told, the checkpoint before it stays, nothing half remains."""
    run = tmp_path / "limited"
    save_whole(step_folder(run, 0), random_state(1), step=0)
    assert "rror" in fill_disk(run, run_python)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000000"]
    assert newest(run).problem() is None


def test_full_disk_leaves_the_old_ones(tmp_path, run_python):
    """DeepSpeed's own save leaves a half folder on a full disk."""
    run = tmp_path / "run"
    with small_disk(run, "1m"):
        said = fill_disk(run, run_python)  # two of 393 kB fit; the third does not
        assert "rror" in said and "o space" in said, said
        assert [p.name for p in step_folders(run)] == ["step_00000002", "step_00000001"]
        assert {p.name for p in (run / "checkpoints").iterdir()} == {"step_00000001", "step_00000002"}
        assert newest(run).step == 2 and newest(run).problem() is None


def test_folder_that_cannot_be_made_is_told(tmp_path):
    """A run folder that became a file: an error in every process, not a hang in all but one."""
    (tmp_path / "checkpoints").write_text("")
    held = cut(random_state(1), {"a.weight": [4]})
    results = Processes(2).save(step_folder(tmp_path, 5), {"step": 5}, held)
    assert results[0] == results[1] and "rror" in results[0]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    """A run that went back and came to the step again must not keep the old one, nor a mixture."""
    save_whole(step_folder(tmp_path, 5), random_state(1), cuts={"a.weight": [4]})
    save_whole(step_folder(tmp_path, 5), random_state(2))
    checkpoint = newest(tmp_path)
    assert checkpoint.problem() is None and same_bits(checkpoint.read("c"), random_state(2)["c"]["master"])
    assert {p.name for p in checkpoint.folder.iterdir()} == {INDEX, "rank_00000.safetensors"}


# ---- which one


def test_newest_and_latest(tmp_path):
    """`latest` decides; without it the highest step; a partial folder never; a step folder is itself."""
    with pytest.raises(UserError, match="holds no checkpoint"):
        newest(tmp_path)
    for step in (5, 10, 100000000):
        save_whole(step_folder(tmp_path, step), random_state(step), step=step)
    (tmp_path / "checkpoints" / "step_99999999999.partial").mkdir()
    assert newest(tmp_path).step == 100000000
    note_latest(tmp_path, step_folder(tmp_path, 10))
    assert newest(tmp_path).step == 10
    assert newest(step_folder(tmp_path, 5)).step == 5
    note_latest(tmp_path, step_folder(tmp_path, 7))
    with pytest.raises(BadCheckpoint, match="step_00000007"):
        newest(tmp_path)
    with pytest.raises(BadCheckpoint, match="step_00000007"):
        newest(step_folder(tmp_path, 7))


def test_prune_keeps_the_newest(tmp_path):
    """The wrong end removed, or all of them."""
    for step in (1, 2, 9, 10, 100):
        save_whole(step_folder(tmp_path, step), random_state(step), step=step)
    prune(tmp_path, 0)
    assert len(step_folders(tmp_path)) == 5
    prune(tmp_path, 2)
    assert [Checkpoint(p).step for p in step_folders(tmp_path)] == [100, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@given(st.sets(st.integers(0, 40), max_size=12), st.integers(0, 4), st.integers(0, 7))
@hypothesis_settings(max_examples=60, deadline=None)
def test_prune_keeps_the_newest_and_every_mth(tmp_path_factory, steps, last, every):
    """A milestone removed is gone for good; one kept too many fills the disk in a week."""
    run = tmp_path_factory.mktemp("run")
    for step in steps:
        step_folder(run, step).mkdir(parents=True)
    prune(run, last, every)
    newest_ones = sorted(steps)[-last:] if last else steps
    kept = {step for step in steps if step in newest_ones or (every and step % every == 0)}
    assert {int(p.name[5:]) for p in step_folders(run)} == kept
