"""The parts that architectures are made of: embedding, norm, attention, feed-forward, head.

Parameters are made uninitialized; each starts with `first_values` from its own generator, keyed by the seed and the parameter's
name, so the weights do not depend on the order of construction or on who holds which part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megaspark.groups import ALONE, Groups, Share, enter, heads_to_tokens, leave, rows, tokens_to_heads
from megaspark.kernels.attention import Spans, attention
from megaspark.kernels.fp8_linear import fp8_linear
from megaspark.kernels.linear import linear
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy
from megaspark.kernels.rms_norm import add_rms_norm, rms_norm
from megaspark.kernels.rope import rope
from megaspark.kernels.swiglu import swiglu

IGNORED = -100  # the label of a token that has no loss
# Ops whose results "selective" keeps, by the beginnings of their names.
PRODUCTS = (
    "aten.mm", "aten.addmm", "aten.bmm", "aten._scaled_dot_product", "megaspark.fp8_linear", "megaspark.flash_attention",
    "megaspark.attention_blocks", "megaspark.attention_native", "megaspark.linear_native", "flash_attn",
)  # fmt: skip


@dataclass(frozen=True)
class Execution:
    """How a model computes, as opposed to what: nothing of it changes the whole model's parameters.

    kernels: the implementation of each op by name, "auto" where none is named (see `megaspark.kernels.dispatch`). fp8: how the
    linears of all blocks but the first and the last are scaled to 8 bits, or None for the model's own dtype. z_loss: weight of
    the squared log of the softmax's denominator in the loss (PaLM, arXiv 2204.02311, section 5). recompute: what the backward
    computes again instead of keeping it (see `run_block`). groups: the processes that share the work on each sample.
    """

    kernels: Mapping[str, str] = field(default_factory=dict)
    fp8: Literal["tensor", "row"] | None = None
    z_loss: float = 0.0
    recompute: Literal["none", "selective", "full"] = "none"
    groups: Groups = ALONE

    def backend(self, op: str) -> str:
        """What an op is told to run."""
        return self.kernels.get(op, "auto")

    def of_block(self, number: int, blocks: int) -> Execution:
        """The same for one of the model's blocks: the first and the last keep their linears out of 8 bits."""
        return replace(self, fp8=None) if number in (0, blocks - 1) else self


class Context(NamedTuple):
    """What every block needs to know of the tokens' places, made once a batch.

    cos_BSC, sin_BSC: rotary angles of half a head's features, of this process's tokens; spans: who sees whom in the whole
    sequence, or None for plain causal attention.
    """

    cos_BSC: Tensor
    sin_BSC: Tensor
    spans: Spans | None


class Linear(nn.Module):
    """x W^T without bias; weight [out, in]; computed in 8 bits where `execution.fp8` says so.

    split: the dimension of the weight of which each process of the tensor group holds its share ("out" or "in"), or None.
    """

    def __init__(
        self, in_features: int, out_features: int, execution: Execution, split: Literal["out", "in"] | None = None
    ) -> None:
        super().__init__()
        group, shape = execution.groups.tensor, [out_features, in_features]
        self.share: Share | None = None
        if split is not None and group.size > 1:
            self.share = Share(("out", "in").index(split), group.rank, group.size)
            shape[self.share.dim] //= group.size
        self.weight = nn.Parameter(torch.empty(shape))
        self.fp8, self.backend = execution.fp8, execution.backend("linear" if execution.fp8 is None else "fp8_linear")

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x: [..., in]. Returns [..., out]; by another weight where one is given."""
        weight = self.weight if weight is None else weight
        if self.fp8 is None:
            return linear(x, weight, backend=self.backend)
        return fp8_linear(x, weight, scaling=self.fp8, backend=self.backend)


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
    """Grouped-query self-attention with rotary positions.

    The processes of the tensor group share out the heads, those of the sequence group the tokens, and within attention the heads
    that are left. Where there are fewer key/value heads than processes in the tensor group, each holds all of them and computes
    the one that its query heads ask.
    """

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, execution: Execution) -> None:
        super().__init__()
        self.tensor, self.sequence = execution.groups.tensor, execution.groups.sequence
        self.head_dim, self.kv_heads = head_dim, kv_heads
        self.kv_whole = kv_heads < self.tensor.size
        kv_split = None if self.kv_whole else "out"
        self.q = Linear(hidden, heads * head_dim, execution, "out")
        self.k = Linear(hidden, kv_heads * head_dim, execution, kv_split)
        self.v = Linear(hidden, kv_heads * head_dim, execution, kv_split)
        self.o = Linear(heads * head_dim, hidden, execution, "in")
        self.rope_backend, self.backend = execution.backend("rope"), execution.backend("attention")

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        x_BSE = enter(x_BSE, self.tensor)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (self.q(x_BSE), self._kv(self.k, x_BSE), self._kv(self.v, x_BSE)))
        q, k = rope(q, k, context.cos_BSC, context.sin_BSC, backend=self.rope_backend)
        q, k, v = (tokens_to_heads(y, self.sequence) for y in (q, self._enough(k), self._enough(v)))
        y_BSHD = attention(q, k, v, context.spans, backend=self.backend)
        return leave(self.o(heads_to_tokens(y_BSHD, self.sequence).flatten(2)), self.tensor)

    def _kv(self, linear: Linear, x_BSE: Tensor) -> Tensor:
        if not self.kv_whole:
            return linear(x_BSE)
        head = self.tensor.rank * self.kv_heads // self.tensor.size
        return linear(x_BSE, enter(linear.weight, self.tensor)[head * self.head_dim : (head + 1) * self.head_dim])

    def _enough(self, x_BSKD: Tensor) -> Tensor:
        """Key/value heads repeated, if need be, until each process of the sequence group can have one."""
        return x_BSKD.repeat_interleave(max(1, self.sequence.size // x_BSKD.shape[2]), 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), F wide inside."""

    def __init__(self, hidden: int, ffn: int, execution: Execution) -> None:
        super().__init__()
        self.gate = Linear(hidden, ffn, execution, "out")
        self.up = Linear(hidden, ffn, execution, "out")
        self.down = Linear(ffn, hidden, execution, "in")
        self.group, self.backend = execution.groups.tensor, execution.backend("swiglu")

    def forward(self, x_BSE: Tensor) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        x_BSE = enter(x_BSE, self.group)
        return leave(self.down(swiglu(self.gate(x_BSE), self.up(x_BSE), backend=self.backend)), self.group)


class Head(nn.Module):
    """The last norm and the projection to the vocabulary, or to the loss when labels are given.

    Everything happens in `forward`, since ZeRO-3 gathers a module's parameters around that call alone. Every process of the tensor
    group holds the whole table, as it does of the embedding, and computes the loss of its share of the tokens: split by the
    vocabulary instead, the softmax would need two messages a chunk of tokens, within the kernel that never holds the logits.
    """

    def __init__(self, norm: nn.Module, hidden: int, vocab: int, tied: nn.Parameter | None, execution: Execution) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(vocab, hidden)) if tied is None else tied
        self.group = execution.groups.tensor
        self.z_loss, self.backend = execution.z_loss, execution.backend("linear_cross_entropy")

    def forward(self, x_BSE: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """x_BSE: [B, S, E]. Returns logits [B, S, V] in x's dtype, or with labels_BS the mean loss as a fp32 scalar."""
        x_BSE = self.norm(x_BSE)
        if labels_BS is None:
            return F.linear(x_BSE, self.weight)
        z_loss = self.z_loss if self.training else 0.0  # an evaluation's loss is comparable, with it or without
        weight, x_NE, labels_N = enter(self.weight, self.group), rows(x_BSE.flatten(0, 1), self.group), labels_BS.flatten()
        labels_n = labels_N.chunk(self.group.size)[self.group.rank]
        loss = linear_cross_entropy(x_NE, weight, labels_n, z_loss=z_loss, backend=self.backend)
        return self._mean(loss, labels_n, labels_N)

    def _mean(self, loss: Tensor, labels_n: Tensor, labels_N: Tensor) -> Tensor:
        """The mean over all tokens that have a label, from the mean over this process's."""
        if self.group.size == 1:
            return loss
        mine, all_of_them = (labels_n != IGNORED).sum(), (labels_N != IGNORED).sum()
        return leave(torch.where(mine > 0, loss * (mine / all_of_them), 0.0), self.group)


def run_block(block: nn.Module, x_BSE: Tensor, context: Context, recompute: str) -> Tensor:
    """block(x, context); what the backward needs of it is kept ("none"), or some of it is computed again.

    "full": only x is kept, and the whole block is computed a second time (Chen et al. 2016, arXiv 1604.06174). "selective": the
    results of matrix products and of attention are kept, and what lies between them, cheap and bound by memory, is computed
    again (Korthikanti et al. 2022, arXiv 2205.05198, with the choice turned around for a fused attention). The bits are the same.
    """
    if recompute == "none" or not torch.is_grad_enabled():
        return block(x_BSE, context)
    settings: dict[str, Any] = {"context_fn": _keep_products} if recompute == "selective" else {}
    return checkpoint(block, x_BSE, context, use_reentrant=False, preserve_rng_state=False, **settings)


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op).startswith(PRODUCTS) else CheckpointPolicy.PREFER_RECOMPUTE


def first_values(name: str, shape: tuple[int, ...], seed: int, std: float, room: Tensor | None = None) -> Tensor:
    """What a parameter starts with: ones for a norm's weight, else normal(0, std) drawn from (seed, name) alone.

    Returns fp32 on the CPU, so that every device starts from the same bits. room: fp32, flat, to be drawn into; None: new memory.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    values = torch.empty(shape) if room is None else room[: math.prod(shape)].view(shape)
    return values.normal_(0.0, std, generator=generator)
