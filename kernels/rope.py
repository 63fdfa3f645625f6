"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in GPT-NeoX and Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes

CONFIGS: dict[str, list[dict[str, int]]] = {"_rotate_kernel": [{"TOKENS": 4, "HEADS": 8, "num_warps": 4}]}


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Radians a position of each pair of features: theta^(-2i/D), [D/2] fp32 on the CPU."""
    halves = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float()
    return 1.0 / (theta ** (halves / head_dim))


def rope_angles(positions_BS: Tensor, frequencies_C: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines of every position, for all heads of all layers.

    positions_BS: [B, S] integers; frequencies_C: [D/2] fp32. Returns cos, sin: [B, S, D/2] fp32.
    """
    angles_BSC = positions_BS[..., None].float() * frequencies_C.to(positions_BS.device)
    return angles_BSC.cos(), angles_BSC.sin()


def rope_reference(q_BSHD: Tensor, k_BSKD: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` in plain torch, for any device."""

    def rotated(x_BSHD: Tensor) -> Tensor:
        a, b = x_BSHD.chunk(2, dim=-1)
        cos, sin = cos_BSC[:, :, None], sin_BSC[:, :, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BSHD.dtype)

    return rotated(q_BSHD), rotated(k_BSKD)


@kernel(reference=rope_reference)
def rope(q_BSHD: Tensor, k_BSKD: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions' angles: (a, b) -> (a cos - b sin, b cos + a sin) over the halves of D.

    q_BSHD: [B, S, H, D]; k_BSKD: [B, S, K, D], D even, of one dtype; views into a packed projection are read where they lie.
    cos_BSC, sin_BSC: [B or 1, S, D/2] fp32. Returns new tensors of the same shapes and dtypes; the products are taken in fp32.
    Not in place: it would save no traffic, and a projection saves none of its output for the backward, so no memory either.
    """
    return _rotate(q_BSHD, k_BSKD, cos_BSC, sin_BSC, False)


@launcher("rope_rotate")
def _rotate(q_BSHD: Tensor, k_BSKD: Tensor, cos_BSC: Tensor, sin_BSC: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Both rotated in one launch, by the angles or, if `back`, by the negated ones; the results are contiguous."""
    out_q, out_k = q_BSHD.new_empty(q_BSHD.shape), k_BSKD.new_empty(k_BSKD.shape)
    if only_shapes(q_BSHD) or not q_BSHD.numel():
        return out_q, out_k
    batch, seq, heads, dim = q_BSHD.shape
    q, k = _heads_packed(q_BSHD), _heads_packed(k_BSKD)
    cos, sin = cos_BSC.contiguous(), sin_BSC.contiguous()
    config = CONFIGS["_rotate_kernel"][0]
    _rotate_kernel[(triton.cdiv(seq, config["TOKENS"]), batch)](
        q, k, cos, sin, out_q, out_k,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0) if cos.shape[0] > 1 else 0, seq,
        H=heads, K=k.shape[2], D=dim, HALF=triton.next_power_of_2(dim // 2), BACK=back, **config,
    )  # fmt: skip
    return out_q, out_k


def _heads_packed(x_BSHD: Tensor) -> Tensor:
    """x with each token's heads one after the other; tokens may lie anywhere. A copy only where it must be."""
    packed = x_BSHD.stride(3) == 1 and (x_BSHD.stride(2) == x_BSHD.shape[3] or x_BSHD.shape[2] == 1)
    return x_BSHD if packed else x_BSHD.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.back = inputs[4]


def _gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    return *_rotate(grad_q, grad_k, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_gradients, setup_context=_save)


@triton.jit
def _rotate_heads(
    x_ptr, out_ptr, cos, sin, token, inside, x_stride, COUNT: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
):
    """Rotates the COUNT heads of some tokens, HEADS at a time; cos and sin are [TOKENS, 1, HALF]."""
    column = tl.arange(0, HALF)[None, None, :]
    for first in tl.static_range(0, COUNT, HEADS):
        head = first + tl.arange(0, HEADS)[None, :, None]
        there = inside & (head < COUNT) & (column < D // 2)
        at = x_ptr + token * x_stride + head * D + column
        a = tl.load(at, mask=there, other=0.0).to(tl.float32)
        b = tl.load(at + D // 2, mask=there, other=0.0).to(tl.float32)
        out = out_ptr + token * (COUNT * D) + head * D + column
        tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=there)
        tl.store(out + D // 2, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, out_q_ptr, out_k_ptr, q_batch, q_stride, k_batch, k_stride, angle_batch, seq,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program rotates all heads of TOKENS tokens, so that the angles are read once."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    column = tl.arange(0, HALF)[None, None, :]
    inside = token < seq
    token = token.to(tl.int64)
    angle = batch * angle_batch + token * (D // 2) + column
    cos = tl.load(cos_ptr + angle, mask=inside & (column < D // 2), other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside & (column < D // 2), other=0.0)
    if BACK:
        sin = -sin
    q_ptr, out_q_ptr = q_ptr + batch * q_batch, out_q_ptr + batch * seq * H * D
    k_ptr, out_k_ptr = k_ptr + batch * k_batch, out_k_ptr + batch * seq * K * D
    _rotate_heads(q_ptr, out_q_ptr, cos, sin, token, inside, q_stride, H, D, HALF, HEADS)
    few: tl.constexpr = K if K < HEADS and (K & (K - 1)) == 0 else HEADS  # so few heads fill a tile of their own size
    _rotate_heads(k_ptr, out_k_ptr, cos, sin, token, inside, k_stride, K, D, HALF, few)


def cases() -> list[Case]:
    """Litespark 3B and 30B, StarCoder2 3B: 4 sequences of 4,096 tokens, of a packed projection and of three."""

    def make(name: str, heads: int, kv_heads: int, dim: int, packed: bool) -> Case:
        batch, seq = 4, 4096

        def inputs(make: Inputs) -> dict[str, Any]:
            sizes = [heads, kv_heads, kv_heads]
            if packed:
                q, k, _ = make.normal(batch, seq, sum(sizes), dim).split(sizes, dim=2)
            else:
                q, k = make.normal(batch, seq, heads, dim), make.normal(batch, seq, kv_heads, dim)
            angles = [make.normal(batch, seq, dim // 2, dtype=torch.float32) for _ in range(2)]
            return {"q_BSHD": q, "k_BSKD": k, "cos_BSC": angles[0], "sin_BSC": angles[1]}

        moved = batch * seq * dim * (2 * 2 * (heads + kv_heads) + 4)
        return Case(name, inputs, ("q_BSHD", "k_BSKD"), forward_bytes=moved, backward_bytes=moved)

    return [
        make("litespark-3b", 16, 2, 128, packed=False),
        make("litespark-3b packed", 16, 2, 128, packed=True),
        make("litespark-30b", 64, 64, 104, packed=False),
        make("starcoder2-3b", 24, 2, 128, packed=False),
    ]
