"""The bench of checkpoints: its line must be JSON alone, its figures of what they are called, and nothing may stay on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaspark.cli import main
from megaspark.tools import bench_checkpoint


def test_bench_prints_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the saver says of each save on stdout would break whoever parses the lines."""
    assert main(["bench", "checkpoint", "--mb", "6", "--rounds", "2", "--threads", "1", "--dir", str(tmp_path)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["megabytes"] == 6 and line["rounds"] == 2 and line["stall_s"] > 0
    assert all(line[f"{name}_mb_per_s"] > 0 for name in ("save", "dd_write", "load", "dd_read"))
    for name in ("save_of_dd", "load_of_dd", "stall_of_save"):
        least, most = line[f"{name}_range"]
        assert 0 < least <= line[name] <= most
    assert line["verify_s"] < line["load_s"] and not list(tmp_path.iterdir())


def test_ratios_are_the_right_way_round() -> None:
    """Above 1 is faster than dd; a stall is a part of the save."""
    seconds = {
        "megabytes": 100.0, "dd_write_s": 1.0, "save_s": 2.0, "stall_s": 0.2, "background_s": 3.0, "slowed": 0.1,
        "verify_s": 0.3, "load_s": 0.5, "dd_read_s": 0.4,
    }  # fmt: skip
    line = bench_checkpoint.summary([seconds])
    assert (line["save_of_dd"], line["load_of_dd"], line["stall_of_save"]) == (0.5, 0.8, 0.1)
    assert [line[f"{name}_mb_per_s"] for name in ("save", "dd_write", "load", "dd_read")] == [50, 100, 200, 250]


def test_too_small_a_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found after the first gigabytes, on somebody's shared disk."""
    assert main(["bench", "checkpoint", "--mb", "1e9", "--dir", str(tmp_path)]) == 2
    assert "smaller --mb" in capsys.readouterr().err and not list(tmp_path.iterdir())
