"""Root-mean-square layer norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x_E: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Scales each row to unit root mean square, then by `weight_E`.

    x_E: [..., E] of any float dtype; the mean is taken in fp32 and rounded to x's dtype before the weight is applied, as
    transformers' LlamaRMSNorm does. Returns [..., E] in the promoted dtype of x and weight.
    """
    x_f32 = x_E.float()
    scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
    return weight_E * (x_f32 * scale).to(x_E.dtype)
