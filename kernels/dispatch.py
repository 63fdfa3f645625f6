"""Which implementation of an op runs: the one for the tensors' device, or the one that is named.

    @kernel(reference=rms_norm_reference)
    def rms_norm(x, weight, eps): ...                # made of Triton kernels

    rms_norm(x, weight, eps)                         # Triton on CUDA, ROCm and in Triton's interpreter; the reference elsewhere
    rms_norm(x, weight, eps, backend="reference")

An op may have more of them (a native CPU one, torch's SDPA) and say itself what "auto" means.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 was set when triton was first imported

if INTERPRETED:
    from megaspark.kernels import interpreter

    interpreter.install()


def by_device(*args: Any, **kwargs: Any) -> str:
    """The default meaning of "auto": "triton" for tensors on a GPU and in the interpreter, else "reference"."""
    tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return "triton" if tensor.is_cuda or INTERPRETED else "reference"


def kernel(auto: Callable[..., str] = by_device, **others: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes an op of its Triton implementation (the decorated function) and `others`, by name; all take the same arguments.

    The op takes `backend` besides: a name, or "auto" (what `auto` says for these arguments). `op.implementations` holds all.
    Raises ValueError for a name that the op does not have.
    """

    def decorate(op: Callable[..., Any]) -> Callable[..., Any]:
        implementations = {"triton": op, **others}

        @functools.wraps(op)
        def dispatched(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
            name = auto(*args, **kwargs) if backend == "auto" else backend
            if name not in implementations:
                raise ValueError(f"{op.__name__} has no backend {name!r}; it has auto, {', '.join(implementations)}")
            return implementations[name](*args, **kwargs)

        dispatched.implementations = implementations  # type: ignore[attr-defined]
        return dispatched

    return decorate


@functools.cache
def op_modules() -> dict[str, ModuleType]:
    """Every file of this folder that holds an op, by the op's name: those with `cases()`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "def cases(" in path.read_text(encoding="utf-8"))
    return {name: import_module(f"megaspark.kernels.{name}") for name in names}


def backends(op: str) -> list[str]:
    """The names that `backend` may have for an op."""
    return ["auto", *getattr(op_modules()[op], op).implementations]
