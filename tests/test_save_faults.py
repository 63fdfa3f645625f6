"""Two processes whose threads write a checkpoint while they are told to stop, or are stopped: no half one, no wait without end."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from conftest import TinyData, tiny_run
from jobs import BIG, Job, deepspeed_job, log, losses
from megaspark.checkpoint import Checkpoint

pytestmark = [pytest.mark.long, pytest.mark.launch]
SAVES = [*BIG, "run.steps=24", "run.save_every=5", "run.eval_every=0", "run.hang_after_s=10"]


@pytest.fixture(scope="module")
def saving(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run of two processes that nothing happened to, whose saves last longer than a step."""
    job = deepspeed_job(folder := tmp_path_factory.mktemp("saving"), tiny_run(tiny_data, folder)[0], *SAVES)
    assert job.ends_within(180) == 0, job.told()
    return losses(job.run)


def stopped_in_mid_write(job: Job, step: int, rank: int) -> psutil.Process:
    """The worker, stopped while its thread writes the checkpoint of a step."""
    before, now = (job.run / "checkpoints" / f"step_{step - 5:08d}", job.run / "checkpoints" / f"step_{step:08d}.partial")
    file = f"rank_{rank:05d}.safetensors"
    job.wait_for_step(step - 3)
    worker, end = job.worker(rank), time.monotonic() + 60
    while not ((now / file).exists() and (now / file).stat().st_size):
        assert job.child.poll() is None and time.monotonic() < end, job.told()
        time.sleep(0.0005)
    worker.suspend()
    written, full = (now / file).stat().st_size, (before / file).stat().st_size
    assert 0 < written < full, f"{written} of {full} bytes: it was not stopped in mid-write"
    return worker


def test_stop_by_signal_during_a_background_save_completes_it(
    tiny_data: TinyData, tmp_path: Path, saving: dict[int, float]
) -> None:
    """A preemption that ends the thread in mid-write, writes a second checkpoint into the first one's memory, or waits for ever."""
    config, _ = tiny_run(tiny_data, tmp_path)
    job = deepspeed_job(tmp_path, config, *SAVES)
    writing = stopped_in_mid_write(job, 10, rank=1)
    job.worker(0).send_signal(signal.SIGTERM)  # the process that is not stopped: both must hear of it
    writing.resume()
    status, stopped = job.ends_within(60), max(losses(job.run))
    assert status == 0 and 10 < stopped < 15 and f"stopped at step {stopped}" in log(job.run, 1), (status, job.told())
    folders = sorted((job.run / "checkpoints").iterdir())
    assert [path.name for path in folders] == ["step_00000010", f"step_{stopped:08d}"]
    assert [Checkpoint(path).problem() for path in folders] == [None, None]
    again = deepspeed_job(tmp_path, config, *SAVES)
    assert again.ends_within(180) == 0, again.told()
    assert losses(job.run) == saving
    if f"the save of step {stopped} waited" not in job.told():  # tests/test_savers.py has a save that waits on any disk
        pytest.skip("all is well, but this disk is so fast that the write was over when the signal was heard")


def test_rank_stopped_in_a_background_save_ends_the_run(tiny_data: TinyData, tmp_path: Path, saving: dict[int, float]) -> None:
    """A save that never ends and holds everybody up; its half files taken for a checkpoint, or in the way of the next."""
    config, _ = tiny_run(tiny_data, tmp_path)
    job = deepspeed_job(tmp_path, config, *SAVES)
    stopped_in_mid_write(job, 10, rank=1)
    assert job.ends_within(60) == 250, job.told()
    assert "State: T (stopped)" in log(job.run, 1) and all("HANGS" in log(job.run, rank) for rank in (0, 1)), job.told()
    assert all('File "' in log(job.run, rank).partition("HANGS")[2] for rank in (0, 1)), job.told()
    assert (job.run / "latest").read_text().strip() == "step_00000005" and max(losses(job.run)) >= 10
    again = deepspeed_job(tmp_path, config, *SAVES)
    assert again.ends_within(180) == 0, again.told()
    assert losses(job.run) == saving
    assert sorted(path.name for path in (job.run / "checkpoints").iterdir()) == ["step_00000020", "step_00000024"]
