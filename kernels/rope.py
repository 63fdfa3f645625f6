"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in GPT-NeoX and Hugging Face."""

import torch
from torch import Tensor


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


def rope(q_BSHD: Tensor, k_BSKD: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions' angles: (a, b) -> (a cos - b sin, b cos + a sin) over the halves of D.

    q_BSHD: [B, S, H, D]; k_BSKD: [B, S, K, D], D even; cos_BSC, sin_BSC: [B or 1, S, D/2] fp32. Returns the same shapes and
    dtypes; the products are taken in fp32.
    """
    return _rotated(q_BSHD, cos_BSC, sin_BSC), _rotated(k_BSKD, cos_BSC, sin_BSC)


def _rotated(x_BSHD: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    a, b = x_BSHD.chunk(2, dim=-1)
    cos, sin = cos_BSC[:, :, None], sin_BSC[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BSHD.dtype)
