"""Joules: the counter's wrap-around, missing or unreadable hardware, and the integral of sampled power."""

import math
import os
import time
from pathlib import Path

import pytest

from megaspark.energy import EnergyCounter, EnergyMeter, PowerSampler


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are of the CPU's counters, also on a machine with GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def zone(root: Path, folder: str, name: str, microjoules: int, range_uj: int = 1_000_000_000) -> Path:
    """A RAPL zone as sysfs shows it; returns its counter file."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def test_sums_packages_and_memory_and_nothing_twice(tmp_path):
    """core is a part of its package and psys the whole again: adding them counts joules twice."""
    files = [
        zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        zone(tmp_path, "intel-rapl:1", "package-1", 2_000_000),
        zone(tmp_path, "intel-rapl:0:0", "core", 3_000_000),
        zone(tmp_path, "intel-rapl:0:1", "dram", 4_000_000),
        zone(tmp_path, "intel-rapl:2", "psys", 5_000_000),
    ]
    meter = EnergyMeter(tmp_path)
    for i, file in enumerate(files):
        file.write_text(str(int(file.read_text()) + 10**i * 1_000_000))
    assert meter.read() == pytest.approx(1 + 10 + 1000)
    assert meter.read() == 0
    assert meter.source == "RAPL (package-0, dram, package-1)"


def test_wrap_around(tmp_path):
    """The counter of a busy server wraps every hour or so: a negative step, or a huge one, would spoil the sum of a run."""
    file = zone(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000, range_uj=262_143_328_850)
    meter = EnergyMeter(tmp_path)
    file.write_text("671150")
    assert meter.read() == pytest.approx(1.0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_for_us(tmp_path):
    """Without root the kernel's files are mode 0400: no figure, and no error."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1).chmod(0)
    assert EnergyMeter(tmp_path).source is None


@pytest.mark.parametrize("damage", ["empty", "words", "folder", "gone"])
def test_a_zone_that_cannot_be_read_is_left_out(tmp_path, damage):
    """Virtual machines show zones without working counters."""
    file = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    if damage in ("folder", "gone"):
        file.unlink()
    if damage == "folder":
        file.mkdir()  # reading it is an OSError, as a refused permission is
    else:
        file.write_text({"empty": "", "words": "none", "gone": ""}[damage])
    if damage == "gone":
        file.unlink()
    meter = EnergyMeter(tmp_path)
    assert (meter.source, meter.read()) == (None, None)
    meter.close()


def test_no_hardware_at_all(tmp_path):
    """Most containers have nothing: None, never zero joules."""
    meter = EnergyMeter(tmp_path / "absent")
    assert (meter.source, meter.read()) == (None, None)
    meter.close()


def test_a_counter_that_fails_for_once_spoils_one_interval_only(tmp_path):
    """A figure with a part missing is a guess; the next interval must begin at the failed one's end for the others."""
    zero, one = zone(tmp_path, "intel-rapl:0", "package-0", 0), zone(tmp_path, "intel-rapl:1", "package-1", 0)
    meter = EnergyMeter(tmp_path)
    zero.write_text("")
    one.write_text("5000000")
    assert meter.read() is None
    zero.write_text("0")
    assert meter.read() == 0


def test_gpu_counter_counts_from_the_last_reading():
    """The driver counts from its own start, not from ours; one that went back was reset and tells nothing."""
    values = iter([5000.0, 5010.0, 5010.5, 3.0, 4.0])
    counter = EnergyCounter(lambda: next(values))
    assert [counter.read(), counter.read()] == [10.0, 0.5]
    with pytest.raises(RuntimeError, match="reset"):
        counter.read()
    assert counter.read() == 1.0


def test_sampled_power_is_the_integral():
    """Rectangles, or samples lost while the main thread works, would be off by a power that changes within the interval."""
    start = time.perf_counter()

    def watts() -> float:
        return 100 + 50 * math.sin(10 * (time.perf_counter() - start))

    sampler = PowerSampler(watts, sample_s=0.005)
    begin = time.perf_counter() - start
    time.sleep(0.5)
    joules = sampler.read()
    end = time.perf_counter() - start
    sampler.close()
    expected = 100 * (end - begin) - 5 * (math.cos(10 * end) - math.cos(10 * begin))
    assert joules == pytest.approx(expected, rel=0.05)
    assert not sampler._thread.is_alive()


def test_a_failed_power_reading_is_told():
    """A GPU that fell off the bus must not look like one that rests."""
    readings = iter([100.0, 100.0])

    def watts() -> float:
        try:
            return next(readings)
        except StopIteration:
            raise OSError("gone") from None

    sampler = PowerSampler(watts, sample_s=60)
    assert sampler.read() >= 0
    with pytest.raises(RuntimeError):
        sampler.read()
    sampler.close()
