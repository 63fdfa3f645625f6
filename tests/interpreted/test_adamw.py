"""adamw as Triton computes it: the same bits as torch's AdamW on the fp32 master.

Planted bugs that these tests caught, each alone: either fma replaced by a product and a sum; the decay after the update, or of the
moment (L2); no correction of either start; eps inside the root, or under the correction; beta2 for beta1; ties of the rounded
weight to even, or the weight cut off (low then overflows); low read as unsigned; the mask off by one at the last block; the
master rounded to bf16 before the update; the moment stored in place of the other; a NaN that becomes a weight of -0.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interpreted.numerics import poisoned_memory
from megaspark.kernels import adamw as module
from megaspark.kernels.adamw import Update, adamw, join, split

FUSED_MULTIPLY_ADD = any(name in torch.backends.cpu.get_cpu_capability() for name in ("AVX2", "AVX512"))
# Torch's square roots are MKL's, which on AMD's processors are off by a rounding here and there.
_NUMBERS = torch.arange(1.0, 9999.0)
EXACT_ROOTS = torch.equal(_NUMBERS.sqrt(), _NUMBERS.double().sqrt().float())


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.CONFIGS["_adamw_kernel"][0], "BLOCK", 64)
        yield


def run(count: int, grad_dtype: torch.dtype, steps: int, seed: int = 0, backend: str = "auto") -> list[tuple[torch.Tensor, ...]]:
    """(ours, torch's) for master and both moments, after some steps from weights that bf16 does not hold."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(count, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    weight, low = split(start)
    moments = [torch.zeros(count), torch.zeros(count)]
    for step in range(1, steps + 1):
        lr = 1e-2 / step
        grad = (torch.randn(count, generator=generator) * 10.0 ** (step - 3)).to(grad_dtype)
        adamw(weight, low, grad, *moments, Update(lr, 0.9, 0.95, 1e-8, 0.1, step), backend=backend)
        optimizer.param_groups[0]["lr"], theirs.grad = lr, grad.float()
        optimizer.step()
    state = optimizer.state[theirs]
    return list(zip((join(weight, low), *moments), (theirs.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True))


@pytest.mark.skipif(not FUSED_MULTIPLY_ADD, reason="torch's own arithmetic has no fused multiply-add on this processor")
@given(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 300]), st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_bits_of_torchs_adamw(count, grad_dtype, seed):
    """Any of the bugs above; over five steps with gradients from 1e-2 to 1e2."""
    for ours, torchs in run(count, grad_dtype, steps=5, seed=seed):
        assert torch.equal(ours, torchs) if EXACT_ROOTS else torch.allclose(ours, torchs, rtol=8 * 2**-24, atol=1e-7)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_triton_and_plain_torch_agree(grad_dtype):
    """To the bit where torch has fused multiply-adds and exact square roots; else within a rounding or two a step."""
    for ours, plain in zip(run(500, grad_dtype, 4), run(500, grad_dtype, 4, backend="reference"), strict=True):
        if FUSED_MULTIPLY_ADD and EXACT_ROOTS:
            assert torch.equal(ours[0], plain[0])
        assert torch.allclose(ours[0], plain[0], rtol=8 * 2**-24, atol=1e-7)


def test_special_numbers_split_as_on_the_cpu():
    """Ties, the largest number, infinities and NaN: the kernel's own rounding is `split`'s."""
    bits = torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001,
         0x7FC00000, 0x7FFFFFFF, 0x7FFF8000], dtype=torch.int32,
    )  # fmt: skip
    master = torch.cat([bits, bits | -0x80000000]).view(torch.float32)
    weight, low = split(master)
    expected_weight, expected_low = weight.clone(), low.clone()
    still = Update(lr=0.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, step=1)
    nothing = torch.zeros_like(master)
    adamw(weight, low, nothing, nothing.clone(), nothing.clone(), still)
    assert torch.equal(weight.view(torch.int16), expected_weight.view(torch.int16)) and torch.equal(low, expected_low)
    # A NaN that the update makes is a NaN in the weight too, whatever its payload.
    weight, low = split(torch.ones(4))
    gradients = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    adamw(weight, low, gradients, torch.zeros(4), torch.zeros(4), still._replace(lr=1e-3))
    assert weight.isnan().tolist() == join(weight, low).isnan().tolist() == [True, True, True, False]


def test_custom_op():
    """torch's own check that it changes what its schema says and nothing else; and nothing at all for no elements."""
    weight, low = split(torch.randn(70, generator=torch.Generator().manual_seed(0)))
    arguments = (weight, low, torch.ones(70), torch.zeros(70), torch.zeros(70), *Update(1e-3, 0.9, 0.95, 1e-8, 0.1, 1).factors())
    torch.library.opcheck(module._step, arguments)
    with poisoned_memory():
        run(0, torch.float32, 1)


def test_compiled_whole():
    """A graph break, or an in-place change that functionalization loses."""
    def step(*tensors):
        adamw(*tensors, Update(1e-3, 0.9, 0.95, 1e-8, 0.1, 1))

    given = [*split(torch.linspace(-3, 3, 100)), torch.ones(100), torch.zeros(100), torch.zeros(100)]
    eager, compiled = [x.clone() for x in given], [x.clone() for x in given]
    step(*eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert not torch.equal(eager[1], given[1])
