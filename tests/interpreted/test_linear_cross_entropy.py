"""The fused head with its Triton kernel: every loss and gradient against fp64, by the rule of numerics.py.

Planted bugs that these tests caught, each alone: a row's address by BLOCK in place of V; ignored labels counted, their loss or
their gradient stored; the maximum of the last block only; the sum not rescaled when the maximum grows, or the maximum left out
of the logarithm or of the second pass; 0 in place of -inf outside the row; a store outside it; the label's column found in the
first block only; a gradient of the first block only, or none; z-loss not squared, its gradient without the 2, only at the
label, or everywhere but there; the loss, or the label's probability, rounded to bf16; a wrong label's logit read as 0. Around
the kernel: the first chunk's labels for all; each chunk's product in place of the sum; the mean over ignored tokens too; the
upstream gradient left out, or rounded to bf16. (The sum over chunks kept in bf16 is caught by the plain tests.)
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreted.numerics import DTYPES, check, normal, poisoned_memory
from megaspark.kernels import linear_cross_entropy as module
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses

op = partial(linear_cross_entropy, backend="triton")


def inputs(tokens, hidden, vocab, ignored=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    weight = normal(vocab, hidden, seed=seed + 2, std=0.5)
    return {"hidden_NE": normal(tokens, hidden, seed=seed + 1), "weight_VE": weight, "labels_N": labels}


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    """Blocks of 16 columns: several in a row, and a last one that is partly outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CONFIGS["_softmax_kernel"][0], "BLOCK", 16)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_against_fp64(dtype, z_loss, monkeypatch):
    """Any of the bugs above: vocabularies that no block divides, one column, one token, chunks of 5, ignored rows."""
    for tokens, vocab, ignored in [(13, 37, 0.3), (1, 16, 0.0), (6, 1, 0.0), (9, 65, 0.0), (4, 40, 1.0)]:
        monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 5 * vocab * dtype.itemsize)
        check(op, linear_cross_entropy_reference, dtype, **inputs(tokens, 24, vocab, ignored), z_loss=z_loss)


@given(st.integers(1, 12), st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 50]), st.integers(1, 12), st.sampled_from([0.0, 0.5]))
@settings(max_examples=25, deadline=None)
def test_sizes(tokens, vocab, chunk, ignored):
    """The edges of blocks, of chunks and of the batch; at four times torch's error where sums over chunks round again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CHUNK_BYTES, "cpu", chunk * vocab * 4)
        given = inputs(tokens, 8, vocab, ignored, seed=tokens)
        # The gradient by the weights of one token is a product of two vectors: one rounding of the softmax is in all of a row.
        factor = 4.0 if chunk < tokens or tokens == 1 else 2.0
        check(op, linear_cross_entropy_reference, torch.float32, factor=factor, **given, z_loss=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_are_fp32(dtype):
    """A loss stored in bf16 is off by 0.03; logits of 1,000, the largest first, last or in the middle, overflow exp."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 40, generator=generator) * 5).to(dtype)
    logits[range(3), [0, 20, 39]] = 1000.0
    labels = torch.tensor([0, 1, 2, -100, 39, 16])
    losses, guarded = torch.empty(6).fill_(float("nan")), torch.cat([logits, torch.full((1, 40), 7.0, dtype=dtype)])
    gradient = guarded[:6]
    module._softmax_triton(gradient, labels, losses, -100, 0.0, True)
    assert (guarded[6] == 7.0).all()
    right = F.cross_entropy(logits.double(), labels, reduction="none")
    assert ((losses - right).abs() <= 4 * 2.0**-24 * right.abs().clamp(min=10)).all()
    exact = (torch.softmax(logits.double(), 1) - F.one_hot(labels.clamp(min=0), 40)) * (labels >= 0)[:, None]
    # The gradient's own rounding, and exp and a division in fp32: of a probability p off by about 4 units of p.
    assert ((gradient.double() - exact).abs() <= exact.abs() * 2.0**-8 + 2.0**-22).all()
    untouched = logits.clone()
    module._softmax_triton(untouched, labels, losses, -100, 0.0, False)
    assert torch.equal(untouched, logits)


def test_the_gradient_of_a_sure_token_is_small_not_zero():
    """p - 1 of a probability near 1 loses all bits if p was rounded to bf16 first."""
    logits = torch.tensor([[0.0, -8.0]], dtype=torch.bfloat16)
    right = -float(torch.sigmoid(torch.tensor(-8.0, dtype=torch.float64)))
    module._softmax_triton(logits, torch.tensor([0]), torch.empty(1), -100, 0.0, True)
    assert abs(logits[0, 0].item() - right) <= abs(right) * 2.0**-8


def test_labels_out_of_range_give_nan():
    """A GPU cannot raise: the loss must say it."""
    given = inputs(5, 8, 20)
    for wrong in (-1, 20, 2**40):
        labels = given["labels_N"].clone()
        labels[3] = wrong
        with poisoned_memory():
            assert op(given["hidden_NE"].float(), given["weight_VE"].float(), labels).isnan()
            assert token_losses(given["hidden_NE"].float(), given["weight_VE"].float(), labels).isnan().tolist() == [
                n == 3 for n in range(5)
            ]


def test_a_nan_logit_gives_a_nan_loss():
    """A maximum passes over NaN: it must come through the sum."""
    hidden = torch.ones(2, 4)
    hidden[1, 2] = float("nan")
    assert token_losses(hidden, torch.ones(33, 4), torch.tensor([1, 2])).isnan().tolist() == [False, True]


def test_token_losses():
    """The losses without gradients are those of the mean, and the logits stay unread after them."""
    given = inputs(13, 8, 37, ignored=0.4)
    hidden, weight = given["hidden_NE"].float(), given["weight_VE"].float()
    found = token_losses(hidden, weight, given["labels_N"])
    right = F.cross_entropy(F.linear(hidden, weight).double(), given["labels_N"], reduction="none")
    assert (found - right).abs().max() <= 40 * 2.0**-24
    assert abs(found.sum() / (given["labels_N"] >= 0).sum() - op(**given | {"hidden_NE": hidden, "weight_VE": weight})) <= 2.0**-20
