"""Attention on a CPU in C++ (native/attention.cpp): flash forward and backward that skip what no query sees.

torch's own CPU kernels spend most of a small head's time between the products; these hold a block of scores in the cache and the
sums in registers. The bits depend neither on the number of threads nor on the rest of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaspark.kernels import native
from megaspark.kernels.dispatch import launcher, only_shapes

MOST_FEATURES = 256  # of a head: beyond it a block no longer fits the second-level cache


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention like this can be computed here."""
    return device.type == "cpu" and dtype in native.DTYPES and head_dim <= MOST_FEATURES and native.available()


@launcher("attention_native")
def _attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """o, and the logarithms of the softmax's sums [B, H, S] fp32."""
    B, S, H, _ = q.shape
    o, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty((B, H, S), dtype=torch.float32)
    if not only_shapes(q) and q.numel():
        q, k, v = (_packed(x) for x in (q, k, v))
        native.call("attention_forward", q.dtype, _numbers(q, k, v, q, start), q, k, v, start, scale, o, lse)
    return o, lse


@launcher("attention_native_backward")
def _attend_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, start: Tensor | None,
                     scale: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    (B, S, H, D), K = q.shape, k.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype)
    if only_shapes(q) or not q.numel():
        return dq, *torch.empty((2, B, S, K, D), dtype=q.dtype).unbind()
    dk, dv = (torch.empty((B, S, H, D), dtype=torch.float32) for _ in range(2))  # of each head, though several share a kv head
    do, q, k, v = (_packed(x) for x in (do, q, k, v))
    native.call("attention_backward", q.dtype, _numbers(q, k, v, do, start), do, q, k, v, o, lse, start, scale, dq, dk, dv)
    return dq, *((x if H == K else x.unflatten(2, (K, -1)).sum(3)).to(q.dtype) for x in (dk, dv))


def _packed(x_BSHD: Tensor) -> Tensor:
    """x as it lies if the numbers of a head follow each other, else a copy."""
    return x_BSHD if x_BSHD.stride(3) == 1 else x_BSHD.contiguous()


def _numbers(q: Tensor, k: Tensor, v: Tensor, do: Tensor, start: Tensor | None) -> list[int]:
    """`Shape` of native/attention.cpp."""
    B, S, H, D = q.shape
    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:3]]
    each = 0 if start is None or len(start) == 1 else start.stride(0)
    return [B, S, H, k.shape[2], D, *strides, each, torch.get_num_threads()]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, start)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*_attend_backward(do, *ctx.saved_tensors, ctx.scale), None, None)


_attend.register_autograd(_gradients, setup_context=_save)


def attention_native(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, start_BS: Tensor | None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, where query m sees the keys from start[m] to m.

    q_BSHD: [B, S, H, D]; k_BSKD, v_BSKD: [B, S, K, D] with H a multiple of K, both fp32 or bf16, on the CPU, D at most 256.
    start_BS: [B or 1, S] int32, never decreasing, or None: every query sees all keys before it. scale: positive, 1/sqrt(D) by
    default. Returns [B, S, H, D]. Raises ValueError for what it cannot do, or where no library can be made.
    """
    D = q_BSHD.shape[3]
    if q_BSHD.dtype not in native.DTYPES or D > MOST_FEATURES or q_BSHD.device.type != "cpu":
        found = f"{q_BSHD.dtype} with head dim {D} on {q_BSHD.device}"
        raise ValueError(f"attention backend 'native' has fp32 and bf16 and head dims up to {MOST_FEATURES} on CPUs, not {found}")
    start_BS = None if start_BS is None else start_BS.contiguous()
    return _attend(q_BSHD, k_BSKD, v_BSKD, start_BS, D**-0.5 if scale is None else scale)[0]
