"""Times and splits: sums that a pencil can check, and measurements of others that no bound may exceed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaspark.costs import costs, seconds_of
from megaspark.devices import DEVICES
from megaspark.errors import UserError
from megaspark.flops import Shape
from megaspark.volumes import Volume
from megaspark.workloads import Workload, Zero, split_evenly

S3B = Shape(layers=28, hidden=2048, heads=16, kv_heads=2, head_dim=128, ffn=11008, vocab=32000)
S30B = Shape(layers=60, hidden=6656, heads=64, kv_heads=64, head_dim=104, ffn=17920, vocab=32000)
H200 = DEVICES["h200"]


@pytest.mark.parametrize(
    ("shape", "gpus", "tokens_per_s"),
    [
        (S3B, 8, 439_645), (S3B, 16, 862_900), (S3B, 128, 1_387_342), (S3B, 256, 964_981),
        (S30B, 256, 471_486), (S30B, 512, 508_261),
    ],
)  # fmt: skip
def test_no_published_step_beats_the_bound(shape, gpus, tokens_per_s):
    """Litespark's own results (arXiv 2510.02483, table 2), ZeRO-1 and 256 samples of 4,096: a bound above a measurement is none."""
    work = Workload(shape, False, gpus, 4096, max(1, 256 // gpus), 1, zero=Zero(1, overlap_comm=True))
    if gpus == 512:  # more GPUs than samples
        work = replace(work, tensor=2)
    assert work.step_tokens == 256 * 4096
    assert costs(work, H200).bound_s < work.step_tokens / tokens_per_s


def test_bound_is_work_over_peak_where_nothing_is_sent():
    """A factor lost here is a factor in every plan."""
    work = Workload(S3B, False, 1, 4096, 2, 3)
    flops = 3 * 2 * 4096 * (6 * (28 * S3B.block_matmul_parameters + 32000 * 2048) + 6 * 28 * 16 * 128 * 4097)
    assert costs(work, H200).bound_s == pytest.approx(flops / 989e12, rel=1e-12)
    forward = (flops - 3 * 2 * 4096 * 6 * 32000 * 2048) / 3
    assert costs(replace(work, recompute="full"), H200).bound_s == pytest.approx((flops + forward) / 989e12, rel=1e-12)


def test_bubble():
    """(p - 1) / (m + p - 1), and the same from stages that are busy for m of m + p - 1 slots."""
    work = Workload(S3B, False, 4, 4096, 1, 8, pipeline=4, zero=Zero(1))
    assert work.bubble == 3 / 11  # of 11 turns each of the four stages works in 8
    assert replace(work, pipeline=1).bubble == 0
    assert costs(work, H200).compute_s >= work.step_flops / 4 / 989e12 / (1 - 3 / 11)


def test_links():
    """NVLink inside a node; between nodes a ring of 8 ranks a node goes over 8 adapters, of 1 over one; the host over PCIe."""

    def seconds(group: int, neighbours: int, op: str = "all_reduce") -> float:
        return seconds_of(Volume("", op, 10**12, group, neighbours, True), H200)

    assert seconds(8, 8) == pytest.approx(1e12 / 450e9)
    assert seconds(64, 8) == pytest.approx(1e12 / 400e9)
    assert seconds(32, 1) == seconds(2, 1, "send") == pytest.approx(1e12 / 50e9)
    assert seconds(1, 1, "copy") == pytest.approx(1e12 / 64e9)


def test_unknown_precision_is_told():
    """A100s have no 8-bit products: a plan with a peak of None would divide by it."""
    with pytest.raises(UserError, match=r"A100.*fp8"):
        costs(Workload(S3B, False, 8, 4096, 1, 1, "fp8"), DEVICES["a100"])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_split_is_the_best_there_is(weights, parts):
    """Against all ways to cut: a stage heavier than need be makes every other one wait."""
    if parts > len(weights):
        with pytest.raises(ValueError, match="do not make"):
            split_evenly(tuple(weights), parts)
        return
    cut = split_evenly(tuple(weights), parts)
    assert [first for first, _ in cut] == [0, *(end for _, end in cut[:-1])] and cut[-1][1] == len(weights)
    assert len(cut) == parts and all(first < end for first, end in cut)
    ways = ([0, *inner, len(weights)] for inner in combinations(range(1, len(weights)), parts - 1))
    best = min(max(sum(weights[a:b]) for a, b in pairwise(way)) for way in ways)
    assert max(sum(weights[a:b]) for a, b in cut) == best
