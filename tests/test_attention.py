"""attention on a CPU, its spans, and what its backends are told; tests/interpreted/test_attention.py has the Triton kernels."""

import itertools
import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaspark.kernels import attention as module
from megaspark.kernels import attention_blocks as blocks_module
from megaspark.kernels import native
from megaspark.kernels.attention import (
    attention,
    attention_sdpa,
    backend_for,
    cases,
    cu_seqlens_of,
    spans,
    spans_from_starts,
    starts_from_cu_seqlens,
)
from megaspark.kernels.cases import Inputs


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal fp64 numbers that bf16 holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def positions_of(*rows: list[int]) -> Tensor:
    """Documents of these lengths -> positions [B, S]."""
    return torch.tensor([[p for length in row for p in range(length)] for row in rows])


def brute_force_sees(positions: list[int], window: int | None) -> list[list[bool]]:
    """Who sees whom, by walking: query m sees back to the last place where the position was 0, and no farther than the window."""
    out = []
    for m in range(len(positions)):
        start = next((n for n in range(m, -1, -1) if positions[n] == 0), 0)
        out.append([start <= n <= m and (window is None or m - n < window) for n in range(len(positions))])
    return out


def plain_attention(q: Tensor, k: Tensor, v: Tensor, sees_BSS: Tensor, scale: float | None = None) -> Tensor:
    """Head h looks into key head h // groups; softmax written out; [B, S, H, D]."""
    groups, scale = q.shape[2] // k.shape[2], scale or 1 / math.sqrt(q.shape[-1])
    heads = []
    for h in range(q.shape[2]):
        scores = (q[:, :, h] @ k[:, :, h // groups].transpose(1, 2) * scale).masked_fill(~sees_BSS, -math.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        heads.append((weights / weights.sum(-1, keepdim=True)) @ v[:, :, h // groups])
    return torch.stack(heads, dim=2)


def run(op, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """[output, gradient of q, of k, of v] in fp64, for an upstream gradient that differs everywhere."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=77).to(dtype)))]


def assert_as_good(found: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    """The error's norm is at most twice that of plain torch, or a rounding of fp32."""
    for mine, plain, right in zip(found, torchs, exact, strict=True):
        assert (mine - right).norm() <= 2 * (plain - right).norm() + 2.0**-22 * right.norm()


# ---- who sees whom


@given(
    st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), st.sampled_from([None, 1, 2, 5, 9, 20])
)  # fmt: skip
def test_spans(starts_BS, window):
    """A document or a window that sees one key too many, the future, or not even itself; ends that do not mirror the starts."""
    rows = [[i for i in range(10) if i in (0, 9) or row[i]] for row in starts_BS]
    positions = positions_of(*([b - a for a, b in itertools.pairwise(row)] for row in rows))
    made = spans(positions, 9, window, torch.float32, backend="sdpa")
    sees = torch.tensor([brute_force_sees(row, window) for row in positions.tolist()])
    assert torch.equal(made.mask_B1SS[:, 0] == 0, sees) and (made.mask_B1SS[:, 0][~sees] == -math.inf).all()
    for b in range(len(positions)):
        for i in range(9):
            assert sees[b, i].nonzero()[[0, -1], 0].tolist() == [made.start_BS[b, i], i]
            assert sees[b, :, i].nonzero()[[0, -1], 0].tolist() == [i, made.end_BS[b, i] - 1]


def test_spans_are_left_out_where_nothing_is():
    """Plain causal attention would read and compare spans for nothing; a mask would be made that nobody reads."""
    assert spans(None, 8, None, torch.float32) is None
    assert spans(None, 8, 8, torch.float32) is None and spans(None, 8, 7, torch.float32) is not None
    assert spans(positions_of([3, 5]), 8, None, torch.float32).mask_B1SS is None  # "auto" on a CPU does without
    assert spans(positions_of([3, 5]), 8, None, torch.bfloat16, backend="reference").mask_B1SS.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="sliding window of 0"):
        spans(None, 8, 0, torch.float32)


def test_spans_of_positions_that_begin_in_a_document():
    """A sample that begins inside a document: nothing lies before it to be seen."""
    assert spans(torch.tensor([[4, 5, 0, 1]]), 4, None, torch.float32).start_BS.tolist() == [[0, 0, 2, 2]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_cu_seqlens_there_and_back(lengths):
    """Packed callers give bounds of documents, and flash-attn takes them: off by one, a document sees its neighbour."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    starts = starts_from_cu_seqlens(bounds, sum(lengths))
    assert starts.dtype == torch.int32 and starts.tolist() == [[m - p for m, p in enumerate(positions_of(lengths)[0].tolist())]]
    for window in (None, 3):
        found, longest = cu_seqlens_of(spans_from_starts(starts, window, torch.float32), 1)
        assert torch.equal(found, bounds) and longest == max(lengths)
    twice, _ = cu_seqlens_of(spans_from_starts(starts, None, torch.float32), 2)
    assert twice.tolist() == [*bounds.tolist(), *(bounds[1:] + sum(lengths)).tolist()]


# ---- the implementations that run here

MASKS = {
    "causal": (None, None),
    "documents": (positions_of([4, 2, 3], [9]), None),
    "window": (None, 4),
    "window and documents": (positions_of([7, 2], [1, 8]), 3),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference", "blocks", "native"])
def test_attention(mask, heads, kv_heads, backend):
    """Heads paired with the wrong key head (h % K in place of h // groups), a wrong scale, a leak through the mask."""
    positions, window = MASKS[mask]
    places = list(range(9)) if positions is None else None
    sees = torch.tensor([brute_force_sees(row, window) for row in ([places] * 2 if places else positions.tolist())])
    inputs = [normal(2, 9, heads, 16, seed=1), normal(2, 9, kv_heads, 16, seed=2), normal(2, 9, kv_heads, 16, seed=3)]
    for dtype in (torch.float32, torch.bfloat16):
        seen = spans(positions, 9, window, dtype, backend)
        for scale in (None, 0.7):
            exact = run(lambda q, k, v: plain_attention(q, k, v, sees, scale), inputs, torch.float64)  # noqa: B023
            plain = run(lambda q, k, v: plain_attention(q, k, v, sees, scale), inputs, dtype)  # noqa: B023
            found = run(lambda q, k, v: attention(q, k, v, seen, scale=scale, backend=backend), inputs, dtype)  # noqa: B023
            assert_as_good(found, plain, exact)


@given(
    st.integers(1, 40), st.sampled_from([None, 1, 3, 8, 20]), st.lists(st.integers(1, 39), max_size=4), st.integers(1, 9),
    st.integers(1, 9), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_blocks_at_every_edge(S, window, cuts, rows, keys, shared):
    """A block of queries whose keys begin a block too late, or rows at the end of the sequence that no block has."""
    bounds = [0, *sorted({c for c in cuts if c < S}), S]
    positions = positions_of([b - a for a, b in itertools.pairwise(bounds)])
    inputs = [normal(2, S, 4, 8, seed=1), normal(2, S, 2, 8, seed=2), normal(2, S, 2, 8, seed=3)]
    sees = torch.tensor([brute_force_sees(positions[0].tolist(), window)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "ROWS", {4: rows})
        patch.setattr(blocks_module, "KEYS", keys)
        seen = spans(positions if shared else positions.expand(2, S), S, window, torch.float32)
        found = run(lambda q, k, v: attention(q, k, v, seen or seen_all(S), backend="blocks"), inputs, torch.float32)
    exact = run(lambda q, k, v: plain_attention(q, k, v, sees), inputs, torch.float64)
    for mine, right in zip(found, exact, strict=True):
        assert (mine - right).norm() <= 1e-6 * max(1.0, right.norm())  # 40 terms, 2^-24 each


def seen_all(S: int) -> module.Spans:
    return spans_from_starts(torch.zeros((1, S), dtype=torch.int32), None, torch.float32)


def test_blocks_compile_whole():
    """A graph break in every layer, or a fake whose shapes are not the op's."""
    q, k, v = (normal(1, 20, h, 8, seed=h).float().requires_grad_() for h in (2, 1, 1))
    seen = spans(positions_of([12, 8]), 20, None, torch.float32)
    torch.library.opcheck(blocks_module._attend, (q, k, v, seen.start_BS, None))
    found = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v, seen)
    gradients = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, attention(q, k, v, seen))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_skip_what_nobody_sees():
    """Masked pairs that are computed all the same cost as much as those that count."""
    seen = spans(positions_of([512, 512, 1024]), 2048, None, torch.bfloat16)
    pairs = sum((m.stop - m.start) * (n.stop - n.start) for _, m, n, _ in blocks_module._blocks(seen.start_BS, 1, torch.bfloat16))
    # Of 2,048^2 pairs in a mask: rows of 256 with the keys of their document up to their own last.
    assert pairs == 256**2 * (1 + 2 + 1 + 2 + 1 + 2 + 3 + 4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_the_same():
    """FlexAttention asks for every pair by itself; its gradients run on GPUs alone, and here a clear word is due."""
    q, k, v = (normal(2, 200, h, 16, seed=h).float() for h in (4, 2, 2))
    for positions, window in [(None, None), (None, 30), (positions_of([100, 3, 97], [1, 199]), 50)]:
        seen = spans(positions, 200, window, torch.float32, backend="flex")
        assert (seen is None) == (window is None) and (seen is None or seen.block_mask is not None)
        assert (attention(q, k, v, seen, backend="flex") - attention_sdpa(q, k, v, seen)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="'flex' has no gradients on a CPU"):
        attention(q.requires_grad_(), k, v, backend="flex")


# ---- which one runs


def test_auto(monkeypatch):
    """A slow path taken silently, or a kernel asked for what it cannot do."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for dtype, head_dim, name in [(torch.bfloat16, 64, "native"), (torch.float32, 256, "native"), (torch.float32, 257, None)]:
        assert backend_for(cpu, dtype, head_dim, 64, spanned=False) == (name or "reference")
    assert backend_for(cpu, torch.float64, 64, 64, spanned=True) == "blocks"
    assert spans(positions_of([3, 5]), 8, None, torch.bfloat16).mask_B1SS is None
    monkeypatch.setattr(native, "available", lambda: False)
    for seq, spanned, dtype, name in [
        (2048, False, torch.bfloat16, "reference"), (2048, True, torch.bfloat16, "blocks"),
        (512, True, torch.bfloat16, "reference"), (64, True, torch.float32, "blocks"),
    ]:  # fmt: skip
        assert backend_for(cpu, dtype, 64, seq, spanned) == name
    assert spans(positions_of([3, 5]), 8, None, torch.bfloat16).mask_B1SS is not None  # which needs a mask, made once
    for head_dim, name in {64: "triton", 80: "triton", 104: "triton", 128: "triton", 100: "sdpa", 136: "sdpa", 256: "sdpa"}.items():
        for dtype in (torch.bfloat16, torch.float16):
            assert backend_for(gpu, dtype, head_dim, 64, spanned=True) == name, (head_dim, dtype)
        assert backend_for(gpu, torch.float32, head_dim, 64, spanned=True) == "sdpa"


def test_what_cannot_run_says_so():
    """An import error out of a package that nobody chose by that name, or a misspelt backend that is taken for another."""
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="no backend 'flash'; it has auto, triton, triton_fused, sdpa, flex, flash_attn"):
        attention(q, q, q, backend="flash")
    if not _installed("flash_attn"):
        with pytest.raises(ValueError, match="'flash_attn' needs the flash-attn package, which is not installed"):
            attention(q, q, q, backend="flash_attn")


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


# ---- cases


def test_cases_count_the_pairs_that_see_each_other():
    """FLOPs of a full square where half of it is masked would show twice the speed."""
    case = module._case("small", 2, 40, 6, 3, 16, window=7, documents=(5, 20, 3))
    arguments = case.make(Inputs("cpu", torch.bfloat16))
    pairs = 6 * int((arguments["spans"].end_BS - torch.arange(40)).sum())
    assert case.forward_flops == 2 * (2 * 16 * pairs) and case.backward_flops == 5 * (2 * 16 * pairs)
    q, k, v = (2 * arguments[f"{name}"].numel() for name in ("q_BSHD", "k_BSKD", "v_BSKD"))
    lse = 4 * 2 * 40 * 6
    assert case.forward_bytes == q + k + v + q + lse  # o is as large as q
    assert case.backward_bytes == (q + k + v) + (q + q + lse) + (q + k + v)
    assert {case.name for case in cases()} >= {"Litespark 3B", "Litespark 30B", "head dim 64", "head dim 80"}
    for case in cases():
        shapes = case.make(Inputs("meta", torch.bfloat16, empty=True))
        assert shapes["q_BSHD"].shape[2] % shapes["k_BSKD"].shape[2] == 0
