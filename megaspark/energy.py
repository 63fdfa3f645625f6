"""Joules that this host spent since the last reading, from whatever counters it lets us read; None where there are none.

Best first: the driver's energy counter of each visible NVIDIA GPU, else its power, sampled and integrated; beside either, RAPL
of the CPU packages and their memory. `EnergyMeter` is the face of it all and never raises for hardware that is absent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
SAMPLE_S = 0.1  # NVML refreshes its power reading every 20-100 ms


class _Counter(Protocol):
    def read(self) -> float:
        """Joules since the last call; raises OSError or RuntimeError if it cannot be read."""
        ...

    def close(self) -> None: ...


class EnergyMeter:
    """Sums the energy counters of this host; `source` says which there are, None if none.

    One process a host is to hold it, for the counters are the host's. `powercap` is the folder of the RAPL zones.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        gpus, gpu_source = _gpu_counters()
        zones = _rapl_zones(powercap)
        self._counters: list[_Counter] = [*gpus, *zones]
        parts = [gpu_source, f"RAPL ({', '.join(zone.name for zone in zones)})" if zones else None]
        self.source: str | None = " + ".join(part for part in parts if part) or None

    def read(self) -> float | None:
        """Joules since the last call, or since this meter was made; None without counters, or if one failed just now."""
        joules, failed = 0.0, not self._counters
        for counter in self._counters:  # all of them, so that the next interval begins here for each
            try:
                joules += counter.read()
            except (OSError, RuntimeError, ValueError):
                failed = True
        return None if failed else joules

    def close(self) -> None:
        """Stops what samples in the background; readings are None from here on."""
        for counter in self._counters:
            counter.close()
        self._counters = []


class RaplZone:
    """The energy counter of a CPU package or its memory, in sysfs; it wraps around at `max_energy_range_uj`.

    Source: the kernel's Documentation/power/powercap/powercap.rst.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = (folder / "name").read_text().strip()
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self._last_uj = self._microjoules()

    def _microjoules(self) -> int:
        return int((self.folder / "energy_uj").read_text())

    def read(self) -> float:
        """Joules since the last call, of which at most one wrap-around is noticed."""
        now = self._microjoules()
        spent = now - self._last_uj
        self._last_uj = now
        return (spent if spent >= 0 else spent + self._range_uj) / 1e6

    def close(self) -> None:
        """Nothing is held open."""


class EnergyCounter:
    """A counter of joules that only grows, such as a GPU driver's own."""

    def __init__(self, joules: Callable[[], float]) -> None:
        self._joules = joules
        self._last = joules()

    def read(self) -> float:
        """Joules since the last call; a counter that the driver has reset begins anew."""
        now = self._joules()
        spent, self._last = now - self._last, now
        if spent < 0:
            raise RuntimeError("the energy counter was reset")
        return spent

    def close(self) -> None:
        """Nothing is held open."""


class PowerSampler:
    """Integrates sampled power over time, by the trapezoid rule, in a thread of its own."""

    def __init__(self, watts: Callable[[], float], sample_s: float = SAMPLE_S) -> None:
        self._watts, self._sample_s = watts, sample_s
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last = (time.perf_counter(), watts())
        self._failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._sample_s):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            try:
                now, watts = time.perf_counter(), self._watts()
            except Exception as error:  # told to whoever reads next
                self._failure = error
                return
            then, before = self._last
            self._joules += (now - then) * (before + watts) / 2
            self._last = (now, watts)

    def read(self) -> float:
        """Joules since the last call."""
        self._sample()
        with self._lock:
            joules, self._joules = self._joules, 0.0
            failure, self._failure = self._failure, None
        if failure:
            raise RuntimeError("a power reading failed") from failure
        return joules

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(timeout=5)


def _rapl_zones(powercap: Path) -> list[RaplZone]:
    """Readable zones of packages and memory. (psys holds the packages again; core and uncore are parts of them.)"""
    zones = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        try:
            zone = RaplZone(folder)
        except (OSError, ValueError):  # since 2020 only root may read it
            continue
        if zone.name.startswith("package") or zone.name == "dram":
            zones.append(zone)
    return zones


def _gpu_counters() -> tuple[list[_Counter], str | None]:
    """A counter for every visible NVIDIA GPU and what they are, or none at all: half of the GPUs would be a wrong sum."""
    try:
        import pynvml
    except ImportError:
        return [], None
    try:
        pynvml.nvmlInit()
        handles = _visible_gpus(pynvml)
    except (pynvml.NVMLError, ValueError):
        return [], None
    if not handles:
        return [], None

    def energy(handle: Any) -> Callable[[], float]:
        return _calls(pynvml, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)  # millijoules

    def power(handle: Any) -> Callable[[], float]:
        return _calls(pynvml, lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3)  # milliwatts

    try:
        return [EnergyCounter(energy(handle)) for handle in handles], f"NVML energy counters of {len(handles)} GPUs"
    except RuntimeError:
        pass
    samplers: list[_Counter] = []
    try:
        for handle in handles:
            samplers.append(PowerSampler(power(handle)))
    except RuntimeError:
        for sampler in samplers:
            sampler.close()
        return [], None
    return samplers, f"NVML power of {len(handles)} GPUs, sampled every {SAMPLE_S:g} s"


def _calls(pynvml: Any, function: Callable[[], float]) -> Callable[[], float]:
    """`function` with NVML's errors as RuntimeError."""

    def call() -> float:
        try:
            return function()
        except pynvml.NVMLError as error:
            raise RuntimeError(str(error)) from error

    return call


def _visible_gpus(pynvml: Any) -> list[Any]:
    """NVML handles of the GPUs that CUDA_VISIBLE_DEVICES leaves visible: all, or those that it names by index or UUID."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
        if name != "-1"
    ]
