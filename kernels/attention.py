"""Causal attention over packed documents and sliding windows, on whatever does it fastest where it runs.

Everything that attention must know of the tokens is one number a query: the first key that it sees. A document and a window
both give one, the larger counts, and it never decreases along the sequence. `spans` makes these numbers once a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaspark.kernels import dispatch
from megaspark.kernels.attention_blocks import attention_blocks
from megaspark.kernels.attention_native import attention_native, fits
from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import kernel, launcher, only_shapes
from megaspark.kernels.flash_backward import launch_backward
from megaspark.kernels.flash_forward import launch_forward, padded_sequence

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Spans(NamedTuple):
    """Who sees whom: query m sees key n exactly when start[m] <= n <= m, so when n <= m < end[n].

    start_BS: [B or 1, S] int32, the first key that each query sees; end_BS: int32, one past the last query that sees each key.
    window: the sliding window in tokens that `start` has in it, or None. mask_B1SS: additive, and block_mask: FlexAttention's,
    are there if the backend that the spans were made for needs them; another backend makes its own at every call.
    """

    start_BS: Tensor
    end_BS: Tensor
    window: int | None = None
    mask_B1SS: Tensor | None = None
    block_mask: Any = None


def spans(positions_BS: Tensor | None, seq: int, window: int | None, dtype: torch.dtype, backend: str = "auto",
          device: torch.device | str | None = None, head_dim: int = 128) -> Spans | None:  # fmt: skip
    """The spans of a batch, for all layers; None if every query sees all before it.

    positions_BS: [B, seq] integers, 0 at the start of every document and one more at each token after; None: one document.
    window: how many keys a query sees at most, itself included. dtype, head_dim: attention's, of which backend "auto" depends.
    """
    if window is not None and window < 1:
        raise ValueError(f"a sliding window of {window} tokens sees nothing; it must be at least 1, or None")
    windowed = window is not None and window < seq
    if positions_BS is None and not windowed:
        return None
    device = device if positions_BS is None else positions_BS.device
    index_1S = torch.arange(seq, device=device)[None]
    start_BS = torch.zeros_like(index_1S) if positions_BS is None else (index_1S - positions_BS).clamp_min(0)
    return spans_from_starts(start_BS, window if windowed else None, dtype, backend, head_dim)


def spans_from_starts(start_BS: Tensor, window: int | None, dtype: torch.dtype, backend: str = "auto",
                      head_dim: int = 128) -> Spans:  # fmt: skip
    """The spans of queries whose documents begin at start_BS: [B or 1, S] integers, never decreasing."""
    index_S = torch.arange(start_BS.shape[1], device=start_BS.device)
    if window is not None:
        start_BS = torch.maximum(start_BS, index_S - (window - 1))
    start_BS = start_BS.to(torch.int32).contiguous()
    index_BS = index_S.to(torch.int32).expand_as(start_BS).contiguous()
    found = Spans(start_BS, torch.searchsorted(start_BS, index_BS, right=True, out_int32=True), window)
    name = backend_for(start_BS.device, dtype, head_dim, len(index_S), spanned=True) if backend == "auto" else backend
    if name in ("sdpa", "reference"):
        return found._replace(mask_B1SS=mask_of(found, dtype))
    return found._replace(block_mask=block_mask_of(found)) if name == "flex" else found


def starts_from_cu_seqlens(cu_seqlens: Tensor, seq: int) -> Tensor:
    """The document start of each of `seq` packed tokens, [1, seq] int32, from the documents' bounds [0, ..., end]."""
    index_S = torch.arange(seq, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return cu_seqlens[torch.searchsorted(cu_seqlens, index_S, right=True) - 1].to(torch.int32)[None]


def mask_of(spans: Spans, dtype: torch.dtype) -> Tensor:
    """The additive mask of spans: [B or 1, 1, S, S], 0 where seen and -inf elsewhere."""
    index_S = torch.arange(spans.start_BS.shape[1], device=spans.start_BS.device)
    seen_BSS = (index_S[:, None] >= index_S) & (index_S >= spans.start_BS[:, :, None])
    return torch.zeros(seen_BSS.shape, dtype=dtype, device=seen_BSS.device).masked_fill_(~seen_BSS, float("-inf"))[:, None]


def block_mask_of(spans: Spans) -> Any:
    """FlexAttention's form of spans; blocks that nobody sees are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    start_BS = spans.start_BS
    B, S = start_BS.shape
    each = int(B > 1)  # or all sequences share row 0

    def seen(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return (m >= n) & (n >= start_BS[b * each, m])

    return create_block_mask(seen, B if each else None, None, S, S, device=start_BS.device.type)


def backend_for(device: torch.device, dtype: torch.dtype, head_dim: int, seq: int, spanned: bool) -> str:
    """What "auto" means. On a GPU Triton, where it has tensor cores and a fitting tile, which fp32 and head dims above 128 lack."""
    tiled = head_dim % 8 == 0 and head_dim <= 128
    if dispatch.INTERPRETED:
        return "triton" if tiled and dtype in TRITON_DTYPES else "reference"
    if device.type == "cuda":
        return "triton" if tiled and dtype in TRITON_DTYPES[:2] else "sdpa"
    if fits(device, dtype, head_dim):
        return "native"
    # Without a compiler: a mask's wasted work outweighs the cost of smaller matrices beyond 512 tokens in 16 bits, always in 32.
    return "blocks" if spanned and (dtype.itemsize > 2 or seq > 512) else "reference"


def _auto(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *, scale: float | None = None) -> str:
    _, S, _, D = q_BSHD.shape
    return backend_for(q_BSHD.device, q_BSHD.dtype, D, S, spans is not None)


# ---- The implementations; all have the signature of `attention` without `backend`.


def attention_sdpa(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *,
                   scale: float | None = None) -> Tensor:  # fmt: skip
    """By torch's scaled_dot_product_attention, with a mask if there are spans."""
    q, k, v = q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    mask = None
    if spans is not None:
        mask = mask_of(spans, q.dtype) if spans.mask_B1SS is None else spans.mask_B1SS.to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def attention_flex(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *,
                   scale: float | None = None) -> Tensor:  # fmt: skip
    """By torch's FlexAttention (Dong et al. 2024, arXiv 2412.05496), compiled on a GPU; without gradients on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attention backend 'flex' has no gradients on a CPU: use backend auto or sdpa")
    blocks = _causal_block_mask(q.shape[2], q.device) if spans is None else spans.block_mask or block_mask_of(spans)
    flex = _compiled(flex_attention) if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return flex(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)


@cache
def _causal_block_mask(seq: int, device: torch.device) -> Any:
    return block_mask_of(Spans(torch.zeros((1, seq), dtype=torch.int32, device=device), torch.empty(0)))


def attention_flash_attn(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *,
                         scale: float | None = None) -> Tensor:  # fmt: skip
    """By the flash-attn package (Dao 2023, arXiv 2307.08691)."""
    try:
        import flash_attn
    except ImportError:
        raise ValueError("attention backend 'flash_attn' needs the flash-attn package, which is not installed") from None
    if spans is None:
        return flash_attn.flash_attn_func(q_BSHD, k_BSKD, v_BSKD, softmax_scale=scale, causal=True)
    B, S = q_BSHD.shape[:2]
    bounds, longest = cu_seqlens_of(spans, B)
    window = (-1, -1) if spans.window is None else (spans.window - 1, 0)
    out = flash_attn.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q_BSHD, k_BSKD, v_BSKD)), bounds, bounds, longest, longest,
        softmax_scale=scale, causal=True, window_size=window,
    )  # fmt: skip
    return out.unflatten(0, (B, S))


def cu_seqlens_of(spans: Spans, batch: int) -> tuple[Tensor, int]:
    """The bounds [0, ..., B S] int32 of all documents of a batch laid end to end, and the length of the longest.

    A document begins where a query sees no key before itself, windows or not.
    """
    start_BS = spans.start_BS.expand(batch, -1)
    first_BS = start_BS == torch.arange(start_BS.shape[1], device=start_BS.device)
    bounds = F.pad(first_BS.flatten().nonzero().flatten(), (0, 1), value=start_BS.numel()).to(torch.int32)
    return bounds, int(bounds.diff().max())


def _attention_blocks(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *,
                      scale: float | None = None) -> Tensor:  # fmt: skip
    if spans is None:
        return attention_sdpa(q_BSHD, k_BSKD, v_BSKD, scale=scale)
    return attention_blocks(q_BSHD, k_BSKD, v_BSKD, spans.start_BS, scale)


def _attention_native(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *,
                      scale: float | None = None) -> Tensor:  # fmt: skip
    return attention_native(q_BSHD, k_BSKD, v_BSKD, None if spans is None else spans.start_BS, scale)


@launcher("flash_attention")
def _flash(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float,
           fused: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and what the backward needs of the softmax; `end` and `fused` are for the backward."""
    if only_shapes(q):
        B, S, H, D = q.shape
        return q.new_empty((B, S, H, D)), q.new_empty((B, H, padded_sequence(S)), dtype=torch.float32)
    return launch_forward(_boxable(q), _boxable(k), _boxable(v), start, scale)


@launcher("flash_attention_backward")
def _flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, start: Tensor | None, end: Tensor | None,
                    scale: float, fused: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    if only_shapes(q):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return launch_backward(_boxable(do.contiguous()), _boxable(q), _boxable(k), _boxable(v), o, lse, start, end, scale, fused)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, end, ctx.scale, ctx.fused = inputs
    ctx.save_for_backward(q, k, v, *output, start, end)


def _gradients(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*_flash_backward(do, *ctx.saved_tensors, ctx.scale, ctx.fused), None, None, None, None)


_flash.register_autograd(_gradients, setup_context=_save)


def _boxable(x_BSHD: Tensor) -> Tensor:
    """x as it is if a tensor descriptor can hold it (unit stride in D, the rest in steps of 16 bytes), else a copy."""
    aligned = all(stride * x_BSHD.element_size() % 16 == 0 for stride in x_BSHD.stride()[:3])
    if aligned and x_BSHD.stride(3) == 1 and x_BSHD.data_ptr() % 16 == 0:
        return x_BSHD
    return x_BSHD.clone(memory_format=torch.contiguous_format)


def _flash_attention(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *, scale: float | None = None,
                     fused: bool = False) -> Tensor:  # fmt: skip
    D = q_BSHD.shape[3]
    if D % 8 or D > 128 or q_BSHD.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"attention in Triton has head dims up to 128 in steps of 8 and fp16, bf16 and fp32, not {D} in {q_BSHD.dtype}: "
            "use backend auto or sdpa"
        )
    start, end = (None, None) if spans is None else (spans.start_BS, spans.end_BS)
    return _flash(q_BSHD, k_BSKD, v_BSKD, start, end, D**-0.5 if scale is None else scale, fused)[0]


@kernel(
    _auto,
    triton_fused=partial(_flash_attention, fused=True),
    sdpa=attention_sdpa,
    flex=attention_flex,
    flash_attn=attention_flash_attn,
    native=_attention_native,
    blocks=_attention_blocks,
    reference=attention_sdpa,
)
def attention(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, spans: Spans | None = None, *, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the keys that each query sees, heads in groups sharing a key and value head (GQA, 2305.13245).

    q_BSHD: [B, S, H, D]; k_BSKD, v_BSKD: [B, S, K, D] with H a multiple of K, any strides; spans: of `spans`, or None for plain
    causal attention; scale: positive, 1/sqrt(D) by default. Returns [B, S, H, D] in q's dtype. Backends: "triton", whose
    gradients are the same bits in every run; "triton_fused", faster, whose dQ is summed in the order of the hardware; "sdpa";
    "flex"; "flash_attn"; for CPUs "native" in C++ and "blocks" in torch. Raises ValueError for what a named backend cannot do.
    """
    return _flash_attention(q_BSHD, k_BSKD, v_BSKD, spans, scale=scale)


# ---- Cases


def _case(name: str, B: int, S: int, H: int, K: int, D: int, window: int | None = None, documents: Sequence[int] = ()) -> Case:
    """A case of bf16 attention; `documents` repeats to fill the sequence."""
    lengths = _filled(documents, S) if documents else [S]
    pairs = B * H * sum(min(m + 1, window or S) for length in lengths for m in range(length))
    q_bytes, kv_bytes, lse_bytes = 2 * B * S * H * D, 2 * B * S * K * D, 4 * B * S * H

    def make(inputs: Inputs) -> dict[str, Any]:
        q, k, v = inputs.normal(B, S, H, D), inputs.normal(B, S, K, D), inputs.normal(B, S, K, D, std=0.5)
        positions = torch.cat([torch.arange(n, device=q.device) for n in lengths]).expand(B, S) if documents else None
        return {"q_BSHD": q, "k_BSKD": k, "v_BSKD": v, "spans": spans(positions, S, window, q.dtype, "triton", q.device, D)}

    return Case(
        name, make, ("q_BSHD", "k_BSKD", "v_BSKD"), forward_bytes=2 * q_bytes + 2 * kv_bytes + lse_bytes,
        backward_bytes=4 * q_bytes + 4 * kv_bytes + lse_bytes, forward_flops=4 * D * pairs, backward_flops=10 * D * pairs,
    )  # fmt: skip


def _filled(lengths: Sequence[int], total: int) -> list[int]:
    out: list[int] = []
    while sum(out) < total:
        out.append(min(lengths[len(out) % len(lengths)], total - sum(out)))
    return out


def cases() -> list[Case]:
    """The attention of real models; FLOPs count the pairs that see each other, 2 products forward and 5 backward."""
    mixed = (1200, 90, 700, 2500, 35, 410, 15)  # about what packed web text looks like
    return [
        _case("Litespark 3B", 4, 4096, 16, 2, 128),
        _case("Litespark 3B, documents", 4, 4096, 16, 2, 128, documents=mixed),
        _case("Litespark 30B", 1, 4096, 64, 64, 104),
        _case("StarCoder2 3B, window", 1, 16384, 24, 2, 128, window=4096),
        _case("StarCoder2 3B, window and documents", 1, 16384, 24, 2, 128, window=4096, documents=(9000, *mixed)),
        _case("head dim 64", 4, 2048, 12, 12, 64),
        _case("head dim 80", 4, 2048, 16, 4, 80),
    ]
