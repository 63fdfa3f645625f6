"""`megaspark bench kernels`: how far each kernel is from what the hardware allows, by counting; with a GPU, by measuring too."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from megaspark.errors import UserError
from megaspark.flops import peak_flops
from megaspark.kernels import traffic
from megaspark.kernels.cases import Case, Inputs
from megaspark.kernels.compiled import Compiled, compile_case, triton_backends
from megaspark.kernels.dispatch import INTERPRETED, op_modules
from megaspark.settings import nearest

H200_BYTES_A_SECOND = 4.8e12  # HBM3e; NVIDIA H200 data sheet, 2024
BYTES_GOAL = 1.05
MOVE_BYTES = ("rms_norm", "layer_norm", "rope", "swiglu", "gelu_tanh", "adamw")  # the ops that are nothing but memory traffic
SERIALIZED_GOAL, OVERLAPPED_GOAL = 0.66, 0.95  # of the tensor cores, in the hottest loop at head dim 128
_EXAMPLE = """examples:
  megaspark bench kernels
  megaspark bench kernels --op rms_norm attention --json

least: each input read once and each output written once; bound: the larger of FLOPs over the H200's peak (989 TFLOP/s bf16,
1,979 fp8) and least bytes over 4.8 TB/s. ours, eager, compile: bytes moved as a multiple of the least. See docs/kernels.md."""


def main(argv: list[str]) -> int:
    """Counts, prints a line for each direction of each case, then the clocks of the matrix loops; returns 0."""
    parser = argparse.ArgumentParser(
        prog="megaspark bench kernels",
        description="Prints for every case of every op its FLOPs, the bytes that its kernels move (counted from their own loads "
        "and stores), that plain torch moves op by op and that torch.compile's kernels would, against the least possible, and the "
        "time bound on an H200; for kernels with matrix products the tensor cores' share of their hottest loop's clocks, counted "
        "from the machine code. With a GPU also the measured time, as a fraction of the bound.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="only these ops (default: all)")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only the cases of these names")
    parser.add_argument("--json", action="store_true", help="a JSON object a line in place of the tables")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)  # the part that runs in Triton's interpreter
    arguments = parser.parse_args(argv)
    cases = selected(arguments.op, arguments.case)
    if arguments.count:
        for op, case in tqdm(cases, unit="case", desc="counting bytes"):
            for line in (*counted(op, case), *skipped(op, case)):
                print(json.dumps(line), flush=True)
        return 0
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: the machine code of kernels cannot be read then; unset it")
    show = _Printer(arguments.json)
    for line in _counted_elsewhere(arguments.op, arguments.case):
        (show.traffic if line["bench"] == "kernels" else show.skipping)(line)
    for op, case in cases:
        for record in {r.identity: r for r in compile_case(op, case.name, "sm_90") if r.clocks}.values():
            show.clocks(record, case)
    if torch.cuda.is_available():
        for op, case in cases:
            show.measured(op, case, measured_s(case.function(op_modules()[op]), case))
    return 0


def selected(ops: list[str], names: list[str]) -> list[tuple[str, Case]]:
    """The cases asked for, with their op; raises UserError for a name that does not exist."""
    modules = op_modules()
    for op in ops:
        if op not in modules:
            raise UserError(f"no op {op!r} in kernels/{nearest(op, [*modules])}")
    cases = [(op, case) for op in ops or modules for case in modules[op].cases()]
    for name in names:
        if name not in (known := [case.name for _, case in cases]):
            raise UserError(f"no case {name!r}{nearest(name, known)}")
    return [(op, case) for op, case in cases if not names or case.name in names]


# ---- counting


def counted(op: str, case: Case) -> Iterator[dict[str, Any]]:
    """A line for each direction and Triton backend of a case; in a process with TRITON_INTERPRET=1."""
    module = op_modules()[op]
    function = case.function(module)
    plain = getattr(module, f"{function.__name__}_reference", function.implementations["reference"])
    eager = traffic.case_traffic(plain, case)
    try:
        compiled_bytes: tuple[int | None, int | None] = traffic.inductor_bytes(plain, case)
    except Exception as failure:  # a reference that torch.compile cannot trace whole has no count
        print(f"{op} {case.name}: torch.compile's bytes are unknown: {str(failure).splitlines()[0]}", file=sys.stderr)
        compiled_bytes = (None, None)
    for backend in triton_backends(function):
        ours = traffic.case_traffic(partial(function, backend=backend), case)
        least = ((case.forward_bytes, case.forward_flops), (case.backward_bytes, case.backward_flops))
        for number, direction in enumerate(("forward", "backward")):
            least_bytes, flops = least[number]
            if not ours[number]:
                continue
            yield {
                "bench": "kernels", "op": op, "case": case.name, "backend": backend, "direction": direction, "flops": flops,
                "least_bytes": least_bytes, "bytes": _moved(ours[number]), "eager_bytes": _moved(eager[number]),
                "compile_bytes": compiled_bytes[number], "executed_flops": sum(each.matrix_flops for each in ours[number]),
                "bound_us": bound_s(op, case, flops, least_bytes) * 1e6, "kernels": [vars(each) for each in ours[number]],
            }  # fmt: skip


def skipped(op: str, case: Case) -> Iterator[dict[str, Any]]:
    """For attention with documents or a window: the FLOPs that its kernels execute, and those that they would without."""
    if op != "attention" or case.make(traffic.Blank("cpu", case.dtype)).get("spans") is None:
        return
    whole = replace(case, make=lambda inputs: {**case.make(inputs), "spans": None})
    function = partial(case.function(op_modules()[op]), backend="triton")
    runs = zip(traffic.case_traffic(function, case), traffic.case_traffic(function, whole), strict=True)
    needed = (case.forward_flops, case.backward_flops)
    for direction, (with_spans, without), flops in zip(("forward", "backward"), runs, needed, strict=True):
        executed, causal = (sum(each.matrix_flops for each in found) for found in (with_spans, without))
        yield {
            "bench": "skipping", "op": op, "case": case.name, "direction": direction, "needed_flops": flops,
            "executed_flops": executed, "causal_flops": causal, "saved": 1 - executed / causal,
        }  # fmt: skip


def bound_s(op: str, case: Case, flops: float, moved_bytes: float) -> float:
    """The least time on an H200: what its tensor cores (plain units for fp32) or its memory need, whichever is more."""
    precision = "fp8" if op.startswith("fp8") else "fp32" if case.dtype == torch.float32 else "bf16"
    return max(flops / peak_flops("H200", precision), moved_bytes / H200_BYTES_A_SECOND)  # type: ignore[operator,arg-type]


def verdict(op: str, least_bytes: float, moved_bytes: float) -> str:
    """"ok" or "over" for the ops that only move bytes, "" for the others."""
    if op not in MOVE_BYTES:
        return ""
    return "ok" if moved_bytes <= BYTES_GOAL * least_bytes else "over"


def _moved(found: list[traffic.Traffic]) -> float:
    return sum(each.moved_bytes for each in found)


def _counted_elsewhere(ops: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """`counted`'s lines from a process of its own: Triton's interpreter is chosen when triton is first imported."""
    command = [sys.executable, "-m", "megaspark.tools.bench_kernels", "--count"]
    command += [*(["--op", *ops] if ops else []), *(["--case", *names] if names else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}) as child:
        assert child.stdout is not None
        yield from map(json.loads, child.stdout)
    if child.returncode:
        raise UserError(f"counting ended with status {child.returncode}; what it said is above")


# ---- measuring


def measured_s(function: Callable[..., Any], case: Case, repeats: int = 30) -> dict[str, tuple[float, float]]:
    """Median seconds (forward, backward) of each Triton backend on this GPU, its L2 cache emptied before each call."""
    found = {}
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for backend in triton_backends(function):
        arguments = case.make(Inputs("cuda", case.dtype))
        leaves = [arguments[name].requires_grad_() for name in case.differentiated]
        times: list[tuple[float, float]] = []
        for _ in range(repeats + 5):  # the first five compile and warm up
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            flush.zero_()
            marks[0].record()
            outputs = function(**arguments, backend=backend)
            marks[1].record()
            outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(out, torch.Tensor)]
            outputs = [out for out in outputs if out.requires_grad]
            gradients = [torch.ones_like(out) for out in outputs]
            flush.zero_()
            marks[2].record()
            if leaves and outputs:
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
            marks[3].record()
            torch.cuda.synchronize()
            times.append((marks[0].elapsed_time(marks[1]) / 1e3, marks[2].elapsed_time(marks[3]) / 1e3))
        forward, backward = (statistics.median(column) for column in zip(*times[5:], strict=True))
        found[backend] = (forward, backward if leaves else 0.0)
    return found


# ---- printing


class _Printer:
    """Lines of tables, each with its header before the first, or JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._table = as_json, ""

    def _line(self, table: str, header: str, text: str, values: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps(values), flush=True)
            return
        if table != self._table:
            self._table = table
            print(f"\n{header}")
        print(text, flush=True)

    def traffic(self, line: dict[str, Any]) -> None:
        """Bytes and FLOPs of one direction of a case."""
        least = line["least_bytes"] or 1

        def times(count: float | None) -> str:
            return "     -" if count is None else f"{count / least:6.2f}"

        word = verdict(line["op"], line["least_bytes"], line["bytes"])
        header = f"{'op':20} {'case':34} {'direction':9} GFLOP  least MB  ours  eager compile  bound us"
        text = (
            f"{line['op'] + line['backend'].removeprefix('triton'):20} {line['case']:34.34} {line['direction']:9} "
            f"{line['flops'] / 1e9:5.0f} {least / 1e6:9.1f} {line['bytes'] / least:5.3f} {times(line['eager_bytes'])} "
            f"{times(line['compile_bytes'])}  {line['bound_us']:8.1f}  {word}"
        )
        self._line("traffic", header, text, {**line, "verdict": word})

    def skipping(self, line: dict[str, Any]) -> None:
        """What attention saves by not computing what nobody sees."""
        header = f"{'op':14} {'case':38} {'direction':9} GFLOP: needed executed causal; saved"
        text = (
            f"{line['op']:14} {line['case']:38.38} {line['direction']:9} {line['needed_flops'] / 1e9:13.0f} "
            f"{line['executed_flops'] / 1e9:8.0f} {line['causal_flops'] / 1e9:6.0f} {line['saved']:6.1%}"
        )
        self._line("skipping", header, text, line)

    def clocks(self, record: Compiled, case: Case) -> None:
        """The tensor cores' share of a kernel's hottest loop."""
        clocks = record.clocks
        assert clocks is not None
        goal = record.op == "attention" and " D=128 " in f" {record.constants} "
        good = clocks.serialized >= SERIALIZED_GOAL - 0.005 and clocks.overlapped >= OVERLAPPED_GOAL
        word = ("ok" if good else "over") if goal else ""
        header = f"{'op':14} {'case':30} {'kernel':24} clocks a pass of tensor, exp2, fp32, alu, shared, shuffle, issue; shares"
        parts = (clocks.tensor, clocks.special, clocks.fp32, clocks.alu, clocks.shared, clocks.shuffle, clocks.issue)
        text = (
            f"{record.op:14} {record.case:30.30} {record.kernel:24} {' '.join(f'{part:5.0f}' for part in parts)}  "
            f"{clocks.serialized:6.1%} {clocks.overlapped:6.1%}  {word}"
        )
        values = {
            "bench": "clocks", "op": record.op, "case": record.case, "kernel": record.kernel, "constants": record.constants,
            **vars(clocks), "serialized": clocks.serialized, "overlapped": clocks.overlapped, "verdict": word,
        }  # fmt: skip
        self._line("clocks", header, text, values)

    def measured(self, op: str, case: Case, seconds: dict[str, tuple[float, float]]) -> None:
        """Measured times beside the bound; the bound is an H200's, whatever the GPU is."""
        for backend, pair in seconds.items():
            least = ((case.forward_flops, case.forward_bytes), (case.backward_flops, case.backward_bytes))
            bounds = [bound_s(op, case, *each) for each in least]
            for direction, took_s, limit_s in zip(("forward", "backward"), pair, bounds, strict=True):
                if took_s:
                    text = f"{op:14} {case.name:34.34} {backend:12} {direction:9} {took_s * 1e6:9.1f} us"
                    text += f" {limit_s / took_s:6.1%} of the bound"
                    values = {
                        "bench": "measured", "op": op, "case": case.name, "backend": backend, "direction": direction,
                        "device": torch.cuda.get_device_name(), "seconds": took_s, "bound_fraction": limit_s / took_s,
                    }  # fmt: skip
                    self._line("measured", f"measured on {torch.cuda.get_device_name()}", text, values)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:
        print(f"megaspark: {mistake}", file=sys.stderr)
        sys.exit(2)
