"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass over bf16 weights that carry their fp32 master's other bits.

A weight w of 16 bits and `low`, a signed integer of 16, are the master exactly: its bits are w's bits * 2^16 + low. w is the
master rounded to the nearest bf16, which is what the model computes with in training; cut off instead of rounded it would be
nearer to 0 by half a unit on average, in all weights alike. Of two equally near the one further from 0 is taken: ties to even
would need 65,537 values of low for every second weight. So weight, low, two fp32 moments and a bf16 gradient take 14 bytes a
parameter, where an fp32 master beside the weight makes it 16, and an fp32 gradient more.

The arithmetic is that of torch's AdamW(foreach=False) in fp32, to the bit, where torch's CPU code has fused multiply-adds (AVX2,
AVX-512): on a GPU too, since the kernel names the two of them and forbids others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes

CONFIGS: dict[str, list[dict[str, int]]] = {"_adamw_kernel": [{"BLOCK": 2048, "num_warps": 8}]}
CHUNK = 1 << 16  # elements that plain torch takes at a time: its fp32 temporaries stay in the cache


class Update(NamedTuple):
    """The numbers of one step; step counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    def factors(self) -> tuple[float, ...]:
        """What the update multiplies and divides by, in the names of `_adamw_kernel`; in Python's floats, as torch has them."""
        keep = 1 - self.lr * self.weight_decay
        size = self.lr / (1 - self.beta1**self.step)
        return keep, 1 - self.beta1, self.beta2, 1 - self.beta2, (1 - self.beta2**self.step) ** 0.5, self.eps, -size


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers -> (the nearest bf16, the int16 that is missing to the master's bits); a NaN becomes the one of bits 0x7FC0."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its int16 `low`; exactly what was split."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def adamw_reference(
    weight: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update
) -> None:
    """`adamw` in plain torch, for any device: a chunk at a time, or whole where torch.compile traces it and fuses it anyway."""
    keep, one_minus_beta1, beta2, one_minus_beta2, correction, eps, minus_size = update.factors()
    tensors = [x.view(-1) for x in (weight, low, grad, exp_avg, exp_avg_sq)]
    chunk = max(1, weight.numel()) if torch.compiler.is_compiling() else CHUNK
    for start in range(0, weight.numel(), chunk):
        w, rest, g, m, v = (x[start : start + chunk] for x in tensors)
        g = g.float()
        m.lerp_(g, one_minus_beta1)
        v.mul_(beta2).addcmul_(g, g, value=one_minus_beta2)
        master = join(w, rest).mul_(keep).addcdiv_(m, v.sqrt().div_(correction).add_(eps), value=minus_size)
        for old, new in zip((w, rest), split(master), strict=True):
            old.copy_(new)


def adamw_compiled(
    weight: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update
) -> None:
    """`adamw` as torch.compile makes it of plain torch: on a CPU a third of the reference's time, to a rounding the same."""
    tensors = [x.view(-1) for x in (weight, low, grad, exp_avg, exp_avg_sq)]
    _fused()(*tensors, torch.tensor(update.factors(), dtype=torch.float32, device=weight.device))


@functools.cache
def _fused() -> Any:
    """Compiled once for all sizes and steps: the factors are a tensor, since other numbers would make it compile again."""

    def fused(weight: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, factors: Tensor) -> None:
        keep, one_minus_beta1, beta2, one_minus_beta2, correction, eps, minus_size = factors.unbind()
        grad = grad.float()
        exp_avg.add_((grad - exp_avg) * one_minus_beta1)
        exp_avg_sq.mul_(beta2).add_(grad * one_minus_beta2 * grad)
        master = join(weight, low) * keep + exp_avg * minus_size / (exp_avg_sq.sqrt() / correction + eps)
        for old, new in zip((weight, low), split(master), strict=True):
            old.copy_(new)

    return torch.compile(fused, dynamic=True, fullgraph=True)


@kernel(reference=adamw_reference, compiled=adamw_compiled)
def adamw(weight: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Update) -> None:
    """One step of AdamW, in place: weight, low, exp_avg and exp_avg_sq are each read and written once.

    weight: bf16; low: int16 (see `split`); grad: bf16 or fp32; exp_avg, exp_avg_sq: fp32; all dense, of one shape, and without
    autograd. Bit-equal to torch.optim.AdamW(foreach=False) on the fp32 master, for beta1 > 0.5.
    """
    _step(weight, low, grad, exp_avg, exp_avg_sq, *update.factors())


@launcher("adamw", mutates_args=("weight", "low", "exp_avg", "exp_avg_sq"))
def _step(
    weight: Tensor, low: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, keep: float, one_minus_beta1: float,
    beta2: float, one_minus_beta2: float, correction: float, eps: float, minus_size: float,
) -> None:  # fmt: skip
    if only_shapes(weight) or not weight.numel():
        return
    config = CONFIGS["_adamw_kernel"][0]
    _adamw_kernel[(triton.cdiv(weight.numel(), config["BLOCK"]),)](
        weight, low, grad, exp_avg, exp_avg_sq, keep, one_minus_beta1, beta2, one_minus_beta2, correction, eps, minus_size,
        weight.numel(), enable_fp_fusion=False, **config,
    )  # fmt: skip


@triton.jit
def _adamw_kernel(
    weight_ptr, low_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, keep, one_minus_beta1, beta2, one_minus_beta2, correction, eps,
    minus_size, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products and sums in torch's order; tl.fma where torch's lerp and addcmul have one, and nowhere else."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    low = tl.load(low_ptr + at, mask=inside, other=0).to(tl.int32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + at, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0)

    exp_avg = tl.fma(grad - exp_avg, tl.full([BLOCK], one_minus_beta1, tl.float32), exp_avg)
    exp_avg_sq = tl.fma(grad * one_minus_beta2, grad, exp_avg_sq * beta2)
    tl.store(exp_avg_ptr + at, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq, mask=inside)

    master = ((weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.sqrt_rn(exp_avg_sq), tl.full([BLOCK], correction, tl.float32)) + eps
    master = master * keep + tl.div_rn(exp_avg * minus_size, scale)

    bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
    high = (bits + 0x8000) >> 16
    tl.store(weight_ptr + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(low_ptr + at, (bits - (high << 16)).to(tl.int16), mask=inside)


def cases() -> list[Case]:
    """A feed-forward matrix of Litespark 3B, with gradients in bf16 and in fp32."""

    def make(grad_dtype: torch.dtype) -> Case:
        shape = (11008, 2048)

        def inputs(make: Inputs) -> dict[str, Any]:
            return {
                "weight": make.normal(*shape), "low": make.zeros(*shape, dtype=torch.int16),
                "grad": make.normal(*shape, dtype=grad_dtype), "exp_avg": make.zeros(*shape, dtype=torch.float32),
                "exp_avg_sq": make.zeros(*shape, dtype=torch.float32), "update": Update(1e-3, 0.9, 0.95, 1e-8, 0.1, step=10),
            }  # fmt: skip

        moved = shape[0] * shape[1] * (2 * (2 + 2 + 4 + 4) + grad_dtype.itemsize)
        return Case(f"{shape[0]}x{shape[1]} {grad_dtype}".replace("torch.", ""), inputs, (), forward_bytes=moved, backward_bytes=0)

    return [make(torch.bfloat16), make(torch.float32)]
