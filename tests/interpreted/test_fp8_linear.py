"""The 8-bit linear layer's Triton kernels: the bits of what is rounded, and the products, against the model in fp64.

Planted bugs that these tests caught, each alone: by rows: the maximum without the absolute value, passing over NaN, or with
columns outside; a scale stored outside; multiplied by the inverse scale; programs that all start at row 0; the columns' maxima
of the last rows only, without the absolute value, passing over NaN, or of all programs at one place. The scale: its change at
1.5 or at 2 in place of 1.75 times a power of two; half the range; exponents that wrap around at 0; an infinity that is
forgotten. By tile: the smallest number forgotten; one column's scale for all; scales stored by the wrong programs, or only one;
the transpose by the wrong stride; not scaled; rows outside. The product: the last tiles left out, each way and in depth; groups
of tiles mixed up; only the last step kept; sums in bf16; a scale of the other dimension, or none; a store outside. Around them:
gradients in e4m3; the weight's scale by tensor for its transpose by row; maxima of the first row only.
"""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fp8_linear import check_against_model

from interpreted.numerics import normal, poisoned_memory
from megaspark.kernels import dispatch
from megaspark.kernels import fp8_linear as module
from megaspark.kernels.fp8_linear import E4M3, E5M2, fp8_linear

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 48, 65]


@pytest.fixture(autouse=True, scope="module")
def _small_tiles():
    """Several tiles each way, the last ones partly outside; 3 processors, so that programs take several turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "processors", lambda device: 3)
        patch.setitem(module.CONFIGS["_cast_rows_kernel"][0], "TILE", 128)
        patch.setitem(module.CONFIGS["_cast_rows_kernel"][0], "PER_PROCESSOR", 1)
        tiles = {"_cast_kernel": {"ROWS": 16, "COLUMNS": 32}, "_product_kernel": {"BM": 16, "BN": 32, "BK": 32, "GROUP": 2}}
        for kernel, sizes in tiles.items():
            for name, size in sizes.items():
                patch.setitem(module.CONFIGS[kernel][0], name, size)
        yield


def check_bits(x: torch.Tensor, dtype: torch.dtype, scaling: str, rows: bool, columns: bool) -> None:
    """What the kernels write is, bit for bit, what torch's casts write."""
    with poisoned_memory():
        found = module._quantized(x, dtype, scaling, "triton", rows, columns)
        right = module._quantized(x, dtype, scaling, "reference", rows, columns)
    for mine, torchs in zip(found, right, strict=True):
        assert torch.equal(mine.values_MK.view(torch.uint8), torchs.values_MK.view(torch.uint8))
        assert torch.equal(mine.scale.view(torch.int32), torchs.scale.view(torch.int32))


@pytest.mark.parametrize("dtype, scaling", [*product([E4M3, E5M2], ["tensor", "row"])])
@pytest.mark.parametrize("rows, columns", [(True, True), (True, False), (False, True)])
def test_rounding(dtype, scaling, rows, columns):
    """Every bit, of numbers from subnormal to the largest, ties included; rows of zeros and of tiny numbers."""
    x = normal(50, 70, seed=1) * 2.0 ** torch.randint(-30, 31, (50, 1), generator=torch.Generator().manual_seed(1))
    x[7], x[:, 9] = 0.0, 0.0
    x[11] *= 2.0**-90
    x[13, :8] = torch.tensor([1.0, 1.0625, 1.125, 1.1875, 1.75, -1.8125, 1.875, 1.9375])  # ties, and where the scale changes
    check_bits(x.bfloat16(), dtype, scaling, rows, columns)


@given(st.sampled_from(SIZES), st.sampled_from(SIZES), st.sampled_from(["tensor", "row"]), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_sizes(height, width, scaling, rows, columns):
    """The edges of tiles, of rows and of programs."""
    check_bits(normal(height, width, seed=height + width).bfloat16(), E4M3, scaling, rows, columns)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(scaling, bad):
    """A maximum passes over NaN and a cast saturates infinity: both must become NaN, in the row and in the column they are in."""
    x = normal(40, 48, seed=1).bfloat16()
    x[35, 33] = bad
    for mine, place in zip(module._quantized(x, E4M3, scaling, "triton", True, True), (35, 33), strict=True):
        assert mine.scale.isnan().nonzero().tolist() == [[place if scaling == "row" else 0]]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_against_the_model(scaling, uneven):
    """Products of tiles at every edge, with the scales of their own rows and columns."""
    for tokens, width, out in [(16, 16, 16), (48, 80, 64)]:
        check_against_model("triton", scaling, tokens, width, out, uneven)


def test_few_tokens():
    """Fewer rows than a tile, without gradients; and none."""
    x, weight = normal(7, 32, seed=1).bfloat16(), normal(48, 32, seed=2).bfloat16()
    assert torch.equal(fp8_linear(x, weight, backend="triton"), fp8_linear(x, weight, backend="reference"))
    assert fp8_linear(x[:0], weight, backend="triton").shape == (0, 48)
