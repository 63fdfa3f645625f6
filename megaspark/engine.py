"""A checked run becomes a DeepSpeed engine behind one face: step(batches) -> loss, evaluate(batches) -> losses.

Weights start from (seed, name) in every layout; the fp32 master starts from what the model computes with, so a bf16 run
starts from the same bf16 bits under every ZeRO stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megaspark import fragments
from megaspark.accelerators import join
from megaspark.bad_steps import Refuse, not_finite
from megaspark.batches import Batch
from megaspark.config import Checked
from megaspark.fragments import Fragment
from megaspark.models.blocks import IGNORED
from megaspark.optim import adamw, gate
from megaspark.ranks import Ranks

FLOWS_AT_ONCE = 4  # times the stages: micro-batches of an evaluation that flow through a pipeline one behind the other


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step tells: the mean loss over all its tokens, the gradient's norm before clipping, and `asked`.

    asked: what the processes brought to be summed along. refused: why the step was not taken, None if it was. All of these are
    the same on all processes. own_losses: of a refused step, the losses of this process's micro-batches. idle: of a pipeline, the
    share of the step's passes in which a stage did not compute, in the mean over the stages; None without one.
    """

    loss: float
    grad_norm: float
    asked: tuple[float, ...] = ()
    refused: str | None = None
    own_losses: tuple[float, ...] = ()
    idle: float | None = None


class Engine:
    """The model, its optimizer and its gradients, spread over all processes as the run's layout says."""

    def __init__(self, checked: Checked, ranks: Ranks) -> None:
        config, layout = checked.config, checked.layout
        self.layout, self.place = layout, layout.place(ranks.rank)
        self.clip = config.optim.clip
        self.device = join(ranks)
        self._shape: torch.Size | None = None
        # After the accelerator was settled; takes seconds.
        import deepspeed

        from megaspark.pipelines import Stopwatch
        from megaspark.placements import make_grid, place_model

        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
        # Without ZeRO and in fp32 there is no wrapper around the optimizer, and nobody else keeps or clips the gradient's norm.
        self.plain = layout.stage == 0 and config.run.precision == "fp32"
        settings = {"steps_per_print": 1 << 40, **layout.deepspeed}
        if self.plain:
            settings["gradient_clipping"] = 0.0
        grid = make_grid(layout)
        deepspeed.utils.groups.mpu = grid  # DeepSpeed keeps that of an engine before this one
        model = place_model(config, layout, self.place, self.device, settings, grid)
        optim = config.optim
        optimizer = adamw(model, optim.lr, optim.betas, optim.eps, optim.weight_decay)
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=grid, dist_init_required=False
        )
        fragments.discard_build_step(self.deepspeed)
        fragments.prepare(self.deepspeed)
        self._stopwatch = Stopwatch(self.deepspeed) if layout.pipeline > 1 else None
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
        self._asked, self._refuse, self._agreed = asked, refuse, None
        if self._stopwatch:
            self._stopwatch.start()
            self.deepspeed.train_batch(self._flows(list(batches)))
            return self._agree()
        self._losses = []
        for batch in batches:
            loss = self._loss(batch)
            self._losses.append(loss.detach())
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        return self._agree()

    def _agree(self) -> StepResult:
        """The step's result, agreed on by all processes in one message; the optimizer asks for it before it does anything.

        Where DeepSpeed finds the gradient not finite, which it does everywhere alike, it does not ask, and `step` does.
        """
        if self._agreed is None:
            norm = self._plain_norm() if self.plain else self.deepspeed.optimizer._global_grad_norm
            losses = self._losses if self.layout.pipeline == 1 else self.deepspeed.fwd_outputs
            # Equal norms: their mean is each of them. Were they not, or not finite in one place only, all see the same even so.
            times = self._stopwatch.read() if self._stopwatch else (0.0, 0.0)
            loss, norms, busy_s, passed_s, *sums = self._mean(losses, [float(norm), *times, *self._asked()])
            idle = 1 - busy_s / passed_s if self._stopwatch else None
            refused = self._refuse(loss, norms / self.layout.world)
            own_losses = tuple(own.item() for own in losses) if refused else ()
            self._agreed = StepResult(loss, norms / self.layout.world, tuple(sums), refused, own_losses, idle)
            if self.plain and self.clip and not refused:
                torch.nn.utils.clip_grads_with_norm_(self.deepspeed.module.parameters(), self.clip, norm)
        return self._agreed

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """The mean loss of each of everybody's micro-batches: the first one of every process, then the second of every one.

        Every process must bring equally many; they are read when they are due, in a pipeline some at a time. A micro-batch none
        of whose labels count has a loss of 0.
        """
        self.deepspeed.eval()
        at_once = 1 if self.layout.pipeline == 1 else FLOWS_AT_ONCE * self.layout.pipeline
        batches, parts = iter(batches), []
        while some := list(islice(batches, at_once)):
            parts.append(self._nats(some))
        sums = torch.cat(parts)
        everybody = [torch.empty_like(sums) for _ in range(self.layout.world)]
        torch.distributed.all_gather(everybody, sums)
        whole = torch.zeros(len(sums), self.layout.data_parallel, 2, dtype=torch.float64, device=self.device)
        for rank, theirs in enumerate(everybody):
            whole[:, self.layout.place(rank).data] += theirs
        nats, tokens = whole.flatten(0, 1).unbind(1)
        return torch.where(tokens > 0, nats / tokens, 0.0).tolist()

    def _nats(self, batches: list[Batch]) -> torch.Tensor:
        """Of each of this process's micro-batches the nats, and the tokens that have a label; [N, 2], 0 unless it speaks."""
        if self.layout.pipeline == 1:
            losses = [self._loss(batch) for batch in batches]
        else:
            flows = self._flows(batches)
            self.deepspeed.eval_batch(flows, reduce_output=None, bcast_loss=False, num_micro_batches=len(batches))
            losses = self.deepspeed.fwd_outputs
        sums = torch.zeros(len(batches), 2, dtype=torch.float64, device=self.device)
        if self._speaks:
            counts = [(self._mine(batch).labels_BS != IGNORED).sum() for batch in batches]
            sums[:, 1] = torch.stack(counts)
            sums[:, 0] = torch.stack(losses).double() * sums[:, 1]
        return sums

    def owned(self) -> Iterator[Fragment]:
        """The pieces of fp32 state that this process has to save: of those that several hold, one speaks for all."""
        alike = fragments.whole(self.deepspeed) and (self.place.data or self.place.sequence)
        return (fragment for fragment in fragments.fragments(self.deepspeed) if fragment.counted and not alike)

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

    @property
    def _speaks(self) -> bool:
        """Whether this process has losses, and is the one to speak for those that have the same."""
        return self.place.pipeline == self.layout.pipeline - 1 and self.place.tensor == 0

    def _mine(self, batch: Batch) -> Batch:
        """On the device, the tokens and labels of this process's part of the sequence, and the positions of all of it."""
        tokens, labels, positions = (None if t is None else t.to(self.device, non_blocking=True) for t in batch)
        parts, part = self.layout.sequence, self.place.sequence
        return Batch(tokens.chunk(parts, 1)[part], labels.chunk(parts, 1)[part], positions)

    def _loss(self, batch: Batch) -> torch.Tensor:
        tokens, labels, positions = self._mine(batch)
        return self.deepspeed(tokens, positions, labels)

    def _flows(self, batches: list[Batch]) -> Iterator[tuple[Any, torch.Tensor]]:
        """Micro-batches as the first stage of a pipeline takes them; the last one's own labels come along with the flow."""
        shape = batches[0].tokens_BS.shape
        if shape != self._shape:
            self._shape = shape
            self.deepspeed.reset_activation_shape()
        return map(self._flow, batches)

    def _flow(self, batch: Batch) -> tuple[Any, torch.Tensor]:
        tokens, labels, positions = self._mine(batch)
        if positions is None:
            rows, seq = batch.tokens_BS.shape
            positions = torch.arange(seq, device=self.device).repeat(rows, 1)
        return (tokens, positions, labels), labels

    def _plain_norm(self) -> torch.Tensor:
        """The norm of the whole gradient; of equal copies of a parameter's one counts."""
        parameters = self.deepspeed.module.parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None and p.part.counted])
        if self.layout.pipeline > 1 or self.layout.tensor > 1:
            squared = norm.square()
            torch.distributed.all_reduce(squared, group=self.deepspeed.mpu.get_model_parallel_group())
            norm = squared.sqrt()
        return norm

    def _mean(self, losses: list[torch.Tensor], also: Sequence[float] = ()) -> list[float]:
        """The mean loss over all processes that have one, and the sums of what each process brings besides."""
        # Equal numbers of tokens everywhere: the mean of means is the mean. Summed in fp64, so the order hardly matters.
        mine = torch.stack(losses).double().mean().item() if self._speaks else 0.0
        loss, *sums = self._totals([mine, *also])
        return [loss / self.layout.replicas, *sums]

    def _totals(self, values: list[float]) -> list[float]:
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.tolist()
