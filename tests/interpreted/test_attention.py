"""attention as Triton computes it: fused and split backward, documents, windows, shared key heads, ragged lengths.

Planted bugs that these tests caught, each alone. Masks, in all three kernels: one key too few or too many at the diagonal or the
start; blocks of keys skipped or taken for seen by all, at the first, the last, the diagonal; the blocks before the diagonal that
hold a start left out; the last queries that see a key left out; the spans of sequence 0 used for all, or a shared row read with a
stride. Addresses: query head h with key head h % K, in the forward and in dQ; only the first head of a group in dK, or its lse
for all; the padding of D or S read; a view's strides taken for dense ones, its alignment or unit stride not looked at. Forward:
old sums or old values not faded, values not divided, the scale left out of the peak, lse without its logarithm or unwritten
beyond the last tile. Backward: delta forgotten in either kernel, or summed in bf16; the scale missing in dK, dQ or fused dQ;
P of masked pairs in dV; fused dQ added to what lay there. Spans: a window of one token more or less; end[n] one too small. The
caller's scale, or the choice of the fused backward, ignored.
"""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from interpreted.numerics import DTYPES, check, normal, results
from megaspark.kernels import attention as module
from megaspark.kernels import flash_backward, flash_forward
from megaspark.kernels.attention import Spans, attention, attention_sdpa, spans

TALL = {"forward": (32, 16), "keys": (16, 32), "keys_fused": (16, 32), "queries": (32, 16)}  # (BM, BN)
WIDE = {"forward": (16, 32), "keys": (32, 16), "keys_fused": (32, 16), "queries": (16, 32)}
NO_SHRINKING = (Phase.explicit, Phase.generate)  # which takes minutes here, and the examples are small
FEW = 4.0  # in place of 2: of a few sums of a few terms torch rounds some by chance hardly at all


def use_blocks(patch: pytest.MonkeyPatch, sides: dict[str, tuple[int, int]]) -> None:
    """Small blocks, so that edges are near."""
    for configs in (flash_forward.CONFIGS, flash_backward.CONFIGS):
        for key in configs:
            BM, BN = sides[key[0]]
            patch.setitem(configs, key, [{"BM": BM, "BN": BN, "num_warps": 4, "num_stages": 1}])


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, TALL)
        yield


def positions_of(*rows: list[int]) -> Tensor:
    """Documents of these lengths -> positions [B, S]."""
    return torch.tensor([[p for length in row for p in range(length)] for row in rows])


def heads(B: int, S: int, H: int, K: int, D: int) -> dict[str, Tensor]:
    q, k, v = normal(B, S, H, D, seed=1), normal(B, S, K, D, seed=2), normal(B, S, K, D, seed=3)
    return {"q_BSHD": q, "k_BSKD": k, "v_BSKD": v}


def fused(**arguments: Any) -> Tensor:
    return attention(**arguments, backend="triton_fused")


CASES = {
    "causal": (heads(2, 33, 4, 2, 64), None),
    "wide group": (heads(1, 17, 6, 1, 24), None),
    "head dim 104, documents": (heads(2, 49, 1, 1, 104), spans(positions_of([20, 1, 28], [45, 4]), 49, None, torch.float32)),
    "head dim 80, window": (heads(1, 50, 2, 1, 80), spans(None, 50, 20, torch.float32)),
    "head dim 128, window and documents": (heads(1, 52, 2, 1, 128), spans(positions_of([35, 17]), 52, 21, torch.float32)),
    "one token": (heads(1, 1, 1, 1, 8), None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention(name, dtype):
    """Any of the bugs above. "auto" must be Triton here, or nothing of this is tested."""
    inputs, seen = CASES[name]
    check(attention, attention_sdpa, dtype, **inputs, spans=seen)
    assert module._auto(**{key: x.to(dtype) for key, x in inputs.items()}) == "triton"


@pytest.mark.parametrize(
    "name, dtype", [("causal", torch.bfloat16), ("head dim 104, documents", torch.float16), ("wide group", torch.float32)]
)
def test_fused_backward(name, dtype):
    """A part of dQ that is lost, added twice, rounded before the sum, or added to what lay there before."""
    inputs, seen = CASES[name]
    check(fused, attention_sdpa, dtype, **inputs, spans=seen)


@st.composite
def packed(draw: st.DrawFn) -> tuple[int, int | None, Tensor | None]:
    """(length, window, positions of one or two rows): lengths at and around multiples of blocks."""
    S = draw(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65]))
    window = draw(st.sampled_from([None, None, 2, 15, 16, 17, 40]))
    if draw(st.booleans()):
        return S, window, None
    cuts = draw(st.lists(st.lists(st.integers(1, S), max_size=4), min_size=1, max_size=2))
    bounds = [[0, *sorted({c for c in row if c < S}), S] for row in cuts]
    return S, window, positions_of(*([b - a for a, b in itertools.pairwise(row)] for row in bounds))


@given(packed(), st.sampled_from([TALL, WIDE]), st.sampled_from([(2, 1), (1, 1)]), st.sampled_from([attention, attention, fused]))
@example((33, None, None), WIDE, (1, 1), attention)  # the backward's last block reaches beyond the forward's
@settings(max_examples=12, deadline=None, phases=NO_SHRINKING)
def test_sizes(batch, sides, grouping, op):
    """An edge that only shows where a document, the window or the sequence ends on a block, or one before or after."""
    S, window, positions = batch
    B = 1 if positions is None else len(positions)
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, sides)
        check(op, attention_sdpa, torch.float32, FEW, **heads(B, S, *grouping, 8), spans=spans(positions, S, window, torch.float32))


@pytest.mark.long
@given(packed(), st.sampled_from([TALL, WIDE]), st.sampled_from([(2, 1), (3, 3), (6, 2)]), st.sampled_from([8, 24, 104]))
@settings(max_examples=40, deadline=None, phases=NO_SHRINKING)
def test_many_sizes(batch, sides, grouping, D):
    """The same at length, in both forms of the backward."""
    S, window, positions = batch
    B = 1 if positions is None else len(positions)
    seen = spans(positions, S, window, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        use_blocks(patch, sides)
        for op in (attention, fused):
            check(op, attention_sdpa, torch.float32, FEW, **heads(B, S, *grouping, D), spans=seen)


@pytest.mark.parametrize("op", [attention, fused])
def test_a_window_of_one_token_copies_values(op):
    """Every query sees itself, whatever else is masked: o = v, and no gradient for q and k but rounding."""
    inputs = heads(1, 35, 2, 2, 16)
    found = results(op, torch.float32, {**inputs, "spans": spans(None, 35, 1, torch.float32)})
    assert torch.equal(found["output 0"], inputs["v_BSKD"].float())
    assert found["gradient of q_BSHD"].abs().max() <= 1e-5 and found["gradient of k_BSKD"].abs().max() <= 1e-5


def test_scale_is_the_callers():
    """1/sqrt(D) assumed somewhere, or a gradient that forgets the factor."""
    for op in (attention, fused):
        check(op, attention_sdpa, torch.float32, **heads(1, 20, 2, 1, 24), scale=1.7)


@pytest.mark.filterwarnings("ignore:overflow")  # of pairs that the mask then takes out
def test_large_scores_do_not_overflow():
    """exp of a score of 1,000 is infinite unless the largest is taken off first."""
    inputs = {name: 16.0 * x for name, x in heads(1, 20, 1, 1, 24).items()}
    check(attention, attention_sdpa, torch.float32, factor=8.0, **inputs)  # another order of rounding scores of 4,000


def packed_views(S: int) -> list[Tensor]:
    """q, k, v of one projection [1, S, (4 + 2 + 2) x 16]."""
    qkv = normal(1, S, 8, 16, seed=5).float()
    return [qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]]


VIEWS = {
    "packed projection": packed_views,
    "heads before tokens": lambda S: [normal(1, h, S, 16, seed=h).float().transpose(1, 2) for h in (4, 2, 2)],
    "no unit stride": lambda S: [normal(1, S, h, 32, seed=h).float()[..., ::2] for h in (4, 2, 2)],
    "odd strides": lambda S: [normal(1, S, h, 17, seed=h).float()[..., :16] for h in (4, 2, 2)],
    "not aligned": lambda S: [normal(1, S, h, 20, seed=h).float()[..., 1:17] for h in (4, 2, 2)],
    "expanded": lambda S: [normal(1, S, 1, 16, seed=h).float().expand(1, S, h, 16) for h in (4, 2, 2)],
}


@pytest.mark.parametrize("name, backend", [*((view, "triton") for view in VIEWS), ("packed projection", "triton_fused")])
def test_views(name, backend):
    """Strides that a descriptor cannot hold, or that a kernel takes for dense ones: the bits must be those of copies."""
    views = VIEWS[name](20)
    found, expected = [], []
    for out, make in ((found, lambda x: x), (expected, lambda x: x.contiguous())):
        leaves = [x.detach().requires_grad_() for x in views]
        o = attention(*map(make, leaves), backend=backend)
        upstream = make(normal(1, 4, 20, 16, seed=9).float().transpose(1, 2))  # of a view, too
        out += [o, *torch.autograd.grad(o, leaves, upstream)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def dots(monkeypatch: pytest.MonkeyPatch, call: Any) -> int:
    """How many matrix products the interpreter runs in a call."""
    from triton.runtime.interpreter import InterpreterBuilder

    count, multiply = [0], InterpreterBuilder.create_dot

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return multiply(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", counted)
        call()
    return count[0]


def blocks_seen(start_S: list[int], rows: int, columns: int) -> int:
    """Blocks of [queries, keys] with a pair that sees each other, one by one."""
    return len({(m // rows, n // columns) for m, start in enumerate(start_S) for n in range(start, m + 1)})


@pytest.mark.parametrize("sides", [TALL, WIDE], ids=["tall", "wide"])
@pytest.mark.parametrize("window, lengths", [(None, [96]), (None, [32, 64]), (None, [5, 28, 1, 62]), (20, [96]), (30, [70, 26])])
def test_blocks_that_nobody_sees_are_skipped(monkeypatch, sides, window, lengths):
    """Masked but computed blocks give the right numbers at several times the FLOPs."""
    use_blocks(monkeypatch, sides)
    seen = spans(positions_of(lengths), 96, window, torch.float32)
    counts = {kernel: blocks_seen(seen.start_BS[0].tolist(), *side) for kernel, side in sides.items()}
    q, k, v = (x.float().requires_grad_() for x in heads(1, 96, 1, 1, 16).values())
    products = {"triton": 4 * counts["keys"] + 3 * counts["queries"], "triton_fused": 5 * counts["keys_fused"]}
    for backend, backward in products.items():
        assert dots(monkeypatch, lambda: attention(q, k, v, seen, backend=backend)) == 2 * counts["forward"]  # noqa: B023
        o = attention(q, k, v, seen, backend=backend)
        assert dots(monkeypatch, lambda: o.sum().backward()) == backward  # noqa: B023
    if lengths == [32, 64]:  # 2,608 pairs of 4,656 are left
        assert counts["forward"] <= 0.7 * blocks_seen([0] * 96, *sides["forward"])


def test_one_row_of_spans_serves_every_sequence():
    """A batch stride where all sequences share their spans reads the row's end, and what lies after it."""
    inputs = heads(2, 20, 2, 1, 16)
    made = spans(None, 20, 7, torch.float32)
    assert len(made.start_BS) == 1
    plain = torch.zeros(1, 20, dtype=torch.int32), torch.full((1, 20), 20, dtype=torch.int32)
    shared = Spans(*(torch.cat([row, next_row])[:1] for row, next_row in zip(made[:2], plain, strict=True)))
    each = Spans(*(x.expand(2, 20).contiguous() for x in made[:2]))
    for op in (attention, fused):
        one, other = (results(op, torch.float32, {**inputs, "spans": s}) for s in (shared, each))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_compiles_whole_and_registers_right():
    """A graph break in every layer, a fake with other shapes or strides than the op, a gradient that autograd is not told of."""
    q, k, v = (x.float().requires_grad_() for x in heads(1, 20, 2, 1, 16).values())
    seen = spans(positions_of([12, 8]), 20, None, torch.float32)
    for fused_backward in (False, True):
        torch.library.opcheck(module._flash, (q, k, v, seen.start_BS, seen.end_BS, 0.25, fused_backward))
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found, expected = whole(q, k, v, seen), attention(q, k, v, seen)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_triton_cannot_do_is_refused_and_auto_does_it_otherwise():
    """A head dim that no tile fits would be read beside its head."""
    q = torch.randn(1, 5, 2, 12)
    with pytest.raises(ValueError, match=r"steps of 8.*not 12.*use backend auto or sdpa"):
        attention(q, q, q, backend="triton")
    assert torch.equal(attention(q, q, q), attention_sdpa(q, q, q))
