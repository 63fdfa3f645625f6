"""Root-mean-square layer norm (Zhang and Sennrich 2019, arXiv 1910.07467), alone or with the residual's addition before it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes, row_tiles

CONFIGS: dict[str, list[dict[str, int]]] = {
    "_forward_kernel": [{"TILE": 8192, "PER_PROCESSOR": 2, "STAGES": 2, "num_warps": 16}],
    "_backward_kernel": [{"TILE": 8192, "PER_PROCESSOR": 1, "STAGES": 2, "num_warps": 16}],
}


def rms_norm_reference(x_E: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch, for any device; rounds where transformers' LlamaRMSNorm does."""
    x_f32 = x_E.float() if x_E.dtype != torch.float64 else x_E
    scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return weight_E * (x_f32 * scale).to(x_E.dtype)


def add_rms_norm_reference(x_E: Tensor, residual_E: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    residual_E = residual_E + x_E
    return rms_norm_reference(residual_E, weight_E, eps), residual_E


@kernel(reference=rms_norm_reference)
def rms_norm(x_E: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Scales each row to unit root mean square, then by `weight_E`.

    x_E: [..., E] of any float dtype; the mean is taken in fp32 and the scaled row rounded to x's dtype before the weight is
    applied, as transformers' LlamaRMSNorm does. Returns [..., E] in the promoted dtype of x and weight.
    """
    return _forward(x_E, None, weight_E, eps)[0]


@kernel(reference=add_rms_norm_reference)
def add_rms_norm(x_E: Tensor, residual_E: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of residual + x in one pass: returns (normed, residual + x).

    x_E, residual_E: [..., E] of one dtype, in which the sum is rounded before it is normed. The backward takes both upstream
    gradients in one pass too. A block gives it a sublayer's output: normed, residual = add_rms_norm(attended, residual, ...).
    """
    if (residual_E.shape, residual_E.dtype) != (x_E.shape, x_E.dtype):
        raise ValueError(f"add_rms_norm: residual {tuple(residual_E.shape)} {residual_E.dtype}, x {tuple(x_E.shape)} {x_E.dtype}")
    normed, total, _ = _forward(x_E, residual_E, weight_E, eps)
    return normed, total


@launcher("rms_norm_forward")
def _forward(x_E: Tensor, residual_E: Tensor | None, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual + x or nothing, 1 / root mean square of each row [N] fp32)."""
    x_NE = _rows(x_E)
    out_E = torch.empty(x_E.shape, dtype=torch.promote_types(x_E.dtype, weight_E.dtype), device=x_E.device)
    total_E = x_E.new_empty(x_E.shape if residual_E is not None else 0)
    scale_N = torch.empty(x_NE.shape[0], dtype=torch.float32, device=x_E.device)
    if only_shapes(x_E) or not x_E.numel():
        return out_E, total_E, scale_N
    residual_NE = x_NE if residual_E is None else _rows(residual_E)
    programs, options = row_tiles(*x_NE.shape, CONFIGS["_forward_kernel"][0], x_E.device)
    _forward_kernel[(programs,)](
        x_NE, residual_NE, weight_E.contiguous(), out_E, total_E, scale_N,
        x_NE.stride(0), residual_NE.stride(0), x_NE.shape[0], eps,
        E=x_NE.shape[1], HAS_RESIDUAL=residual_E is not None, **options,
    )  # fmt: skip
    return out_E, total_E, scale_N


@launcher("rms_norm_backward")
def _backward(
    grad_E: Tensor, grad_total_E: Tensor | None, x_E: Tensor, weight_E: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x (and of the residual: it is the same) and of the weight; x_E is what was normed."""
    x_NE = _rows(x_E)
    grad_x_E, grad_weight_E = torch.empty(x_E.shape, dtype=x_E.dtype, device=x_E.device), torch.empty_like(weight_E)
    if only_shapes(x_E):
        return grad_x_E, grad_weight_E
    if not x_E.numel():
        return grad_x_E, grad_weight_E.zero_()
    grad_NE = _rows(grad_E)
    grad_total_NE = grad_NE if grad_total_E is None else _rows(grad_total_E)
    programs, options = row_tiles(*x_NE.shape, CONFIGS["_backward_kernel"][0], x_E.device)
    partial_PE = torch.empty(programs, x_NE.shape[1], dtype=torch.float32, device=x_E.device)
    _backward_kernel[(programs,)](
        grad_NE, grad_total_NE, x_NE, weight_E.contiguous(), scale_N, grad_x_E, partial_PE,
        grad_NE.stride(0), grad_total_NE.stride(0), x_NE.stride(0), x_NE.shape[0],
        E=x_NE.shape[1], HAS_TOTAL=grad_total_E is not None, **options,
    )  # fmt: skip
    return grad_x_E, grad_weight_E.copy_(partial_PE.sum(0))


def _rows(x_E: Tensor) -> Tensor:
    """[..., E] as [N, E] whose rows are each contiguous; a copy only where it must be."""
    x_NE = x_E.reshape(-1, x_E.shape[-1])
    return x_NE if x_NE.stride(-1) == 1 else x_NE.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_E, residual_E, weight_E, _ = inputs
    _, total_E, scale_N = output
    ctx.set_materialize_grads(False)
    ctx.added = residual_E is not None
    ctx.save_for_backward(total_E if ctx.added else x_E, weight_E, scale_N)


def _gradients(ctx: Any, grad_E: Tensor | None, grad_total_E: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_E is None:  # only the sum was used
        return grad_total_E, grad_total_E, None, None
    grad_x_E, grad_weight_E = _backward(grad_E, grad_total_E if ctx.added else None, *ctx.saved_tensors)
    return grad_x_E, grad_x_E if ctx.added else None, grad_weight_E, None


_forward.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, scale_ptr, x_stride, residual_stride, rows, eps,
    E: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p ROWS .. p ROWS + ROWS, then those P ROWS further on, for P programs."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < E)
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
            x = (residual.to(tl.float32) + x.to(tl.float32)).to(x_ptr.dtype.element_ty)
            tl.store(total_ptr + row * E + column, x, mask=inside)
        x = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / E + eps)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        normed = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + row * E + column, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr,
    grad_stride, grad_total_stride, x_stride, rows,
    E: tl.constexpr, HAS_TOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As the forward; each program sums its rows' part of the weight's gradient into a row of its own, so no order is random."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < E)
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        normed = x * scale
        grad_weight += grad * normed
        grad = grad * weight
        grad_x = (grad - normed * (tl.sum(grad * normed, axis=1, keep_dims=True) / E)) * scale
        if HAS_TOTAL:
            grad_x += tl.load(grad_total_ptr + row * grad_total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * E + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(grad_weight, axis=0, keep_dims=True)
    tl.store(partial_ptr + tl.program_id(0) * E + column, total, mask=column < E)


def cases() -> list[Case]:
    """The norms of Litespark 3B and 30B, 4 sequences of 4,096 tokens, and of 3B one, where the partial sums weigh 5 %."""

    def make(tokens: int, hidden: int, added: bool) -> Case:
        def inputs(make: Inputs) -> dict[str, Any]:
            residual = {"residual_E": make.normal(tokens, hidden)} if added else {}
            return {"x_E": make.normal(tokens, hidden), **residual, "weight_E": make.normal(hidden), "eps": 1e-5}

        row, once = 2 * hidden * tokens, 2 * hidden
        scales = 4 * tokens
        return Case(
            name=f"{'add_' if added else ''}{tokens}x{hidden}",
            make=inputs,
            differentiated=("x_E", "residual_E", "weight_E") if added else ("x_E", "weight_E"),
            forward_bytes=(4 if added else 2) * row + once + scales,
            backward_bytes=(4 if added else 3) * row + 2 * once + scales,
            op="add_rms_norm" if added else "rms_norm",
        )

    sizes = [(16384, 2048), (16384, 6656), (4096, 2048)]
    return [make(*size, added) for size in sizes for added in (True, False)]
