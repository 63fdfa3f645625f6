"""Which implementation of an op runs: the one for the tensors' device, or the one that is named.

    @kernel(reference=rms_norm_reference)
    def rms_norm(x, weight, eps): ...                # made of Triton kernels

    rms_norm(x, weight, eps)                         # Triton on CUDA, ROCm and in Triton's interpreter; the reference elsewhere
    rms_norm(x, weight, eps, backend="reference")

An op may have more of them (a native CPU one, torch's SDPA) and say itself what "auto" means.

The part of an op that launches kernels is one function, opaque to torch.compile, which also tells it the outputs' shapes:

    @launcher("rms_norm_forward")
    def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd = ...                                # allocate the outputs
        if not only_shapes(x):
            _kernel[grid](...)
        return y, rstd
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 was set when triton was first imported

if INTERPRETED:
    from megaspark.kernels import interpreter

    interpreter.install()


def by_device(*args: Any, **kwargs: Any) -> str:
    """The default meaning of "auto": "triton" for tensors on a GPU and in the interpreter, else "reference"."""
    tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return "triton" if tensor.is_cuda or INTERPRETED else "reference"


def kernel(
    auto: Callable[..., str] = by_device, main: str = "triton", **others: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Any]:
    """Makes an op of the decorated function, named `main`, and of `others`, by name; all take the same arguments.

    The op takes `backend` besides: a name, or "auto" (what `auto` says for these arguments). `op.implementations` holds all.
    Raises ValueError for a name that the op does not have.
    """

    def decorate(op: Callable[..., Any]) -> Callable[..., Any]:
        implementations = {main: op, **others}

        @functools.wraps(op)
        def dispatched(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
            name = auto(*args, **kwargs) if backend == "auto" else backend
            if name not in implementations:
                raise ValueError(f"{op.__name__} has no backend {name!r}; it has auto, {', '.join(implementations)}")
            return implementations[name](*args, **kwargs)

        dispatched.implementations = implementations  # type: ignore[attr-defined]
        return dispatched

    return decorate


def launcher(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Makes torch.ops.megaspark.<name>, a custom op that torch.compile and DeepSpeed take whole, of a function with type hints.

    The function is its own fake implementation: it allocates the outputs, and launches nothing if `only_shapes` of an input.
    """

    def register(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"megaspark::{name}", function, mutates_args=mutates_args)
        op.register_fake(function)
        return op

    return register


_compiling_only = False


def only_shapes(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory to launch a kernel on: torch.compile asks with such what shapes an op gives."""
    return isinstance(tensor, FakeTensor) and not _compiling_only


@contextmanager
def compiling_only() -> Iterator[None]:
    """Within it kernels are launched on tensors without memory too: for a Triton that compiles and runs nothing."""
    global _compiling_only
    _compiling_only = True
    try:
        yield
    finally:
        _compiling_only = False


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors (AMD: compute units) a GPU has; in the interpreter 132, as many as an H100 or H200."""
    if INTERPRETED:
        return 132
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"]


def row_tiles(rows: int, width: int, config: dict[str, int], device: torch.device) -> tuple[int, dict[str, int]]:
    """How a kernel that keeps whole rows in registers goes over them: (programs, its other constants with ROWS and BLOCK).

    A program takes ROWS rows of `width` padded to BLOCK, about TILE elements, at a time, and at most PER_PROCESSOR programs a
    multiprocessor share all rows; fewer, but one, where that left a program less than LEAST_ROWS (1). What is read or written
    once a program (weights, partial sums) so stays small beside the rows.
    """
    options = dict(config)
    block = triton.next_power_of_2(width)
    rows_at_once = max(1, options.pop("TILE") // block)
    enough = rows // (processors(device) * options.pop("LEAST_ROWS", 1))
    most = processors(device) * max(1, min(options.pop("PER_PROCESSOR"), enough))
    turns = triton.cdiv(triton.cdiv(rows, rows_at_once), most)
    programs = triton.cdiv(rows, rows_at_once * turns)  # no more than go over all rows in as many turns
    return programs, {"ROWS": rows_at_once, "BLOCK": block, **options}


@functools.cache
def op_modules() -> dict[str, ModuleType]:
    """Every file of this folder that holds an op, by the op's name: those with `cases()`."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    names = [path.stem for path in paths if re.search(r"^def cases\(", path.read_text(encoding="utf-8"), re.MULTILINE)]
    return {name: import_module(f"megaspark.kernels.{name}") for name in names}


@functools.cache
def backends() -> dict[str, list[str]]:
    """Every op whose implementation can be chosen, by name, and the names that `backend` may have for it."""
    paths = sorted(Path(__file__).parent.glob("*.py"))
    names = [path.stem for path in paths if re.search(r"^@kernel\(", path.read_text(encoding="utf-8"), re.MULTILINE)]
    return {name: ["auto", *getattr(import_module(f"megaspark.kernels.{name}"), name).implementations] for name in names}
