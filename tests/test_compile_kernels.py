"""compile-kernels: the gate against planted kernels that break each rule, reading machine code, and our kernels for sm_90."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from conftest import CHECKOUT, process_environment
from megaspark.errors import UserError
from megaspark.kernels import compiled, sass
from megaspark.kernels.compiled import TARGETS, Compiled, compile_only, inspect, matrix_operands, occupancy
from megaspark.kernels.dispatch import INTERPRETED
from megaspark.tools import compile_kernels
from megaspark.tools.compile_kernels import selected, violations

pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are compiled in a process without TRITON_INTERPRET")
SM_90 = TARGETS["sm_90"]


# ---- planted kernels


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """A matrix product of one tile, its operands by pointers."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, K, BLOCK):
        a = tl.load(a_ptr + m[:, None] * K + first + k[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * N + n[None, :])
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def _product_by_tma(a_box, b_box, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """The same with operands by tensor descriptors."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for first in tl.range(0, K, BLOCK):
        total = tl.dot(a_box.load([0, first]), b_box.load([first, 0]), total)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)


@triton.jit
def _broken(a_ptr):
    tl.store(a_ptr, tl.load(a_ptr) + no_such_name)  # noqa: F821


def compiled_product(m: int, n: int, k: int, block: int, dtype: torch.dtype, tma: bool = False, **options: int) -> Compiled:
    """What sm_90 would run for a product of tiles of m x n, read as if it were attention's."""
    with compile_only(SM_90) as launches:
        a, b, c = torch.empty(m, k, dtype=dtype), torch.empty(k, n, dtype=dtype), torch.empty(m, n)
        if tma:
            boxes = TensorDescriptor.from_tensor(a, [m, block]), TensorDescriptor.from_tensor(b, [block, n])
            _product_by_tma[(1,)](*boxes, c, M=m, N=n, K=k, BLOCK=block, **options)
        else:
            _product[(1,)](a, b, c, M=m, N=n, K=k, BLOCK=block, **options)
    assert len(launches) == 1
    return inspect(launches[0], SM_90, "attention")


def test_a_good_kernel_breaks_no_rule():
    """A gate that finds fault with everything would be switched off."""
    record = compiled_product(128, 128, 512, 64, torch.bfloat16, tma=True, num_warps=8, num_stages=2)
    assert violations(record) == [] and record.counts["HGMMA"] and record.counts["UTMALDG"]
    assert record.dots == ("bf16",) and record.spilled_bytes == 0 and 32 <= record.registers <= 255
    # Two stages of 128 x 64 and 64 x 128 bf16, and some bytes of barriers.
    assert 0 <= record.shared_bytes - 2 * 2 * 128 * 64 * 2 < 1024


def test_a_spill_in_a_loop_is_caught():
    """256 x 256 fp32 over 4 warps are 512 registers a thread: the sum lives in local memory for the whole loop."""
    record = compiled_product(256, 256, 512, 32, torch.bfloat16, num_warps=4, num_stages=1)
    broken = " ".join(violations(record))
    assert "inside a loop" in broken and "spills" in broken and record.spilled_bytes > 1000


def test_too_much_shared_memory_is_caught():
    """Four stages of 128 x 128 twice are 256 KB: it compiles, and would fail at its first launch."""
    record = compiled_product(128, 128, 4096, 128, torch.bfloat16, tma=True, num_warps=8, num_stages=4)
    assert any("shared memory" in text for text in violations(record))


def test_a_product_without_warpgroup_instructions_is_caught():
    """16 rows are too few for a warpgroup: Triton takes HMMA, and says nothing."""
    record = compiled_product(16, 64, 64, 32, torch.bfloat16, num_warps=4, num_stages=1)
    broken = " ".join(violations(record))
    assert "without HGMMA" in broken and "HMMA: an older path" in broken


def test_attention_without_tma_is_caught():
    """Loads through pointers cost registers and address arithmetic that the copy engine does for nothing."""
    record = compiled_product(128, 128, 512, 64, torch.bfloat16, num_warps=8, num_stages=2)
    assert violations(record) == ["reads without TMA (no UTMALDG)"]
    assert violations(replace(record, op="fp8_linear")) == []


def test_fp32_products_are_exempt():
    """IEEE fp32 has no tensor cores: HGMMA would mean TF32, which loses 13 bits."""
    record = compiled_product(64, 64, 64, 32, torch.float32, num_warps=4, num_stages=1)
    assert record.dots == ("f32",) and violations(record) == []


def test_fp8_products_need_their_own_instruction():
    """QGMMA is twice HGMMA: an fp8 product that is widened to bf16 first gains nothing."""
    record = compiled_product(128, 128, 512, 128, torch.float8_e4m3fn, tma=True, num_warps=8, num_stages=2)
    assert record.counts["QGMMA"] and violations(record) == []
    assert violations(replace(record, counts={**record.counts, "QGMMA": 0})) == ["multiplies f8E4M3FN without QGMMA"]


def test_what_does_not_compile_is_caught_and_the_next_kernel_compiled():
    """One kernel's error must not hide the others, on any target."""
    with compile_only(TARGETS["sm_80"]) as launches:
        a = torch.empty(64, 64, dtype=torch.bfloat16)
        _broken[(1,)](a)
        _product[(1,)](a, a, a.float(), M=64, N=64, K=64, BLOCK=32)
    records = [inspect(launch, TARGETS["sm_80"]) for launch in launches]
    assert "no_such_name" in violations(records[0])[0] and violations(records[1]) == []


@pytest.mark.parametrize("bytes_, broken", [(0, 0), (16, 0), (17, 1)])
def test_a_few_spilled_bytes_outside_of_loops_are_allowed(bytes_, broken):
    """The limit itself, and one byte more."""
    record = compiled_product(128, 128, 512, 64, torch.bfloat16, tma=True, num_warps=8, num_stages=2)
    assert len(violations(replace(record, spilled_bytes=bytes_))) == broken


# ---- reading machine code

_CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR19], R14 ;
        /*0030*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], R24, gsb0 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   LDL R2, [R1] ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR19], R14 ;
        /*00a0*/              @!P1 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""


def test_loops_are_natural_loops():
    """Waits lie behind the code and jump back into it: taken for loops they would put the whole kernel into one."""
    listing = sass.Listing(_CODE)
    assert listing.in_loops("LDL", "STL") == 0 and listing.in_loops("HGMMA") == 1
    (body,) = listing.matrix_loops()
    names = [instruction.opcode for instruction in body]
    assert names.count("HGMMA") == 1 and names.count("SYNCS") == 1  # the wait that fails spins in a loop of its own
    inside = sass.Listing(_CODE.replace("MUFU.EX2 R3, R3", "LDL R3, [R1]"))
    assert inside.in_loops("LDL", "STL") == 1


def test_clocks():
    """The tensor cores' share follows from these numbers: an HGMMA of 64 x 128 x 16 is 64 clocks of an SM, 8 warps run two."""
    (body,) = sass.Listing(_CODE).matrix_loops()
    found = sass.clocks(body, warps=8)
    assert found.tensor == 2 * 64 * 128 * 16 / 2048 == 128
    assert found.special == 8 * 32 / 16 == 16 and found.issue == 8 * len(body) / 4
    assert found.serialized == 128 / (128 + 16) and found.overlapped == 1.0
    assert sass.clocks([replace(body[2], name="QGMMA.64x128x32.F32.E4M3.E4M3")], 8).tensor == 128


def test_occupancy():
    """CUDA's calculator for compute capability 9.0: 128 registers x 8 warps fit twice; 100 KB of shared memory fit twice."""
    assert occupancy(SM_90, 128, 8, 0) == 16 and occupancy(SM_90, 32, 8, 0) == 64 and occupancy(SM_90, 255, 8, 0) == 8
    assert occupancy(SM_90, 32, 4, 100 * 1024) == 8 and occupancy(SM_90, 32, 4, 200 * 1024) == 4


def test_matrix_operands():
    """A kernel that multiplies nothing is not asked for tensor cores, one that does is, by what it multiplies."""
    line = "%1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>"
    assert matrix_operands(line) == ("bf16",) and matrix_operands("%1 = tt.dotless") == ()


# ---- our kernels


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "rope", "adamw"])
def test_our_small_kernels(op):
    """One case of each op that only moves memory: no spill, and enough warps an SM to keep the memory busy."""
    (name, case, _), *_ = selected([op], [], first=True)
    records = compiled.compile_case(name, case, "sm_90")
    assert records
    for record in records:
        assert violations(record) == [] and record.spilled_bytes == 0 and record.warps_an_sm >= 16, record


@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(name, marks=pytest.mark.long) for name in TARGETS if name != "sm_90")])
def test_every_kernel_on_every_target(target, capfd):
    """A kernel that spills, or that some GPU cannot have at all."""
    status = compile_kernels.main(["--target", target, "--json"])
    out, err = capfd.readouterr()
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    expected = {op for op in compiled.op_modules() if not compile_kernels.absent_on(op, target)}
    assert {line["op"] for line in lines} == expected and len(expected) >= len(compiled.op_modules()) - 1
    assert not any(line["violations"] for line in lines)


def run_tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megaspark.tools.compile_kernels", *arguments], capture_output=True, text=True, cwd=CHECKOUT,
        env=process_environment(**environment), timeout=300,
    )  # fmt: skip


def test_users_mistakes():
    """A misspelled op compiled nothing and passed; TRITON_INTERPRET left over from a test run did as well."""
    with pytest.raises(UserError, match=r"rms_nrm.*rms_norm"):
        selected(["rms_nrm"], [])
    with pytest.raises(UserError, match="no case"):
        selected(["rms_norm"], ["nothing"])
    done = run_tool("--op", "rms_norm", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.launch
@pytest.mark.long
def test_the_command():
    """Processes of its own, the table, and the exit status."""
    done = run_tool("--op", "swiglu", "--first", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "_forward_kernel" in done.stdout and "0 broken rules" in done.stderr


def test_alternatives_are_compiled_and_put_back(monkeypatch):
    """Every entry of CONFIGS has its turn, and the one that is launched stays first."""
    module = compiled.op_modules()["adamw"]
    (entry,) = module.CONFIGS["_adamw_kernel"]
    entries = [entry, {**entry, "BLOCK": 1024}]
    monkeypatch.setitem(module.CONFIGS, "_adamw_kernel", entries)
    case = module.cases()[0].name
    assert compiled.configurations("adamw") == 2
    found = [compiled.compile_case("adamw", case, "sm_90", number)[0].constants for number in range(2)]
    assert f"BLOCK={entry['BLOCK']}" in found[0] and "BLOCK=1024" in found[1] and entries[0] is entry
