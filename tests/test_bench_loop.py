"""The bench of our training loop beside a bare one: both must do the same work, or their ratio says nothing."""

from __future__ import annotations

import pytest

from megaspark.tools import bench_loop, bench_train

TINY = ({"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 24, "vocab": 64}, 2, 16)


@pytest.mark.launch
def test_both_loops_compute_the_same_losses() -> None:
    """Other batches, another optimizer or another start on one side, and a start of which some part is not counted."""
    line = bench_loop.compare(TINY, "fp32", processes=1, threads=1, rounds=3, steps=2)
    assert line["ours_loss"] == line["theirs_loss"] and line["rounds"] == 3
    assert line["ours_tokens_per_s"] > 0 and line["theirs_tokens_per_s"] > 0
    parts_s = line["first_step_parts_s"]
    assert [*parts_s] == ["import", "settings", "join", "model", "initialize", "rest", "first_step"]
    assert sum(parts_s.values()) == pytest.approx(line["first_step_s"], abs=0.05) and parts_s["import"] > 0.1


def test_overhead_is_of_our_loop() -> None:
    """Above 0 we are slower, in the median of what was taken round by round."""
    ours = [{"cpu_s": 1.1 * s, "wall_s": 1.2 * s, "loss": 5.0} for s in (1.0, 2.0, 4.0)]
    theirs = [{"cpu_s": s, "wall_s": s, "loss": 5.0} for s in (1.0, 2.0, 4.0)]
    line = bench_loop.summary({"ours": ours, "theirs": theirs, "first_step_s": {"import": 1.25, "model": 2.0}}, 100)
    assert (line["overhead_cpu"], line["overhead_wall"], line["overhead_cpu_s"]) == (0.1, 0.2, 0.2)
    assert line["overhead_cpu_range"] == [0.1] * 4 and line["first_step_s"] == 3.25
    assert (line["ours_tokens_per_s"], line["theirs_tokens_per_s"]) == (42, 50)


def test_peers_are_measured_each_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed alone must not bring a run of our model alone with it, nor be taken for a model."""
    asked = []
    monkeypatch.setattr(bench_train, "compare", lambda *said: asked.append(said[3]) or [{}])
    monkeypatch.setattr(bench_loop, "compare", lambda *said: asked.append(said[2]) or {})
    for peers in ([], ["deepspeed"], ["hf", "deepspeed"]):
        assert bench_train.main(["--size", "5m", "--precision", "fp32", *(f"--peer={peer}" for peer in peers)]) == 0
    assert asked == [["ours"], 1, 2, ["ours", "hf"], 1, 2]
