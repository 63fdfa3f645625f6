"""Faults, injected for real: whoever is killed, told to stop or hangs, nothing lives on, the folder tells, and the run goes on."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import CHECKOUT, TinyData, process_environment, tiny_run
from jobs import BIG, Job, deepspeed_job, log, losses
from megaspark.checkpoint import Checkpoint
from saves import small_disk

STEPS = 150


# ---- one process, no launcher


@pytest.fixture(scope="module")
def alone(tiny_data: TinyData) -> Callable[..., subprocess.Popen[str]]:
    """Starts a run in one process in a folder."""

    def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
        config, _ = tiny_run(tiny_data, folder)
        command = [sys.executable, "-m", "megaspark", "pretrain", "--config", str(config), "run.eval_every=0", "run.save_every=0"]
        return subprocess.Popen(
            [*command, *overrides], env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=CHECKOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    return start


def read_until(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout
    for line in child.stdout:
        if word in line:
            return
    raise AssertionError(f"ended with {child.wait()} before it said {word!r}")


def test_signals_save_and_stop_and_the_run_goes_on_bit_for_bit(alone: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """A preemption that loses the hours since the last checkpoint, or a save by signal that disturbs the run."""
    run = tmp_path / "runs" / "tiny"
    steps = f"run.steps={STEPS}"
    child = alone(tmp_path, steps)
    read_until(child, "step 5/")
    child.send_signal(signal.SIGUSR1)
    read_until(child, "told by a signal to save: at step")
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and "stop: at step" in said, said
    stopped = max(losses(run))
    saved = sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
    assert 5 <= saved[0] < saved[1] == stopped < STEPS
    assert "SIGUSR1" in log(run, 0) and "SIGTERM" in log(run, 0) and f"stopped at step {stopped}" in log(run, 0)
    # Until the second half, then through: the same losses as in a run without any signal.
    end = [steps, f"run.stop_after={stopped + 5}"]
    second = alone(tmp_path, *end)
    assert f"step_{stopped:08d}" in second.communicate(timeout=60)[0] and second.returncode == 0
    whole = alone(tmp_path, *end, "run.name=whole")
    whole.communicate(timeout=120)
    assert whole.returncode == 0 and losses(tmp_path / "runs" / "whole") == losses(run) and len(losses(run)) == stopped + 5


def test_run_whose_output_nobody_reads_saves_and_stops(alone: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """`... | head`, or the ssh connection lost: BrokenPipeError at the next line told, and everything since the last save gone."""
    child = alone(tmp_path, f"run.steps={STEPS}")
    read_until(child, "step 3/")
    assert child.stdout
    child.stdout.close()
    assert child.wait(60) == 0
    run = tmp_path / "runs" / "tiny"
    assert "nobody reads its output" in log(run, 0) and "Traceback" not in log(run, 0)
    assert (run / "latest").read_text().strip() == f"step_{max(losses(run)):08d}" and max(losses(run)) < STEPS


# ---- two processes under `deepspeed`


@pytest.fixture(scope="module")
def undisturbed(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing happened to."""
    job = deepspeed_job(folder := tmp_path_factory.mktemp("whole"), tiny_run(tiny_data, folder)[0], *OVERRIDES)
    assert job.ends_within(180) == 0, job.told()
    assert len(losses(job.run)) == STEPS
    return losses(job.run)


OVERRIDES = [f"run.steps={STEPS}", "run.save_every=10", "run.eval_every=0", "run.hang_after_s=6"]
Drill = tuple[Callable[[Job], None], set[int], tuple[str, ...]]


def sent(number: signal.Signals, whom: str) -> Callable[[Job], None]:
    """Sends a signal to "runner", "launcher", "group" (as Ctrl-C does) or a rank."""

    def send(job: Job) -> None:
        if whom == "group":
            os.killpg(job.child.pid, number)
        elif whom == "runner":
            job.child.send_signal(number)
        else:
            (job.launcher() if whom == "launcher" else job.worker(int(whom))).send_signal(number)

    return send


KILL, TERM, INT, STOP, USR2 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGUSR2
# What is done to the run, which exit statuses of `deepspeed` are right, and what its logs must say.
DRILLS: dict[str, Drill] = {
    "kill -9 of a worker": (sent(KILL, "1"), {247, 1}, ("rank 1 (watchdog): killed in step",)),
    "kill -9 of launch.py": (sent(KILL, "launcher"), {-15}, ("its launcher was killed",)),
    "kill -9 of deepspeed": (sent(KILL, "runner"), {-9}, ("the deepspeed command that started it has ended", "stopped at step")),
    "SIGTERM to a worker": (sent(TERM, "1"), {0}, ("told to save and stop (SIGTERM)", "stopped at step")),
    "SIGUSR2 to a worker": (sent(USR2, "0"), {0}, ("told to save and stop (SIGUSR2)", "stopped at step")),
    "SIGTERM to launch.py": (sent(TERM, "launcher"), {1}, ("told to save and stop (SIGTERM)", "stopped at step")),
    "SIGTERM to deepspeed": (sent(TERM, "runner"), {-15}, ("the deepspeed command that started it has ended", "stopped at step")),
    "SIGINT to deepspeed": (sent(INT, "runner"), {-2, 1, 130}, ("the deepspeed command that started it", "stopped at step")),
    "Ctrl-C": (sent(INT, "group"), {-2, 1, 130}, ("told to save and stop (SIGINT", "stopped at step")),
    "SIGHUP": (sent(signal.SIGHUP, "group"), {-1}, ("told to save and stop (SIGHUP)",)),
    "a rank stopped": (sent(STOP, "1"), {250}, ("HANGS", "State: T (stopped)", "Thread 0x", "ended by its watchdog")),
}


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("drill", DRILLS)
def test_fault_leaves_nothing_behind_and_the_run_goes_on(
    drill: str, tiny_data: TinyData, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    """Processes that train on unseen, a status that says all went well, steps computed otherwise the second time."""
    harm, statuses, words = DRILLS[drill]
    config, _ = tiny_run(tiny_data, tmp_path)
    job = deepspeed_job(tmp_path, config, *OVERRIDES)
    job.wait_for_step(12)
    harm(job)
    status = job.ends_within(60)
    logs = job.logs()
    print(f"{drill}: exit status {status}\n{logs}")
    assert status in statuses and all(word in logs for word in words), (status, job.told())
    reached = max(losses(job.run))
    assert reached < STEPS, "the run was over before anything happened to it: nothing was tested"
    if "stopped at step" in logs:
        assert (job.run / "latest").read_text().strip() == f"step_{reached:08d}"
    for rank in (0, 1):  # whatever happened, each has its last word
        assert len(log(job.run, rank).splitlines()) > 1
    again = deepspeed_job(tmp_path, config, *OVERRIDES)
    assert again.ends_within(180) == 0, again.told()
    assert losses(job.run) == undisturbed


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("whom, status", [("runner", -9), ("launcher", 0)])
def test_kill_before_training_begins(whom: str, status: int, tiny_data: TinyData, tmp_path: Path) -> None:
    """A run begun by workers that nobody waits for any more: those who start it were gone before it knew of them."""
    config, _ = tiny_run(tiny_data, tmp_path)
    job_folder = tmp_path / "runs" / "tiny"
    job_folder.mkdir(parents=True)
    with (job_folder / "config.yaml").open("w") as lock:  # as if another run were in there: they wait before they begin
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = deepspeed_job(tmp_path, config, *OVERRIDES)
        end = time.monotonic() + 120
        while "waiting up to" not in job.output.read_text():
            assert job.child.poll() is None and time.monotonic() < end, job.told()
            time.sleep(0.1)
        sent(KILL, whom)(job)
        assert job.child.wait(60) == status
        if whom == "launcher":  # the kernel ends its workers, whatever they do; of this time DeepSpeed says that all went well
            assert job.ends_within(20) == 0
    job.ends_within(60)
    assert max(losses(job.run), default=0) < 3
    assert ("has ended" in job.logs() and "stopped at step" in job.logs()) == (whom == "runner")


# ---- a save in the background


def test_kill_in_mid_write_loses_only_that_save(alone: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """kill -9 while a thread writes: the half one must never be taken for a checkpoint, and the run goes on from the one before."""
    run, common = tmp_path / "runs" / "tiny", [*BIG, "run.steps=8", "run.save_every=3"]
    whole = alone(tmp_path, *common, "run.name=whole")
    said = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, said
    child = alone(tmp_path, *common)
    half = run / "checkpoints" / "step_00000006.partial" / "rank_00000.safetensors"
    end = time.monotonic() + 200
    while not (half.exists() and half.stat().st_size):
        assert child.poll() is None and time.monotonic() < end, "ended before its second save"
        time.sleep(0.0005)
    child.send_signal(signal.SIGSTOP)  # so that what is looked at is what is killed
    written, full = half.stat().st_size, (run / "checkpoints" / "step_00000003" / half.name).stat().st_size
    child.kill()
    child.communicate()
    assert 0 < written < full, f"{written} of {full} bytes: it was not killed in mid-write"
    assert half.exists() and max(losses(run)) >= 6 and (run / "latest").read_text().strip() == "step_00000003"
    again = alone(tmp_path, *common)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and "resuming from" in said and "step_00000003" in said, said
    assert losses(run) == losses(tmp_path / "runs" / "whole") and len(losses(run)) == 8
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_full_disk_in_a_background_save_stops_only_the_save(alone: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """A disk that fills up while a thread writes: the run trains on, says so, ends non-zero; with room again it goes on."""
    with small_disk(tmp_path / "runs", "1m") as resize:
        run, common = tmp_path / "runs" / "tiny", ["run.save_every=4", "run.keep_last=0"]
        child = alone(tmp_path, *common, "run.steps=20")
        said = child.communicate(timeout=120)[0]
        saved = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert child.returncode == 1 and "CHECKPOINT NOT WRITTEN" in said and "No space left" in said, said
        assert sorted(losses(run)) == [*range(1, 21)]
        assert 1 <= len(saved) < 5 and all(Checkpoint(run / "checkpoints" / name).problem() is None for name in saved)
        assert (run / "latest").read_text().strip() == saved[-1] and not saved[-1].endswith("20")
        resize("64m")
        before = losses(run)
        again = alone(tmp_path, *common, "run.steps=20")
        assert f"resuming from {run / 'checkpoints' / saved[-1]}" in again.communicate(timeout=120)[0] and again.returncode == 0
        assert losses(run) == before and (run / "latest").read_text().strip() == "step_00000020"
