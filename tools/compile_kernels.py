"""`megaspark compile-kernels`: compiles every kernel for a GPU, without having one, and refuses what would be slow there."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

from tqdm import tqdm

from megaspark.errors import UserError
from megaspark.kernels.compiled import TARGETS, Compiled, compile_case, configurations
from megaspark.kernels.dispatch import INTERPRETED, op_modules
from megaspark.settings import nearest

SPILLED_BYTES_AT_MOST = 16  # outside of loops: two registers put aside once cost nothing
STRICT = "sm_90"  # what we tune for; elsewhere a kernel has to compile
_EXAMPLE = """examples:
  megaspark compile-kernels
  megaspark compile-kernels --op attention --target gfx942 --json
Exit status 1 if a kernel breaks a rule; each is named."""


def main(argv: list[str]) -> int:
    """Compiles, prints a line a kernel and every broken rule; returns 1 if there is one, else 0."""
    parser = argparse.ArgumentParser(
        prog="megaspark compile-kernels",
        description="Compiles what every case of every op launches, forward and backward, in every configuration, and prints "
        f"registers, spills, shared memory, warps an SM and matrix instructions. For {STRICT} it fails on a spill in a loop, on "
        f"more than {SPILLED_BYTES_AT_MOST} spilled bytes outside, on more shared memory than a block may have, on a matrix kernel "
        "that does not use the warpgroup instructions (HGMMA; fp8: QGMMA), on attention without TMA loads; for every target on "
        "what does not compile.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=[*TARGETS], default=STRICT)
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="only these ops (default: all)")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="only the cases of these names")
    parser.add_argument("--first", action="store_true", help="only the configuration that is launched, not its alternatives")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line in place of the table")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: kernels cannot be compiled then; unset it")
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: it takes at least one process")
    tasks = selected(arguments.op, arguments.case, arguments.first)
    absent = {op: why for op in {op for op, _, _ in tasks} if (why := absent_on(op, arguments.target))}
    for op, why in absent.items():
        print(f"{op} is not for {arguments.target}: {why}", file=sys.stderr)
    tasks = [task for task in tasks if task[0] not in absent]
    found: list[Compiled] = []
    if not arguments.json:
        print(_HEADER)
    for record in _compiled(tasks, arguments.target, arguments.jobs):
        found.append(record)
        broken = violations(record)
        line = json.dumps({**asdict(record), "violations": broken, "notes": notes(record)}) if arguments.json else _row(record)
        tqdm.write(line, file=sys.stdout)
    return _verdict(found, arguments.target)


def selected(ops: list[str], cases: list[str], first: bool = False) -> list[tuple[str, str, int]]:
    """(op, case, configuration) of all that is asked for; raises UserError for a name that does not exist."""
    modules = op_modules()
    for op in ops:
        if op not in modules:
            raise UserError(f"no op {op!r} in kernels/{nearest(op, [*modules])}")
    chosen = {op: [case.name for case in modules[op].cases()] for op in ops or modules}
    known = {name for names in chosen.values() for name in names}
    for case in cases:
        if case not in known:
            raise UserError(f"no case {case!r}{nearest(case, [*known])}")
    passes = {op: 1 if first else configurations(op) for op in chosen}
    return [
        (op, name, number) for op, names in chosen.items() for name in names if not cases or name in cases
        for number in range(passes[op])
    ]  # fmt: skip


def absent_on(op: str, target: str) -> str:
    """Why an op's module says (`NOT_ON`) that its kernels have no use on a target; "" if it says nothing."""
    return getattr(op_modules()[op], "NOT_ON", {}).get(target, "")


def violations(record: Compiled) -> list[str]:
    """The rules that a compiled kernel breaks, each in words; for other targets than sm_90 only that it compiles."""
    if record.error:
        return [f"does not compile: {textwrap.shorten(record.error, 300)}"]
    if record.target != STRICT:
        return []
    counts, broken = record.counts, []
    if record.spills_in_loops:
        broken.append(f"{record.spills_in_loops} loads and stores of spilled registers inside a loop")
    if record.spilled_bytes > SPILLED_BYTES_AT_MOST:
        broken.append(f"spills {record.spilled_bytes} bytes; {SPILLED_BYTES_AT_MOST} are allowed")
    limit_bytes = TARGETS[STRICT].block_shared_bytes
    if record.shared_bytes > limit_bytes:
        broken.append(f"takes {record.shared_bytes:,} bytes of shared memory; a block has {limit_bytes:,}")
    narrow = {"HGMMA" for dot in record.dots if dot in ("bf16", "f16")} | {"QGMMA" for dot in record.dots if dot.startswith("f8")}
    broken += [f"multiplies {'/'.join(record.dots)} without {opcode}" for opcode in sorted(narrow) if not counts.get(opcode)]
    if counts.get("HMMA"):  # fp32 products stay IEEE: they use no tensor cores at all
        broken.append(f"{counts['HMMA']} HMMA: an older path with half the throughput")
    if record.op == "attention" and narrow and not counts.get("UTMALDG"):
        broken.append("reads without TMA (no UTMALDG)")
    return broken


def notes(record: Compiled) -> list[str]:
    """What does not break a rule and should be known: on other targets a kernel may ask for more than a block can have."""
    limit_bytes = TARGETS[record.target].block_shared_bytes
    if record.target != STRICT and record.shared_bytes > limit_bytes:
        return [f"compiles, and will not launch: {record.shared_bytes:,} bytes of shared memory, a block has {limit_bytes:,}"]
    return []


def _compiled(tasks: list[tuple[str, str, int]], target: str, jobs: int) -> Iterator[Compiled]:
    """Every kernel of every task once; what a configuration does not change was compiled with the first one already."""
    seen: set[tuple[str, ...]] = set()
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(jobs, len(tasks) or 1), mp_context=context) as pool:
        futures = [pool.submit(compile_case, op, case, target, number) for op, case, number in tasks]
        for future in tqdm(futures, unit="case", desc=f"compiling for {target}"):
            for record in future.result():
                identity = (record.op, record.case, record.kernel, record.identity)
                if identity not in seen:
                    seen.add(identity)
                    yield record


_HEADER = f"{'op':10} {'case':28} {'kernel':30} regs spill loop shared w/SM matrix and TMA instructions; seconds"


def _row(record: Compiled) -> str:
    number = f"#{record.configuration}" if record.configuration else ""
    name = f"{record.op[:10]:10} {record.case[:28]:28} {record.kernel[:27]:27}{number:3}"
    if record.error:
        return f"{name} FAILED"
    counts = " ".join(f"{opcode} {count}" for opcode, count in record.counts.items())
    return (
        f"{name} {record.registers:4} {record.spilled_bytes:5} {record.spills_in_loops:4} {record.shared_bytes / 1024:5.0f}K "
        f"{record.warps_an_sm:4} {counts}; {'cached' if record.cached else f'{record.seconds:.1f}s'}"
    )


def _verdict(found: list[Compiled], target: str) -> int:
    """Says on stderr what is broken; returns the exit status."""
    broken = [(record, text) for record in found for text in violations(record)]
    noted = [(record, f"note: {text}") for record in found for text in notes(record)]
    for record, text in broken + noted:
        where = f"{record.op} {record.case} {record.kernel} [{record.constants}] configuration {record.configuration}"
        print(f"{where}: {text}", file=sys.stderr)
    print(f"{target}: {len(found)} kernels, {len(broken)} broken rules", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:
        print(f"megaspark: {mistake}", file=sys.stderr)
        sys.exit(2)
