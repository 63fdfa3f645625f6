"""How good an op must be: its error against fp64 at most twice that of plain torch in the same dtype.

For each output and each gradient, by the largest error and by the error's norm. The factor 2 is FlashAttention's rule: another
order of sums and another choice of instructions are free, a lost bit is not. One rounding to the dtype stays allowed besides,
since plain torch may happen to round nothing (a product by 1, a sum of two terms), and four where so few elements are compared
that all of torch's roundings may have been lucky ones.

    check(op, plain, dtype, x=normal(5, 33, seed=1), weight=normal(33, seed=2), eps=1e-5)

Inputs start as fp64 numbers that bf16 holds exactly; tensors of floats are cast to `dtype` and get gradients, all else is passed
as it is (wrap a float tensor that must keep its dtype in `Fixed`). While the op runs, torch.empty and empty_like give NaN, so an
element that nobody writes shows; and the op runs twice and must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Op = Callable[..., Any]


class Fixed(NamedTuple):
    """A tensor that keeps its dtype and takes no gradient: fp32 angles, integer labels. In fp64 runs it is made fp64."""

    tensor: Tensor


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    """Normal fp64 numbers that bf16 and fp16 hold exactly (8 significant bits, none tiny)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).bfloat16().half().double()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: -12345), so that an element nobody writes shows."""

    def poisoned(allocate: Op) -> Op:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -12345)

        return allocated

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        yield


def results(op: Op, dtype: torch.dtype, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs ("output 0") and gradients ("gradient of x") of op(**inputs) in `dtype`, for upstream gradients that differ."""

    def given(value: Any) -> Any:
        if isinstance(value, Fixed):
            return value.tensor.double() if dtype == torch.float64 and value.tensor.is_floating_point() else value.tensor
        return value.to(dtype).requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    arguments = {name: given(value) for name, value in inputs.items()}
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    out = op(**arguments)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    found = {f"output {i}": value.detach() for i, value in enumerate(outputs)}
    upstream = [normal(*value.shape, seed=77 + i).to(value.dtype) for i, value in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return found | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(op: Op, plain: Op, dtype: torch.dtype, factor: float = 2.0, **inputs: Any) -> None:
    """`op` errs at most `factor` times as much as `plain` in `dtype`, writes everything, and gives the same bits twice."""
    exact = results(plain, torch.float64, inputs)
    torchs = results(plain, dtype, inputs)
    with poisoned_memory():
        found, again = results(op, dtype, inputs), results(op, dtype, inputs)
    for name, right in exact.items():
        assert_as_good(name, found[name], torchs[name], right, dtype, factor)
        assert torch.equal(found[name], again[name]), f"{name}: two runs differ"


def assert_as_good(name: str, found: Tensor, torchs: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 2.0) -> None:
    """`found` is of torch's shape and dtype, finite, and as near to `exact` as the rule says."""
    assert found.shape == torchs.shape and found.dtype == torchs.dtype, f"{name}: {found.shape} {found.dtype}"
    assert found.isfinite().all(), f"{name}: {(~found.isfinite()).sum()} of {found.numel()} elements not written, or not finite"
    ours, theirs = (found.double() - exact).flatten(), (torchs.double() - exact).flatten()
    if exact.numel() == 0:
        return
    floor = UNIT_ROUNDOFF[dtype] * (1 if exact.numel() >= 256 else 4)
    for what, order in (("largest error", float("inf")), ("error's norm", 2.0)):
        mine, allowed = ours.norm(order), factor * theirs.norm(order) + floor * exact.flatten().norm(order)
        assert mine <= allowed, f"{name}: {what} {mine:.3e}, torch's {theirs.norm(order):.3e}, allowed {allowed:.3e}"
