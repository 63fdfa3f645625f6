"""The fused head on a CPU in C++ (native/linear_cross_entropy.cpp): logits are in fp32 and live in a cache.

Written once, as numerators in the weights' dtype, they are read once more, for the weights' gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaspark.kernels import native

TOKENS = 48  # a block in native/linear_cross_entropy.cpp


def fits(hidden_NE: Tensor) -> bool:
    """Whether it pays here: not in bf16 where torch multiplies by AMX tiles, which do many times as much."""
    if hidden_NE.device.type != "cpu" or hidden_NE.dtype not in native.DTYPES or not native.available():
        return False
    return hidden_NE.dtype == torch.float32 or not native.has_amx()


def forward_native(
    hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, ignore_index: int, z_loss: float, chunk: int, losses_N: Tensor,
    grad_hidden_NE: Tensor | None, grad_weight_VE: Tensor | None,
) -> None:  # fmt: skip
    """Writes each token's loss and the gradients of their sum that are asked for, about `chunk` tokens at a time.

    Arguments as in `linear_cross_entropy_cpu.forward_torch`, for fp32 and bf16. Raises RuntimeError for a label out of range.
    """
    labels_N = labels_N.to(torch.int64).contiguous()
    wrong = labels_N[((labels_N < 0) | (labels_N >= len(weight_VE))) & (labels_N != ignore_index)]
    if wrong.numel():
        raise RuntimeError(f"index {int(wrong[0])} is out of bounds for a vocabulary of {len(weight_VE)}")
    rounded = -(-chunk // TOKENS) * TOKENS
    in_fp32 = grad_weight_VE is not None and grad_weight_VE.dtype == torch.float32
    numbers = [*hidden_NE.shape[:1], *weight_VE.shape, rounded, ignore_index, in_fp32, torch.get_num_threads()]
    native.call(
        "linear_cross_entropy", hidden_NE.dtype, numbers, hidden_NE.contiguous(), weight_VE.contiguous(), labels_N, z_loss,
        losses_N, grad_hidden_NE, grad_weight_VE,
    )  # fmt: skip
