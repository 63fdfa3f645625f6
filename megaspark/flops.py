"""FLOPs, parameters and device peaks, counted from a model's shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-like transformer that its cost follows from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def block_matmul_parameters(self) -> int:
        """Weights of one block that take part in matrix products: q, k, v, o, gate, up, down."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn


@dataclass(frozen=True)
class Flops:
    """FLOPs a token of forward and backward together, under the field's two ways of counting attention."""

    litespark: int
    causal: int


def parameters(shape: Shape, tied: bool = False) -> int:
    """All weights: blocks with two norms each, embedding, head (unless tied to it) and the last norm."""
    blocks = shape.layers * (shape.block_matmul_parameters + 2 * shape.hidden)
    tables = shape.vocab * shape.hidden * (1 if tied else 2)
    return blocks + tables + shape.hidden


def per_token(shape: Shape, seq: int) -> Flops:
    """FLOPs a token of one training step at sequence length `seq`, nothing recomputed.

    Litespark (arXiv 2510.02483, derived from its results): 6 a matmul weight, head included and embedding lookup not, plus
    12 L s H D for q k^T and the product with v over all s x s pairs. Causal: the average token looks at (s + 1) / 2 keys,
    so attention costs 6 L (s + 1) H D.
    """
    weights = 6 * (shape.layers * shape.block_matmul_parameters + shape.vocab * shape.hidden)
    per_key = 12 * shape.layers * shape.heads * shape.head_dim
    return Flops(litespark=weights + per_key * seq, causal=weights + per_key * (seq + 1) // 2)


# Dense peaks in FLOP/s, no sparsity, from the makers' data sheets: A100 (NVIDIA A100 data sheet, 2021), H100 SXM and PCIe
# (H100 data sheet, 2023; halved where it quotes sparsity), H200 (its data sheet, 2024: the same chip), B200 (HGX B200, 2024),
# GB200 (a 72nd of GB200 NVL72, 2024), MI300X (AMD CDNA 3 data sheet, 2023). fp32 is that of the plain units, without TF32 or
# XF32. The first row whose words are all in the name counts.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("A100", {"bf16": 312e12, "fp32": 19.5e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp32": 51e12, "fp8": 1513e12}),
    ("H100 NVL", {"bf16": 835e12, "fp32": 60e12, "fp8": 1671e12}),
    ("H100", {"bf16": 989e12, "fp32": 67e12, "fp8": 1979e12}),
    ("H200", {"bf16": 989e12, "fp32": 67e12, "fp8": 1979e12}),
    ("GB200", {"bf16": 2500e12, "fp32": 80e12, "fp8": 5000e12}),
    ("B200", {"bf16": 2250e12, "fp32": 75e12, "fp8": 4500e12}),
    ("MI300X", {"bf16": 1307e12, "fp32": 163.4e12, "fp8": 2615e12}),
)


def peak_flops(device_name: str, precision: Literal["bf16", "fp32", "fp8"]) -> float | None:
    """A device's dense peak in FLOP/s by the name its driver gives it; None where we do not know it (every CPU)."""
    for name, peaks in _PEAKS:
        if all(word in device_name for word in name.split()):
            return peaks.get(precision)
    return None
