"""The parts that architectures are made of: embedding, norm, attention, feed-forward, head.

Parameters are made uninitialized; `initialize` fills each from its own generator, keyed by the seed and the parameter's
name, so the weights do not depend on the order of construction or on who holds which part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaspark.kernels.attention import Spans, attention
from megaspark.kernels.fp8_linear import fp8_linear
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy
from megaspark.kernels.rms_norm import add_rms_norm, rms_norm
from megaspark.kernels.rope import rope
from megaspark.kernels.swiglu import swiglu


@dataclass(frozen=True)
class Execution:
    """How a model computes, as opposed to what: nothing of it changes the parameters.

    kernels: the implementation of each op by name, "auto" where none is named (see `megaspark.kernels.dispatch`). fp8: how the
    linears of all blocks but the first and the last are scaled to 8 bits, or None for the model's own dtype. z_loss: weight of
    the squared log of the softmax's denominator in the loss (PaLM, arXiv 2204.02311, section 5).
    """

    kernels: Mapping[str, str] = field(default_factory=dict)
    fp8: Literal["tensor", "row"] | None = None
    z_loss: float = 0.0

    def backend(self, op: str) -> str:
        """What an op is told to run."""
        return self.kernels.get(op, "auto")

    def of_block(self, number: int, blocks: int) -> Execution:
        """The same for one of the model's blocks: the first and the last keep their linears out of 8 bits."""
        return replace(self, fp8=None) if number in (0, blocks - 1) else self


class Context(NamedTuple):
    """What every block needs to know of the tokens' places, made once a batch.

    cos_BSC, sin_BSC: rotary angles of half a head's features; spans: who sees whom, or None for plain causal attention.
    """

    cos_BSC: Tensor
    sin_BSC: Tensor
    spans: Spans | None


class Linear(nn.Module):
    """x W^T without bias; weight [out, in]; computed in 8 bits where `execution.fp8` says so."""

    def __init__(self, in_features: int, out_features: int, execution: Execution) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.fp8, self.backend = execution.fp8, execution.backend("fp8_linear")

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        if self.fp8 is None:
            return F.linear(x, self.weight)
        return fp8_linear(x, self.weight, scaling=self.fp8, backend=self.backend)


class Embedding(nn.Module):
    """A row of the table for each token; weight [V, E]."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """tokens_BS: [B, S] integers below V. Returns [B, S, E]."""
        return F.embedding(tokens_BS, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight [E], alone or of a sum."""

    def __init__(self, hidden: int, eps: float, execution: Execution) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps, self.backend = eps, execution.backend("rms_norm")

    def forward(self, x_BSE: Tensor, residual_BSE: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x_BSE: [B, S, E]. Returns the normed x; with a residual, the normed sum of both and the sum."""
        if residual_BSE is None:
            return rms_norm(x_BSE, self.weight, self.eps, backend=self.backend)
        return add_rms_norm(x_BSE, residual_BSE, self.weight, self.eps, backend=self.backend)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, execution: Execution) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = Linear(hidden, heads * head_dim, execution)
        self.k = Linear(hidden, kv_heads * head_dim, execution)
        self.v = Linear(hidden, kv_heads * head_dim, execution)
        self.o = Linear(heads * head_dim, hidden, execution)
        self.rope_backend, self.backend = execution.backend("rope"), execution.backend("attention")

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        # The head count comes from the projection's width, so that a rank holding some of the heads needs no telling.
        q, k, v = (p(x_BSE).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        q, k = rope(q, k, context.cos_BSC, context.sin_BSC, backend=self.rope_backend)
        return self.o(attention(q, k, v, context.spans, backend=self.backend).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), F wide inside."""

    def __init__(self, hidden: int, ffn: int, execution: Execution) -> None:
        super().__init__()
        self.gate = Linear(hidden, ffn, execution)
        self.up = Linear(hidden, ffn, execution)
        self.down = Linear(ffn, hidden, execution)
        self.backend = execution.backend("swiglu")

    def forward(self, x_BSE: Tensor) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        return self.down(swiglu(self.gate(x_BSE), self.up(x_BSE), backend=self.backend))


class Head(nn.Module):
    """The last norm and the projection to the vocabulary, or to the loss when labels are given.

    Everything happens in `forward`, since ZeRO-3 gathers a module's parameters around that call alone.
    """

    def __init__(self, norm: nn.Module, hidden: int, vocab: int, tied: nn.Parameter | None, execution: Execution) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(vocab, hidden)) if tied is None else tied
        self.z_loss, self.backend = execution.z_loss, execution.backend("linear_cross_entropy")

    def forward(self, x_BSE: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """x_BSE: [B, S, E]. Returns logits [B, S, V] in x's dtype, or with labels_BS the mean loss as a fp32 scalar."""
        x_BSE = self.norm(x_BSE)
        if labels_BS is None:
            return F.linear(x_BSE, self.weight)
        z_loss = self.z_loss if self.training else 0.0  # an evaluation's loss is comparable, with it or without
        return linear_cross_entropy(
            x_BSE.flatten(0, 1), self.weight, labels_BS.flatten(), z_loss=z_loss, backend=self.backend
        )


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
