"""GELU by its tanh approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415), with the linear layer's bias added before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes

# A program keeps a block of columns and goes down ROWS rows, so that the bias is read, and a partial sum of its gradient
# written, once for so many rows.
CONFIGS: dict[str, list[dict[str, int]]] = {
    "_forward_kernel": [{"ROWS": 64, "AT_ONCE": 4, "BLOCK": 512, "num_warps": 4}],
    "_backward_kernel": [{"ROWS": 128, "AT_ONCE": 4, "BLOCK": 512, "num_warps": 4}],
}


def gelu_tanh_reference(x_F: Tensor, bias_F: Tensor | None) -> Tensor:
    """`gelu_tanh` in plain torch, for any device."""
    return F.gelu(x_F if bias_F is None else x_F + bias_F, approximate="tanh")


@kernel(reference=gelu_tanh_reference)
def gelu_tanh(x_F: Tensor, bias_F: Tensor | None) -> Tensor:
    """y = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) of z = x + bias; the backward recomputes all of it from x.

    x_F: [..., F]; bias_F: [F] of the same float dtype, or None. Returns x's shape and dtype; computed in fp32.
    """
    return _forward(x_F, bias_F)


@launcher("gelu_tanh_forward")
def _forward(x_F: Tensor, bias_F: Tensor | None) -> Tensor:
    out_F = x_F.new_empty(x_F.shape)
    if not only_shapes(x_F) and x_F.numel():
        x_NF = _rows(x_F)
        bias, config = (x_NF if bias_F is None else bias_F.contiguous()), CONFIGS["_forward_kernel"][0]
        grid = (triton.cdiv(x_NF.shape[1], config["BLOCK"]), triton.cdiv(x_NF.shape[0], config["ROWS"]))
        _forward_kernel[grid](x_NF, bias, out_F, x_NF.stride(0), *x_NF.shape, HAS_BIAS=bias_F is not None, **config)
    return out_F


@launcher("gelu_tanh_backward")
def _backward(grad_F: Tensor, x_F: Tensor, bias_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the bias (empty without one)."""
    grad_x_F, grad_bias_F = x_F.new_empty(x_F.shape), x_F.new_empty(x_F.shape[-1:] if bias_F is not None else 0)
    if only_shapes(x_F):
        return grad_x_F, grad_bias_F
    if not x_F.numel():
        return grad_x_F, grad_bias_F.zero_()
    x_NF, grad_NF = _rows(x_F), _rows(grad_F)
    config = CONFIGS["_backward_kernel"][0]
    grid = (triton.cdiv(x_NF.shape[1], config["BLOCK"]), triton.cdiv(x_NF.shape[0], config["ROWS"]))
    partial_PF = torch.empty(grid[1] if bias_F is not None else 0, x_NF.shape[1], dtype=torch.float32, device=x_F.device)
    _backward_kernel[grid](
        grad_NF, x_NF, x_NF if bias_F is None else bias_F.contiguous(), grad_x_F, partial_PF, grad_NF.stride(0), x_NF.stride(0),
        *x_NF.shape, HAS_BIAS=bias_F is not None, **config,
    )  # fmt: skip
    return grad_x_F, grad_bias_F if bias_F is None else grad_bias_F.copy_(partial_PF.sum(0))


def _rows(x_F: Tensor) -> Tensor:
    """[..., F] as [N, F] whose rows are each contiguous; a copy only where it must be."""
    x_NF = x_F.reshape(-1, x_F.shape[-1])
    return x_NF if x_NF.stride(-1) == 1 else x_NF.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_F: Tensor) -> tuple[Tensor, Tensor | None]:
    x_F, bias_F = ctx.saved_tensors
    grad_x_F, grad_bias_F = _backward(grad_F, x_F, bias_F)
    return grad_x_F, grad_bias_F if bias_F is not None else None


_forward.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _shares_of(z):
    """(1 + tanh(u)) / 2 and (1 - tanh(u)) / 2, u = sqrt(2 / pi) (z + 0.044715 z^3): sigmoids of 2u and -2u.

    From e^-|2u|, which never overflows; 1 less the other would lose the bits of the smaller one.
    """
    twice = 1.5957691216057308 * z * (1.0 + 0.044715 * z * z)
    power = tl.exp(-tl.abs(twice))
    large = 1.0 / (1.0 + power)
    small = power * large
    return tl.where(twice < 0, small, large), tl.where(twice < 0, large, small)


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, out_ptr, x_stride, rows, width,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    for first in tl.range(0, ROWS, AT_ONCE):
        row = tl.program_id(1) * ROWS + first + tl.arange(0, AT_ONCE)[:, None]
        inside = (row < rows) & (column < width)
        row = row.to(tl.int64)
        z = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias
        share, _ = _shares_of(z)
        tl.store(out_ptr + row * width + column, (z * share).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_x_ptr, partial_ptr, grad_stride, x_stride, rows, width,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        grad_bias = tl.zeros([AT_ONCE, BLOCK], dtype=tl.float32)
    for first in tl.range(0, ROWS, AT_ONCE):
        row = tl.program_id(1) * ROWS + first + tl.arange(0, AT_ONCE)[:, None]
        inside = (row < rows) & (column < width)
        row = row.to(tl.int64)
        z = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += bias
        share, rest = _shares_of(z)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)  # of 2u
        grad *= share + z * share * rest * slope
        tl.store(grad_x_ptr + row * width + column, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            grad_bias += grad  # 0 outside, where 0 was loaded
    if HAS_BIAS:
        total = tl.sum(grad_bias, axis=0, keep_dims=True)
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * width + column, total, mask=column < width)


def cases() -> list[Case]:
    """StarCoder2 3B, 4 sequences of 4,096 tokens, with the bias and without."""

    def make(tokens: int, ffn: int, biased: bool) -> Case:
        def inputs(make: Inputs) -> dict[str, Any]:
            return {"x_F": make.normal(tokens, ffn), "bias_F": make.normal(ffn) if biased else None}

        one, bias = 2 * tokens * ffn, 2 * ffn * biased
        name = f"{tokens}x{ffn}{'' if biased else ' without bias'}"
        return Case(name, inputs, ("x_F", "bias_F") if biased else ("x_F",), 2 * one + bias, 3 * one + 2 * bias)

    return [make(16384, 12288, True), make(16384, 12288, False)]
