"""The optimizer and its learning rate: AdamW (arXiv 1711.05101) under a cosine with warm-up (arXiv 1608.03983)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr` at the last of `steps`; a pure function of the step.

    Nothing of it needs saving: a resumed run asks for the rate of its next step.
    """

    lr: float
    min_lr: float
    warmup_steps: int
    steps: int

    def __call__(self, step: int) -> float:
        """The rate of the 0-based `step`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors (norm weights), which do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if rank(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if rank(p) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def rank(parameter: torch.Tensor) -> int:
    """How many dimensions a parameter has, also where ZeRO-3 holds it as a flat piece."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's one-pass AdamW over `parameter_groups`; the loop sets each step's learning rate."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)
