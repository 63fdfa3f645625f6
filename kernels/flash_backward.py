"""The backward kernels of causal flash attention in Triton; flash_forward.py says what form the compiler needs and why.

With P = exp2(scale Q K^T - lse), delta = rowsum(O * dO) and dS = P * (dO V^T - delta):
    dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
`keys_kernel` owns a block of keys of one kv head and walks over all query heads of its group, so GQA needs no atomics; it
computes P and dS transposed, keys as rows, which makes them register operands of both its products. Fused, it also adds its
part of dQ to memory as it goes (5 products a block, the order of the additions is the hardware's); split, `queries_kernel`
makes dQ (7 products in all, bit-reproducible).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaspark.kernels.dispatch import INTERPRETED
from megaspark.kernels.flash_forward import LOG2E, ROWS, Configs, box, configuration, key_blocks, padded, per_token, rows_of_head

_KEYS = {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 2}
_QUERIES = {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2}
_FP32 = {"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}  # without tensor cores; larger blocks spill
CONFIGS: Configs = {
    **{(kernel, dim, 2): [dict(_KEYS)] for kernel in ("keys", "keys_fused") for dim in (64, 128)},
    **{("queries", dim, 2): [dict(_QUERIES)] for dim in (64, 128)},
    **{(kernel, 64, 4): [dict(_FP32)] for kernel in ("keys", "keys_fused", "queries")},
    **{(kernel, 128, 4): [dict(_FP32, BM=16, BN=16)] for kernel in ("keys", "keys_fused", "queries")},
}
_SMALL_KEYS = {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 1}
_SMALL_QUERIES = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 1}
_AMD: Configs = {
    **{(kernel, dim, 2): [dict(_SMALL_KEYS)] for kernel in ("keys", "keys_fused") for dim in (64, 128)},
    **{("queries", dim, 2): [dict(_SMALL_QUERIES)] for dim in (64, 128)},
}
ELSEWHERE: dict[str, Configs] = {
    "amd": _AMD,
    "small": _AMD | {(kernel, 128, 2): [dict(_SMALL_KEYS, num_warps=8)] for kernel in ("keys", "keys_fused")},
    "sm_100": {("keys_fused", 128, 2): [dict(_KEYS, num_stages=1)]},  # two stages need more tensor memory than there is
}

if INTERPRETED:  # Triton 3.9's interpreter lacks the reduction that `atomic_add` of a descriptor becomes
    from triton.runtime import interpreter as _interpreter

    def _descriptor_reduce(self, kind, box, value, indices):  # type: ignore[no-untyped-def]
        pointers, inside = box.materialize_pointers(indices)
        ir = _interpreter._ir
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, inside, ir.MEM_SEMANTIC.RELAXED, None)

    _interpreter.InterpreterBuilder.create_descriptor_reduce = _descriptor_reduce


@triton.jit
def delta_kernel(o_ptr, do_ptr, delta_ptr, S, padded_S, H, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """delta [B, H, padded S] fp32: the sum of o * do over each query's head; o and do contiguous [B, S, H, D]."""
    m0 = tl.program_id(0) * BM
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    o = rows_of_head(o_ptr, S * H * D, H * D, D, b, m0, h, S, D, DP, BM)
    do = rows_of_head(do_ptr, S * H * D, H * D, D, b, m0, h, S, D, DP, BM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * padded_S + m0 + tl.arange(0, BM), delta)


@triton.jit
def _query_blocks(end_ptr, n0, S, BM: tl.constexpr, BN: tl.constexpr, SPANS: tl.constexpr):
    """Where the queries of keys [n0, n0 + BN) lie: (first, seeing, masked, last).

    In [seeing, masked) every query sees every key; [first, seeing) and [masked, last) need the mask. All but `last` are
    multiples of BM.
    """
    first = n0 // BM * BM
    if SPANS:
        last = tl.load(end_ptr + tl.minimum(n0 + BN, S) - 1)
        masked = tl.load(end_ptr + n0) // BM * BM
    else:
        last = S
        masked = tl.cdiv(S, BM) * BM  # queries beyond the sequence are zeros, and so is all that they add
    seeing = tl.minimum(tl.cdiv(n0 + BN - 1, BM), tl.cdiv(last, BM)) * BM
    return first, seeing, tl.maximum(masked, seeing), last


@triton.jit
def _see(dk, dv, k, v, q_box, do_box, dq_box, lse_ptr, delta_ptr, b, m0, h, offs_n, width, scale, DP: tl.constexpr,
         BM: tl.constexpr, MASKED: tl.constexpr, FUSED: tl.constexpr):  # fmt: skip
    """One block of queries seen from a block of keys: adds to dk, dv [BN, DP] and, fused, to dq in memory."""
    offs_m = m0 + tl.arange(0, BM)
    q = q_box.load([b, m0, h, 0]).reshape(BM, DP)
    do = do_box.load([b, m0, h, 0]).reshape(BM, DP)
    p = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale - tl.load(lse_ptr + offs_m)[None, :])
    if MASKED:
        p = tl.where((offs_m[None, :] - offs_n[:, None]).to(tl.uint32) < width[:, None], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, do.T, input_precision="ieee") - tl.load(delta_ptr + offs_m)[None, :])
    ds = ds.to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    if FUSED:
        dq_box.atomic_add([b, m0, h, 0], tl.dot(ds.T, k, input_precision="ieee").reshape(1, BM, 1, DP))
    return dk, dv


@triton.jit
def keys_kernel(q_box, do_box, dq_box, dk_box, dv_box, k_ptr, k_stride_b, k_stride_s, k_stride_h, v_ptr, v_stride_b, v_stride_s,
                v_stride_h, lse_ptr, delta_ptr, end_ptr, end_stride, S, padded_S, K, groups, scale, scale_log2,
                D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPANS: tl.constexpr,
                FUSED: tl.constexpr):  # fmt: skip
    """dk and dv of BN keys of one kv head, and fused their part of dq without its scale. Longest blocks first."""
    n0 = tl.program_id(0) * BN
    b = tl.program_id(1) // K
    kv = tl.program_id(1) % K
    offs_n = n0 + tl.arange(0, BN)
    end_ptr += b * end_stride
    first, seeing, masked, last = _query_blocks(end_ptr, n0, S, BM, BN, SPANS)
    width = S - offs_n  # how many queries from its own on see each key
    if SPANS:
        width = tl.load(end_ptr + offs_n, mask=offs_n < S, other=0) - offs_n
    width = tl.maximum(width, 0).to(tl.uint32)
    k = rows_of_head(k_ptr, k_stride_b, k_stride_s, k_stride_h, b, n0, kv, S, D, DP, BN)
    v = rows_of_head(v_ptr, v_stride_b, v_stride_s, v_stride_h, b, n0, kv, S, D, DP, BN)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    rows = tl.program_id(1).to(tl.int64) * groups * padded_S  # of the group's first head, in lse and delta
    lse_ptr += rows
    delta_ptr += rows
    # One loop over blocks and heads, so that loading ahead goes on from one head to the next.
    early = (seeing - first) // BM
    for i in tl.range(0, (early + tl.cdiv(last - masked, BM)) * groups):
        g = i % groups
        j = i // groups
        m0 = tl.where(j < early, first + j * BM, masked + (j - early) * BM)
        dk, dv = _see(dk, dv, k, v, q_box, do_box, dq_box, lse_ptr + g * padded_S, delta_ptr + g * padded_S, b, m0,
                      kv * groups + g, offs_n, width, scale_log2, DP, BM, True, FUSED)  # fmt: skip
    for i in tl.range(0, (masked - seeing) // BM * groups):
        g = i % groups
        m0 = seeing + i // groups * BM
        dk, dv = _see(dk, dv, k, v, q_box, do_box, dq_box, lse_ptr + g * padded_S, delta_ptr + g * padded_S, b, m0,
                      kv * groups + g, offs_n, width, scale_log2, DP, BM, False, FUSED)  # fmt: skip
    dk_box.store([b, n0, kv, 0], (dk * scale).to(k.dtype).reshape(1, BN, 1, DP))
    dv_box.store([b, n0, kv, 0], dv.to(k.dtype).reshape(1, BN, 1, DP))


@triton.jit
def _pull(dq, q, do, k_box, v_box, lse, delta, b, n0, h, offs_m, reach, scale, DP: tl.constexpr, BN: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """One block of keys: adds to dq [BM, DP]."""
    k = k_box.load([b, n0, h, 0]).reshape(BN, DP)
    v = v_box.load([b, n0, h, 0]).reshape(BN, DP)
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        distance = offs_m[:, None] - (n0 + tl.arange(0, BN))[None, :]
        p = tl.where(distance.to(tl.uint32) <= reach[:, None], p, 0.0)
    ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def queries_kernel(q_ptr, q_stride_b, q_stride_s, q_stride_h, do_ptr, k_box, v_box, dq_box, lse_ptr, delta_ptr, start_ptr,
                   start_stride, S, padded_S, H, groups, scale, scale_log2, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, SPANS: tl.constexpr):  # fmt: skip
    """dq of BM queries of one head: the half of the split backward that the keys' kernel leaves out. Longest tiles first."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    kv = h // groups
    offs_m = m0 + tl.arange(0, BM)
    start_ptr += b * start_stride
    first, clear, diagonal, last = key_blocks(start_ptr, m0, S, BM, BN, SPANS)
    reach = offs_m
    if SPANS:
        reach = offs_m - tl.load(start_ptr + offs_m, mask=offs_m < S, other=0)
    reach = reach.to(tl.uint32)
    q = rows_of_head(q_ptr, q_stride_b, q_stride_s, q_stride_h, b, m0, h, S, D, DP, BM)
    do = rows_of_head(do_ptr, S * H * D, H * D, D, b, m0, h, S, D, DP, BM)
    row = tl.program_id(1).to(tl.int64) * padded_S
    lse = tl.load(lse_ptr + row + offs_m)
    delta = tl.load(delta_ptr + row + offs_m)
    dq = tl.zeros([BM, DP], tl.float32)
    for n0 in tl.range(clear, diagonal, BN):
        dq = _pull(dq, q, do, k_box, v_box, lse, delta, b, n0, kv, offs_m, reach, scale_log2, DP, BN, False)
    left = (clear - first) // BN
    for i in tl.range(0, left + tl.cdiv(last - diagonal, BN)):
        n0 = tl.where(i < left, first + i * BN, diagonal + (i - left) * BN)
        dq = _pull(dq, q, do, k_box, v_box, lse, delta, b, n0, kv, offs_m, reach, scale_log2, DP, BN, True)
    dq_box.store([b, m0, h, 0], (dq * scale).to(q.dtype).reshape(1, BM, 1, DP))


def launch_backward(do_BSHD: Tensor, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, o_BSHD: Tensor, lse_BHS: Tensor,
                    start_BS: Tensor | None, end_BS: Tensor | None, scale: float,
                    fused: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, contiguous, from o's; q, k, v, o, lse and start as `launch_forward` had them.

    do_BSHD, o_BSHD: contiguous. end_BS: [B or 1, S] int32, one past the last query that sees each key, or None.
    """
    delta_BHS = launch_delta(o_BSHD, do_BSHD, lse_BHS)
    inputs = do_BSHD, q_BSHD, k_BSKD, v_BSKD, lse_BHS, delta_BHS
    # Written without the last factor if fused, which rounds it off once all of it is there.
    dq = torch.zeros_like(q_BSHD, dtype=torch.float32, memory_format=torch.contiguous_format) if fused else None
    dk, dv = launch_keys(*inputs, end_BS, scale, dq)
    if dq is None:
        return launch_queries(*inputs, start_BS, scale), dk, dv
    return torch.mul(dq, scale, out=torch.empty_like(dq, dtype=q_BSHD.dtype)), dk, dv


def launch_delta(o_BSHD: Tensor, do_BSHD: Tensor, lse_BHS: Tensor) -> Tensor:
    """The sums of o * do over each head, [B, H, S padded to ROWS] fp32."""
    B, S, H, D = o_BSHD.shape
    delta_BHS = torch.empty_like(lse_BHS)
    grid = (lse_BHS.shape[2] // ROWS, B * H)
    delta_kernel[grid](o_BSHD, do_BSHD, delta_BHS, S, lse_BHS.shape[2], H, D=D, DP=padded(D), BM=ROWS, num_warps=8)
    return delta_BHS


def launch_keys(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, end: Tensor | None, scale: float,
                dq: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of k and v; to dq [B, S, H, D] fp32, if given, that of q is added, not yet multiplied with the scale."""
    B, S, K, D = k.shape
    config = configuration(CONFIGS, ELSEWHERE, "keys" if dq is None else "keys_fused", q)
    BM, BN = config["BM"], config["BN"]
    dk, dv = torch.empty_like(k, memory_format=torch.contiguous_format), torch.empty_like(v, memory_format=torch.contiguous_format)
    keys_kernel[(triton.cdiv(S, BN), B * K)](
        box(q, BM), box(do, BM), box(q if dq is None else dq, BM), box(dk, BN), box(dv, BN), k, *k.stride()[:3], v, *v.stride()[:3],
        lse, delta, *per_token(end, lse), S, lse.shape[2], K, q.shape[2] // K, scale, scale * LOG2E,
        D=D, DP=padded(D), SPANS=end is not None, FUSED=dq is not None, **config,
    )  # fmt: skip
    return dk, dv


def launch_queries(do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, start: Tensor | None,
                   scale: float) -> Tensor:  # fmt: skip
    """The gradient of q."""
    B, S, H, D = q.shape
    config = configuration(CONFIGS, ELSEWHERE, "queries", q)
    BM, BN = config["BM"], config["BN"]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries_kernel[(triton.cdiv(S, BM), B * H)](
        q, *q.stride()[:3], do, box(k, BN), box(v, BN), box(dq, BM), lse, delta, *per_token(start, lse), S, lse.shape[2], H,
        H // k.shape[2], scale, scale * LOG2E, D=D, DP=padded(D), SPANS=start is not None, **config,
    )  # fmt: skip
    return dq
