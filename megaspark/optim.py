"""The optimizer and its learning rate: AdamW (arXiv 1711.05101) under a cosine with warm-up (arXiv 1608.03983)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaspark.errors import UserError
from megaspark.kernels.adamw import Update, join, split
from megaspark.kernels.adamw import adamw as adamw_step


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


def rank(parameter: Tensor) -> int:
    """How many dimensions a parameter has, also where ZeRO-3 holds it as a flat piece."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's one-pass AdamW over `parameter_groups`; the loop sets each step's learning rate."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def gate(optimizer: torch.optim.Optimizer, admits: Callable[[], bool]) -> None:
    """From now on `optimizer.step()` first asks `admits`, and does nothing at all where that says no.

    On the object, not by a class of its own: DeepSpeed takes only optimizers of exactly the types that it knows, and steps one
    several times a step, once for each flat group.
    """
    step = optimizer.step

    def gated(closure: Callable[[], Any] | None = None) -> Any:
        return step(closure) if admits() else None

    optimizer.step = gated  # type: ignore[method-assign]


class SplitAdamW(torch.optim.Optimizer):
    """AdamW over bf16 parameters that keep their fp32 master as the weight itself and 16 more bits: 14 bytes a parameter.

    A parameter's state: step (how many it has taken), low (int16, see kernels/adamw.py), exp_avg and exp_avg_sq (fp32). Gradients
    are bf16, as autograd leaves them. `backend` names the kernel's implementation. Raises UserError for another dtype.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.1, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.backend = backend
        for parameter in self._parameters():
            if parameter.dtype != torch.bfloat16 or not parameter.is_contiguous():
                raise UserError(f"SplitAdamW steps dense bf16 parameters, not one of {parameter.dtype} {tuple(parameter.shape)}")

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` does, called first if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                state["step"] += 1
                moments = (state["exp_avg"], state["exp_avg_sq"])
                gradient = parameter.grad.contiguous()
                adamw_step(parameter, state["low"], gradient, *moments, Update(*numbers, state["step"]), backend=self.backend)
        return loss

    def master(self, parameter: Tensor) -> Tensor:
        """A copy in fp32 of what a parameter is rounded from."""
        return join(parameter.detach(), self._state_of(parameter)["low"])

    @torch.no_grad()
    def set_master(self, parameter: Tensor, master: Tensor) -> None:
        """Makes `master` (fp32, the parameter's shape) what the parameter is rounded from, and rounds it."""
        weight, low = split(master)
        parameter.copy_(weight)
        self._state_of(parameter)["low"].copy_(low)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:  # the master starts as the bf16 weight: nothing is missing to it
            state["step"] = 0
            state["low"] = torch.zeros_like(parameter, dtype=torch.int16)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict()` gave, in its dtypes: torch's own would make bf16 of the moments and of the low bits."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                copied = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                self.state[parameter][name] = copied
