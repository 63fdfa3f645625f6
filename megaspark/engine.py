"""A checked run becomes a DeepSpeed engine behind one face: step(batches) -> loss, evaluate(batches) -> losses.

Weights start from (seed, name) in every layout; the fp32 master starts from what the model computes with, so a bf16 run
starts from the same bf16 bits under every ZeRO stage.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megaspark import fragments, launchers
from megaspark.allocators import keep_pages
from megaspark.batches import Batch
from megaspark.config import Checked
from megaspark.models import architecture
from megaspark.models.blocks import Execution
from megaspark.optim import adamw
from megaspark.ranks import Ranks, threads_per_process


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells: the mean loss over all its tokens, the gradient's norm before clipping, and `asked`.

    asked: what the processes brought to be summed along, the same on all of them.
    """

    loss: float
    grad_norm: float
    asked: tuple[float, ...] = ()


class Engine:
    """The model, its optimizer and its gradients, spread over all processes as the run's layout says."""

    def __init__(self, checked: Checked, ranks: Ranks) -> None:
        config = checked.config
        self.documents = config.data.document_mask
        self.device = join(ranks)
        # Without ZeRO and in fp32 there is no wrapper around the optimizer, and nobody else keeps the gradient's norm.
        self.plain = checked.layout.stage == 0 and config.run.precision == "fp32"
        import deepspeed  # after the accelerator was settled; takes seconds

        dtype = torch.float32 if config.run.precision == "fp32" else torch.bfloat16
        model = build_model(config.model, config.run.seed, config.execution).to(self.device, dtype)
        if config.run.compile:
            for block in model.blocks:
                block.compile()
        optim = config.optim
        optimizer = adamw(model, optim.lr, optim.betas, optim.eps, optim.weight_decay)
        settings = {"steps_per_print": 1 << 40, **checked.layout.deepspeed}
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        fragments.discard_build_step(self.deepspeed)
        fragments.prepare(self.deepspeed)

    def step(self, batches: Iterable[Batch], lr: float, asked: Callable[[], Sequence[float]] = tuple) -> StepResult:
        """One optimizer step at rate `lr` over this process's micro-batches (their number is the accumulation).

        asked: called at the end of the step; its numbers are summed over all processes together with the loss.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        losses, norm = [], None
        for batch in batches:
            loss = self._loss(batch)
            self.deepspeed.backward(loss)
            if self.plain and self.deepspeed.is_gradient_accumulation_boundary():
                norm = torch.nn.utils.get_total_norm([p.grad for p in self.deepspeed.module.parameters() if p.grad is not None])
            self.deepspeed.step()
            losses.append(loss.detach())
        loss, *sums = self._mean(losses, asked())
        return StepResult(loss, float(self.deepspeed.get_global_grad_norm() if norm is None else norm), tuple(sums))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """The mean loss of each of everybody's micro-batches: the first one of every process, then the second of every one.

        Every process must bring equally many. A micro-batch none of whose labels count has a loss of 0.
        """
        self.deepspeed.eval()
        losses_N = torch.stack([self._loss(batch).float() for batch in batches])
        everybody = [torch.empty_like(losses_N) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everybody, losses_N)
        return torch.stack(everybody, dim=1).flatten().tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, on every process, in order of rank."""
        out: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(out, value)
        return out

    def total(self, value: float) -> float:
        """The sum of every process's `value`; NaN if one is."""
        return self._totals([value])[0]

    def wait_for_all(self) -> None:
        """Returns when every process has come here: after it, one may end without disturbing the others."""
        torch.distributed.barrier()

    def _loss(self, batch: Batch) -> torch.Tensor:
        tensors = [None if t is None else t.to(self.device, non_blocking=True) for t in batch]
        return self.deepspeed(tensors[0], tensors[2], tensors[1])

    def _mean(self, losses: list[torch.Tensor], also: Sequence[float] = ()) -> list[float]:
        """The mean loss over all processes, and the sums of what each brings besides."""
        # Equal numbers of tokens everywhere: the mean of means is the mean. Summed in fp64, so the order hardly matters.
        loss, *sums = self._totals([torch.stack(losses).double().mean().item(), *also])
        return [loss / torch.distributed.get_world_size(), *sums]

    def _totals(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()


def build_model(config: Any, seed: int, execution: Execution) -> nn.Module:
    """The architecture's model in fp32 on the CPU, every weight filled from (seed, its name)."""
    model = architecture(config.arch).Model(config, execution)
    model.initialize_(seed)
    return model


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name, without making any of them."""
    with torch.device("meta"):
        model = architecture(config.arch).Model(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def settle_accelerator() -> None:
    """Tells DeepSpeed, before its first import, to compute on the CPU where there is no CUDA device."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def join(ranks: Ranks) -> torch.device:
    """Joins the process group (NCCL on CUDA, gloo on CPU), if it has not yet, and returns this process's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_pages()
        torch.set_num_threads(threads_per_process(ranks))
    launchers.complete_environment(ranks)
    import deepspeed.ops

    # Its first use would compile C++ for minutes, and a build killed half-way leaves a lock that hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device
