"""The figures of a step and their log: units, nulls, valid JSON, and what a crash or a resume does to the file."""

import json
import math
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaspark.flops import Flops
from megaspark.meters import (
    METRICS,
    MetricsLog,
    Pauses,
    StepMeter,
    TimeLeft,
    evaluation_line,
    peak_memory_bytes,
    terminal_line,
    to_json,
)
from saves import small_disk

KEYS = {
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "step_s",
    "tokens_per_s",
    "flops_per_s",
    "mfu",
    "joules",
    "joules_per_token",
    "memory_bytes",
}


def meter(peak: float | None = 1e9) -> StepMeter:
    """Meters steps of 1000 tokens of 600 FLOPs each."""
    return StepMeter(Flops(litespark=600, causal=500), peak, 1000)


def line_of(step: int, **more) -> dict:
    """A line with all figures."""
    found = meter().line(step=step, tokens=1000 * step, loss=2.5, lr=1e-3, grad_norm=0.5, joules=20.0)
    return {**found, **more}


def test_figures_follow_from_time_and_tokens():
    """Rates a factor off, or joules by token of another step, are what a benchmark would publish."""
    steps = meter()
    time.sleep(0.05)
    line = steps.line(step=3, tokens=3000, loss=2.5, lr=1e-3, grad_norm=0.5, joules=20.0)
    assert 0.05 <= line["step_s"] < 0.5
    assert line["tokens_per_s"] == pytest.approx(1000 / line["step_s"])
    assert line["flops_per_s"] == pytest.approx(600 * line["tokens_per_s"])
    assert line["flops_per_s_causal"] == pytest.approx(500 * line["tokens_per_s"])
    assert line["mfu"] == pytest.approx(line["flops_per_s"] / 1e9)
    assert line["joules_per_token"] == pytest.approx(0.02)
    assert set(line) >= KEYS


def test_what_was_not_measured_is_null():
    """A zero or a guess would be averaged into a result."""
    line = meter(peak=None).line(step=1, tokens=1000, loss=2.0, lr=1e-3, grad_norm=None, joules=None)
    stored = json.loads(to_json(line))
    assert [stored[key] for key in ("mfu", "joules", "joules_per_token", "grad_norm")] == [None] * 4


def test_restart_leaves_a_pause_out():
    """An evaluation or a checkpoint is no training time: it would sink tokens per second in every run that saves often."""
    steps = meter()
    time.sleep(0.3)
    steps.restart()
    assert steps.line(step=1, tokens=1000, loss=1.0, lr=1e-3, grad_norm=1.0, joules=None)["step_s"] < 0.25


def test_memory_is_this_process_own_peak():
    """A peak of the parent's (which getrusage hands on), or of now, would be blamed on the model."""
    code = (
        "import os; from megaspark.meters import peak_memory_bytes as peak\n"
        "before = peak(); block = b'x' * (64 << 20); del block; print(before, peak())"
    )
    ballast = bytearray(b"x" * (300 << 20))
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    del ballast
    before, after = map(int, output.split())
    assert before < 250 << 20
    assert 60 << 20 < after - before < 80 << 20
    assert peak_memory_bytes() > 300 << 20


@given(st.floats())
def test_any_loss_is_valid_json(loss):
    """NaN in metrics.jsonl breaks every strict reader just when a run diverged."""

    def refuse(name):
        raise ValueError(name)

    stored = json.loads(to_json({"step": 1, "loss": loss}), parse_constant=refuse)
    if math.isfinite(loss):
        assert stored == {"step": 1, "loss": loss}
    else:
        assert stored["loss"] is None
        assert str(float(stored["loss_nonfinite"])) == str(loss)


def test_lines_are_on_the_disk_at_once(tmp_path):
    """A killed run must not lose the lines of the steps that it took."""
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write(line_of(step))
        assert len((tmp_path / METRICS).read_text().splitlines()) == step
    log.close()


def test_resume_drops_later_and_torn_lines_and_counts_them(tmp_path):
    """Steps computed twice would be in the curve twice; a torn line would swallow the one appended to it."""
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(line_of(step))
    log.write({"step": 3, "tokens": 3000, "split": "validation", "loss": 2.0})
    log.close()
    whole = (tmp_path / METRICS).read_bytes()
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'{"step": 6, "lo')
    log = MetricsLog(tmp_path)
    assert log.keep_until(3) == 3  # 4, 5 and the torn one
    log.write(line_of(4, loss=9.0))
    log.close()
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    assert lines[:3] == whole.splitlines(keepends=True)[:3]
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4]
    assert json.loads(lines[-1])["loss"] == 9.0


def test_torn_line_that_looks_whole(tmp_path):
    """Without its newline a line may be cut inside its last number."""
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n{"step": 2}')
    assert MetricsLog(tmp_path).keep_until(5) == 1
    assert (tmp_path / METRICS).read_bytes() == b'{"step": 1}\n'


def test_resume_without_a_log_and_with_nothing_to_drop(tmp_path):
    """A checkpoint whose metrics were deleted still resumes; a log that is right is not rewritten."""
    assert MetricsLog(tmp_path).keep_until(10) == 0
    (tmp_path / METRICS).write_bytes(b'{"step": 10}\n')
    inode = (tmp_path / METRICS).stat().st_ino
    assert MetricsLog(tmp_path).keep_until(10) == 0
    assert (tmp_path / METRICS).stat().st_ino == inode


def test_tensorboard_holds_the_resumed_curve_once(tmp_path):
    """TensorBoard shows what it reads: training and validation apart, and after a resume the new values only."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(line_of(step, loss=float(step)))
    log.close()
    time.sleep(1.1)  # the writer names its file by the second
    log = MetricsLog(tmp_path)
    log.keep_until(3)
    for step in (4, 5, 6):
        log.write(line_of(step, loss=10.0 * step))
    log.write({"step": 6, "tokens": 6000, "split": "validation/a", "loss": 8.0, "bits_per_byte": None, "samples": 3})
    log.write({"step": 6, "tokens": 6000, "split": "validation", "loss": 7.0})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(6, 7)]
    assert [(e.step, e.value) for e in events.Scalars("validation/a/loss")] == [(6, 8)]
    assert "validation/a/bits_per_byte" not in events.Tags()["scalars"]
    assert "train/step" not in events.Tags()["scalars"]


def test_terminal_line():
    """The line that everybody watches: units, the time left, and nothing where nothing was measured."""
    line = line_of(40, step_s=2.0, tokens_per_s=12345.6, mfu=0.41234, joules_per_token=0.0213)
    assert terminal_line(line, 100, "0:02:00") == (
        "step 40/100 | loss 2.5000 | ETA 0:02:00 | 12,346 tokens/s | MFU 41.2% | 0.0213 J/token | lr 1.00e-03 | grad norm 0.500"
    )
    bare = terminal_line({**line, "mfu": None, "joules_per_token": None, "grad_norm": None, "loss": math.nan}, 40, "0:00:00")
    assert bare == "step 40/40 | loss nan | ETA 0:00:00 | 12,346 tokens/s | lr 1.00e-03"


def test_evaluation_line():
    """One source needs no second figure; bits per byte that could not be counted are not there."""
    of = {"loss": 2.0, "perplexity": 7.389, "bits_per_byte": 0.9, "samples": 8}
    several = {"validation/a": of, "validation/b/c": {**of, "loss": 3.0}, "validation": {**of, "loss": 2.5, "samples": 1600}}
    expected = "step 1,000 | validation loss 2.5000 | 0.9000 bits/byte | a 2.0000, b/c 3.0000 | 1,600 samples in 1.5 s"
    assert evaluation_line(1000, several, 1.5) == expected
    one = {"validation/a": of, "validation": {**of, "bits_per_byte": None}}
    assert evaluation_line(5, one, 0.04) == "step 5 | validation loss 2.0000 | 8 samples in 0.0 s"


@given(every=st.integers(0, 12), at_end=st.booleans(), last=st.integers(1, 40), data=st.data())
def test_pauses_to_come_are_counted(every, at_end, last, data):
    """One too few at the end, or the one that is due now: on a large model each is minutes."""
    step = data.draw(st.integers(1, last))
    due = [i for i in range(step, last + 1) if (every and i % every == 0) or (at_end and i == last)]
    assert Pauses(every, at_end).left(step, last) == len(due)


def test_time_left_has_evaluations_and_saves_in_it():
    """An ETA of the steps alone is hours short where saves are slow; one that says nothing of what it does not know lies."""
    left = TimeLeft(100, {"evaluation": Pauses(10, True), "save": Pauses(50, True)})
    left.stepped(60.0)  # the first one compiles
    assert left.told(1) == "1:39:00+"  # all that is known yet
    for _ in range(9):
        left.stepped(1.0)
    assert left.told(10) == "0:01:30+"
    left.paused("evaluation", 7.0)
    assert left.told(11) == f"{timedelta(seconds=89 + 9 * 7)}+"
    left.paused("save", 20.0)
    assert left.told(50) == str(timedelta(seconds=50 + 6 * 7 + 2 * 20))  # both are due after this step
    assert left.told(51) == str(timedelta(seconds=49 + 5 * 7 + 20))
    left.paused("evaluation", 9.0)
    assert left.told(51) == str(timedelta(seconds=49 + 5 * 8 + 20))
    left.steps_change()
    left.stepped(30.0)
    left.stepped(2.0)
    assert left.told(98) == str(timedelta(seconds=2 * 2 + 8 + 20))


def test_time_left_follows_the_latest_steps():
    """A run that slowed down an hour ago, or was slow only then, must not be told by the mean of its life."""
    left = TimeLeft(10_000, {})
    for seconds in [100.0] * 50 + [1.0] * 200:
        left.stepped(seconds)
    assert left.told(9_000) == "0:16:40"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_full_disk_keeps_the_lines_and_the_run(tmp_path, capsys):
    """A save that fills the disk from a thread must not end the run by way of its metrics, nor leave a gap in them."""
    with small_disk(tmp_path / "run", "64k") as resize:
        log = MetricsLog(tmp_path / "run")
        log.write({"step": 1, "loss": 1.5})
        with (tmp_path / "run" / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 512)
        for step in range(2, 400):  # more than the rest of the file's last page takes
            log.write({"step": step, "loss": 1 / step})
        assert "METRICS NOT WRITTEN" in capsys.readouterr().err
        assert len(log.path.read_bytes().splitlines()) < 399
        resize("4m")
        log.write({"step": 400, "loss": 0.5})
        log.close()
        assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [*range(1, 401)]
