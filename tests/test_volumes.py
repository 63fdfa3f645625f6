"""The bytes sent: theory against what goes through DeepSpeed's backend in real processes, and sums that a pencil can check.

This file is also what the processes run: `python test_volumes.py CASES RESULTS`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaspark.flops import Shape
from megaspark.volumes import ring, volumes
from megaspark.workloads import Workload, Zero

# Hardly anything of it divides by two, so that partitions are padded; the threshold lies between its parameters' sizes.
SHAPE = Shape(layers=2, hidden=33, heads=4, kv_heads=2, head_dim=8, ffn=41, vocab=131)
WORLD, SEQ, MICRO_BATCH = 2, 24, 2
THRESHOLD = 1000
FILES = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "1 by owner": {"stage": 1, "use_multi_rank_bucket_allreduce": False},
    "2": {"stage": 2},
    "2 overlapped, small buckets": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000},
    "3": {"stage": 3, "stage3_param_persistence_threshold": THRESHOLD},
    "3, nothing kept": {
        "stage": 3, "stage3_param_persistence_threshold": THRESHOLD, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    "3, half kept": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 20_000, "stage3_prefetch_bucket_size": 0,
    },
    "3 whole gradients": {"stage": 3, "reduce_scatter": False, "stage3_param_persistence_threshold": THRESHOLD},
}  # fmt: skip
LARGEST = 131 * 33  # elements of the largest module: what is kept is kept by modules


# ---- in the processes


def worker(cases_file: Path, results_file: Path) -> None:
    """Counts what the third step of every case sends; the first process writes it down."""
    from megaspark.engine import settle_accelerator
    from megaspark.ranks import Ranks

    settle_accelerator()
    ranks = Ranks.from_environment()
    results = {case["name"]: measure(case, ranks) for case in json.loads(cases_file.read_text())}
    if ranks.first:
        results_file.write_text(json.dumps(results))


def measure(case: dict[str, Any], ranks: Any) -> dict[str, int]:
    """Bytes sent in one step by operation, after two in which DeepSpeed learns the order of modules."""
    import torch

    from megaspark.batches import Batch
    from megaspark.comm_counters import CommCounter
    from megaspark.config import check_run, load_config
    from megaspark.engine import Engine

    config, tree = load_config(case["config"], case["overrides"])
    checked = check_run(config, tree, ranks.world)
    engine = Engine(checked, ranks)
    counter = CommCounter().start()
    for _ in range(3):
        counter.take()
        tokens = torch.randint(0, config.model.vocab, (checked.layout.accumulation, MICRO_BATCH, SEQ + 1))
        engine.step([Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None) for t in tokens], 1e-3)
    counter.stop()
    engine.step([Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None) for t in tokens], 1e-3)
    engine.deepspeed.destroy()
    return {op: sent for (op, _), sent in counter.take().items()}


# ---- the tests


@pytest.mark.launch
def test_engines_send_what_the_theory_says(launch, tiny_data, tmp_path):
    """A stage that reduces every micro-batch, or gathers twice: on a network that is the difference between fast and idle."""
    from conftest import tiny_run

    config, _ = tiny_run(tiny_data, tmp_path)
    cases, works = [], {}
    for number, (name, zero) in enumerate(FILES.items()):
        path = tmp_path / f"zero-{number}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        precision, accumulation = ("bf16", "fp32")[number % 2], 1 + number % 3
        run = [f"run.micro_batch={MICRO_BATCH}", f"run.global_batch={WORLD * MICRO_BATCH * accumulation}"]
        overrides = [*run, f"run.precision={precision}", f"deepspeed={path}"]
        cases.append({"name": name, "config": str(config), "overrides": overrides})
        read = Zero.read({"zero_optimization": zero})
        works[name] = Workload(SHAPE, False, WORLD, SEQ, MICRO_BATCH, accumulation, precision, zero=read)  # type: ignore[arg-type]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch(WORLD, Path(__file__), str(tmp_path / "cases.json"), str(tmp_path / "results.json")).checked()
    measured = json.loads((tmp_path / "results.json").read_text())
    for name, work in works.items():
        theory: dict[str, int] = {}
        for volume in volumes(work):
            theory[volume.op] = theory.get(volume.op, 0) + volume.sent_bytes
        assert set(theory) <= set(measured[name]), name
        for op, sent in measured[name].items():
            # Each parameter or group is padded to divide, and a handful of scalars go along (the norm, whether all are finite).
            slack = LARGEST * work.accumulation * work.element_bytes / WORLD if "half" in name else 64
            assert sent == pytest.approx(theory.get(op, 0), rel=5e-3, abs=slack), (name, op)


LARGE = Workload(Shape(60, 6656, 64, 64, 104, 17920, 32000), False, 64, 4096, 1, 4)


def sent(work: Workload) -> dict[str, int]:
    return {volume.kind: volume.sent_bytes for volume in volumes(work)}


def test_rings():
    """Patarasuk and Yuan 2009: an all-reduce is a reduce-scatter and an all-gather; alone one sends nothing."""
    assert ring("all_reduce", 800, 8) == 2 * ring("all_gather", 800, 8) == 2 * ring("reduce_scatter", 800, 8) == 1400
    assert ring("all_reduce", 800, 1) == ring("all_to_all", 800, 1) == 0


def test_a_single_rank_sends_nothing():
    """A plan for one GPU that waits for a network."""
    for stage in range(4):
        assert volumes(replace(LARGE, world=1, zero=Zero(stage))) == []


def test_stage_2_reduces_every_micro_batch_and_stage_1_once():
    """With accumulation, stage 2 sends as many times the gradients: who plans with one reduction picks the wrong stage."""
    one, two = (sent(replace(LARGE, zero=Zero(stage))) for stage in (1, 2))
    assert two["gradients"] == pytest.approx(4 * one["gradients"], rel=1e-6) and two["weights"] == one["weights"]


def test_zero_plus_plus_sends_what_its_paper_says():
    """Wang et al. 2023 (arXiv 2306.10209), table 1: 3 M between nodes becomes 0.75 M: half, none and a quarter of a gather."""
    plain = replace(LARGE, zero=Zero(3, stage3_max_reuse_distance=0, stage3_param_persistence_threshold=0))
    options = {"zero_hpz_partition_size": 8, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    plus = replace(plain, zero=replace(plain.zero, **options))

    def between_nodes(work: Workload) -> int:
        return sum(volume.sent_bytes for volume in volumes(work) if volume.crosses)

    assert between_nodes(plus) / between_nodes(plain) == pytest.approx(0.75 / 3, rel=1e-3)


def test_tensor_sequence_and_pipeline_by_hand():
    """Four sums a block and micro-batch, two exchanges of q, k, v and the result, and one activation each way."""
    tensor = replace(LARGE, tensor=8, zero=Zero(1))
    assert sent(tensor)["tensor"] == 4 * 60 * 4 * ring("all_reduce", 4096 * 6656 * 2, 8)
    sequence = replace(LARGE, sequence=8, zero=Zero(1))
    assert sent(sequence)["sequence"] == 4 * 60 * 2 * 4 * ring("all_to_all", 512 * 6656 * 2, 8)
    pipeline = replace(LARGE, pipeline=4, zero=Zero(1))
    assert sent(pipeline)["pipeline"] == 4 * (2 * 4096 * 6656 * 2 + 2 * 8 * 4096)
    for work in (tensor, sequence):
        again = sum(sent(replace(work, recompute="full")).values())
        assert again > sum(sent(work).values())


if __name__ == "__main__":
    worker(*map(Path, sys.argv[1:3]))
