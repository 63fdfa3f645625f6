"""What a layout costs on a device, before anybody pays for it: memory, bytes sent, bubble, and a time that no run can beat."""

from __future__ import annotations

from dataclasses import dataclass

from megaspark.devices import Device
from megaspark.footprints import Footprint, footprint
from megaspark.volumes import Volume, volumes
from megaspark.workloads import Workload


@dataclass(frozen=True)
class Costs:
    """A workload on a device: its memory, what it sends, and the seconds that a step takes at the very least.

    compute_s: FLOPs, causal count and with what is computed again, at the device's peak, on the stage that has most of them,
    bubble included. overlapped_s, exposed_s: communication at the links' full rate, beside computing and between.
    """

    memory: Footprint
    sent: tuple[Volume, ...]
    bubble: float
    compute_s: float
    overlapped_s: float
    exposed_s: float
    fits: bool

    @property
    def bound_s(self) -> float:
        """No step is shorter, unless switches reduce on the way (NVLink SHARP halves what an all-reduce sends)."""
        return max(self.compute_s, self.overlapped_s) + self.exposed_s


def costs(work: Workload, device: Device) -> Costs:
    """The costs of a workload on a cluster of `device`; raises UserError where the device does not know the precision."""
    memory, sent = footprint(work), tuple(volumes(work))
    flops = (work.step_flops + work.recomputed_flops) / work.world * _heaviest(work)
    compute_s = flops / device.peak(work.precision) / (1 - work.bubble)
    seconds = [(seconds_of(volume, device), volume.exposed) for volume in sent]
    overlapped_s = sum(s for s, exposed in seconds if not exposed)
    exposed_s = sum(s for s, exposed in seconds if exposed)
    fits = memory.peak <= device.usable_bytes
    return Costs(memory, sent, work.bubble, compute_s, overlapped_s, exposed_s, fits)


def seconds_of(volume: Volume, device: Device) -> float:
    """The time of some traffic at the links' full rate.

    A ring through several nodes enters and leaves each by as many adapters as it has ranks there, each carrying its part.
    """
    if volume.op == "copy":
        return volume.sent_bytes / device.host_bytes_per_s
    if not volume.crosses:
        return volume.sent_bytes / device.node_bytes_per_s
    adapters = volume.neighbours if volume.op not in ("send", "all_to_all") else 1
    return max(volume.sent_bytes / device.node_bytes_per_s, volume.sent_bytes / (adapters * device.network_bytes_per_s))


def _heaviest(work: Workload) -> float:
    """How many times a stage's mean work the busiest one does: blocks and the head by their FLOPs, the embedding none."""
    if work.pipeline == 1:
        return 1.0
    head = 6 * work.shape.vocab * work.shape.hidden * work.step_tokens
    block = (work.step_flops - head) / work.shape.layers
    most = max(work.stage_blocks(s) * block + (head if s == work.pipeline - 1 else 0) for s in range(work.pipeline))
    return most * work.pipeline / work.step_flops
