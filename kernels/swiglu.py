"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes

CONFIGS: dict[str, list[dict[str, int]]] = {
    "_forward_kernel": [{"BLOCK": 2048, "num_warps": 8}],
    "_backward_kernel": [{"BLOCK": 2048, "num_warps": 8}],
}


def swiglu_reference(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """`swiglu` in plain torch, for any device."""
    return F.silu(gate_F) * up_F


@kernel(reference=swiglu_reference)
def swiglu(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; the backward recomputes silu from the gate, so nothing else is kept.

    gate_F, up_F: [..., F] of one float dtype; the halves of one packed projection are read where they lie. Returns the same
    shape and dtype; computed in fp32.
    """
    return _forward(gate_F, up_F)


@launcher("swiglu_forward")
def _forward(gate_F: Tensor, up_F: Tensor) -> Tensor:
    out_F = gate_F.new_empty(gate_F.shape)
    if not only_shapes(gate_F) and gate_F.numel():
        (gate, up), strides, width, grid = _layout("_forward_kernel", gate_F, up_F)
        _forward_kernel[grid](gate, up, out_F, *strides, width, **CONFIGS["_forward_kernel"][0])
    return out_F


@launcher("swiglu_backward")
def _backward(grad_F: Tensor, gate_F: Tensor, up_F: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of up."""
    grad_gate_F, grad_up_F = gate_F.new_empty(gate_F.shape), up_F.new_empty(up_F.shape)
    if not only_shapes(gate_F) and gate_F.numel():
        (grad, gate, up), strides, width, grid = _layout("_backward_kernel", grad_F, gate_F, up_F)
        _backward_kernel[grid](grad, gate, up, grad_gate_F, grad_up_F, *strides, width, **CONFIGS["_backward_kernel"][0])
    return grad_gate_F, grad_up_F


def _layout(name: str, *tensors: Tensor) -> tuple[list[Tensor], list[int], int, tuple[int, int]]:
    """(rows of each tensor, their strides, the rows' width, the grid): one long row where all lie without gaps."""
    if all(x.is_contiguous() for x in tensors):
        rows = [x.view(1, -1) for x in tensors]
    else:
        rows = [x.reshape(-1, x.shape[-1]) for x in tensors]
        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in rows]
    count, width = rows[0].shape
    return rows, [x.stride(0) for x in rows], width, (count, triton.cdiv(width, CONFIGS[name][0]["BLOCK"]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_F: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad_F, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    """Program (r, c) makes the c-th block of row r."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, grad_stride, gate_stride, up_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    # sigmoid(gate) and sigmoid(-gate) from e^-|gate|: 1 less the one would lose the bits of the other.
    power = tl.exp(-tl.abs(gate))
    large = 1.0 / (1.0 + power)
    small = power * large
    sigmoid = tl.where(gate < 0, small, large)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * tl.where(gate < 0, large, small))
    tl.store(grad_gate_ptr + row * width + column, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + row * width + column, (grad * silu).to(grad_up_ptr.dtype.element_ty), mask=inside)


def cases() -> list[Case]:
    """Litespark 3B and 30B, 16,384 tokens; of one packed projection too."""

    def make(name: str, tokens: int, ffn: int, packed: bool) -> Case:
        def inputs(make: Inputs) -> dict[str, Any]:
            if packed:
                gate, up = make.normal(tokens, 2 * ffn).chunk(2, dim=-1)
            else:
                gate, up = make.normal(tokens, ffn), make.normal(tokens, ffn)
            return {"gate_F": gate, "up_F": up}

        one = 2 * tokens * ffn
        return Case(name, inputs, ("gate_F", "up_F"), forward_bytes=3 * one, backward_bytes=5 * one)

    return [
        make("litespark-3b", 16384, 11008, packed=False),
        make("litespark-3b packed", 16384, 11008, packed=True),
        make("litespark-30b", 16384, 17920, packed=False),
    ]
