"""Kernels in plain torch: every op against its formula in fp64, forward and gradients; which implementation runs.

tests/interpreted holds the same ops as Triton computes them.

Tolerances: an op of k roundings on values of size s errs by at most about k s u, with u = 2^-24 in fp32 and 2^-8 in bf16
(half a unit in the last place); sums over n terms by about sqrt(n) u of their terms' size. Each test says its own factor.
"""

import inspect
import math
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from megaspark.kernels import adamw as adamw_module
from megaspark.kernels import dispatch, interpreter
from megaspark.kernels.adamw import Update, adamw, join, split
from megaspark.kernels.cases import Inputs
from megaspark.kernels.dispatch import backends, kernel, op_modules
from megaspark.kernels.gelu_tanh import gelu_tanh
from megaspark.kernels.layer_norm import add_layer_norm, layer_norm
from megaspark.kernels.rms_norm import add_rms_norm, rms_norm
from megaspark.kernels.rope import rope, rope_angles, rope_frequencies
from megaspark.kernels.swiglu import swiglu

U32, U16 = 2.0**-24, 2.0**-8


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    """Normal fp64 numbers that bf16 holds exactly, so that every dtype starts from the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).bfloat16().double()


def values_and_gradients(op: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """[output, gradient of each input] in fp64, for an upstream gradient that differs everywhere."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    upstream = normal(*out.shape, seed=77).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    return [out.detach().double(), *(g.double() for g in gradients)]


def assert_close(op: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, factor: float):
    """op in `dtype` equals plain in fp64 within `factor` roundings of the largest value, in output and all gradients."""
    u = U32 if dtype == torch.float32 else U16
    exact = values_and_gradients(plain, inputs, torch.float64)
    for i, (found, expected) in enumerate(zip(values_and_gradients(op, inputs, dtype), exact, strict=True)):
        error = (found - expected).abs().max().item()
        allowed = factor * u * max(1.0, expected.abs().max().item())
        assert error <= allowed, f"{'output' if i == 0 else f'gradient {i}'}: off by {error:.2e}, allowed {allowed:.2e}"


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 30), (torch.bfloat16, 8)])
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 33), (1, 1, 1), (7, 1000)])
def test_rms_norm(shape, dtype, factor):
    """Epsilon in the wrong place, the mean taken in bf16, or a gradient that forgets that the mean depends on x."""
    assert_close(lambda x, w: rms_norm(x, w, 1e-5), plain_rms_norm, [normal(*shape), normal(shape[-1], seed=1)], dtype, factor)


def test_rms_norm_of_tiny_and_huge_rows():
    """Rows at the size of sqrt(epsilon) show where it is added; squares in bf16 or fp16 would overflow."""
    x = torch.stack([normal(64) * scale for scale in (0.0, 1e-6, 3e-3, 1.0, 1e15)])
    weight = normal(64, seed=1)
    found, expected = rms_norm(x.float(), weight.float(), 1e-5).double(), plain_rms_norm(x, weight)
    assert (found - expected).abs().max() <= 30 * U32 * expected.abs().max()
    assert rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5).isfinite().all()


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 30), (torch.bfloat16, 8)])
@pytest.mark.parametrize("shape", [(2, 3, 64), (5, 33), (7, 1000)])
def test_layer_norm(shape, dtype, factor):
    """The weight or the bias left out, a variance over E - 1."""
    inputs = [normal(*shape), normal(shape[-1], seed=1), normal(shape[-1], seed=2)]
    assert_close(lambda x, w, b: layer_norm(x, w, b, 1e-5), plain_layer_norm, inputs, dtype, factor)


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 30), (torch.bfloat16, 16)])
def test_norms_with_the_residual(dtype, factor):
    """Another sum returned than was normed; a gradient that comes by one of the two ways only."""

    def both(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(pair, dim=-1)

    x, residual, weight, bias = normal(5, 33), normal(5, 33, seed=1), normal(33, seed=2), normal(33, seed=3)
    assert_close(
        lambda x, r, w: both(add_rms_norm(x, r, w, 1e-5)), lambda x, r, w: both((plain_rms_norm(x + r, w), x + r)),
        [x, residual, weight], dtype, factor,
    )  # fmt: skip
    assert_close(
        lambda x, r, w, b: both(add_layer_norm(x, r, w, b, 1e-5)), lambda x, r, w, b: both((plain_layer_norm(x + r, w, b), x + r)),
        [x, residual, weight, bias], dtype, factor,
    )  # fmt: skip


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 8), (torch.bfloat16, 6)])
def test_gelu_tanh(dtype, factor):
    """The exact GELU (by erf) in place of the tanh one, 4e-4 away; the bias added afterwards."""

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        z = x + bias
        return z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    assert_close(gelu_tanh, plain, [normal(3, 5, 40, std=2.0), normal(40, seed=1)], dtype, factor)
    assert_close(lambda x: gelu_tanh(x, None), lambda x: plain(x, x.new_zeros(40)), [normal(3, 5, 40)], dtype, factor)


@pytest.mark.parametrize("dtype, factor", [(torch.float32, 8), (torch.bfloat16, 4)])
def test_swiglu(dtype, factor):
    """The gate and the value exchanged, or the gradient of silu."""

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return gate / (1 + torch.exp(-gate)) * up

    assert_close(swiglu, plain, [normal(3, 5, 40, std=3.0), normal(3, 5, 40, seed=1)], dtype, factor)


def plain_rope(x_BSHD: Tensor, positions_BS: Tensor, theta: float) -> Tensor:
    """Each pair (x[i], x[i + D/2]) as a complex number, turned by position x theta^(-2i/D)."""
    half = x_BSHD.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    angles = positions_BS.double()[..., None] * frequencies
    turned = torch.complex(x_BSHD[..., :half], x_BSHD[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("head_dim, theta", [(2, 10000.0), (64, 10000.0), (104, 5e5)])
def test_rope(head_dim, theta):
    """Interleaved pairs in place of halves, an angle of the wrong sign, frequencies that lose bits at far positions."""
    positions = torch.tensor([[0, 1, 2, 1000, 4095], [7, 0, 1, 2, 0]])

    def turned(x: Tensor) -> Tensor:
        return rope(x, x, *rope_angles(positions, rope_frequencies(head_dim, theta)))[0]

    # A fp32 angle of 4,095 radians is off by up to 4,096 u (2 roundings): that is 8,200 u in the result.
    assert_close(turned, lambda x: plain_rope(x, positions, theta), [normal(2, 5, 3, head_dim)], torch.float32, 8200)
    near = positions.clamp(max=8)
    assert_close(
        lambda x: rope(x, x, *rope_angles(near, rope_frequencies(head_dim, theta)))[0], lambda x: plain_rope(x, near, theta),
        [normal(2, 5, 3, head_dim)], torch.float32, 24,
    )  # fmt: skip


def test_rope_angles_come_from_fp32():
    """Positions multiplied in bf16 have 8 bits: beyond position 256 neighbours share an angle."""
    positions = torch.arange(4096)[None]
    cos, sin = rope_angles(positions, rope_frequencies(16, 10000.0))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 4096, 8)
    angles = positions.double()[..., None] * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert (cos.double() - angles.cos()).abs().max() <= 8200 * U32
    assert (sin.double() - angles.sin()).abs().max() <= 8200 * U32


# ---- adamw


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@hypothesis_settings(max_examples=60)
def test_split_and_join(values):
    """A master that comes back with another bit; a weight that is not the nearest; low bits that do not fit in 16."""
    master = torch.tensor(values, dtype=torch.float32)
    weight, low = split(master)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    back, numbers = join(weight, low), ~master.isnan()
    assert torch.equal(back.view(torch.int32)[numbers], master.view(torch.int32)[numbers])
    assert back[~numbers].isnan().all() and weight[~numbers].isnan().all()
    # torch rounds to nearest too; only where two bf16 numbers are equally near it takes the even one.
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    nearest = master.bfloat16()
    assert torch.equal(weight[numbers & ~tie], nearest[numbers & ~tie])
    assert (weight.abs() >= nearest.abs())[numbers & tie].all()


@pytest.mark.parametrize("count", [1, 15, 16, 1000, 1025])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_adamw_has_the_bits_of_torchs(monkeypatch, count, grad_dtype):
    """Any change of the formula or of its order; an element lost where chunks meet; a state that loses bits between steps."""
    monkeypatch.setattr(adamw_module, "CHUNK", 512)
    start = normal(count).float() * 1.00123
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    weight, low = split(start)
    moments = [torch.zeros(count), torch.zeros(count)]
    for step in range(1, 8):
        grad = (normal(count, seed=step) * 10.0 ** (step - 4)).to(grad_dtype)
        optimizer.param_groups[0]["lr"], theirs.grad = 1e-2 / step, grad.float()
        optimizer.step()
        adamw(weight, low, grad, *moments, Update(1e-2 / step, 0.9, 0.95, 1e-8, 0.1, step))
    assert torch.equal(join(weight, low), theirs.detach())
    assert torch.equal(moments[0], optimizer.state[theirs]["exp_avg"])
    assert torch.equal(moments[1], optimizer.state[theirs]["exp_avg_sq"])


def test_adamw_compiled_once():
    """torch.compile would freeze the learning rate of the first step, or compile again for every step and size."""
    import torch._dynamo

    found: list[Tensor] = []
    for backend in ("reference", "compiled"):
        tensors = []
        for count in (70, 1000, 70):
            tensors.append([*split(normal(count).float() * 1.1), normal(count, seed=1).bfloat16(), *torch.zeros(2, count)])
        for step in range(1, 4):
            for these in tensors:
                adamw(*these, Update(1e-2 / step, 0.9, 0.95, 1e-8, 0.1, step), backend=backend)
        found.append(torch.cat([join(*these[:2]) for these in tensors]))
        if backend == "reference":
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    # Three steps of a few roundings each; the update is 1e-2 of the weight.
    assert (found[0] - found[1]).abs().max() <= 12 * U32 * found[0].abs().max()


# ---- how programs share rows, and which implementation runs


@given(st.integers(1, 50_000), st.integers(1, 20_000), st.integers(1, 3), st.integers(1, 40))
def test_programs_over_rows(rows, width, per_processor, least_rows):
    """Rows left out or a program without rows; on 132 processors, more programs than asked for, or fewer with as many turns."""
    config = {"TILE": 8192, "PER_PROCESSOR": per_processor, "LEAST_ROWS": least_rows, "STAGES": 2}
    with patch.object(dispatch, "processors", return_value=132):
        programs, options = dispatch.row_tiles(rows, width, config, torch.device("cpu"))
    assert set(options) == {"ROWS", "BLOCK", "STAGES"} and options["BLOCK"] >= width and "TILE" in config
    tiles = math.ceil(rows / options["ROWS"])
    assert 1 <= programs <= min(tiles, per_processor * 132)
    assert programs <= 132 or rows >= least_rows * 132 * math.ceil(programs / 132)
    turns = math.ceil(tiles / programs)
    assert programs == 1 or math.ceil(tiles / (programs - 1)) > turns
    assert turns == 1 or 2 * programs >= 132


def test_dispatch():
    """A name that nobody checks, a device that is not asked, arguments that get lost on the way."""

    def op(x: Tensor, power: int = 1) -> tuple[str, int]:
        return "triton", power

    made = kernel(reference=lambda x, power=1: ("reference", power), other=lambda x, power=1: ("other", power))(op)
    x = torch.zeros(1)
    assert made(x, power=3) == made(x=x, power=3) == made(x, power=3, backend="reference") == ("reference", 3)
    assert made(x, 2, backend="triton") == ("triton", 2) and made(x, backend="other") == ("other", 1)
    with pytest.raises(ValueError, match="op has no backend 'otter'; it has auto, triton, reference, other"):
        made(x, backend="otter")
    assert kernel(main="native", reference=op)(op)(x, backend="native") == ("triton", 1)
    chosen = kernel(auto=lambda x, power=1: "other" if power > 1 else "reference", reference=op, other=lambda *_, **__: "mine")(op)
    assert chosen(x, power=2) == "mine" and chosen(x) == ("triton", 1)


def test_ops_are_found():
    """An op that compile-kernels, bench and the config do not see; a case that does not fit its op."""
    modules = op_modules()
    assert {"adamw", "gelu_tanh", "layer_norm", "rms_norm", "rope", "swiglu"} <= modules.keys()
    assert not modules.keys() & {"dispatch", "cases", "interpreter"}
    assert backends()["adamw"] == ["auto", "triton", "reference", "compiled"]
    assert backends().keys() == {*modules, "linear"}
    for name in ("adamw", "gelu_tanh", "layer_norm", "rms_norm", "rope", "swiglu"):
        cases = modules[name].cases()
        assert len({case.name for case in cases}) == len(cases) > 0
        for case in cases:
            arguments = case.make(Inputs("meta", case.dtype, empty=True))
            inspect.signature(case.function(modules[name])).bind(**arguments)
            assert set(case.differentiated) <= arguments.keys() and case.forward_bytes > 0


PLACES = torch.arange(5)[None]
COMPILED = {
    "rms_norm": lambda x, w: rms_norm(x, w, 1e-5),
    "add_rms_norm": lambda x, w: torch.cat(add_rms_norm(x, 2 * x, w, 1e-5)),
    "layer_norm": lambda x, w: layer_norm(x, w, w, 1e-5),
    "add_layer_norm": lambda x, w: torch.cat(add_layer_norm(x, 2 * x, w, w, 1e-5)),
    "rope": lambda x, w: torch.cat(rope(x[:, :, None], (x * w)[:, :, None], *rope_angles(PLACES, rope_frequencies(40, 1e4)))),
    "swiglu": lambda x, w: swiglu(x, x * w),
    "gelu_tanh": lambda x, w: gelu_tanh(x, w),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole(name):
    """A graph break in the dispatch would leave eager pieces between a block's fused ones."""
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    inputs = [normal(3, 5, 40), normal(40, seed=1)]
    for found, right in zip(*(values_and_gradients(op, inputs, torch.float32) for op in (compiled, COMPILED[name])), strict=True):
        assert (found - right).abs().max() <= 30 * U32 * right.abs().max()


FLOATS = st.floats(width=32) | st.integers(0, 2**32 - 1).map(lambda bits: np.array(bits, np.uint32).view(np.float32).item())


@given(st.lists(FLOATS, min_size=1, max_size=30))
def test_the_interpreters_casts_are_torchs(values):
    """fp32 cut off in place of rounded, ties to odd, NaN that becomes infinite: all of bf16 in the interpreter rests on it."""
    numbers = np.array(values, np.float32)
    bits = interpreter.bf16_from_fp32(numbers)
    torchs = torch.from_numpy(numbers).bfloat16()
    found = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found.isnan(), torchs.isnan())
    there = ~torchs.isnan()
    assert torch.equal(found.view(torch.int16)[there], torchs.view(torch.int16)[there])
    assert np.array_equal(interpreter.fp32_from_bf16(bits), torchs.float().numpy(), equal_nan=True)
