"""The plain linear layer: the vendor's product, but on CPUs where it is slow: in fp32 on AMD's, of which MKL leaves a part idle,
and in bf16 on all that do not multiply bf16 themselves, where torch is tens of times slower than in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaspark.kernels import native
from megaspark.kernels.dispatch import by_device, kernel, launcher, only_shapes

# Below, laying out the weight for them costs more than it brings.
FEWEST_TOKENS = {torch.float32: 128, torch.bfloat16: 8}


def linear_reference(x_E: Tensor, weight_FE: Tensor) -> Tensor:
    """`linear` in plain torch, for any device."""
    return F.linear(x_E, weight_FE)


def _auto(x_E: Tensor, weight_FE: Tensor) -> str:
    if by_device(x_E) != "reference" or x_E.device.type != "cpu" or x_E.dtype not in FEWEST_TOKENS:
        return "reference"
    slow = native.mkl_is_slow() if x_E.dtype == torch.float32 else not native.has_bf16()
    many = x_E.numel() >= FEWEST_TOKENS[x_E.dtype] * x_E.shape[-1]
    return "native" if slow and many and native.available() else "reference"


@kernel(_auto, main="native", reference=linear_reference)
def linear(x_E: Tensor, weight_FE: Tensor) -> Tensor:
    """x W^T. x_E: [..., E]; weight_FE: [F, E], both of one dtype. Returns [..., F].

    backend: "reference" (torch's), "native" (native/linear.cpp: on a CPU). Raises ValueError for what "native" cannot do.
    """
    if x_E.dtype not in native.DTYPES or weight_FE.dtype != x_E.dtype or x_E.device.type != "cpu":
        kinds = f"{x_E.dtype} and {weight_FE.dtype} on {x_E.device}"
        raise ValueError(f"linear's backend 'native' has fp32 and bf16 on CPUs, not {kinds}")
    return _forward(x_E.reshape(-1, x_E.shape[-1]), weight_FE).unflatten(0, x_E.shape[:-1])


@launcher("linear_native")
def _forward(x_NE: Tensor, weight_FE: Tensor) -> Tensor:
    return _product(x_NE, weight_FE.t())


@launcher("linear_native_backward")
def _backward(grad_NF: Tensor, x_NE: Tensor, weight_FE: Tensor, x_wanted: bool, weight_wanted: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x [N, E] and of the weight [F, E]; empty where not wanted."""
    grad_x_NE = _product(grad_NF, weight_FE) if x_wanted else grad_NF.new_empty(0)
    return grad_x_NE, _product(grad_NF.t(), x_NE) if weight_wanted else grad_NF.new_empty(0)


def _product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    out_MN = a_MK.new_empty(a_MK.shape[0], b_KN.shape[1])
    if not only_shapes(a_MK) and out_MN.numel():
        a_MK, b_KN = (x if 1 in x.stride() else x.contiguous() for x in (a_MK, b_KN))
        numbers = [*out_MN.shape, a_MK.shape[1], *a_MK.stride(), *b_KN.stride(), torch.get_num_threads()]
        native.call("linear", a_MK.dtype, numbers, a_MK, b_KN, out_MN)
    return out_MN


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    gradients = _backward(grad_NF, *ctx.saved_tensors, *wanted)
    return tuple(gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True))


_forward.register_autograd(_gradients, setup_context=_save)
