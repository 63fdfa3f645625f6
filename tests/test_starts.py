"""Where a run starts: from its newest whole checkpoint, saying what it passes over; never at step 0 where it had got further."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CHECKOUT, Finished, TinyData, launch_deepspeed, snapshot, tiny_run
from jobs import losses
from megaspark.checkpoint import Checkpoint
from megaspark.config import Checked, check_run, load_config
from megaspark.errors import UserError
from megaspark.starts import find_start

PRETRAIN = CHECKOUT / "megaspark" / "pretrain.py"
SECOND = "rank_00001.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.yaml and runs/tiny: 6 steps by 2 processes, checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    go_on(folder, tiny_run(tiny_data, folder)[0], "run.steps=6").checked()
    return folder


def go_on(folder: Path, config: Path, *overrides: str) -> Finished:
    common = ["run.eval_every=0", "run.save_every=2", "run.keep_last=0", f"run.dir={folder}/runs"]
    return launch_deepspeed(2, PRETRAIN, "--config", str(config), *common, *overrides)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, to be damaged."""
    return Path(shutil.copytree(trained / "runs" / "tiny", tmp_path / "runs" / "tiny"))


def asked(trained: Path, run: Path, *overrides: str) -> Checked:
    """The run, about to be started again in another folder."""
    config, tree = load_config(trained / "run.yaml", [f"run.dir={run.parent}", "run.save_every=2", *overrides])
    return check_run(config, tree, 1)


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut_off, SECOND),
    "a bit flipped": (flip_a_bit, SECOND),
    "incomplete": (Path.unlink, SECOND),
    "index truncated": (cut_off, "checkpoint.json"),
    "a bit of the index flipped": (flip_a_bit, "checkpoint.json"),
    "index missing": (Path.unlink, "checkpoint.json"),
}


@pytest.mark.launch
@pytest.mark.parametrize("resume", ["auto", "required"])
@pytest.mark.parametrize("harm", HARMS)
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    harm: str, resume: str, trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Days lost to one bad sector, or trained on from it; `required` too takes the newest good one, and stops where none is."""
    damage, name = HARMS[harm]
    damage(step(run, 6) / name)
    checked = asked(trained, run, f"run.resume={resume}")
    found = find_start(checked, say=True)
    said = capsys.readouterr()
    assert found is not None and found.step == 4 and str(step(run, 6)) in said.err and name in said.err, said.err
    for number in (2, 4):
        damage(step(run, number) / name)
    before = snapshot(run)
    with pytest.raises(UserError, match="holds no checkpoint to resume from") as refused:
        find_start(checked, say=False)
    assert all(str(step(run, number)) in str(refused.value) for number in (2, 4, 6)) and snapshot(run) == before


@pytest.mark.launch
def test_processes_share_the_verification(trained: Path, run: Path) -> None:
    """The file that another process verifies is bad: the first must hear of it, and all go back to the same checkpoint."""
    flip_a_bit(step(run, 6) / SECOND)
    again = go_on(run.parent.parent, trained / "run.yaml", "run.steps=8").checked()
    assert f"cannot resume from {step(run, 6)}" in again.stderr and SECOND in again.stderr
    assert f"resuming from {step(run, 4)}" in again.stdout
    assert {number: losses(run)[number] for number in range(1, 5)} == {n: losses(trained / "runs" / "tiny")[n] for n in range(1, 5)}
    assert sorted(losses(run)) == [*range(1, 9)] and Checkpoint(step(run, 8)).problem() is None


def test_files_are_shared_out(trained: Path) -> None:
    """A file that nobody verifies, or each process the other's, which is not in its host's memory."""
    found = Checkpoint(step(trained / "runs" / "tiny", 6))
    assert [found.share(rank, 2) for rank in (0, 1)] == [["rank_00000.safetensors"], [SECOND]]
    for world in (1, 2, 3, 5):
        assert sorted(name for rank in range(world) for name in found.share(rank, world)) == sorted(found.files)


@pytest.mark.launch
@pytest.mark.parametrize("gone", ["folder", "content", "folder, and nothing names one"])
def test_run_that_had_saved_does_not_start_at_0(gone: str, trained: Path, run: Path) -> None:
    """DeepSpeed warns and begins again at step 0, over the metrics of weeks; so does whoever forgets to mount a disk."""
    shutil.rmtree(run / "checkpoints")
    if gone == "content":
        (run / "checkpoints").mkdir()
    if "nothing" in gone:
        (run / "latest").unlink()
    before = snapshot(run)
    for resume in ("auto", "required"):
        with pytest.raises(UserError, match="no checkpoint") as refused:
            find_start(asked(trained, run, f"run.resume={resume}"), say=True)
        assert str(run) in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert snapshot(run) == before
    assert find_start(asked(trained, run, "run.resume=never"), say=True) is None  # said in so many words


@pytest.mark.parametrize("every", [0, 100])
def test_run_killed_before_its_first_save_starts_again_and_says_so(
    every: int, trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command must go on after a kill at any time, also one before there was anything to go on from."""
    shutil.rmtree(run / "checkpoints")
    (run / "latest").unlink()
    assert find_start(asked(trained, run, f"run.save_every={every}"), say=True) is None
    said = capsys.readouterr()
    assert "starting at step 0" in said.out and "was at step 6 and had not saved yet" in said.err
    lines = [json.dumps({"step": number, "loss": 1.0}) for number in range(1, 200)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 20')
    assert find_start(asked(trained, run, "run.save_every=100"), say=True) is None  # the first save may not have been through
    assert "was at step 199" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 200})]) + "\n")
    with pytest.raises(UserError, match=r"goes to step 200"):
        find_start(asked(trained, run, "run.save_every=100"), say=True)


@pytest.mark.launch
def test_nothing_there_is_a_start(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`auto` begins, and says so; `required` stops."""
    assert find_start(asked(trained, tmp_path / "runs" / "tiny"), say=True) is None
    said = capsys.readouterr()
    assert "starting at step 0" in said.out and said.err == ""
    with pytest.raises(UserError, match="none was written"):
        find_start(asked(trained, tmp_path / "runs" / "tiny", "run.resume=required"), say=True)
    assert not (tmp_path / "runs").exists()
