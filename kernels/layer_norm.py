"""Layer norm (Ba et al. 2016, arXiv 1607.06450), alone or with the residual's addition before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes, row_tiles

CONFIGS: dict[str, list[dict[str, int]]] = {
    # A program reads weight and bias, as many bytes as one row's input and output: with 20 rows each that is 1/20 at most.
    "_forward_kernel": [{"TILE": 8192, "PER_PROCESSOR": 2, "LEAST_ROWS": 20, "STAGES": 3, "num_warps": 16}],
    "_backward_kernel": [{"TILE": 8192, "PER_PROCESSOR": 1, "STAGES": 2, "num_warps": 16}],
}


def layer_norm_reference(x_E: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float) -> Tensor:
    """`layer_norm` in plain torch, for any device."""
    return F.layer_norm(x_E, x_E.shape[-1:], weight_E, bias_E, eps)


def add_layer_norm_reference(
    x_E: Tensor, residual_E: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain torch."""
    residual_E = residual_E + x_E
    return layer_norm_reference(residual_E, weight_E, bias_E, eps), residual_E


@kernel(reference=layer_norm_reference)
def layer_norm(x_E: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float) -> Tensor:
    """Each row made of mean 0 and variance 1, times `weight_E`, plus `bias_E`.

    x_E: [..., E]; weight_E, bias_E: [E]; all of one float dtype, computed in fp32. Returns x's shape and dtype.
    """
    return _forward(x_E, None, weight_E, bias_E, eps)[0]


@kernel(reference=add_layer_norm_reference)
def add_layer_norm(
    x_E: Tensor, residual_E: Tensor, weight_E: Tensor, bias_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of residual + x in one pass: returns (normed, residual + x).

    x_E, residual_E: [..., E] of one dtype, in which the sum is rounded before it is normed. The backward takes both upstream
    gradients in one pass too.
    """
    if (residual_E.shape, residual_E.dtype) != (x_E.shape, x_E.dtype):
        raise ValueError(f"add_layer_norm: residual {tuple(residual_E.shape)} {residual_E.dtype}, x {tuple(x_E.shape)} {x_E.dtype}")
    normed, total, _ = _forward(x_E, residual_E, weight_E, bias_E, eps)
    return normed, total


@launcher("layer_norm_forward")
def _forward(
    x_E: Tensor, residual_E: Tensor | None, weight_E: Tensor, bias_E: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual + x or nothing, mean and 1 / standard deviation of each row [2, N] fp32)."""
    x_NE = _rows(x_E)
    out_E = x_E.new_empty(x_E.shape)
    total_E = x_E.new_empty(x_E.shape if residual_E is not None else 0)
    moments_2N = torch.empty(2, x_NE.shape[0], dtype=torch.float32, device=x_E.device)
    if only_shapes(x_E) or not x_E.numel():
        return out_E, total_E, moments_2N
    residual_NE = x_NE if residual_E is None else _rows(residual_E)
    programs, options = row_tiles(*x_NE.shape, CONFIGS["_forward_kernel"][0], x_E.device)
    _forward_kernel[(programs,)](
        x_NE, residual_NE, weight_E.contiguous(), bias_E.contiguous(), out_E, total_E, moments_2N,
        x_NE.stride(0), residual_NE.stride(0), x_NE.shape[0], eps,
        E=x_NE.shape[1], HAS_RESIDUAL=residual_E is not None, **options,
    )  # fmt: skip
    return out_E, total_E, moments_2N


@launcher("layer_norm_backward")
def _backward(
    grad_E: Tensor, grad_total_E: Tensor | None, x_E: Tensor, weight_E: Tensor, moments_2N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and of the residual: it is the same), weight and bias; x_E is what was normed."""
    x_NE = _rows(x_E)
    grad_x_E = x_E.new_empty(x_E.shape)
    grad_weight_E, grad_bias_E = torch.empty_like(weight_E), torch.empty_like(weight_E)
    if only_shapes(x_E):
        return grad_x_E, grad_weight_E, grad_bias_E
    if not x_E.numel():
        return grad_x_E, grad_weight_E.zero_(), grad_bias_E.zero_()
    grad_NE = _rows(grad_E)
    grad_total_NE = grad_NE if grad_total_E is None else _rows(grad_total_E)
    programs, options = row_tiles(*x_NE.shape, CONFIGS["_backward_kernel"][0], x_E.device)
    partial_P2E = torch.empty(programs, 2, x_NE.shape[1], dtype=torch.float32, device=x_E.device)
    _backward_kernel[(programs,)](
        grad_NE, grad_total_NE, x_NE, weight_E.contiguous(), moments_2N, grad_x_E, partial_P2E,
        grad_NE.stride(0), grad_total_NE.stride(0), x_NE.stride(0), x_NE.shape[0],
        E=x_NE.shape[1], HAS_TOTAL=grad_total_E is not None, **options,
    )  # fmt: skip
    sums_2E = partial_P2E.sum(0)
    return grad_x_E, grad_weight_E.copy_(sums_2E[0]), grad_bias_E.copy_(sums_2E[1])


def _rows(x_E: Tensor) -> Tensor:
    """[..., E] as [N, E] whose rows are each contiguous; a copy only where it must be."""
    x_NE = x_E.reshape(-1, x_E.shape[-1])
    return x_NE if x_NE.stride(-1) == 1 else x_NE.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_E, residual_E, weight_E, _, _ = inputs
    _, total_E, moments_2N = output
    ctx.set_materialize_grads(False)
    ctx.added = residual_E is not None
    ctx.save_for_backward(total_E if ctx.added else x_E, weight_E, moments_2N)


def _gradients(ctx: Any, grad_E: Tensor | None, grad_total_E: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_E is None:  # only the sum was used
        return grad_total_E, grad_total_E, None, None, None
    grad_x_E, grad_weight_E, grad_bias_E = _backward(grad_E, grad_total_E if ctx.added else None, *ctx.saved_tensors)
    return grad_x_E, grad_x_E if ctx.added else None, grad_weight_E, grad_bias_E, None


_forward.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, moments_ptr, x_stride, residual_stride, rows, eps,
    E: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p ROWS .. p ROWS + ROWS, then those P ROWS further on, for P programs."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < E, other=0.0).to(tl.float32)
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
        mean = tl.sum(x, axis=1, keep_dims=True) / E
        # From the centred row: the mean of squares less the squared mean would lose every bit of a row far from 0.
        x = tl.where(inside, x - mean, 0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / E + eps)
        tl.store(moments_ptr + row, mean, mask=row < rows)
        tl.store(moments_ptr + rows + row, scale, mask=row < rows)
        tl.store(out_ptr + row * E + column, (x * scale * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, moments_ptr, grad_x_ptr, partial_ptr,
    grad_stride, grad_total_stride, x_stride, rows,
    E: tl.constexpr, HAS_TOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As the forward; each program sums its rows' part of the weight's and the bias's gradient into rows of its own."""
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < E, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < E)
        row = row.to(tl.int64)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(moments_ptr + row, mask=row < rows, other=0.0)
        scale = tl.load(moments_ptr + rows + row, mask=row < rows, other=0.0)
        normed = (x - mean) * scale  # outside the row grad is 0, and so are its products with this
        grad_weight += grad * normed
        grad_bias += grad
        grad = grad * weight
        grad_mean = tl.sum(grad, axis=1, keep_dims=True) / E
        grad_x = (grad - grad_mean - normed * (tl.sum(grad * normed, axis=1, keep_dims=True) / E)) * scale
        if HAS_TOTAL:
            grad_x += tl.load(grad_total_ptr + row * grad_total_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * E + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    partial_ptr += tl.program_id(0) * 2 * E
    tl.store(partial_ptr + column, tl.sum(grad_weight, axis=0, keep_dims=True), mask=column < E)
    tl.store(partial_ptr + E + column, tl.sum(grad_bias, axis=0, keep_dims=True), mask=column < E)


def cases() -> list[Case]:
    """The norms of StarCoder2 3B, 4 sequences of 4,096 tokens, 2 and 1.

    Of one sequence alone the partial sums are a tenth of the backward's bytes (5 % in rms_norm); they stay in a GPU's L2.
    """

    def make(tokens: int, hidden: int, added: bool) -> Case:
        def inputs(make: Inputs) -> dict[str, Any]:
            residual = {"residual_E": make.normal(tokens, hidden)} if added else {}
            vectors = {"weight_E": make.normal(hidden), "bias_E": make.normal(hidden)}
            return {"x_E": make.normal(tokens, hidden), **residual, **vectors, "eps": 1e-5}

        row, once = 2 * hidden * tokens, 2 * hidden
        moments = 8 * tokens
        return Case(
            name=f"{'add_' if added else ''}{tokens}x{hidden}",
            make=inputs,
            differentiated=("x_E", *(["residual_E"] if added else []), "weight_E", "bias_E"),
            forward_bytes=(4 if added else 2) * row + 2 * once + moments,
            backward_bytes=(4 if added else 3) * row + 3 * once + moments,
            op="add_layer_norm" if added else "layer_norm",
        )

    return [make(tokens, 3072, added) for tokens in (16384, 8192, 4096) for added in (True, False)]
