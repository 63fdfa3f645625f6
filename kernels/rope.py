"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in GPT-NeoX and Hugging Face."""

import torch
from torch import Tensor


def rope_angles(positions_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cosines and sines of every position, for all heads of all layers.

    positions_BS: [B, S] integers. Returns cos, sin: [B, S, 1, D] in `dtype`, each half of D holding the same D/2 angles,
    computed in fp32.
    """
    halves = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions_BS.device).float()
    inverse_frequency = 1.0 / (theta ** (halves / head_dim))
    angles_BSD = (positions_BS[..., None].float() * inverse_frequency).repeat(1, 1, 2)
    return angles_BSD.cos().to(dtype)[:, :, None], angles_BSD.sin().to(dtype)[:, :, None]


def rope(x_BSHD: Tensor, cos_BS1D: Tensor, sin_BS1D: Tensor) -> Tensor:
    """Rotates queries or keys by their positions' angles: (a, b) -> (a cos - b sin, b cos + a sin) over the halves of D.

    x_BSHD: [B, S, heads, D], D even. Returns the same shape and dtype.
    """
    a, b = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos_BS1D + torch.cat((-b, a), dim=-1) * sin_BS1D
