"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_F: Tensor, up_F: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    gate_F, up_F: [..., F] of one float dtype. Returns the same shape and dtype.
    """
    return F.silu(gate_F) * up_F
