"""The forward kernel of causal flash attention (Dao 2023, arXiv 2307.08691) in Triton, and what both directions share.

A query m sees the keys from start[m] to m. `start` never decreases, so the first and the last row of a tile of queries tell
which blocks of keys nobody in it sees (never loaded), which everybody sees (no mask) and which need comparing: one unsigned
comparison, since m - n of a key in the future wraps around to a huge number.

The form that the compiler needs on sm_90 to keep everything in registers and shared memory:
- Blocks that a loop loads come by 4-D tensor descriptors made on the host (TMA): no pointers or masks, rows beyond the
  sequence and columns beyond the head are zeros, nothing of another sequence or head is ever touched.
- Operands that stay for the whole loop come by pointers: from a descriptor they would be held in registers.
- Head dims between powers of two are padded with zeros to the next one.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megaspark.kernels.dispatch import INTERPRETED

LOG2E = math.log2(math.e)
ROWS = 128  # lse and delta are padded to a multiple of this, which every block size divides, and are read without masks
UNSEEN = tl.constexpr(-1.0e30)  # infinity would give NaN in rows whose first blocks are wholly masked

Configs = dict[tuple[str, int, int], list[dict[str, int]]]

# Launch parameters by (kernel, padded head dim, bytes of a number); the first of each list is used. No autotuning: two runs
# that picked differently would differ in their last bits.
CONFIGS: Configs = {
    ("forward", 128, 2): [{"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 2}],
    ("forward", 64, 2): [{"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 2}],
    ("forward", 128, 4): [{"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 1}],
    ("forward", 64, 4): [{"BM": 32, "BN": 32, "num_warps": 8, "num_stages": 1}],
}
# What differs elsewhere. "small" has less shared memory than an sm_90: 163 KB on sm_80, 99 on sm_89; AMD's gfx942 has 64.
ELSEWHERE: dict[str, Configs] = {
    "small": {
        ("forward", 128, 2): [{"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 1}],
        ("forward", 64, 2): [{"BM": 64, "BN": 64, "num_warps": 4, "num_stages": 1}],
    }
}
ELSEWHERE["amd"] = ELSEWHERE["small"]


def configuration(configs: Configs, elsewhere: dict[str, Configs], kernel: str, x: Tensor) -> dict[str, int]:
    """The launch parameters of a kernel for heads as wide as x's last axis, padded, in x's dtype, on the GPU at hand."""
    key = kernel, max(64, padded(x.shape[-1])), x.element_size()
    family = "sm_90" if INTERPRETED else _family(triton.runtime.driver.active, x.device.index or 0)
    return elsewhere.get(family, {}).get(key, configs[key])[0]


@cache
def _family(driver: Any, device: int) -> str:
    target = driver.get_current_target()
    if target.backend != "cuda":
        return "amd"
    if driver.utils.get_device_properties(device)["max_shared_mem"] < 227 * 1024:
        return "small"
    return "sm_90" if target.arch < 100 else "sm_100"


def padded_sequence(seq: int) -> int:
    """How long lse and delta are."""
    return -(-seq // ROWS) * ROWS


def padded(head_dim: int) -> int:
    """The head dim that a tile has: the next power of two, at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(head_dim))


def box(x_BSHD: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of [B, S, H, D] that loads or stores `rows` rows of one head."""
    return TensorDescriptor.from_tensor(x_BSHD, [1, rows, 1, padded(x_BSHD.shape[-1])])


def per_token(x_BS: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Starts or ends as arguments of a kernel: with the stride from one sequence to the next, 0 if all share one row."""
    if x_BS is None:
        return stand_in, 0
    return x_BS, x_BS.stride(0) if x_BS.shape[0] > 1 else 0


@triton.jit
def rows_of_head(ptr, stride_b, stride_s, stride_h, b, first, h, S, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Rows [first, first + ROWS) of one head of [B, S, H, D] by pointers: [ROWS, DP], zero beyond S and D."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, DP)
    start = ptr + b.to(tl.int64) * stride_b + first.to(tl.int64) * stride_s + h.to(tl.int64) * stride_h
    inside = (first + rows < S)[:, None] & (columns < D)[None, :]
    return tl.load(start + rows[:, None] * stride_s + columns[None, :], mask=inside, other=0.0)


@triton.jit
def key_blocks(start_ptr, m0, S, BM: tl.constexpr, BN: tl.constexpr, SPANS: tl.constexpr):
    """Where the keys of queries [m0, m0 + BM) lie: (first, clear, diagonal, last).

    In [clear, diagonal) every query sees every key; [first, clear) and [diagonal, last) need the mask. All but `last` are
    multiples of BN.
    """
    diagonal = m0 // BN * BN
    last = tl.minimum(S, m0 + BM)
    if SPANS:
        first = tl.load(start_ptr + m0) // BN * BN
        clear = tl.minimum(tl.cdiv(tl.load(start_ptr + last - 1), BN) * BN, diagonal)
    else:
        first = 0
        clear = 0
    return first, clear, diagonal, last


@triton.jit
def _attend(acc, total, peak, q, k_box, v_box, b, n0, h, offs_m, reach, scale, DP: tl.constexpr, BN: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """One block of keys: acc [BM, DP] and total [BM] are sums of exp2(scores - peak), peak [BM] the largest score so far."""
    k = k_box.load([b, n0, h, 0]).reshape(BN, DP)
    s = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        distance = offs_m[:, None] - (n0 + tl.arange(0, BN))[None, :]
        s = tl.where(distance.to(tl.uint32) <= reach[:, None], s, UNSEEN)
    higher = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(p, 1)
    v = v_box.load([b, n0, h, 0]).reshape(BN, DP)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def forward_kernel(q_ptr, q_stride_b, q_stride_s, q_stride_h, k_box, v_box, o_box, lse_ptr, start_ptr, start_stride, S, padded_S,
                   H, groups, scale, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   SPANS: tl.constexpr, PADDING: tl.constexpr):  # fmt: skip
    """One tile of BM queries of one head; `scale` carries log2(e), so that exp2 gives the softmax. Longest tiles first."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b = tl.program_id(1) // H
    h = tl.program_id(1) % H
    kv = h // groups
    offs_m = m0 + tl.arange(0, BM)
    start_ptr += b * start_stride
    first, clear, diagonal, last = key_blocks(start_ptr, m0, S, BM, BN, SPANS)
    reach = offs_m  # how far back each query sees
    if SPANS:
        reach = offs_m - tl.load(start_ptr + offs_m, mask=offs_m < S, other=0)
    reach = reach.to(tl.uint32)
    q = rows_of_head(q_ptr, q_stride_b, q_stride_s, q_stride_h, b, m0, h, S, D, DP, BM)
    acc = tl.zeros([BM, DP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    peak = tl.full([BM], UNSEEN, tl.float32)
    for n0 in tl.range(clear, diagonal, BN):
        acc, total, peak = _attend(acc, total, peak, q, k_box, v_box, b, n0, kv, offs_m, reach, scale, DP, BN, False)
    left = (clear - first) // BN
    for i in tl.range(0, left + tl.cdiv(last - diagonal, BN)):
        n0 = tl.where(i < left, first + i * BN, diagonal + (i - left) * BN)
        acc, total, peak = _attend(acc, total, peak, q, k_box, v_box, b, n0, kv, offs_m, reach, scale, DP, BN, True)
    o_box.store([b, m0, h, 0], (acc / total[:, None]).to(q.dtype).reshape(1, BM, 1, DP))
    lse_ptr += tl.program_id(1).to(tl.int64) * padded_S
    tl.store(lse_ptr + offs_m, peak + tl.log2(total), mask=offs_m < padded_S)
    if tl.program_id(0) == 0:  # the last tile: a backward with larger blocks reads beyond it
        rest = m0 + BM + tl.arange(0, PADDING)
        tl.store(lse_ptr + rest, tl.zeros([PADDING], tl.float32), mask=rest < padded_S)


def launch_forward(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, start_BS: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, S, H, D] and the base-2 logarithms of the softmax's sums, [B, H, S padded to ROWS] fp32, finite in the padding.

    q, k, v: strides as `box` wants them: the last 1, the others multiples of 16 bytes. start_BS: [B or 1, S] int32 or None.
    """
    B, S, H, D = q_BSHD.shape
    config = configuration(CONFIGS, ELSEWHERE, "forward", q_BSHD)
    padded_S = padded_sequence(S)
    o_BSHD = torch.empty((B, S, H, D), dtype=q_BSHD.dtype, device=q_BSHD.device)
    lse_BHS = torch.empty((B, H, padded_S), dtype=torch.float32, device=q_BSHD.device)
    forward_kernel[(triton.cdiv(S, config["BM"]), B * H)](
        q_BSHD, *q_BSHD.stride()[:3], box(k_BSKD, config["BN"]), box(v_BSKD, config["BN"]), box(o_BSHD, config["BM"]), lse_BHS,
        *per_token(start_BS, lse_BHS), S, padded_S, H, H // k_BSKD.shape[2], scale * LOG2E,
        D=D, DP=padded(D), SPANS=start_BS is not None, PADDING=ROWS, **config,
    )  # fmt: skip
    return o_BSHD, lse_BHS
