"""rope, swiglu and gelu_tanh as Triton computes them.

Planted bugs that these tests caught, each alone. rope: the sine's sign in either half; halves exchanged; D in place of D / 2 in the
angles' rows; the mask of columns (52 of 64), of heads or of tokens left out; K and H exchanged; the angles' batch stride dropped,
or kept for one row of angles; a view's batch or token stride taken for the dense one, its heads for packed; the backward not
negated; a product taken in bf16. swiglu: gate and up exchanged; silu's slope without its second term; gradients exchanged; a mask
off by one; any of the three strides taken for another. gelu_tanh: each constant, in the third digit or the fifth; the bias left
out, forward or backward; the bias's gradient of one block of rows only, or of the last turn; a mask off by one row or
column; 1 less the share in place of the other share. Not seen here: a load past the end whose value is not used.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreted.numerics import DTYPES, Fixed, check, normal, results
from megaspark.kernels import gelu_tanh as gelu_module
from megaspark.kernels import rope as rope_module
from megaspark.kernels import swiglu as swiglu_module
from megaspark.kernels.gelu_tanh import gelu_tanh, gelu_tanh_reference
from megaspark.kernels.rope import rope, rope_angles, rope_frequencies, rope_reference
from megaspark.kernels.swiglu import swiglu, swiglu_reference


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Several programs, and several turns of each, at small sizes."""
    with pytest.MonkeyPatch.context() as patch:
        for configs in swiglu_module.CONFIGS.values():
            patch.setitem(configs[0], "BLOCK", 32)
        for configs in gelu_module.CONFIGS.values():
            for key, value in {"BLOCK": 32, "ROWS": 8}.items():
                patch.setitem(configs[0], key, value)
        yield


# ---- rope


def rope_inputs(batch: int, seq: int, heads: int, kv_heads: int, dim: int, rows_of_angles: int | None = None) -> dict:
    """Documents that start anywhere; angles for every row, or one row of them for all."""
    starts = torch.arange(rows_of_angles or batch)[:, None] * 3
    positions = (torch.arange(seq)[None] + starts) % 5
    cos, sin = rope_angles(positions, rope_frequencies(dim, 10000.0))
    q, k = normal(batch, seq, heads, dim, seed=1), normal(batch, seq, kv_heads, dim, seed=2)
    return {"q_BSHD": q, "k_BSKD": k, "cos_BSC": Fixed(cos), "sin_BSC": Fixed(sin)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 9, 3, 1, 8), (1, 5, 16, 2, 104), (2, 3, 9, 9, 2), (1, 1, 1, 1, 64)])
def test_rope(sizes, dtype):
    """Any of the bugs above."""
    check(rope, rope_reference, dtype, **rope_inputs(*sizes))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 17), st.integers(1, 9), st.integers(1, 17))
@settings(max_examples=10, deadline=None)
def test_rope_sizes(batch, seq, heads, kv_heads, half):
    """A mask that is off by one, in tokens, heads or features."""
    check(rope, rope_reference, torch.float32, **rope_inputs(batch, seq, heads, kv_heads, 2 * half))


def test_rope_with_one_row_of_angles():
    """[1, S, D/2] angles serve every row of the batch."""
    check(rope, rope_reference, torch.float32, **rope_inputs(3, 5, 2, 1, 8, rows_of_angles=1))


def test_rope_of_a_packed_projection():
    """q and k inside one [B, S, (H + 2K) D] projection, heads before tokens, and gradients that come the same ways."""
    q_heads, k_heads, dim = 4, 2, 8

    def packed(function):
        def run(qkv, cos, sin):
            q, k, _ = qkv.unflatten(-1, (-1, dim)).split([q_heads, k_heads, k_heads], dim=2)
            return function(q, k, cos, sin)
        return run

    def heads_first(function):
        def run(q, k, cos, sin):
            return [out.transpose(1, 2) for out in function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)]
        return run

    angles = {key[:3]: value for key, value in rope_inputs(2, 5, 1, 1, dim).items() if key[:3] in ("cos", "sin")}
    check(packed(rope), packed(rope_reference), torch.float32, qkv=normal(2, 5, (q_heads + 2 * k_heads) * dim), **angles)
    given_heads_first = {"q": normal(2, q_heads, 5, dim, seed=1), "k": normal(2, k_heads, 5, dim, seed=2)}
    check(heads_first(rope), heads_first(rope_reference), torch.float32, **given_heads_first, **angles)
    only_k = [lambda f=f, **given: packed(f)(**given)[1] for f in (rope, rope_reference)]
    check(*only_k, torch.float32, qkv=normal(2, 5, 64), **angles)


# ---- swiglu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 40), (1,), (32,), (65, 3)])
def test_swiglu(shape, dtype):
    """Any of the bugs above; gates to 10, where the sigmoid saturates in bf16."""
    check(swiglu, swiglu_reference, dtype, gate_F=normal(*shape, seed=1, std=4.0), up_F=normal(*shape, seed=2))


@given(st.integers(1, 5), st.sampled_from([1, 31, 32, 33, 63, 64, 65, 97]))
@settings(max_examples=10, deadline=None)
def test_swiglu_of_a_packed_projection(rows, width):
    """Gate and up as the halves of one projection: rows lie 2F apart, and the other half beside them."""

    def packed(function):
        return lambda both: function(*both.chunk(2, dim=-1))

    check(packed(swiglu), packed(swiglu_reference), torch.float32, both=normal(rows, 2 * width))


def test_swiglu_of_mixed_layouts():
    """One dense, the other with rows that lie apart, or transposed; an upstream gradient that is one number."""
    layouts = [
        lambda gate, up: (gate[:, :37], up[:, :37].clone()),
        lambda gate, up: (gate[:, 3:].clone(), up[:, 3:]),
        lambda gate, up: (gate, up.T.clone().T),
    ]
    for layout in layouts:

        def mixed(function, layout=layout):
            return lambda gate, up: function(*layout(gate, up)).sum(0)

        check(mixed(swiglu), mixed(swiglu_reference), torch.float32, gate=normal(5, 40, seed=1), up=normal(5, 40, seed=2))


# ---- gelu_tanh


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 40), (1, 1), (17, 33)])
def test_gelu_tanh(shape, biased, dtype):
    """Any of the bugs above; inputs to 6, where 1 + tanh loses its bits."""
    bias = normal(shape[-1], seed=2) if biased else None
    check(gelu_tanh, gelu_tanh_reference, dtype, x_F=normal(*shape, seed=1, std=2.0), bias_F=bias)


@given(st.sampled_from([1, 3, 4, 5, 7, 8, 9, 16, 17]), st.sampled_from([1, 31, 32, 33, 65]), st.booleans())
@settings(max_examples=10, deadline=None)
def test_gelu_tanh_sizes(rows, width, biased):
    """A mask that is off by one, in rows or columns; the rows that a program has too many."""
    bias = normal(width, seed=2) if biased else None
    check(gelu_tanh, gelu_tanh_reference, torch.float32, x_F=normal(rows, width, seed=1), bias_F=bias)


def test_gelu_tanh_of_views():
    """Rows that lie apart; an upstream gradient that is one number."""

    def cut(function):
        return lambda x, bias: function(x[:, 3:], bias).sum(-1)

    check(cut(gelu_tanh), cut(gelu_tanh_reference), torch.float32, x=normal(9, 43), bias=normal(40, seed=1))


# ---- all


CALLS = {
    "rope": (rope, rope_inputs(2, 9, 8, 4, 16)),
    "swiglu": (swiglu, {"gate_F": normal(12, 40, seed=1), "up_F": normal(12, 40, seed=2)}),
    "gelu_tanh": (gelu_tanh, {"x_F": normal(12, 40, seed=1), "bias_F": normal(40, seed=2)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_bf16_is_rounded_once(name):
    """A product or a sum taken in bf16 on the way: twice torch's error allows one, the nearest bf16 to the exact result does not.

    Errors of fp32 tip a rounding to bf16 in about one of 2^16 / 10 elements.
    """
    op, inputs = CALLS[name]
    plain = {"rope": rope_reference, "swiglu": swiglu_reference, "gelu_tanh": gelu_tanh_reference}[name]
    exact = results(plain, torch.float64, inputs)
    for key, found in results(op, torch.bfloat16, inputs).items():
        assert (found != exact[key].bfloat16()).float().mean() <= 0.003, key


@pytest.mark.parametrize("name", CALLS)
def test_compiled_whole(name):
    """A graph break, or a fake that tells another shape, dtype or stride than the kernel gives."""
    op, inputs = CALLS[name]
    eager = results(op, torch.bfloat16, inputs)
    compiled = results(torch.compile(op, fullgraph=True, backend="aot_eager"), torch.bfloat16, inputs)
    assert all(torch.equal(eager[key], compiled[key]) for key in eager)


def test_custom_ops():
    """torch's own check of schema, fake shapes and autograd registration."""
    x, other, bias = (normal(*shape, seed=i).float().requires_grad_() for i, shape in enumerate([(4, 40), (4, 40), (40,)]))
    torch.library.opcheck(swiglu_module._forward, (x, other))
    torch.library.opcheck(gelu_module._forward, (x, bias))
    torch.library.opcheck(gelu_module._forward, (x, None))
    q, k, cos, sin = (value.tensor if isinstance(value, Fixed) else value.float().requires_grad_()
                      for value in CALLS["rope"][1].values())  # fmt: skip
    torch.library.opcheck(rope_module._rotate, (q, k, cos, sin, False))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0)])
def test_nothing_to_do(shape):
    """No tokens, no features: nothing is launched, gradients are empty or 0."""
    x = torch.zeros(shape, requires_grad=True)
    bias = torch.ones(shape[-1], requires_grad=True)
    assert swiglu(x, x).shape == gelu_tanh(x, bias).shape == shape
    gelu_tanh(x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(shape[-1]))
    q, k = rope(torch.zeros(0, 3, 4, 8), torch.zeros(0, 3, 2, 8), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    assert q.shape == (0, 3, 4, 8) and k.shape == (0, 3, 2, 8)
