"""Causal attention that stays inside each document of a packed sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_mask(positions_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of causal attention within documents, from positions that restart at 0 in every document.

    Query m sees key n exactly when 0 <= m - n <= position of m: no key after it, none before its document's start.
    positions_BS: [B, S] integers. Returns [B, 1, S, S] in `dtype`, 0 where seen and -inf elsewhere.
    """
    index = torch.arange(positions_BS.shape[1], device=positions_BS.device)
    distance_SS = index[:, None] - index[None, :]
    seen_BSS = (distance_SS >= 0) & (distance_SS <= positions_BS[:, :, None])
    mask = torch.zeros(seen_BSS.shape, dtype=dtype, device=positions_BS.device)
    return mask.masked_fill_(~seen_BSS, float("-inf"))[:, None]


def attention(q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask_B1SS: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, heads in groups sharing one key and value head (GQA, arXiv 2305.13245).

    q_BSHD: [B, S, H, D]; k_BSKD, v_BSKD: [B, S, K, D] with H a multiple of K; mask_B1SS: additive, or None for plain causal
    attention over the whole sequence. Returns [B, S, H, D] in q's dtype.
    """
    groups = q_BSHD.shape[2] // k_BSKD.shape[2]
    q, k, v = q_BSHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SS, is_causal=mask_B1SS is None)
    return out.transpose(1, 2)
