"""The 8-bit linear layer against a model of it in fp64 that shares no code with it, and against the layer without rounding.

The model rounds to fp8 by arithmetic and finds scales by trying; it then multiplies exactly. What is left between it and the op
is the fp32 sum and one rounding to bf16. Its Triton kernels are tested in interpreted/test_fp8_linear.py.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted.numerics import normal, poisoned_memory
from torch import Tensor

from megaspark.kernels import fp8_linear as module
from megaspark.kernels.fp8_linear import E4M3, E5M2, fp8_linear

FRACTION_BITS = {E4M3: 3, E5M2: 2}
SMALLEST_EXPONENT = {E4M3: -6, E5M2: -14}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
SCALINGS = ["tensor", "row"]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 numbers to the nearest that the format has, ties to even, by arithmetic."""
    values = x.double().numpy()
    exponent = np.frexp(np.where(values == 0, 1.0, values))[1] - 1
    unit = 2.0 ** (np.maximum(exponent, SMALLEST_EXPONENT[dtype]) - FRACTION_BITS[dtype])
    return torch.from_numpy(np.round(values / unit) * unit)


def model_of(x_MK: Tensor, dtype: torch.dtype, scaling: str) -> Tensor:
    """x as fp8 stands for it: each row, or all of it, scaled by the greatest power of two (to 2^120) that keeps it in range."""
    rows = x_MK.double() if scaling == "row" else x_MK.double().reshape(1, -1)
    out = torch.zeros_like(rows)
    for row, into in zip(rows, out, strict=True):
        if row.any():
            up = max(2.0**n for n in range(-120, 121) if row.abs().max() * 2.0**n <= LARGEST[dtype])
            into.copy_(rounded(row * up, dtype) / up)
    return out.reshape(x_MK.shape)


def model(x_NE: Tensor, weight_FE: Tensor, grad_NF: Tensor, scaling: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, sum of the products' sizes) in fp64 of y, dx and dW."""

    def q(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
        return model_of(x, dtype, scaling)

    factors = {
        "y": (q(x_NE), q(weight_FE)),
        "dx": (q(grad_NF, E5M2), q(weight_FE.T)),
        "dW": (q(grad_NF.T, E5M2), q(x_NE.T)),
    }
    return {name: (a @ b.T, a.abs() @ b.abs().T) for name, (a, b) in factors.items()}


def results(op: Callable[..., Tensor], x_NE: Tensor, weight_FE: Tensor, grad_NF: Tensor) -> dict[str, Tensor]:
    x, weight = (t.bfloat16().requires_grad_() for t in (x_NE, weight_FE))
    y = op(x, weight)
    dx, dW = torch.autograd.grad(y, (x, weight), grad_NF.bfloat16())
    return {"y": y.detach(), "dx": dx, "dW": dW}


def check_against_model(backend: str, scaling: str, tokens: int, width: int, out: int, uneven: bool = False) -> None:
    """y, dx and dW are the model's: rounded to bf16 once, from sums in fp32. Twice the same bits; everything written.

    uneven: rows, and columns, of sizes from 2^-20 to 2^20, so that a scale at the wrong place shows.
    """
    inputs = [normal(*shape, seed=i) for i, shape in enumerate([(tokens, width), (out, width), (tokens, out)])]
    if uneven:
        generator = torch.Generator().manual_seed(5)
        for x in inputs:
            for shape in ((len(x), 1), (1, x.shape[1])):
                x *= 2.0 ** torch.randint(-10, 11, shape, generator=generator)
    op = partial(fp8_linear, scaling=scaling, backend=backend)
    with poisoned_memory():
        found, again = results(op, *inputs), results(op, *inputs)
    for name, (right, sizes) in model(*inputs, scaling).items():
        # Products of fp8 numbers are exact in fp32; K of them summed in any order err by at most K u of the sum of sizes.
        depth = {"y": width, "dx": out, "dW": tokens}[name]
        allowed = 2.0**-8 * right.abs() + (depth + 2) * 2.0**-24 * sizes
        error = (found[name].double() - right).abs()
        assert (error <= allowed).all(), f"{name}: off by {(error / sizes).max():.1e} of its terms"
        assert torch.equal(found[name], again[name]), f"{name}: two runs differ"


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
def test_against_the_model(backend, scaling, uneven):
    """A scale of another row or dimension, operands exchanged, e4m3 for gradients, a saved transpose of the wrong tensor."""
    for tokens, width, out in [(32, 48, 16), (16, 16, 64)]:
        check_against_model(backend, scaling, tokens, width, out, uneven)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_error_is_that_of_the_formats(scaling):
    """Half of the range lost, or rounding twice, would pass unseen where only the model is asked.

    A number rounded to b bits of fraction errs by up to half a unit, uniformly: 2^-(b+1) / sqrt(3) of its power of two, whose
    mean square is about half of the numbers' own (fractions from 1 to 2): 0.0361 x 0.72 = 2.6 % in e4m3, 5.2 % in e5m2. The
    errors of two factors add as squares: 3.7 % and 5.8 %. One bit more or less is a factor of 2.
    """
    inputs = [normal(*shape, seed=i) for i, shape in enumerate([(256, 512), (128, 512), (256, 128)])]
    found = results(partial(fp8_linear, scaling=scaling, backend="reference"), *inputs)
    exact = results(F.linear, *inputs)
    for name, expected in {"y": 0.037, "dx": 0.058, "dW": 0.058}.items():
        relative = (found[name].double() - exact[name].double()).norm() / exact[name].double().norm()
        assert 0.85 * expected < relative < 1.15 * expected, f"{name}: {relative:.4f}"


@given(st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from([E4M3, E5M2]))
@settings(max_examples=300)
def test_scale(largest, dtype):
    """A scale that lets the largest number saturate, or wastes a bit of the range; at 1.75 x 2^n, where it changes; at the ends."""
    for value in (largest, float(np.float32(2.0 ** np.floor(np.log2(largest)) * 1.75))):
        up, down = (x.double().item() for x in module._scale_of(torch.tensor([value]), dtype))
        assert up * down == 1 and np.frexp(up)[0] == 0.5
        assert value * up <= LARGEST[dtype] and (2 * value * up > LARGEST[dtype] or up == 2.0**126)


def test_rows_far_apart():
    """What scales by row are for: a token 2^-20 the size of the largest keeps its bits, and by tensor is lost in e4m3."""
    x = normal(16, 64, seed=1)
    x[3] *= 2.0**-20
    weight = normal(16, 64, seed=2)
    exact = x @ weight.T
    errors = {}
    for scaling in SCALINGS:
        y = fp8_linear(x.bfloat16(), weight.bfloat16(), scaling=scaling, backend="reference").double()
        errors[scaling] = (y[3] - exact[3]).norm() / exact[3].norm()
    assert errors["row"] < 0.06 and errors["tensor"] > 0.5


@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(backend, bad):
    """A saturating cast makes 448 of an infinity: a run that has diverged would go on with nonsense."""
    x, weight = normal(16, 32, seed=1).bfloat16(), normal(16, 32, seed=2).bfloat16()
    x[5, 7] = bad
    assert fp8_linear(x, weight, backend=backend).isnan().all()
    assert fp8_linear(x, weight, scaling="row", backend=backend).isnan().any(1).tolist() == [n == 5 for n in range(16)]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros(scaling):
    """0 / 0 in the scale of a row of padding, or of a gradient that is all 0."""
    zero, some = torch.zeros(16, 32), normal(16, 32, seed=1)
    for x, weight, grad in [(zero, some, normal(16, 16)), (some, zero, normal(16, 16)), (some, some, torch.zeros(16, 16))]:
        found = results(partial(fp8_linear, scaling=scaling, backend="reference"), x, weight, grad)
        for name, (right, _) in model(x, weight, grad, scaling).items():
            assert found[name].isfinite().all() and ((found[name] == 0) == (right == 0)).all()


def test_saves_eight_bit_activations_and_no_weights():
    """The memory it is to save; and under ZeRO-3 a kept copy of the weight would be the whole model on every rank."""
    x, weight = normal(16, 32, seed=1).bfloat16().requires_grad_(), normal(48, 32, seed=2).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fp8_linear(x, weight, backend="reference")
    others = [t for t in saved if t is not weight and t.numel() > 1]
    assert [(t.shape, t.dtype) for t in others] == [((32, 16), torch.uint8)]
    frozen = weight.detach()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fp8_linear(x, frozen, backend="reference")
    assert sum(t.numel() for t in saved if t is not frozen) == 0
    assert y.sum().backward() is None and x.grad is not None


def test_more_dimensions_and_seven_tokens():
    """[B, S, E] as blocks have it; without gradients the number of tokens is free, as generation needs it."""
    x, weight = normal(2, 8, 32, seed=1).bfloat16().requires_grad_(), normal(16, 32, seed=2).bfloat16().requires_grad_()
    y = fp8_linear(x, weight, backend="reference")
    assert y.shape == (2, 8, 16) and torch.equal(y, fp8_linear(x.flatten(0, 1), weight, backend="reference").unflatten(0, (2, 8)))
    y.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
    with torch.no_grad():
        assert fp8_linear(x[0, :7], weight, backend="reference").shape == (7, 16)
        assert fp8_linear(x[0, :0], weight, backend="reference").shape == (0, 16)


@pytest.mark.parametrize(
    "x, weight, scaling, message",
    [
        (torch.zeros(16, 32), torch.zeros(16, 32), "block", "no scaling 'block'"),
        (torch.zeros(16, 32), torch.zeros(16, 48), "row", r"weight \[F, E\]"),
        (torch.zeros(16, 40), torch.zeros(16, 40), "row", "E is 40"),
        (torch.zeros(16, 32), torch.zeros(24, 32), "tensor", "F is 24"),
        (torch.zeros(15, 32), torch.zeros(16, 32), "tensor", "number of tokens is 15"),
    ],
)
def test_mistakes(x, weight, scaling, message):
    """What a GPU's library would refuse in the middle of a run, or compute something else of, on every backend."""
    for backend in ("reference", "scaled_mm", "triton"):
        with pytest.raises(ValueError, match=message):
            fp8_linear(x.bfloat16(), weight.bfloat16().requires_grad_(), scaling=scaling, backend=backend)
    with pytest.raises(ValueError, match="bfloat16"):
        fp8_linear(x, weight.bfloat16(), backend="reference")


@pytest.mark.parametrize("scaling, backend", [*product(SCALINGS, ["reference", "scaled_mm"])])
def test_custom_op(scaling, backend):
    """torch's own checks: the schema, the fake implementation, autograd; gradients of x alone and of the weight alone."""
    x, weight = normal(16, 32, seed=1).bfloat16(), normal(48, 32, seed=2).bfloat16()
    ops = torch.ops.megaspark
    for x_wanted, weight_wanted in [(True, True), (True, False), (False, True)]:
        leaves = x.clone().requires_grad_(x_wanted), weight.clone().requires_grad_(weight_wanted)
        torch.library.opcheck(ops.fp8_linear_forward.default, (*leaves, scaling, backend, weight_wanted))
    saved = ops.fp8_linear_forward.default(x, weight, scaling, backend, True)[1:]
    upstream = normal(16, 48, seed=3).bfloat16()
    torch.library.opcheck(ops.fp8_linear_backward.default, (upstream, weight, *saved, scaling, backend, True, True))


def test_compiled_whole():
    """A graph break in every layer, or other bits."""
    inputs = normal(16, 32, seed=1), normal(48, 32, seed=2), normal(16, 48, seed=3)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return fp8_linear(x * 2, weight, scaling="row", backend="reference")

    for (name, found), right in zip(
        results(torch.compile(layer, fullgraph=True), *inputs).items(), results(layer, *inputs).values(), strict=True
    ):
        assert torch.equal(found, right), name
