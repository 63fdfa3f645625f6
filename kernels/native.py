"""The CPU kernels written in C++ (native/), compiled for the CPU at hand when first asked for, and called by ctypes.

Any C++ compiler that knows GCC's vector extensions and OpenMP will do; where there is none the ops run in plain torch. The
library is kept in a cache folder under the hash of all that it depends on: sources, compiler, CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("native")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi")
CACHE = "MEGASPARK_CACHE"  # the environment variable that names the cache folder


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the library is here or can be made; where it cannot although a compiler is here, a warning says why, once."""
    return _built() is not None


def library() -> ctypes.CDLL:
    """The library. Raises ValueError where there is none."""
    path = _built()
    if path is None:
        raise ValueError("backend 'native' needs a C++ compiler (on Debian: apt-get install g++): use backend auto or reference")
    return _loaded(path)


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    # The OpenMP calls are left to be found in what is loaded: torch has brought its runtime, and a second one would have
    # threads of its own, which wait for work while the others do it.
    return ctypes.CDLL(str(path))


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether this CPU multiplies tiles of bf16."""
    return "amx_bf16" in _cpu()


@torch.compiler.assume_constant_result
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16; where it does not, torch's products of bf16 are tens of times slower than of fp32."""
    return re.search(r"\b(amx_|avx512_)?bf16\b", _cpu()) is not None


@torch.compiler.assume_constant_result
def mkl_is_slow() -> bool:
    """Whether MKL's fp32 products are slower than ours: on AMD's CPUs."""
    return "AuthenticAMD" in _cpu() and re.search(r"\bavx2\b", _cpu()) is not None


def call(name: str, dtype: torch.dtype, numbers: Sequence[int], *arguments: Tensor | float | None) -> None:
    """Calls NAME_DTYPE(numbers, arguments ...): numbers as a struct of longs, tensors as addresses, floats as floats.

    The tensors are on the CPU and as the function expects them; nothing is checked here.
    """
    function = getattr(library(), f"{name}_{DTYPES[dtype]}")
    function(*(ctypes.byref((ctypes.c_long * len(numbers))(*numbers)), *(_passed(x) for x in arguments)))


def _passed(x: Tensor | float | None) -> ctypes.c_void_p | ctypes.c_float | None:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return None if x is None else ctypes.c_float(x)


@functools.cache
def _built() -> Path | None:
    """The library's file, made if need be by one process while others wait; None where it cannot be."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        parts = [*(path.read_text() for path in _sources()), *FLAGS, version, _cpu()]
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        folder = Path(os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megaspark")
        path = folder / f"native-{name}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"native-{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _compile(compiler, path)
        _loaded(path)
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        warnings.warn(f"the CPU kernels could not be compiled and plain torch stands in for them: {error}", stacklevel=2)
        return None
    return path


def _compile(compiler: str, path: Path) -> None:
    """Compiles and links beside `path`, then moves there what is whole. Raises RuntimeError with the compiler's first error."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        objects = []
        for source in SOURCES.glob("*.cpp"):
            objects.append(f"{unfinished}-{source.stem}.o")
            _run([compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
        _run([compiler, "-shared", *objects, "-o", str(unfinished)])  # without -fopenmp: see _loaded
        unfinished.replace(path)
    finally:
        for left in path.parent.glob(f"{unfinished.name}*"):
            with contextlib.suppress(FileNotFoundError):
                left.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["it said nothing"]
        raise RuntimeError(f"{command[0]} ended with status {done.returncode}: {said[0]}")


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.hpp")])


@functools.cache
def _cpu() -> str:
    """What tells apart CPUs for which -march=native means something else."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = re.compile(r"(vendor_id|flags|Features|model name|CPU part)\s*:")
    return "\n".join(sorted({platform.machine(), *(line for line in lines if kind.match(line))}))
