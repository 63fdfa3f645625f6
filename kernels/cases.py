"""What tests, bench and the ahead-of-time compilation call an op with: the shapes that real models have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Makes a case's tensors on a device; with `empty` without values (for a device that is only imagined)."""

    device: str
    dtype: torch.dtype
    seed: int = 0
    empty: bool = False

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in the case's dtype (or another), drawn on the CPU so that every device gets the same."""
        dtype = dtype or self.dtype
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        generator = torch.Generator().manual_seed(self.seed + sum((i + 1) * size for i, size in enumerate(shape)))
        return (torch.randn(shape, generator=generator) * std).to(self.device, dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros in the case's dtype, or in another."""
        return (torch.empty if self.empty else torch.zeros)(shape, dtype=dtype or self.dtype, device=self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        """int64 numbers in [0, below)."""
        if self.empty:
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, below, shape, generator=generator).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op at a size that matters.

    make: Inputs -> the op's keyword arguments. differentiated: the arguments that get a gradient. forward and backward: the
    FLOPs of it (matrix products only) and the least bytes it can move: each input read once, each output written once. op: the
    function's name where it is not the module's (`function` finds it).
    """

    name: str
    make: Callable[[Inputs], dict[str, Any]]
    differentiated: tuple[str, ...]
    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0
    dtype: torch.dtype = torch.bfloat16
    op: str | None = None

    def function(self, module: ModuleType) -> Callable[..., Any]:
        """The op that this case calls, of the module that holds the case."""
        return getattr(module, self.op or module.__name__.rpartition(".")[2])
