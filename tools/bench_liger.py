"""`megaspark bench liger`: Liger's RMSNorm, SwiGLU, RoPE and fused linear cross-entropy beside ours: error, registers, bytes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from megaspark.errors import UserError
from megaspark.kernels import traffic
from megaspark.kernels.cases import Inputs
from megaspark.kernels.compiled import TARGETS, compile_only, inspect
from megaspark.kernels.dispatch import INTERPRETED, op_modules

_EXAMPLE = """example:
  pip install --no-deps liger-kernel==0.8.5 && megaspark bench liger"""
Call = Callable[[dict[str, Any]], Any]


def main(argv: list[str]) -> int:
    """Prints a line for each op and side; returns 0; raises UserError without Liger."""
    parser = argparse.ArgumentParser(
        prog="megaspark bench liger",
        description="Compares four ops with Liger's: the error against fp64 in bf16, in Triton's interpreter, relative to the "
        "largest value (output and each gradient; plain torch's beside it), registers and spilled bytes on sm_90 of every kernel, "
        "and MB moved.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=[*SIZES], default=[*SIZES], help="only these (default: all)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line in place of the table")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)  # the part that runs in Triton's interpreter
    arguments = parser.parse_args(argv)
    if find_spec("liger_kernel") is None:
        raise UserError("Liger is not installed: pip install --no-deps liger-kernel==0.8.5")
    if arguments.count:
        for op in tqdm(arguments.op, unit="op", desc="computing"):
            for line in computed(op):
                print(json.dumps(line), flush=True)
        return 0
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: kernels cannot be compiled then; unset it")
    command = [sys.executable, "-m", "megaspark.tools.bench_liger", "--count", "--op", *arguments.op]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    if done.returncode:
        raise UserError(f"computing ended with status {done.returncode}; what it said is above")
    for line in map(json.loads, done.stdout.splitlines()):
        if line["side"] != "torch":
            line["kernels"] = compiled(line["op"], line["side"])
        print(json.dumps(line) if arguments.json else _row(line), flush=True)
    return 0


# ---- the calls


def inputs(op: str, large: bool, make: Inputs) -> dict[str, Any]:
    """The tensors of one call, floats first; `large` as in training, else as small as shows every error."""
    sizes = SIZES[op][0 if large else 1]
    if op == "rms_norm":
        return {"x": make.normal(*sizes), "weight": make.normal(sizes[-1])}
    if op == "swiglu":
        return {"gate": make.normal(*sizes, std=2.0), "up": make.normal(*sizes)}
    if op == "rope":
        batch, seq, heads, kv_heads, dim = sizes
        angles = torch.arange(seq)[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
        both = [f(angles).expand(batch, -1, -1).contiguous() for f in (torch.cos, torch.sin)]
        q, k = make.normal(batch, seq, heads, dim), make.normal(batch, seq, kv_heads, dim)
        return {"q": q, "k": k, "cos": both[0], "sin": both[1]}
    tokens, width, vocab = sizes
    weight, labels = make.normal(vocab, width, std=0.2), make.integers(vocab, tokens)
    return {"hidden": make.normal(tokens, width), "weight": weight, "labels": labels}


# Rows or tokens, then widths: as trained, for bytes and registers; and small enough to compute, for errors.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "rms_norm": ((16384, 2048), (64, 1024)),
    "swiglu": ((16384, 11008), (32, 1408)),
    "rope": ((4, 4096, 16, 2, 128), (2, 32, 4, 2, 128)),
    "linear_cross_entropy": ((4096, 2048, 32000), (96, 128, 1000)),
}


def ours(op: str, plain: bool = False) -> Call:
    """Our op by its Triton kernels, or `plain` in torch's operations, by the names of `inputs`."""
    module = op_modules()[op]
    function = getattr(module, f"{op}_reference") if plain else partial(getattr(module, op), backend="triton")
    last = (1e-5,) if op == "rms_norm" else ()
    return lambda t: function(*t.values(), *last)


def ligers(op: str) -> Call:
    """Liger's op, by the names of `inputs`, as its modules call it."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rope(t: dict[str, Any]) -> Any:
        cos, sin = (torch.cat([t[name]] * 2, dim=-1).to(t["q"].dtype) for name in ("cos", "sin"))
        q, k = LigerRopeFunction.apply(t["q"].transpose(1, 2), t["k"].transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    calls: dict[str, Call] = {
        "rms_norm": lambda t: LigerRMSNormFunction.apply(t["x"], t["weight"], 1e-5, 0.0, "llama", False),
        "swiglu": lambda t: LigerSiLUMulFunction.apply(t["gate"], t["up"]),
        "rope": rope,
        "linear_cross_entropy": lambda t: LigerFusedLinearCrossEntropyFunction.apply(t["hidden"], t["weight"], t["labels"])[0],
    }
    return calls[op]


def exact(op: str) -> Call:
    """The formula, for tensors in fp64."""
    if op == "rms_norm":
        return lambda t: t["x"] * torch.rsqrt(t["x"].square().mean(-1, keepdim=True) + 1e-5) * t["weight"]
    if op == "swiglu":
        return lambda t: F.silu(t["gate"]) * t["up"]
    if op == "rope":

        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

        return lambda t: tuple(turned(t[name], t["cos"][:, :, None], t["sin"][:, :, None]) for name in ("q", "k"))
    return lambda t: F.cross_entropy(t["hidden"] @ t["weight"].T, t["labels"])


# ---- in the interpreter


def computed(op: str) -> Iterator[dict[str, Any]]:
    """A line each for ours, Liger's and plain torch: errors, and of the two with kernels the bytes moved."""
    _floats_as_tensors()
    for side, call in (("ours", ours(op)), ("liger", ligers(op)), ("torch", ours(op, plain=True))):
        errors = [round(error, 5) for error in _errors(op, call)]
        moved = _moved_bytes(op, call)
        yield {"bench": "liger", "op": op, "side": side, "errors": errors, "moved_mb": round(moved / 1e6, 1)}


def _errors(op: str, call: Call) -> list[float]:
    """Largest error over largest value, of each output and then each gradient."""
    found = []
    for dtype, each in ((torch.float64, exact(op)), (torch.bfloat16, call)):
        tensors = inputs(op, False, Inputs("cpu", torch.bfloat16))
        leaves = [name for name, x in tensors.items() if x.dtype == torch.bfloat16]
        if dtype == torch.float64:
            tensors = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        wanted = [tensors[name].requires_grad_() for name in leaves]
        outputs = tree_leaves(each(tensors))
        upstream = [Inputs("cpu", out.dtype, seed=9).normal(*out.shape).bfloat16().to(out.dtype) for out in outputs]
        values = [out.detach().clone() for out in outputs]  # Liger's backward may write over what its forward gave
        found.append([*values, *torch.autograd.grad(outputs, wanted, upstream)])
    right, mine = found
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, right, strict=True)]


def _moved_bytes(op: str, call: Call) -> float:
    tensors = inputs(op, True, traffic.Blank("cpu", torch.bfloat16))
    leaves = [x.requires_grad_() for x in tensors.values() if x.dtype == torch.bfloat16]
    with traffic.counting() as found:
        outputs = tree_leaves(call(tensors))
        torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
    return sum(each.moved_bytes for each in found)


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


def _floats_as_tensors() -> None:
    """Triton's interpreter hands a kernel Python's floats; Liger's kernels call tensor methods on them, as a GPU's would be.

    Nor does it have libdevice's functions, of which Liger's RMSNorm takes one.
    """
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter as upstream

    convert = upstream._implicit_cvt

    def implicit(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(upstream.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    upstream._implicit_cvt = implicit
    rms_norm.rsqrt = _rsqrt


# ---- for sm_90


def compiled(op: str, side: str) -> list[dict[str, Any]]:
    """Registers, spills and warps an SM of every kernel that a large call launches."""
    # Liger counts labels and compares the upstream gradient with 1 on the host, by values that imagined tensors do not have.
    values = patch.object(torch.Tensor, "item", lambda _: 1), patch.object(torch, "equal", lambda *_: True)
    with values[0], values[1], compile_only(TARGETS["sm_90"]) as launches:
        tensors = inputs(op, True, Inputs("cpu", torch.bfloat16, empty=True))
        leaves = [x.requires_grad_() for x in tensors.values() if x.dtype == torch.bfloat16]
        outputs = tree_leaves((ours(op) if side == "ours" else ligers(op))(tensors))
        torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
    records = {record.identity: record for record in (inspect(launch, TARGETS["sm_90"], op) for launch in launches)}
    wanted = ("kernel", "registers", "spilled_bytes", "spills_in_loops", "warps_an_sm", "error")
    return [{name: getattr(record, name) for name in wanted} for record in records.values()]


def _row(line: dict[str, Any]) -> str:
    kernels = "; ".join(
        f"{each['kernel']} {each['error'] or f'''{each['registers']} registers, {each['spilled_bytes']} B spilled'''}"
        for each in line.get("kernels", [])
    )
    errors = " ".join(f"{error:.1e}" for error in line["errors"])
    return f"{line['op']:21} {line['side']:6} errors {errors:32} {line['moved_mb']:9.1f} MB  {kernels}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:
        print(f"megaspark: {mistake}", file=sys.stderr)
        sys.exit(2)
