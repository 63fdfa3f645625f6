"""The parts that architectures are made of: embedding, norm, attention, feed-forward, head.

Parameters are made uninitialized; `initialize` fills each from its own generator, keyed by the seed and the parameter's
name, so the weights do not depend on the order of construction or on who holds which part.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaspark.kernels.attention import attention, document_mask
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy
from megaspark.kernels.rms_norm import rms_norm
from megaspark.kernels.rope import rope, rope_angles
from megaspark.kernels.swiglu import swiglu


class Context(NamedTuple):
    """What every block needs to know of the tokens' places, made once a batch.

    cos_BSC, sin_BSC: rotary angles of half a head's features; mask_B1SS: additive, or None for plain causal attention.
    """

    cos_BSC: Tensor
    sin_BSC: Tensor
    mask_B1SS: Tensor | None


def make_context(positions_BS: Tensor, frequencies_C: Tensor, dtype: torch.dtype, documents: bool) -> Context:
    """Rotary angles and, if `documents`, the mask that keeps attention inside each of them (positions restart there)."""
    cos, sin = rope_angles(positions_BS, frequencies_C)
    return Context(cos, sin, document_mask(positions_BS, dtype) if documents else None)


class Linear(nn.Module):
    """x W^T without bias; weight [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """A row of the table for each token; weight [V, E]."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """tokens_BS: [B, S] integers below V. Returns [B, S, E]."""
        return F.embedding(tokens_BS, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight [E]."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps

    def forward(self, x_BSE: Tensor) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        return rms_norm(x_BSE, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(hidden, heads * head_dim)
        self.k = Linear(hidden, kv_heads * head_dim)
        self.v = Linear(hidden, kv_heads * head_dim)
        self.o = Linear(heads * head_dim, hidden)

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        # The head count comes from the projection's width, so that a rank holding some of the heads needs no telling.
        q, k, v = (p(x_BSE).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        q, k = rope(q, k, context.cos_BSC, context.sin_BSC)
        return self.o(attention(q, k, v, context.mask_B1SS).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), F wide inside."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, ffn)
        self.up = Linear(hidden, ffn)
        self.down = Linear(ffn, hidden)

    def forward(self, x_BSE: Tensor) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        return self.down(swiglu(self.gate(x_BSE), self.up(x_BSE)))


class Head(nn.Module):
    """The last norm and the projection to the vocabulary, or to the loss when labels are given.

    Everything happens in `forward`, since ZeRO-3 gathers a module's parameters around that call alone.
    """

    def __init__(self, norm: nn.Module, hidden: int, vocab: int, tied: nn.Parameter | None) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(vocab, hidden)) if tied is None else tied

    def forward(self, x_BSE: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """x_BSE: [B, S, E]. Returns logits [B, S, V] in x's dtype, or with labels_BS the mean loss as a fp32 scalar."""
        x_BSE = self.norm(x_BSE)
        if labels_BS is None:
            return F.linear(x_BSE, self.weight)
        return linear_cross_entropy(x_BSE.flatten(0, 1), self.weight, labels_BS.flatten())


@torch.no_grad()
def initialize(name: str, parameter: Tensor, seed: int, std: float) -> None:
    """Fills one parameter in place: ones for a norm's weight, else normal(0, std) drawn from (seed, name) alone.

    parameter: any float dtype; drawn in fp32 on the CPU, so that every device starts from the same bits.
    """
    if parameter.ndim == 1:
        parameter.fill_(1.0)
        return
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    parameter.copy_(torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
