"""A copy of the model shared by processes of several hosts: the losses of one process, and an end to every wait between stages."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from conftest import TinyData
from jobs import Job, losses
from megaspark.watchdogs import DEATH_TICKS, GRACE_TICKS
from namespaces import Hosts, kill, make_hosts, pdsh

STEPS, HANG_AFTER_S = 40, 8
COMMON = [f"run.steps={STEPS}", "run.save_every=10", f"run.hang_after_s={HANG_AFTER_S}", "model.ffn=42"]  # 42 features: two halves
PIPELINE, TENSOR = "parallel.pipeline=2", "parallel.tensor=2"
# As the matrix of layouts asks of fp32, over as many steps as it has.
TOLERANCE, COMPARED_STEPS = 1e-5, 20
pytestmark = [pytest.mark.long, pytest.mark.launch]


@pytest.fixture(scope="module")
def two(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    yield from make_hosts(tmp_path_factory.mktemp("two"), 2, tiny_data)


def whole_run(two: Hosts, name: str, hosts: int, slots: int, *overrides: str) -> dict[int, float]:
    """The losses of a run that nothing happens to."""
    job = two.start(pdsh(hosts, slots), name, *COMMON, *overrides)
    assert job.ends_within(240) == 0, job.told()
    assert len(losses(job.run)) == STEPS
    return losses(job.run)


@pytest.fixture(scope="module")
def alone(two: Hosts) -> dict[int, float]:
    """The losses of one process."""
    return whole_run(two, "alone", 1, 1)


@pytest.fixture(scope="module")
def pipeline(two: Hosts) -> dict[int, float]:
    """The losses of a stage on each host."""
    return whole_run(two, "pipeline", 2, 1, PIPELINE)


def apart(found: dict[int, float], reference: dict[int, float]) -> float:
    """The largest relative difference."""
    return max(abs(found[step] - reference[step]) / reference[step] for step in range(1, COMPARED_STEPS + 1))


def test_pipeline_over_hosts_is_one_process(alone: dict[int, float], pipeline: dict[int, float]) -> None:
    """Stages that meet over the wrong interface, or count a micro-batch of another step."""
    assert apart(pipeline, alone) < TOLERANCE, apart(pipeline, alone)


LAYOUTS = {"tensor groups on hosts, data over them": TENSOR, "a stage on each host, data on it": PIPELINE}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_processes_on_two_hosts_are_one_process(layout: str, two: Hosts, alone: dict[int, float]) -> None:
    """Groups made of the wrong processes, where there is more than one on a host."""
    found = whole_run(two, layout.replace(" ", "-").replace(",", ""), 2, 2, LAYOUTS[layout])
    assert apart(found, alone) < TOLERANCE, apart(found, alone)


DRILLS = {
    "kill -9 of the last stage": (kill(signal.SIGKILL, "worker", on=2), "killed in step"),
    "kill -9 of the first stage": (kill(signal.SIGKILL, "worker", on=1), "killed in step"),
    "the last stage stopped": (kill(signal.SIGSTOP, "worker", on=2), "State: T (stopped)"),
    "the first stage stopped": (kill(signal.SIGSTOP, "worker", on=1), "State: T (stopped)"),
}


@pytest.mark.parametrize("drill", DRILLS)
def test_fault_in_a_pipeline_leaves_nothing_behind_and_the_run_goes_on(
    drill: str, two: Hosts, pipeline: dict[int, float]
) -> None:
    """A stage that waits in gloo, half an hour, for activations or gradients of one that is gone or stands still."""
    harm, word = DRILLS[drill]
    name = drill.replace(" ", "-").replace("-9", "9")
    job = two.start(pdsh(2), name, *COMMON, PIPELINE)
    job.wait_for_step(12)
    harmed = time.time()
    harm(two, job)
    status = job.ends_within(60)
    print(f"{drill}: exit status {status}, {time.time() - harmed:.1f} s after it\n{job.told()}")
    assert word in job.logs() and status != 0
    assert 12 <= max(losses(job.run)) < STEPS, "nothing was tested"
    if "stopped" in drill:
        check_hang(job, harmed)
    again = two.start(pdsh(2), name, *COMMON, PIPELINE)
    assert again.ends_within(240) == 0, again.told()
    assert losses(job.run) == pipeline


def check_hang(job: Job, harmed: float) -> None:
    """Every rank's stacks are in its log, and it was ended when the configured time and the watchdog's grace were over."""
    for path in sorted(job.run.glob("logs/*")):
        text = path.read_text()
        assert "HANGS" in text and 'File "' in text.partition("HANGS")[2], f"{path.name} has no stacks:\n{text}"
        [ended] = re.findall(r"^(\S+ \S+) .*ended by its watchdog", text, re.MULTILINE)
        took_s = datetime.fromisoformat(ended).timestamp() - harmed
        # One tick until a second of silence counts, and what a loaded machine takes to do a step.
        assert took_s < HANG_AFTER_S + GRACE_TICKS + DEATH_TICKS + 5, (path.name, took_s)
