"""What a GPU of a cluster can do and hold, from its makers' data sheets: memory, links, peaks."""

from __future__ import annotations

from dataclasses import dataclass

from megaspark.errors import UserError
from megaspark.flops import peak_flops

# Left to CUDA's context, to NCCL's own buffers and to what the allocator cannot use for its pieces being too small. Ours.
RESERVED_SHARE = 0.08


@dataclass(frozen=True)
class Device:
    """One GPU model: bytes of memory, and bytes a second that one GPU sends to its node, to the network and to its host.

    peaks are in flops.py under `driver_name`. All rates are of one direction.
    """

    driver_name: str
    memory_bytes: int
    node_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes_per_s: float
    per_node: int = 8

    @property
    def usable_bytes(self) -> int:
        """The memory less what is left to others."""
        return int(self.memory_bytes * (1 - RESERVED_SHARE))

    def peak(self, precision: str) -> float:
        """FLOP/s of the dense matrix products of bf16, fp32 or fp8; raises UserError where it has none such."""
        found = peak_flops(self.driver_name, precision)  # type: ignore[arg-type]
        if found is None:
            raise UserError(f"the peak of {self.driver_name} in {precision} is not known")
        return found


# Memory: as the driver reports it, which is above the round figure of the data sheet for HBM and below it in GiB. NVLink: the
# data sheets add both directions (600 GB/s on A100, 900 on H100 and H200, 1,800 on B200); one is half. Network: an adapter a GPU,
# HDR InfiniBand of 200 Gb/s in DGX A100, NDR of 400 Gb/s in DGX H100, H200 and B200 (NVIDIA's user guides of these systems).
# Host: 16 lanes of PCIe, 32 GB/s in generation 4 and 64 in 5.
DEVICES = {
    "a100": Device("NVIDIA A100-SXM4-80GB", 81920 << 20, 300e9, 25e9, 32e9),
    "h100": Device("NVIDIA H100 80GB HBM3", 81559 << 20, 450e9, 50e9, 64e9),
    "h200": Device("NVIDIA H200", 143771 << 20, 450e9, 50e9, 64e9),
    "b200": Device("NVIDIA B200", 183359 << 20, 900e9, 50e9, 64e9),
}
