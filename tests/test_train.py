"""The command that users type, with real processes: training, resume after kill -9, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import CHECKOUT, Finished, TinyData, free_port, launch_deepspeed, process_environment, snapshot, tiny_run

PRETRAIN = CHECKOUT / "megaspark" / "pretrain.py"


def losses(run: Path) -> dict[int, float]:
    """Loss by step, exactly as stored; a later line of a step replaces an earlier one."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "split" not in line}


def pretrain(processes: int, config: Path, *overrides: str) -> Finished:
    return launch_deepspeed(processes, PRETRAIN, "--config", str(config), *overrides)


def alone(*arguments: str, cwd: Path = CHECKOUT) -> Finished:
    """`python -m megaspark ...` in one process."""
    command = [sys.executable, "-m", "megaspark", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=process_environment(), timeout=120)
    return Finished(done.returncode, done.stdout, done.stderr)


def kill_in_mid_run(config: Path, run: Path, lines: int, *overrides: str) -> None:
    """Starts a 2-process run and kills the launcher, its helper and all workers with -9 after so many metrics lines."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    child = subprocess.Popen(
        [*command, str(PRETRAIN), "--config", str(config), *overrides], start_new_session=True, env=process_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    metrics, end = run / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert child.poll() is None and time.monotonic() < end, "the run ended, or hung, before it could be killed"
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)  # `deepspeed` and launch.py; the workers ask the kernel to end with launch.py
    child.wait()


@pytest.mark.launch
@pytest.mark.parametrize("layout", [["deepspeed=zero1.json"], ["deepspeed=zero3.json"], ["parallel.pipeline=2"]], ids=str)
def test_killed_run_goes_on_bit_for_bit(layout: list[str], tiny_data: TinyData, tmp_path: Path) -> None:
    """Weights, moments, step count, learning rate, position in the data: whichever is not restored changes the losses."""
    common = [*layout, "run.precision=bf16", "run.save_every=4", "run.eval_every=6", "run.eval_batches=1", "run.steps=14"]
    config, _ = tiny_run(tiny_data, tmp_path)
    whole = pretrain(2, config, "run.name=whole", *common).checked()
    assert "no checkpoint" in whole.stdout  # starting at 0 is said, never silent
    assert ("its stages stood idle" in whole.stdout) == ("parallel.pipeline=2" in layout)
    kill_in_mid_run(config, tmp_path / "runs/cut", 11, "run.name=cut", *common)
    reached = max(losses(tmp_path / "runs/cut"))
    assert reached < 14, "the run was over before it was killed: nothing was tested"
    resumed = pretrain(2, config, "run.name=cut", *common).checked()
    assert "resuming from" in resumed.stdout
    assert losses(tmp_path / "runs/cut") == losses(tmp_path / "runs/whole")
    assert len(losses(tmp_path / "runs/whole")) == 14


@pytest.mark.launch
def test_killed_launcher_leaves_no_worker(tiny_data: TinyData, tmp_path: Path) -> None:
    """DeepSpeed's launcher, killed, leaves its workers training for ever, on a cluster unseen."""
    config, overrides = tiny_run(tiny_data, tmp_path, run__steps="100000", run__save_every="0", run__eval_every="0")
    kill_in_mid_run(config, tmp_path / "runs/tiny", 3, *overrides)
    end = time.monotonic() + 10
    while workers := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if str(config) in _command_line(pid)]:
        assert time.monotonic() < end, f"processes {workers} live on"
        time.sleep(0.1)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def finished(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished one-process run of 6 steps; its config lies beside `runs`."""
    folder = tmp_path_factory.mktemp("finished")
    every = {"run__save_every": "3", "run__eval_every": "3", "run__eval_batches": "1"}
    config, overrides = tiny_run(tiny_data, folder, run__steps="6", **every)
    alone("pretrain", "--config", str(config), *overrides).checked()
    return folder / "runs" / "tiny"


def test_run_folder_holds_what_others_read(finished: Path) -> None:
    """Scripts read metrics.jsonl by key, reload config.yaml, open TensorBoard; a missing figure is null, not a guess."""
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    keys = "step tokens loss lr grad_norm step_s tokens_per_s flops_per_s mfu joules joules_per_token memory_bytes".split()
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and all(set(keys) <= set(line) for line in steps)
    assert steps[0]["tokens"] == 8 * 24 and steps[0]["mfu"] is None and steps[0]["memory_bytes"] > 1e6
    evaluations = [(line["step"], line["split"]) for line in lines if "split" in line]
    assert evaluations == [(step, split) for step in (3, 6) for split in ("validation/a", "validation")]
    assert (finished / "latest").read_text().strip() == "step_00000006"
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"step_00000003", "step_00000006"}
    text = (finished / "config.yaml").read_text()
    assert "sha256" in text.splitlines()[0] and yaml.safe_load(text)["optim"]["betas"] == [0.9, 0.95]
    assert list(finished.glob("events.out.tfevents.*"))


def test_resolved_config_starts_the_same_run(finished: Path) -> None:
    """A run must be repeatable from what it left: the resolved config, without its base or overrides, is accepted as it is."""
    before = snapshot(finished / "checkpoints")
    done = alone("pretrain", "--config", str(finished / "config.yaml")).checked()
    assert "nothing to do" in done.stdout and snapshot(finished / "checkpoints") == before


def test_stop_after_ends_early_with_a_checkpoint(tiny_data: TinyData, tmp_path: Path, finished: Path) -> None:
    """A run in two halves, from two folders of the file system, is the run in one; the schedule must not shrink to the half."""
    config, overrides = tiny_run(tiny_data, tmp_path, run__steps="6", run__save_every="0", run__eval_every="0")
    alone("pretrain", "--config", str(config), *overrides, "run.stop_after=2", cwd=tmp_path).checked()
    assert (tmp_path / "runs/tiny/latest").read_text().strip() == "step_00000002"
    alone("pretrain", "--config", str(config), *overrides).checked()
    assert losses(tmp_path / "runs/tiny") == losses(finished)


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(finished: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    """Training from damaged weights, or silently from step 0, would look like success."""
    import shutil

    shutil.copytree(finished, tmp_path / "runs/tiny")
    config, _ = tiny_run(tiny_data, tmp_path)
    overrides = ["run.steps=7", "run.save_every=0", "run.eval_every=0"]
    file = tmp_path / "runs/tiny/checkpoints/step_00000006/rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = alone("pretrain", "--config", str(config), *overrides, "run.stop_after=4").checked()
    assert str(file) in done.stderr and "step_00000003" in done.stdout
    for folder in (tmp_path / "runs/tiny/checkpoints").iterdir():
        (folder / "rank_00000.safetensors").write_bytes(b"short")
    refused = alone("pretrain", "--config", str(config), *overrides)
    assert refused.returncode == 2 and "no checkpoint to resume from" in refused.stderr


def test_change_of_blend_and_length_in_mid_run(tiny_data: TinyData, tmp_path: Path) -> None:
    """Changed by hand between two starts, a blend repeats or loses samples unseen; planned, stopped and resumed it must not."""
    changes = "data.changes=[{sample: 16, blend: {a: 3, b: 1}}, {sample: 32, seq: 12}]"
    common = ["run.steps=6", "run.save_every=0", "run.eval_every=0", changes]
    config, _ = tiny_run(tiny_data, tmp_path)
    alone("pretrain", "--config", str(config), "run.name=whole", *common).checked()
    # The first part need not know of what is planned for later; the second may plan it still.
    alone("pretrain", "--config", str(config), "run.name=parts", *common[:-1], "run.stop_after=2").checked()
    alone("pretrain", "--config", str(config), "run.name=parts", *common).checked()
    assert losses(tmp_path / "runs/parts") == losses(tmp_path / "runs/whole")
    lines = [json.loads(line) for line in (tmp_path / "runs/whole/metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [192, 384, 576, 768, 864, 960]  # 8 samples of 24, then of 12
    refused = alone("pretrain", "--config", str(config), "run.name=parts", "run.steps=9", changes.replace("16", "8"))
    assert refused.returncode == 2 and "data.changes" in refused.stderr, refused.stderr[-2000:]
    middle = alone("pretrain", "--config", str(config), "run.name=new", "data.changes=[{sample: 20, seq: 12}]")
    assert middle.returncode == 2 and "nearest: sample" in middle.stderr and not (tmp_path / "runs/new").exists()


REFUSALS: dict[str, tuple[list[str], list[str]]] = {
    "misspelled key": (["run.micro_bach=4"], ["run.micro_batch", "command line"]),
    "no data": (["data.train=nowhere"], ["nowhere", "megaspark prep"]),
    "foreign tokenizer": (["data.tokenizer=setup.cfg"], ["setup.cfg", "not the tokenizer"]),
    "batch does not divide": (["run.global_batch=7"], ["run.global_batch", "nearest"]),
    "no space": (["model.layers=100000000"], ["no space", "GB"]),
    "pipeline with ZeRO-3": (["parallel.pipeline=2", "deepspeed=zero3.json"], ["ZeRO stage 3", "zero1.json"]),
}


@pytest.mark.parametrize("mistake", REFUSALS)
def test_mistake_gets_one_line_and_writes_nothing(mistake: str, tiny_data: TinyData, tmp_path: Path) -> None:
    """A mistake found after minutes of start-up, behind a stack trace, or after the run folder was made, costs an hour."""
    overrides, words = REFUSALS[mistake]
    config, _ = tiny_run(tiny_data, tmp_path)
    done = alone("pretrain", "--config", str(config), *overrides)
    said = [line for line in done.stderr.splitlines() if line.startswith("megaspark:")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert all(word in said[0] for word in words), said[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.launch
def test_mistake_under_the_launcher_exits_2(tiny_data: TinyData, tmp_path: Path) -> None:
    """Two processes fail at once and the launcher ends the slower: the line must come out all the same, once."""
    config, _ = tiny_run(tiny_data, tmp_path)
    done = pretrain(2, config, "run.global_batch=6")
    said = [line for line in done.stderr.splitlines() if line.startswith("megaspark:")]
    assert done.returncode == 2 and len(said) == 1 and "run.global_batch=8" in said[0] and not (tmp_path / "runs").exists()


def test_checkpoint_of_another_model_or_data_is_refused(finished: Path, tiny_data: TinyData, tmp_path: Path) -> None:
    """Weights of another shape cannot be loaded; another data order would repeat and skip samples unseen."""
    import shutil

    shutil.copytree(finished, tmp_path / "runs/tiny")
    config, _ = tiny_run(tiny_data, tmp_path)
    before = snapshot(tmp_path)
    changes = {"model.ffn=48": "blocks.0.mlp.gate.weight", "run.seed=4": "run.seed", "data.seq=16": "data.seq"}
    for override, word in changes.items():
        done = alone("pretrain", "--config", str(config), "run.steps=9", override)
        assert done.returncode == 2 and word in done.stderr, done.stderr[-2000:]
    assert snapshot(tmp_path) == before


@pytest.mark.launch
@pytest.mark.parametrize("how", ["path", "module"])
def test_launcher_finds_us_from_anywhere(how: str, tiny_data: TinyData, tmp_path: Path) -> None:
    """By path from another folder, not installed, our package must be found and our module names must shadow nobody's.

    Nothing may be compiled at the start: it takes minutes, needs a compiler, and hangs for ever on a stale lock.
    """
    config, overrides = tiny_run(tiny_data, tmp_path, run__steps="1", run__eval_every="0")
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1", "--master_port", str(free_port())]
    stale = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"  # as a build that was killed leaves it
    stale.parent.mkdir(parents=True)
    stale.touch()
    environment = process_environment(TORCH_EXTENSIONS_DIR=str(stale.parents[1]))
    del environment["PYTHONPATH"]
    what = [str(PRETRAIN)] if how == "path" else ["--module", "megaspark.pretrain"]
    cwd = tmp_path if how == "path" else CHECKOUT
    command += [*what, "--config", str(config), *overrides]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "runs/tiny")) == 1
    assert [path for path in stale.parents[1].rglob("*") if path.is_file()] == [stale], "something was compiled"


def test_full_disk_stops_the_save_not_the_run(tiny_data: TinyData, tmp_path: Path, run_python: Callable[..., Finished]) -> None:
    """A file that cannot grow (RLIMIT_FSIZE, as a full disk would) must cost the checkpoint only, loudly, and exit non-zero."""
    config, overrides = tiny_run(tiny_data, tmp_path, run__steps="4", run__save_every="2", run__eval_every="0")
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from megaspark.cli import main
sys.exit(main(["pretrain", "--config", *sys.argv[1:]]))
"""
    done = run_python(code, str(config), *overrides)
    assert done.returncode == 1 and done.stdout.count("CHECKPOINT NOT WRITTEN") == 2, done.stderr[-2000:]
    assert len(losses(tmp_path / "runs/tiny")) == 4
    assert not list((tmp_path / "runs/tiny").glob("checkpoints/*"))
