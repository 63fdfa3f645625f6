"""Kernels: every op against its plain formula in fp64, forward and gradients.

Tolerances: an op of k roundings on values of size s errs by at most about k s u, with u = 2^-24 in fp32 and 2^-8 in bf16
(half a unit in the last place); sums over n terms by about sqrt(n) u of their terms' size. Each test says its own factor.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from megaspark.kernels import linear_cross_entropy as lce_module
from megaspark.kernels.attention import attention, document_mask
from megaspark.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from megaspark.kernels.rms_norm import rms_norm
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


def brute_force_sees(positions: list[int]) -> list[list[bool]]:
    """Who sees whom, by walking: query m sees back to the last place where the position was 0, or to the start."""
    out = []
    for m in range(len(positions)):
        start = next((n for n in range(m, -1, -1) if positions[n] == 0), 0)
        out.append([start <= n <= m for n in range(len(positions))])
    return out


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
def test_document_mask(starts_BS):
    """A document that sees into its neighbour, the future, or not even itself."""
    positions = []
    for row in starts_BS:
        places: list[int] = []
        for i, start in enumerate(row):
            places.append(0 if start or i == 0 else places[-1] + 1)
        positions.append(places)
    mask = document_mask(torch.tensor(positions), torch.float32)
    assert mask.shape == (len(positions), 1, 7, 7)
    for b, places in enumerate(positions):
        assert (mask[b, 0] == 0).tolist() == brute_force_sees(places)
        assert ((mask[b, 0] == 0) | (mask[b, 0] == -math.inf)).all()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, sees_BSS: Tensor) -> Tensor:
    """Head h looks into key head h // groups; softmax written out; [B, S, H, D]."""
    groups = q.shape[2] // k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype)
    heads = []
    for h in range(q.shape[2]):
        scores = q[:, :, h] @ k[:, :, h // groups].transpose(1, 2) / math.sqrt(q.shape[-1])
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * sees_BSS
        heads.append((weights / weights.sum(-1, keepdim=True)) @ v[:, :, h // groups])
    return torch.stack(heads, dim=2) if heads else out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype, factor", [(torch.float32, 40), (torch.bfloat16, 8)])
def test_attention(heads, kv_heads, documents, dtype, factor):
    """Heads paired with the wrong key head (h % K in place of h // groups), a wrong scale, a leak through the mask."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], list(range(9))])
    places = positions.tolist() if documents else [list(range(9))] * 2
    sees = torch.tensor([brute_force_sees(row) for row in places])
    mask = document_mask(positions, dtype) if documents else None
    inputs = [normal(2, 9, heads, 16, seed=1), normal(2, 9, kv_heads, 16, seed=2), normal(2, 9, kv_heads, 16, seed=3)]
    assert_close(lambda q, k, v: attention(q, k, v, mask), lambda q, k, v: plain_attention(q, k, v, sees), inputs, dtype, factor)


# ---- the fused head


def head_inputs(tokens: int, hidden: int = 24, vocab: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    return normal(tokens, hidden, seed=1), normal(vocab, hidden, seed=2, std=0.3), labels


def run_head(op: Callable[..., Tensor], tokens: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """[loss, gradient of hidden, gradient of weight] in fp64, for a loss multiplied by `scale`."""
    hidden, weight, labels = head_inputs(tokens)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    loss = op(hidden, weight, labels)
    (loss * scale).backward()
    return [loss.detach().double(), hidden.grad.double(), weight.grad.double()]


def exact_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return -torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, labels[:, None]).mean()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, -65536.0])
def test_linear_cross_entropy(monkeypatch, tokens, scale):
    """A chunk's edge that loses a row, a mean over the chunk instead of all tokens, an upstream gradient ignored."""
    monkeypatch.setattr(lce_module, "CHUNK_TOKENS", 8)
    found = run_head(linear_cross_entropy, tokens, torch.float32, scale)
    reference = run_head(linear_cross_entropy_reference, tokens, torch.float32, scale)
    exact = run_head(exact_head, tokens, torch.float64, scale)
    for mine, plain, right in zip(found, reference, exact, strict=True):
        allowed = 60 * U32 * right.abs().max()  # dot products over 24 to 37 terms, exp and log of values up to 10
        assert (mine - right).abs().max() <= allowed and (plain - right).abs().max() <= allowed


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1 / 7])
@pytest.mark.parametrize("tokens", [64, 200])
def test_linear_cross_entropy_in_bf16_is_as_good_as_torch(monkeypatch, tokens, scale):
    """Rounding the gradient, or its scale, once more than torch does would train a little worse, and nobody would see it."""
    monkeypatch.setattr(lce_module, "CHUNK_TOKENS", 48)
    found = run_head(linear_cross_entropy, tokens, torch.bfloat16, scale)
    plain = run_head(linear_cross_entropy_reference, tokens, torch.bfloat16, scale)
    exact = run_head(exact_head, tokens, torch.float64, scale)
    for mine, torchs, right in zip(found, plain, exact, strict=True):
        assert (mine - right).norm() <= 2 * (torchs - right).norm() + 1e-6 * right.norm()
        # No systematic factor either: projected on the exact gradient the error must be far below one rounding.
        bias = ((mine - right) * right).sum() / right.square().sum()
        torchs_bias = ((torchs - right) * right).sum() / right.square().sum()
        assert abs(bias) <= max(2 * abs(torchs_bias), U16 / 8)


def test_linear_cross_entropy_makes_only_the_gradients_asked_for(monkeypatch):
    """Evaluation would hold gradients of the whole vocabulary, and a frozen head would get one."""
    monkeypatch.setattr(lce_module, "CHUNK_TOKENS", 8)
    hidden, weight, labels = head_inputs(20)
    whole = run_head(linear_cross_entropy, 20, torch.float32)
    for wanted in (0, 1):
        leaves = [hidden.float().requires_grad_(wanted == 0), weight.float().requires_grad_(wanted == 1)]
        linear_cross_entropy(*leaves, labels).backward()
        assert torch.equal(leaves[wanted].grad.double(), whole[1 + wanted]) and leaves[1 - wanted].grad is None
    with torch.no_grad():
        assert linear_cross_entropy(hidden.float(), weight.float(), labels).double() == whole[0]


@given(st.integers(1, 40), st.integers(1, 50))
@hypothesis_settings(max_examples=20, deadline=None)
def test_linear_cross_entropy_does_not_depend_on_the_chunk(tokens, chunk):
    """The chunk is a matter of memory only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lce_module, "CHUNK_TOKENS", chunk)
        found = run_head(linear_cross_entropy, tokens, torch.float32)
    for mine, right in zip(found, run_head(exact_head, tokens, torch.float64), strict=True):
        assert (mine - right).abs().max() <= 60 * U32 * max(1.0, right.abs().max())


def test_linear_cross_entropy_survives_huge_logits():
    """exp of a logit of 1,000 overflows unless the largest is taken off first."""
    hidden = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([0, 0]))
    loss.backward()
    assert loss == 500.0 and hidden.grad.isfinite().all()
