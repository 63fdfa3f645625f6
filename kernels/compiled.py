"""What a GPU would run, found out without one: an op's own launch code compiles its kernels, and the result is read.

Tensors are torch's fake ones, which have shapes and no values; the driver is a stand-in that knows a target's name; a launch
compiles and does not run. So what is compiled is exactly what would be launched: types, alignment, constants, grid. The parts
of Triton and torch used for it that are not public are all in `compile_only`.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.dispatch import INTERPRETED, compiling_only, op_modules
from megaspark.kernels.sass import Clocks, Listing, hottest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton 3.9 does unasked, with a warning; 3.10 will not


@dataclass(frozen=True)
class Target:
    """A GPU architecture, and what one of its SMs (compute units) holds. Bytes of shared memory: a block, and all blocks."""

    name: str
    gpu: GPUTarget
    block_shared_bytes: int
    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65_536


# CUDA C++ Programming Guide, table of technical specifications by compute capability; AMD CDNA 3 ISA reference.
TARGETS = {
    "sm_80": Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024, 164 * 1024),
    "sm_90": Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024),
    "sm_100": Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024),
    "gfx942": Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, warps=32, blocks=32, registers=131_072),
}
_SYSTEM_SHARED_BYTES = 1024  # CUDA takes as much of every block's shared memory for itself


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for, and what the compiler made of it: a CompiledKernel, or why there is none."""

    kernel: str
    grid: tuple[int, ...]
    result: Any
    error: str = ""
    seconds: float = 0.0
    cached: bool = False  # Triton had it from an earlier compilation: the seconds are those of finding it


@dataclass(frozen=True)
class Compiled:
    """The facts about one kernel on one target. Counts are of instructions in the machine code; `dots` are the operand types
    of its matrix products ("bf16", "f8E4M3FN"), read from Triton's own intermediate code, as the kernel's author wrote them."""

    op: str
    case: str
    kernel: str
    constants: str
    configuration: int
    target: str
    registers: int
    spilled_bytes: int
    spills_in_loops: int
    shared_bytes: int
    warps: int
    warps_an_sm: int
    dots: tuple[str, ...]
    counts: dict[str, int]
    clocks: Clocks | None
    seconds: float
    cached: bool
    identity: str
    error: str = ""


class _Driver:
    """As much of a Triton driver as launching without running asks for."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared_bytes, warp_size = self._target.block_shared_bytes, self._target.gpu.warp_size
        return {"max_shared_mem": shared_bytes, "multiprocessor_count": 132, "warpSize": warp_size}


class _OnGpu(TorchFunctionMode):
    """Makes fake tensors say that they lie on a GPU, at an address as the allocator would give it (a multiple of 512)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.Tensor.data_ptr:
            return 512 + args[0].storage_offset() * args[0].element_size()
        return function(*args, **(kwargs or {}))


@contextmanager
def compile_only(target: Target) -> Iterator[list[Launch]]:
    """Inside, launching a Triton kernel compiles it for `target`; yields the list that the launches are noted in.

    Tensors made inside are fake and on the CPU (a torch built for CPUs has no autograd for other devices), and a custom op
    runs the function that launches even where its fake implementation is another.
    Raises ValueError in a process with TRITON_INTERPRET set, which cannot compile.
    """
    if INTERPRETED:
        raise ValueError("kernels are compiled in a process without TRITON_INTERPRET")
    launches: list[Launch] = []
    hits: list[bool] = []

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_instead(*args: Any, **kwargs: Any) -> None:
            name, start = getattr(kernel, "__name__", None) or kernel.fn.__name__, time.perf_counter()
            hits.clear()
            try:
                compiled, error = kernel.warmup(*args, grid=grid, **kwargs), ""
            except Exception as failure:  # whatever a compiler raises, the other kernels still have their turn
                compiled, error = None, f"{type(failure).__name__}: {failure}"
            blocks = grid if isinstance(grid, tuple | list) else (0,)
            launches.append(Launch(name, tuple(blocks), compiled, error, time.perf_counter() - start, all(hits)))

        return compile_instead

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        for op in OPDEFS.values():
            if op._namespace == "megaspark":
                stack.enter_context(patch.object(op, "_abstract_fn", _on_gpu(op._init_fn)))
        stack.enter_context(patch.object(triton.KernelInterface, "__getitem__", launch))
        stack.enter_context(triton.knobs.compilation.scope())
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        stack.enter_context(patch.object(triton.runtime.driver, "_active", _Driver(target)))
        stack.enter_context(compiling_only())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_OnGpu())
        yield launches


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a custom op torch's function modes are off: this turns ours on again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _OnGpu():
            return function(*args, **kwargs)

    return run


def run_case(op: Callable[..., Any], case: Case, inputs: Inputs, backend: str = "triton") -> None:
    """One call of an op, and of its backward wherever the case has one, with gradients of the outputs' own shapes."""
    arguments = case.make(inputs)
    leaves = [arguments[name].requires_grad_() for name in case.differentiated]
    outputs = op(**arguments, backend=backend)
    outputs = [out for out in (outputs if isinstance(outputs, tuple | list) else [outputs]) if isinstance(out, torch.Tensor)]
    outputs = [out for out in outputs if out.requires_grad]
    if leaves and outputs:
        torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs], allow_unused=True)


def configurations(op: str) -> int:
    """How many passes compile every entry of every `CONFIGS` that the op's kernels are launched with."""
    return max(map(len, _config_lists(op_modules()[op])), default=1)


def _config_lists(module: ModuleType) -> list[list[Any]]:
    """The lists of launch parameters in an op's module and in those modules of this folder that it takes functions from."""
    found, waiting = {module.__name__: module}, [module]
    while waiting:
        names = {getattr(value, "__module__", None) or "" for value in vars(waiting.pop()).values()}
        new = {name for name in names if name.startswith(f"{__package__}.")} - {*found}
        waiting += [sys.modules[name] for name in new]
        found |= {name: sys.modules[name] for name in new}
    return [entries for each in found.values() for entries in getattr(each, "CONFIGS", {}).values()]


def triton_backends(function: Callable[..., Any]) -> list[str]:
    """The names of an op's implementations that are made of Triton kernels."""
    return [name for name in function.implementations if name.startswith("triton")]  # type: ignore[attr-defined]


def compile_case(op: str, case_name: str, target_name: str, configuration: int = 0) -> list[Compiled]:
    """Compiles all that one case launches, forward and backward, with the op's `configuration`-th choices first.

    A kernel that does not compile, or launch code that fails, is a record with `error`. Raises KeyError for unknown names.
    """
    module, target = op_modules()[op], TARGETS[target_name]
    case = next(case for case in module.cases() if case.name == case_name)
    function, found = case.function(module), []
    with _chosen(module, configuration), compile_only(target) as launches:
        for backend in triton_backends(function):
            try:
                run_case(function, case, Inputs("cpu", case.dtype, empty=True), backend)
            except Exception as failure:
                launches.append(Launch(f"{backend}: launch code", (), None, f"{type(failure).__name__}: {failure}"))
    seen: set[str] = set()
    for launch in launches:
        identity = launch.result.hash if launch.result else launch.kernel + launch.error
        if identity not in seen:
            seen.add(identity)
            found.append(inspect(launch, target, op, case_name, configuration))
    return found


@contextmanager
def _chosen(module: ModuleType, configuration: int) -> Iterator[None]:
    """Puts the configuration-th entry of each list in the module's CONFIGS, where there is one, first."""
    lists = _config_lists(module)
    before = [list(entries) for entries in lists]
    for entries in lists:
        if configuration < len(entries):
            entries.insert(0, entries.pop(configuration))
    try:
        yield
    finally:
        for entries, old in zip(lists, before, strict=True):
            entries[:] = old


# ---- reading what the compiler made

_Reading = tuple[int, int, int, dict[str, int], Clocks | None]  # registers, spilled bytes, spills in loops, counts, clocks
_READ: dict[str, _Reading] = {}


def inspect(launch: Launch, target: Target, op: str = "", case: str = "", configuration: int = 0) -> Compiled:
    """Reads registers, spills, shared memory, occupancy and instructions from a launch's machine code."""
    kernel = launch.result
    if kernel is None:
        return Compiled(
            op, case, launch.kernel, "", configuration, target.name, registers=0, spilled_bytes=0, spills_in_loops=0,
            shared_bytes=0, warps=0, warps_an_sm=0, dots=(), counts={}, clocks=None, seconds=launch.seconds, cached=False,
            identity=launch.error, error=launch.error,
        )  # fmt: skip
    warps, shared_bytes = kernel.metadata.num_warps, kernel.metadata.shared
    if kernel.hash not in _READ:  # many cases launch the same kernel
        _READ[kernel.hash] = (_read_amd if "amdgcn" in kernel.asm else _read_nvidia)(kernel, target)
    registers, spilled_bytes, in_loops, counts, clocks = _READ[kernel.hash]
    return Compiled(
        op=op, case=case, kernel=launch.kernel, constants=_constants(kernel), configuration=configuration, target=target.name,
        registers=registers, spilled_bytes=spilled_bytes, spills_in_loops=in_loops, shared_bytes=shared_bytes, warps=warps,
        warps_an_sm=occupancy(target, registers, warps, shared_bytes), dots=matrix_operands(kernel.asm["ttir"]), counts=counts,
        clocks=clocks, seconds=round(launch.seconds, 2), cached=launch.cached, identity=kernel.hash,
    )  # fmt: skip


def occupancy(target: Target, registers: int, warps: int, shared_bytes: int) -> int:
    """Warps that one SM holds at once; registers are given to warps in portions of 256 (CUDA occupancy rules)."""
    warp_registers = -(-max(registers, 1) * target.gpu.warp_size // 256) * 256
    system = _SYSTEM_SHARED_BYTES if target.gpu.backend == "cuda" else 0
    by_registers = target.registers // warp_registers // warps
    by_shared = target.shared_bytes // (shared_bytes + system) if shared_bytes + system else target.blocks
    return min(by_registers, target.warps // warps, by_shared, target.blocks) * warps


def matrix_operands(ttir: str) -> tuple[str, ...]:
    """The types of what a kernel multiplies as matrices, from Triton's intermediate code."""
    lines = (line for line in ttir.splitlines() if re.search(r"\btt\.dot(_scaled)?\b", line))
    types = (re.findall(r"tensor<(?:\d+x)+(\w+)", line)[:2] for line in lines)
    return tuple(sorted(set(itertools.chain.from_iterable(types))))


def listing(cubin: bytes) -> Listing:
    """A cubin's machine code, by the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True)
    return Listing(done.stdout)


def _read_nvidia(kernel: Any, target: Target) -> _Reading:
    code = listing(kernel.asm["cubin"])
    registers, spilled_bytes = _assembled(kernel, target) if code.counts["LDL"] + code.counts["STL"] else (_registers(kernel), 0)
    wanted = ("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "LDGSTS")
    counts = {opcode: code.counts[opcode] for opcode in wanted if code.counts[opcode]}
    return registers, spilled_bytes, code.in_loops("LDL", "STL"), counts, hottest(code, kernel.metadata.num_warps)


def _registers(kernel: Any) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1])  # type: ignore[index]


def _assembled(kernel: Any, target: Target) -> tuple[int, int]:
    """Registers and spilled bytes (stores or loads, whichever are more) as ptxas tells them, asked the way Triton asks it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        fused = [] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]
        command = [get_ptxas(target.gpu.arch).path, "-lineinfo", "-v", *fused, "--regAllocOptLevel=2"]
        command += [f"--gpu-name={sm_arch_from_capability(target.gpu.arch)}", str(source), "-o", f"{folder}/kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return int(re.search(r"Used (\d+) registers", text)[1]), max(map(int, spills.groups()))  # type: ignore[index,union-attr]


def _read_amd(kernel: Any, target: Target) -> _Reading:
    text = kernel.asm["amdgcn"]
    told = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
    spilled_bytes = 4 * told.get("vgpr_spill_count", 0)
    return told.get("vgpr_count", 0), spilled_bytes, 0, {"MFMA": len(re.findall(r"\bv_mfma_", text))}, None


def _constants(kernel: Any) -> str:
    """A kernel's compile-time numbers by name, so that two kernels made of one function can be told apart."""
    names = kernel.src.fn.arg_names
    values = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    return " ".join(f"{name}={value}" for name, value in sorted(values.items()) if isinstance(value, int | str) and name.isupper())
