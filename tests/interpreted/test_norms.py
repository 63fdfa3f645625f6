"""rms_norm and layer_norm, alone and with the residual, as Triton computes them.

Planted bugs that these tests caught, each alone, in both norms unless said: eps left out; a mean over BLOCK in place of E; the
mask of columns left out of the load (rms_norm); every program starting at row 0; a loop's step without ROWS, or of twice as many;
the residual subtracted; the norm taken of x in place of the sum; the sum not stored, or normed before it is rounded; rms_norm's
scaled row not rounded before the weight; layer_norm's variance from E[x^2] - mean^2, or of the padding too; its mean not stored;
its bias left out; the backward without the weight, without its second term, without the mean (layer_norm), without the
residual's gradient, with x's stride for either gradient's; the weight's gradient without the scale, of the last rows only, of
program 0 only, or with all partial sums in one row; the bias's gradient times the normed row; the sum's gradient dropped where
only the sum is used. Not seen here: a load past the end whose value is not used.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreted.numerics import DTYPES, Fixed, check, normal, poisoned_memory, results
from megaspark.kernels import dispatch
from megaspark.kernels import layer_norm as layer_module
from megaspark.kernels import rms_norm as rms_module
from megaspark.kernels.layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference
from megaspark.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

OPS = {
    "rms": (rms_norm, rms_norm_reference),
    "add_rms": (add_rms_norm, add_rms_norm_reference),
    "layer": (layer_norm, layer_norm_reference),
    "add_layer": (add_layer_norm, add_layer_norm_reference),
}


def inputs(name: str, *shape: int, offset: float = 0.0) -> dict[str, Any]:
    """What the op of that name takes; rows lie around `offset`."""
    residual = {"residual_E": normal(*shape, seed=2, std=2.0)} if "add" in name else {}
    bias = {"bias_E": normal(shape[-1], seed=4)} if "layer" in name else {}
    return {"x_E": normal(*shape, seed=1) + offset, **residual, "weight_E": normal(shape[-1], seed=3), **bias, "eps": 1e-5}


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """Tiles of 128 elements and 3 processors: a few rows at once, several programs, several turns of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "processors", lambda device: 3)
        for module in (rms_module, layer_module):
            for configs in module.CONFIGS.values():
                patch.setitem(configs[0], "TILE", 128)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_norm(name, dtype):
    """Any of the bugs above: one element, rows that no tile divides, more rows than all programs take in one turn."""
    for shape in [(2, 7, 64), (1, 1), (15, 33), (4, 200)]:
        check(*OPS[name], dtype, **inputs(name, *shape))


@given(st.sampled_from([*OPS]), st.integers(1, 20), st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 65, 127, 128, 129]))
@settings(max_examples=20, deadline=None)
def test_sizes_around_the_edges_of_blocks(name, rows, width):
    """A mask that is off by one."""
    check(*OPS[name], torch.float32, **inputs(name, rows, width))


VIEWS = {
    "columns of a wider tensor": lambda x: x[:, 4:],
    "transposed": lambda x: x.T,
    "one row for all": lambda x: x[:1].expand(7, -1),
    "every other column": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", OPS)
def test_views(name, view):
    """Rows that lie apart, columns that do: a stride taken for the width."""
    op, plain = OPS[name]

    def of_view(function):
        return lambda x_E, **rest: function(VIEWS[view](x_E), **rest)

    shape = VIEWS[view](torch.empty(6, 40)).shape
    check(of_view(op), of_view(plain), torch.float32, **(inputs(name, *shape) | {"x_E": normal(6, 40, seed=1)}))


@pytest.mark.parametrize("name", OPS)
def test_upstream_gradients_with_strides(name):
    """A gradient that comes transposed, or as one number for all (strides 0), read as if it were dense."""
    op, plain = OPS[name]

    def transposed(function):
        return lambda **given: [out.T for out in outputs(function(**given))]

    def summed(function):
        return lambda **given: [out.sum(0) for out in outputs(function(**given))]

    for seen in (transposed, summed):
        check(seen(op), seen(plain), torch.float32, **inputs(name, 6, 40))


def outputs(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("name", ["add_rms", "add_layer"])
def test_one_of_the_two_gradients(name, used):
    """A block whose sum nobody uses any more (the last), or whose norm nobody uses, would lose its gradient or crash."""
    op, plain = OPS[name]
    given = inputs(name, 9, 33)
    vectors = {key: Fixed(given.pop(key).float()) for key in ("weight_E", "bias_E") if key in given}
    check(lambda **a: op(**a)[used], lambda **a: plain(**a)[used], torch.float32, **given, **vectors)


@pytest.mark.parametrize("name", ["rms", "add_rms"])
def test_rms_norm_rounds_where_transformers_does(name):
    """The scaled row is rounded to bf16 before the weight: logits of Hugging Face's model come out the same, bit for bit."""
    op, plain = OPS[name]
    given = {key: value.bfloat16() if isinstance(value, torch.Tensor) else value for key, value in inputs(name, 50, 96).items()}
    found, right = op(**given), plain(**given)
    for i, (mine, theirs) in enumerate(zip(outputs(found), outputs(right), strict=True)):
        # The scale's last bit may differ (sums in another order) and tip a rounding in 2^16 x 2; the sum's bits may not.
        assert (mine != theirs).float().mean() <= (0 if i == 1 else 1e-3)


@pytest.mark.parametrize("name", ["rms", "layer"])
def test_what_is_normed_is_what_is_returned(name):
    """The sum normed before it is rounded: the backward, which starts from the rounded one, would be of another function."""
    given = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs(f"add_{name}", 20, 96).items()}
    normed, total = OPS[f"add_{name}"][0](**given)
    del given["residual_E"]
    assert torch.equal(normed, OPS[name][0](**(given | {"x_E": total})))


def test_fp32_weight_beside_bf16_rows():
    """The promoted dtype, as torch has it."""

    def with_wide_weight(function):
        return lambda x_E, weight_E, eps: function(x_E, weight_E.to(torch.promote_types(torch.float32, weight_E.dtype)), eps)

    check(with_wide_weight(rms_norm), with_wide_weight(rms_norm_reference), torch.bfloat16, **inputs("rms", 5, 48))


def test_rows_far_from_zero():
    """A variance from the mean of squares loses 20 of 24 bits of a row near 1,000: that of the centred row keeps them.

    Ours and torch's mean are rounded once to a unit of 6e-5 there, by luck well or badly: hence 4.
    """
    check(*OPS["layer"], torch.float32, factor=4.0, **inputs("layer", 4, 100, offset=1000.0))


def test_huge_and_tiny_rows():
    """Rows at the size of sqrt(eps) show where it is added; rows of 1e15 overflow in fp16 only."""
    x = torch.stack([normal(64) * scale for scale in (0.0, 1e-6, 3e-3, 1.0, 1e15)])
    for name in ("rms", "layer"):
        check(*OPS[name], torch.float32, **(inputs(name, 5, 64) | {"x_E": x}))


def test_empty_and_wrong_inputs():
    """No tokens: nothing to launch; the weight's gradient is 0. A residual of another shape would be read beyond its end."""
    with poisoned_memory():
        for name, (op, _) in OPS.items():
            given = {k: v.float().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs(name, 0, 24).items()}
            outputs(op(**given))[0].sum().backward()
            assert torch.equal(given["weight_E"].grad, torch.zeros(24))
    for op, vectors in ((add_rms_norm, 1), (add_layer_norm, 2)):
        with pytest.raises(ValueError, match="residual"):
            op(torch.zeros(3, 8), torch.zeros(8), *[torch.ones(8)] * vectors, 1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_custom_ops(residual):
    """torch's own check of schema, fake shapes and autograd registration."""
    x, other, weight, bias = (normal(*s, seed=i).float().requires_grad_() for i, s in enumerate([(6, 20), (6, 20), (20,), (20,)]))
    total = other if residual else None
    torch.library.opcheck(rms_module._forward, (x, total, weight, 1e-5))
    torch.library.opcheck(layer_module._forward, (x, total, weight, bias, 1e-5))


@pytest.mark.parametrize("name", OPS)
def test_compiled_whole(name):
    """A graph break, or a fake that tells another shape, dtype or stride than the kernel gives."""
    op = OPS[name][0]
    given = inputs(name, 6, 20)
    eager = results(op, torch.bfloat16, given)
    compiled = results(torch.compile(op, fullgraph=True, backend="aot_eager"), torch.bfloat16, given)
    assert all(torch.equal(eager[key], compiled[key]) for key in eager)
