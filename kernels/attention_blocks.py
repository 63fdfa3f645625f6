"""Attention over documents and windows on a CPU: torch's flash kernels, called for each block of queries with its keys alone.

With a mask over the whole sequence those kernels compute every pair, also those that no query sees. Here a block of queries
takes part with the keys from its first query's start on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megaspark.kernels.dispatch import launcher, only_shapes

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ROWS = {2: 256, 4: 128, 8: 128}  # queries a block by the bytes of a number: bf16 needs larger matrices to pay off
KEYS = 64  # blocks of keys begin at multiples: each new shape costs oneDNN a compilation


def _blocks(start_BS: Tensor, batch: int, dtype: torch.dtype) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """(sequence, its queries, their keys, the additive mask [1, 1, queries, keys]) of every block."""
    S = start_BS.shape[1]
    rows = ROWS[dtype.itemsize]
    index_S = torch.arange(S, dtype=start_BS.dtype)
    for row, starts in enumerate(start_BS[:, ::rows].tolist()):
        for m0, first in zip(range(0, S, rows), starts, strict=True):
            queries, keys = slice(m0, min(m0 + rows, S)), slice(first // KEYS * KEYS, min(m0 + rows, S))
            seen = (index_S[queries, None] >= index_S[keys]) & (index_S[keys] >= start_BS[row, queries, None])
            mask = torch.zeros((), dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]
            for b in range(batch) if len(start_BS) == 1 else (row,):
                yield b, queries, keys, mask


def _heads(x_BSHD: Tensor, heads: int) -> Tensor:
    """[B, heads, S, D] without copying where every head has its own."""
    x = x_BSHD.transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@launcher("attention_blocks")
def _attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """o, and the logarithms of the softmax's sums [B, H, S] fp32."""
    B, S, H, D = q.shape
    o, lse = torch.empty((B, S, H, D), dtype=q.dtype), torch.empty((B, H, S), dtype=torch.promote_types(q.dtype, torch.float32))
    if not only_shapes(q):
        q, k, v, o_BHSD = q.transpose(1, 2), _heads(k, H), _heads(v, H), o.transpose(1, 2)
        for b, m, n, mask in _blocks(start, B, q.dtype):
            found = _forward(q[b : b + 1, :, m], k[b : b + 1, :, n], v[b : b + 1, :, n], 0.0, False, attn_mask=mask, scale=scale)
            o_BHSD[b : b + 1, :, m], lse[b : b + 1, :, m] = found
    return o, lse


@launcher("attention_blocks_backward")
def _attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, start: Tensor,
                     scale: float | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    (B, S, H, D), K = q.shape, k.shape[2]
    dq = torch.empty((B, S, H, D), dtype=q.dtype)
    if only_shapes(q):
        return dq, *torch.empty((2, B, S, K, D), dtype=q.dtype).unbind()
    dk, dv = torch.zeros((2, B, S, H, D), dtype=lse.dtype)  # blocks of queries share keys, heads share a kv head
    wide = [x.transpose(1, 2) for x in (do, q, o, dq, dk, dv)]
    k, v = _heads(k, H), _heads(v, H)
    for b, m, n, mask in _blocks(start, B, q.dtype):
        do_b, q_b, o_b, dq_b, dk_b, dv_b = (x[b : b + 1] for x in wide)
        found = _backward(do_b[:, :, m], q_b[:, :, m], k[b : b + 1, :, n], v[b : b + 1, :, n], o_b[:, :, m], lse[b : b + 1, :, m],
                          0.0, False, attn_mask=mask, scale=scale)  # fmt: skip
        dq_b[:, :, m] = found[0]
        dk_b[:, :, n] += found[1]
        dv_b[:, :, n] += found[2]
    return dq, *(x.unflatten(2, (K, -1)).sum(3).to(q.dtype) for x in (dk, dv))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, start)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*_attend_backward(do, *ctx.saved_tensors, ctx.scale), None, None)


_attend.register_autograd(_gradients, setup_context=_save)


def attention_blocks(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, start_BS: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, where query m sees the keys from start[m] to m.

    q_BSHD: [B, S, H, D]; k_BSKD, v_BSKD: [B, S, K, D] with H a multiple of K, of one float dtype, on the CPU. start_BS:
    [B or 1, S] int32, never decreasing. scale: 1/sqrt(D) by default. Returns [B, S, H, D].
    """
    return _attend(q_BSHD, k_BSKD, v_BSKD, start_BS, scale)[0]
