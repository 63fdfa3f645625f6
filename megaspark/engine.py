"""A checked run becomes a DeepSpeed engine behind one face: step(batches) -> loss, evaluate(batches) -> loss.

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
from megaspark.bad_steps import Refuse, not_finite
from megaspark.batches import Batch
from megaspark.config import Checked
from megaspark.models import architecture
from megaspark.models.blocks import Execution
from megaspark.optim import adamw, gate
from megaspark.ranks import Ranks, threads_per_process


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells: the mean loss over all its tokens, the gradient's norm before clipping, and `asked`.

    asked: what the processes brought to be summed along. refused: why the step was not taken, None if it was. All of these are
    the same on all processes. own_losses: of a refused step, the losses of this process's micro-batches.
    """

    loss: float
    grad_norm: float
    asked: tuple[float, ...] = ()
    refused: str | None = None
    own_losses: tuple[float, ...] = ()


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
        for optimizer in fragments.base_optimizers(self.deepspeed):
            gate(optimizer, lambda: self._agree().refused is None)

    def step(
        self, batches: Iterable[Batch], lr: float, asked: Callable[[], Sequence[float]] = tuple, refuse: Refuse = not_finite
    ) -> StepResult:
        """One optimizer step at rate `lr` over this process's micro-batches (their number is the accumulation).

        asked: called before the update; its numbers are summed over all processes together with the loss. refuse: judges the
        mean loss and the gradient's norm then; if it gives a reason, no weight, moment or count of steps changes anywhere. It
        must refuse what is not finite, as DeepSpeed does by itself.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.train()
        self._losses, self._asked, self._refuse, self._agreed = [], asked, refuse, None
        for batch in batches:
            loss = self._loss(batch)
            self._losses.append(loss.detach())
            self.deepspeed.backward(loss)
            if self.plain and self.deepspeed.is_gradient_accumulation_boundary():
                gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
                self._plain_norm = torch.nn.utils.get_total_norm(gradients)
            self.deepspeed.step()
        return self._agree()

    def _agree(self) -> StepResult:
        """The step's result, agreed on by all processes in one message; the optimizer asks for it before it does anything.

        Where DeepSpeed finds the gradient not finite, which it does everywhere alike, it does not ask, and `step` does.
        """
        if self._agreed is None:
            norm = self._plain_norm if self.plain else self.deepspeed.optimizer._global_grad_norm
            # Equal norms: their mean is each of them. Were they not, or not finite in one place only, all see the same even so.
            loss, norms, *sums = self._mean(self._losses, [float(norm), *self._asked()])
            norm = norms / torch.distributed.get_world_size()
            refused = self._refuse(loss, norm)
            own_losses = tuple(own.item() for own in self._losses) if refused else ()
            self._agreed = StepResult(loss, norm, tuple(sums), refused, own_losses)
        return self._agreed

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """The mean loss over everybody's micro-batches; every process must bring equally many."""
        self.deepspeed.eval()
        return self._mean([self._loss(batch) for batch in batches])[0]

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
