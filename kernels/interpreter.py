"""Makes Triton's interpreter compute bf16 and fp8 as a GPU does.

Triton 3.9's interpreter holds bf16 in 16-bit and fp8 in 8-bit integers and computes on those integers: sums, comparisons and
matrix products of them are nonsense, fp32 is cut off to bf16 where a GPU rounds to the nearest, and rounding to fp8 loses what it
carries into the exponent. With `install()` narrow operands are widened to fp32, which is exact, and results rounded to nearest
even; in fp8 what is too large becomes the largest number, as the GPU's conversion does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as upstream

_Handle = upstream.TensorHandle
_Builder = upstream.InterpreterBuilder
_TORCH_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_FP8 = (*_TORCH_FP8, tl.float8e4b15)
_INTEGERS = {tl.bfloat16: np.uint16, **dict.fromkeys(_FP8, np.uint8)}  # what each narrow float is held in


def bf16_from_fp32(values: np.ndarray) -> np.ndarray:
    """fp32 numbers -> the 16 bits of the nearest bf16, ties to even, as uint16; a NaN stays one and keeps its sign."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = (((bits >> 16) & 0x8000) | 0x7FC0).astype(np.uint16)
    return np.where(np.isnan(values), quiet, rounded)


def fp32_from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bf16 numbers -> the same numbers in fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(bits))


def fp8_from_fp32(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp32 numbers -> the 8 bits of the nearest number of a torch fp8 dtype, ties to even and saturating, as uint8."""
    wide = torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the interpreter's arrays may be read-only
    largest = torch.finfo(dtype).max
    return wide.clamp(-largest, largest).to(dtype).view(torch.uint8).numpy()


def fp32_from_fp8(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """uint8 bits of a torch fp8 dtype -> the same numbers in fp32."""
    return torch.from_numpy(np.array(bits, dtype=np.uint8)).view(dtype).float().numpy()


@functools.cache
def install() -> None:
    """Corrects the interpreter of this process, once."""
    cast, convert = _Builder.cast_impl, _Builder.create_fp_to_fp
    _Builder.cast_impl = _corrected_cast(cast)  # type: ignore[method-assign]

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        if kinds[0] in _TORCH_FP8 and source.data.dtype == np.uint8:
            wide = _Handle(fp32_from_fp8(source.data, _TORCH_FP8[kinds[0]]), tl.float32)
            return wide if kinds[1] == tl.float32 else create_fp_to_fp(self, wide, target, rounding)
        if kinds[1] in _TORCH_FP8 and rounding in (None, upstream._ir.ROUNDING_MODE.RTNE):
            wide = source if kinds[0] == tl.float32 else self.cast_impl(source, tl.float32)
            return _Handle(fp8_from_fp32(wide.data, _TORCH_FP8[kinds[1]]), kinds[1])
        plain = tl.bfloat16 not in kinds or any(kind in _FP8 for kind in kinds)
        return convert(self, source, target, rounding) if plain else self.cast_impl(source, target)

    _Builder.create_fp_to_fp = create_fp_to_fp

    def widened(self: Any, handle: Any) -> Any:
        if not _is_narrow(handle):
            return handle
        if handle.dtype.scalar == tl.bfloat16:
            return self.cast_impl(handle, tl.float32)
        return create_fp_to_fp(self, handle, tl.float32, None)

    def narrowed(self: Any, handle: Any, kind: Any) -> Any:
        if not isinstance(handle, _Handle) or handle.data.dtype != np.float32:
            return _Handle(handle.data, kind) if isinstance(handle, _Handle) and handle.data.dtype == np.bool_ else handle
        if kind == tl.bfloat16:
            return self.cast_impl(handle, kind)
        return create_fp_to_fp(self, handle, kind, upstream._ir.ROUNDING_MODE.RTNE)

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(_Builder, name, _in_fp32(getattr(_Builder, name), widened, narrowed))
    dot = _Builder.create_dot
    _Builder.create_dot = lambda self, a, b, d, *rest: dot(self, widened(self, a), widened(self, b), d, *rest)
    for operation in (upstream.ReduceOps, upstream.ScanOps):
        operation.apply_impl = _reduced_in_fp32(operation.apply_impl, widened, narrowed)


def _is_narrow(handle: Any) -> bool:
    if not isinstance(handle, _Handle) or isinstance(handle.dtype, tl.pointer_type):
        return False
    return handle.data.dtype == _INTEGERS.get(handle.dtype.scalar)


def _corrected_cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        was, becomes = source.dtype.scalar, target.scalar
        if was == tl.bfloat16 and source.data.dtype == np.uint16:
            if becomes == tl.bfloat16:
                return source
            wide = _Handle(fp32_from_bf16(source.data), tl.float32)
            return wide if becomes == tl.float32 else cast(self, wide, target)
        if becomes == tl.bfloat16:
            return _Handle(bf16_from_fp32(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    return cast_impl


def _in_fp32(operation: Callable[..., Any], widened: Callable[..., Any], narrowed: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def corrected(self: Any, *args: Any, **kwargs: Any) -> Any:
        narrow = next((arg for arg in args if _is_narrow(arg)), None)
        if narrow is None:
            return operation(self, *args, **kwargs)
        return narrowed(self, operation(self, *(widened(self, arg) for arg in args), **kwargs), narrow.dtype.scalar)

    return corrected


def _reduced_in_fp32(apply: Callable[..., Any], widened: Callable[..., Any], narrowed: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, given: Any) -> Any:
        several = isinstance(given, (list, tuple))
        inputs = given if several else (given,)
        if not any(_is_narrow(x.handle) for x in inputs):
            return apply(self, given)
        builder = upstream.interpreter_builder
        wide = [
            tl.tensor(widened(builder, x.handle), tl.block_type(tl.float32, x.shape)) if _is_narrow(x.handle) else x for x in inputs
        ]
        out = apply(self, type(given)(wide) if several else wide[0])

        def restored(result: Any, x: Any) -> Any:
            if not _is_narrow(x.handle) or result.handle.data.dtype != np.float32:
                return result
            return self.to_tensor(narrowed(builder, result.handle, x.dtype.scalar).data, x.dtype.scalar)

        return type(out)(map(restored, out, inputs)) if isinstance(out, (list, tuple)) else restored(out, inputs[0])

    return apply_impl
