"""A linear layer whose three matrix products take 8-bit floats: twice the tensor cores' speed, and half of the bytes.

Forward y = x W^T in e4m3 (3 bits of fraction, up to 448), gradients of outputs in e5m2 (2 bits, up to 57,344), as Micikevicius
et al. 2022 (arXiv 2209.05433) propose: dx = dy W and dW = dy^T x. The weights stay as they are, in bf16, with whatever master
copy the optimizer keeps; products are summed in fp32 and rounded to bf16 once.

Scales are powers of two, found from the tensor at hand and never from the past: there is no state to save, and scaling is
exact, so that the only error is the formats' own rounding. Such a scale leaves at most one bit of the range unused, which
a floating-point format feels only where it runs out of exponents, 2^15 below the largest value in e4m3 and 2^30 in e5m2.

scaling "tensor": one scale for each of x, W and dy. "row": one for each row of each operand of each product, a row running
along the dimension that is summed over. Products sum over different dimensions (features in, features out, tokens), so an
operand that takes part in two of them is rounded twice, with scales by row and, for its transpose, by column.
Both cost the same bytes: Hopper's 8-bit products want both operands stored along the summed dimension, so x and dy are
written in both orders anyway, and the first of the two readings finds the maxima. Under ZeRO-3 a weight is whole only around
its layer's forward and backward: its transpose is made in the backward, not kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megaspark.kernels import native
from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import INTERPRETED, kernel, launcher, only_shapes, row_tiles

CONFIGS: dict[str, list[dict[str, int]]] = {
    "_cast_rows_kernel": [{"TILE": 8192, "PER_PROCESSOR": 2, "STAGES": 2, "num_warps": 16}],
    "_cast_kernel": [{"ROWS": 128, "COLUMNS": 64, "num_warps": 8}, {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}],
    "_product_kernel": [{"BM": 128, "BN": 256, "BK": 128, "GROUP": 8, "num_warps": 8, "num_stages": 4}],
}
NOT_ON = {"sm_80": "tensor cores of compute capability 8.0 take no 8-bit floats"}

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP = {E4M3: 8, E5M2: 15}  # the largest number is 1.75 x 2^TOP


class Quantized(NamedTuple):
    """values_MK [M, K] in fp8, times scale fp32 [1], or [M] for each row, is what it stands for."""

    values_MK: Tensor
    scale: Tensor


def fp8_linear_reference(x_NE: Tensor, weight_FE: Tensor, *, scaling: str = "tensor") -> Tensor:
    """`fp8_linear` in plain torch: rounded to fp8, and multiplied in bf16, which holds every fp8 number."""
    return _run(x_NE, weight_FE, scaling, "reference")


def _fp8_linear_scaled_mm(x_NE: Tensor, weight_FE: Tensor, *, scaling: str = "tensor") -> Tensor:
    return _run(x_NE, weight_FE, scaling, "scaled_mm")


def _auto(x_NE: Tensor, *_: Any, **__: Any) -> str:
    # On a CPU without 8-bit tensor units oneDNN's scaled product is 4,000 times slower than bf16's.
    return "scaled_mm" if x_NE.is_cuda else "triton" if INTERPRETED else "reference"


@kernel(auto=_auto, scaled_mm=_fp8_linear_scaled_mm, reference=fp8_linear_reference)
def fp8_linear(x_NE: Tensor, weight_FE: Tensor, *, scaling: str = "tensor") -> Tensor:
    """x W^T with both rounded to e4m3, and its gradients with that of y rounded to e5m2.

    x_NE: [..., E]; weight_FE: [F, E]; both bf16. Returns [..., F] in bf16. E and F must be multiples of 16, and where the weight
    gets a gradient the number of tokens too: 8-bit tensor cores take operands by 16 bytes. A tensor (or row) that holds an
    infinity or NaN gives NaN. backend: "scaled_mm" (torch's, cuBLASLt or CUTLASS on a GPU), "triton", "reference".
    Raises ValueError for other dtypes, sizes and scalings.
    """
    return _run(x_NE, weight_FE, scaling, "triton")


def _run(x_E: Tensor, weight_FE: Tensor, scaling: str, backend: str) -> Tensor:
    if scaling not in ("tensor", "row"):
        raise ValueError(f"fp8_linear has no scaling {scaling!r}; it has tensor and row")
    if x_E.dtype != torch.bfloat16 or weight_FE.dtype != torch.bfloat16:
        raise ValueError(f"fp8_linear takes bfloat16; x is {x_E.dtype} and weight {weight_FE.dtype}")
    if weight_FE.ndim != 2 or x_E.shape[-1:] != weight_FE.shape[1:]:
        raise ValueError(f"fp8_linear takes x [..., E] and weight [F, E]; x is {tuple(x_E.shape)}, weight {tuple(weight_FE.shape)}")
    x_NE = x_E.reshape(-1, x_E.shape[-1])
    wanted = torch.is_grad_enabled() and weight_FE.requires_grad
    sizes = {"E": x_NE.shape[1], "F": weight_FE.shape[0], **({"the number of tokens": x_NE.shape[0]} if wanted else {})}
    for name, size in sizes.items():
        if size % 16:
            raise ValueError(f"fp8_linear takes multiples of 16 only; {name} is {size}")
    return _forward(x_NE, weight_FE, scaling, backend, wanted)[0].unflatten(0, x_E.shape[:-1])


@launcher("fp8_linear_forward")
def _forward(x_NE: Tensor, weight_FE: Tensor, scaling: str, backend: str, weight_wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, F], and for the weight's gradient the bytes of x^T [E, N] in e4m3 with its scale: empty where it gets none)."""
    x, x_transposed = _quantized(x_NE, E4M3, scaling, backend, True, weight_wanted)
    weight, _ = _quantized(weight_FE, E4M3, scaling, backend, True, False)
    return _product(x, weight, backend, fast=True), x_transposed.values_MK.view(torch.uint8), x_transposed.scale


@launcher("fp8_linear_backward")
def _backward(
    grad_NF: Tensor, weight_FE: Tensor, x_EN: Tensor, x_scale: Tensor, scaling: str, backend: str,
    x_wanted: bool, weight_wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x [N, E] and of the weight [F, E]; empty where not wanted."""
    grad_x_NE, grad_weight_FE = grad_NF.new_empty(0), grad_NF.new_empty(0)
    grad, grad_transposed = _quantized(grad_NF, E5M2, scaling, backend, x_wanted, weight_wanted)
    if x_wanted:
        _, weight_transposed = _quantized(weight_FE, E4M3, scaling, backend, False, True)
        grad_x_NE = _product(grad, weight_transposed, backend, fast=False)
    if weight_wanted:
        grad_weight_FE = _product(grad_transposed, Quantized(x_EN.view(E4M3), x_scale), backend, fast=False)
    return grad_x_NE, grad_weight_FE


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight_FE, ctx.scaling, ctx.backend, ctx.weight_wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight_FE, *output[1:])


def _gradients(ctx: Any, grad_NF: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_NF is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[0], ctx.weight_wanted
    gradients = _backward(grad_NF, *ctx.saved_tensors, ctx.scaling, ctx.backend, *wanted)
    return *(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


# ---- matrix products


def _product(a: Quantized, b: Quantized, backend: str, fast: bool) -> Tensor:
    """a b^T, [M, N] in bf16. fast: sums may be kept with fewer bits than fp32's, as forward passes can bear."""
    if only_shapes(a.values_MK):
        return torch.empty(a.values_MK.shape[0], b.values_MK.shape[0], dtype=torch.bfloat16, device=a.values_MK.device)
    if backend == "triton":
        return _product_triton(a, b)
    by_row = a.scale.numel() > 1 or b.scale.numel() > 1
    if backend == "scaled_mm":
        a_scale, b_scale = (a.scale[:, None], b.scale[None, :]) if by_row else (a.scale[0], b.scale[0])
        return torch._scaled_mm(
            a.values_MK, b.values_MK.t(), a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
        )  # fmt: skip
    # Both hold every fp8 number; a CPU that has no products of bf16 is tens of times faster in fp32.
    dtype = torch.float32 if a.values_MK.device.type == "cpu" and not native.has_bf16() else torch.bfloat16
    out_MN = (a.values_MK.to(dtype) @ b.values_MK.to(dtype).t()).bfloat16()
    return out_MN.mul_(a.scale.bfloat16()[:, None]).mul_(b.scale.bfloat16())  # powers of two: exact


def _product_triton(a: Quantized, b: Quantized) -> Tensor:
    (M, K), N = a.values_MK.shape, b.values_MK.shape[0]
    out_MN = torch.empty(M, N, dtype=torch.bfloat16, device=a.values_MK.device)
    config = CONFIGS["_product_kernel"][0]
    if out_MN.numel():
        _product_kernel[(triton.cdiv(M, config["BM"]) * triton.cdiv(N, config["BN"]),)](
            TensorDescriptor.from_tensor(a.values_MK, [config["BM"], config["BK"]]),
            TensorDescriptor.from_tensor(b.values_MK, [config["BN"], config["BK"]]),
            out_MN, a.scale, b.scale, M, N, K, A_ROWS=a.scale.numel() > 1, B_ROWS=b.scale.numel() > 1, **config,
        )  # fmt: skip
    return out_MN


@triton.jit
def _product_kernel(
    a_descriptor, b_descriptor, out_ptr, a_scale_ptr, b_scale_ptr, M, N, K, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of a b^T; neighbouring programs share GROUP rows of tiles, so that what they read is still in the cache."""
    tiles_N = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * tiles_N)
    rows_of_group = tl.minimum(tl.cdiv(M, BM) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_N)
    m = (group * GROUP + within % rows_of_group) * BM
    n = within // rows_of_group * BN
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        total = tl.dot(a_descriptor.load([m, k]), b_descriptor.load([n, k]).T, total)
    row, column = m + tl.arange(0, BM)[:, None], n + tl.arange(0, BN)[None, :]
    if A_ROWS:
        total *= tl.load(a_scale_ptr + row, mask=row < M, other=0.0)
    else:
        total *= tl.load(a_scale_ptr)
    if B_ROWS:
        total *= tl.load(b_scale_ptr + column, mask=column < N, other=0.0)
    else:
        total *= tl.load(b_scale_ptr)
    tl.store(out_ptr + row.to(tl.int64) * N + column, total.to(tl.bfloat16), mask=(row < M) & (column < N))


# ---- rounding to fp8


def _quantized(
    x_MK: Tensor, dtype: torch.dtype, scaling: str, backend: str, rows: bool, columns: bool
) -> tuple[Quantized, Quantized]:
    """x [M, K], and x^T [K, M], in fp8; of zero size where not wanted."""
    M, K = x_MK.shape
    x_MK, by_row, device = x_MK.contiguous(), scaling == "row", x_MK.device
    values_MK = torch.empty((M, K) if rows else 0, dtype=dtype, device=device)
    values_KM = torch.empty((K, M) if columns else 0, dtype=dtype, device=device)
    scale_M = torch.empty((M if by_row else 1) if rows else 0, dtype=torch.float32, device=device)
    scale_K = torch.empty((K if by_row else 1) if columns else 0, dtype=torch.float32, device=device)
    straight, transposed = Quantized(values_MK, scale_M), Quantized(values_KM, scale_K)
    if only_shapes(x_MK) or not x_MK.numel() or not (rows or columns):
        return straight, transposed
    in_triton = backend == "triton" or (backend == "scaled_mm" and x_MK.is_cuda)
    (_quantize_triton if in_triton else _quantize_torch)(x_MK, straight, transposed, by_row)
    return straight, transposed


def _scale_of(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The greatest power of two by which numbers up to `largest` may be multiplied to fit, and its inverse: both fp32.

    The inverse is NaN where `largest` is not finite, so that nothing infinite disappears in a saturating cast.
    """
    exponent = (largest.float().view(torch.int32) + 0x1FFFFF) >> 23  # one higher where the fraction is beyond 1.75
    up = (254 + TOP[dtype] - exponent).clamp(1, 253)
    down = torch.where(largest.isfinite(), ((254 - up) << 23).view(torch.float32), float("nan"))
    return (up << 23).view(torch.float32), down


def _quantize_torch(x_MK: Tensor, straight: Quantized, transposed: Quantized, by_row: bool) -> None:
    """What the kernels below do."""
    sizes = x_MK.abs()
    for (values, scale), x, dim in ((straight, x_MK, 1), (transposed, x_MK.t(), 0)):
        if values.numel():
            largest = sizes.amax(dim) if by_row else sizes.amax()[None]
            up, down = _scale_of(largest, values.dtype)
            scale.copy_(down)
            values.copy_(x * up[:, None].to(x.dtype))  # in bf16, exactly


def _quantize_triton(x_MK: Tensor, straight: Quantized, transposed: Quantized, by_row: bool) -> None:
    (M, K), rows, columns = x_MK.shape, straight.values_MK.numel() > 0, transposed.values_MK.numel() > 0
    top = TOP[(straight if rows else transposed).values_MK.dtype]
    if by_row and rows:
        programs, options = row_tiles(M, K, CONFIGS["_cast_rows_kernel"][0], x_MK.device)
        if options["BLOCK"] > 16384:  # the registers hold one row and the maxima: the next row has no place beside them
            options["STAGES"] = 1
        maxima_PK = torch.empty((programs, K) if columns else 0, dtype=x_MK.dtype, device=x_MK.device)
        _cast_rows_kernel[(programs,)](x_MK, *straight, maxima_PK, M, K, TOP=top, MAXIMA=columns, **options)
        if not columns:
            return
        low = high = maxima_PK.amax(0)
        rows = False
    else:
        low, high = x_MK.aminmax(dim=0) if by_row else x_MK.aminmax()
    config = CONFIGS["_cast_kernel"][0]
    grid = (triton.cdiv(M, config["ROWS"]), triton.cdiv(K, config["COLUMNS"]))
    _cast_kernel[grid](
        x_MK, low, high, *straight, *transposed, M, K, TOP=top, BY_COLUMN=by_row, STRAIGHT=rows, TRANSPOSED=columns, **config
    )


@triton.jit
def _power_of_two(largest, TOP: tl.constexpr):
    """`_scale_of` for numbers up to `largest`, fp32."""
    exponent = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
    up = tl.minimum(tl.maximum(254 + TOP - exponent, 1), 253)
    down = tl.where(largest < float("inf"), ((254 - up) << 23).to(tl.float32, bitcast=True), float("nan"))
    return (up << 23).to(tl.float32, bitcast=True), down


@triton.jit
def _cast_rows_kernel(
    x_ptr, out_ptr, scale_ptr, maxima_ptr, M, K, TOP: tl.constexpr, MAXIMA: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each row by its own scale, read once; and the largest absolute values of the columns of the rows that a program takes."""
    column = tl.arange(0, BLOCK)[None, :]
    maxima = tl.zeros([ROWS, BLOCK], dtype=x_ptr.dtype.element_ty)
    for first in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < M) & (column < K)
        place = row.to(tl.int64) * K + column
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        if MAXIMA:
            maxima = tl.maximum(maxima, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        x = x.to(tl.float32)
        size = tl.where(x == x, tl.abs(x), float("inf"))  # a maximum would pass over NaN
        up, down = _power_of_two(tl.max(size, axis=1, keep_dims=True), TOP)
        tl.store(scale_ptr + row, down, mask=row < M)
        tl.store(out_ptr + place, (x * up).to(out_ptr.dtype.element_ty), mask=inside)
    if MAXIMA:
        maxima = maxima.to(tl.float32)
        maxima = tl.max(tl.where(maxima == maxima, maxima, float("inf")), axis=0, keep_dims=True).to(maxima_ptr.dtype.element_ty)
        tl.store(maxima_ptr + tl.program_id(0) * K + column, maxima, mask=column < K)


@triton.jit
def _cast_kernel(
    x_ptr, low_ptr, high_ptr, out_ptr, out_scale_ptr, transposed_ptr, transposed_scale_ptr, M, K, TOP: tl.constexpr,
    BY_COLUMN: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile, read once, with scales for numbers from `low` to `high` of all or of each column; written in one or both orders."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    index = column if BY_COLUMN else column * 0
    low = tl.load(low_ptr + index, mask=column < K, other=0.0).to(tl.float32)
    high = tl.load(high_ptr + index, mask=column < K, other=0.0).to(tl.float32)
    largest = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
    up, down = _power_of_two(largest, TOP)
    if tl.program_id(0) == 0:
        if STRAIGHT:
            tl.store(out_scale_ptr + index, down, mask=column == 0)
        if TRANSPOSED:
            tl.store(transposed_scale_ptr + index, down, mask=(column < K) if BY_COLUMN else (column == 0))
    inside = (row < M) & (column < K)
    x = tl.load(x_ptr + row.to(tl.int64) * K + column, mask=inside, other=0.0).to(tl.float32) * up
    if STRAIGHT:
        tl.store(out_ptr + row.to(tl.int64) * K + column, x.to(out_ptr.dtype.element_ty), mask=inside)
    if TRANSPOSED:
        tl.store(transposed_ptr + column.to(tl.int64) * M + row, x.to(transposed_ptr.dtype.element_ty), mask=inside)


def cases() -> list[Case]:
    """The feed-forward layers of Litespark's 3B and 30B Llama, in and out, for one sequence."""

    def make(tokens: int, width: int, out: int, scaling: str) -> Case:
        def inputs(make: Inputs) -> dict[str, Any]:
            return {"x_NE": make.normal(tokens, width), "weight_FE": make.normal(out, width, std=0.02), "scaling": scaling}

        x, weight, y = 2 * tokens * width, 2 * out * width, 2 * tokens * out
        product = 2 * tokens * width * out
        return Case(
            name=f"{tokens}x{width}x{out}_{scaling}",
            make=inputs,
            differentiated=("x_NE", "weight_FE"),
            forward_bytes=x + weight + y,
            backward_bytes=2 * (x + weight) + y,
            forward_flops=product,
            backward_flops=2 * product,
        )

    sizes = [(4096, 2048, 11008), (4096, 11008, 2048), (4096, 6656, 17920), (4096, 17920, 6656)]
    return [make(*size, scaling) for size in sizes for scaling in ("tensor", "row")]
