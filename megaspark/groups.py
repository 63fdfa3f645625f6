"""Processes that share one copy of the model, and how activations and gradients pass between them.

Tensor parallelism (Megatron-LM, arXiv 1909.08053) splits the rows of the first matrices of a block and the columns of the last
ones; sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509) splits the tokens and, for attention alone, trades them for
heads. Every function here is the identity in a group of one. DeepSpeed's own AutoTP is not used: it replaces the linears by its
own, and so has neither 8-bit linears nor a pipeline, nor key/value heads shared by several processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """`size` processes, of which this one is number `rank`; handle: torch's process group, None for a group of one."""

    rank: int = 0
    size: int = 1
    handle: Any = None


@dataclass(frozen=True)
class Groups:
    """The processes that share this one's samples: by heads and features (tensor), and by tokens (sequence)."""

    tensor: Group = field(default_factory=Group)
    sequence: Group = field(default_factory=Group)


ALONE = Groups()


@dataclass(frozen=True)
class Share:
    """Part number `part` of `parts` equal ones of a parameter along dimension `dim`."""

    dim: int
    part: int
    parts: int

    def of(self, whole: Tensor) -> Tensor:
        """That part, a view."""
        return whole.chunk(self.parts, self.dim)[self.part]


@dataclass(frozen=True)
class Part:
    """What one of this process's parameters is in the whole model.

    shape: of the whole parameter. share: which part of it this is; None: all of it. counted: whether this copy is the one that is
    saved, and counted in the gradient's norm; other processes hold the same.
    """

    name: str
    shape: tuple[int, ...]
    share: Share | None = None
    counted: bool = True

    def of(self, whole: Tensor) -> Tensor:
        """The values of this part."""
        return whole if self.share is None else self.share.of(whole).contiguous()

    @property
    def offset(self) -> int:
        """Where in the flattened whole a part of rows begins."""
        return self.share.part * math.prod(self.shape) // self.share.parts if self.share and self.share.dim == 0 else 0

    @property
    def columns(self) -> tuple[int, int] | None:
        """The first column and their number, where the part is columns of a matrix."""
        if self.share is None or self.share.dim == 0:
            return None
        width = self.shape[1] // self.share.parts
        return self.share.part * width, width


def enter(x: Tensor, group: Group) -> Tensor:
    """x as it is, for parts of a computation that every process does its own of: its gradient is the sum of theirs."""
    return x if group.size == 1 else _Enter.apply(x, group)


def leave(x: Tensor, group: Group) -> Tensor:
    """The sum of every process's x; its gradient goes to each as it is."""
    return x if group.size == 1 else _Leave.apply(x, group)


def rows(x: Tensor, group: Group) -> Tensor:
    """This process's part of the rows of an x that all of them hold; the gradient is put together from theirs."""
    return x if group.size == 1 else _Rows.apply(x, group)


def tokens_to_heads(x_BSHD: Tensor, group: Group) -> Tensor:
    """From all heads of some tokens [B, S/P, H, D] to some heads of all tokens [B, S, H/P, D]."""
    return x_BSHD if group.size == 1 else _Trade.apply(x_BSHD, 2, 1, group)


def heads_to_tokens(x_BSHD: Tensor, group: Group) -> Tensor:
    """From some heads of all tokens [B, S, H/P, D] to all heads of some tokens [B, S/P, H, D]."""
    return x_BSHD if group.size == 1 else _Trade.apply(x_BSHD, 1, 2, group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.size)[group.rank].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        whole = gradient.new_empty(len(gradient) * group.size, *gradient.shape[1:])
        dist.all_gather_into_tensor(whole, gradient.contiguous(), group=group.handle)
        return whole, None


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: int, gather: int, group: Group) -> Tensor:
        ctx.trade = scatter, gather, group
        return _traded(x, scatter, gather, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        scatter, gather, group = ctx.trade
        return _traded(gradient, gather, scatter, group), None, None, None


def _summed(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group.handle)
    return out


def _traded(x: Tensor, scatter: int, gather: int, group: Group) -> Tensor:
    """Every process gets its part of dimension `scatter` from all, put together along dimension `gather`."""
    sent = torch.stack(x.chunk(group.size, scatter)).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group.handle)
    return torch.cat(got.unbind(), gather)
