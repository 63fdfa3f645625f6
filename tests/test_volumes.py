"""The bytes sent: theory against what goes through DeepSpeed's backend in real processes, and sums that a pencil can check.

This file is also what the processes run: `python test_volumes.py CASES RESULTS`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaspark.flops import Shape
from megaspark.volumes import of_stage, ring, volumes
from megaspark.workloads import Workload, Zero

WORLD, SEQ, MICRO_BATCH = 2, 24, 2
SMALL = {"stage3_param_persistence_threshold": 1000}  # between the sizes of its parameters
FILES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "1 by owner": {"stage": 1, "use_multi_rank_bucket_allreduce": False},
    "2": {"stage": 2},
    "2 overlapped, small buckets": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 10_000},
    "3": {"stage": 3, **SMALL},
    "3, nothing kept": {"stage": 3, **SMALL, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
    "3, half kept": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 20_000, "stage3_prefetch_bucket_size": 0,
    },
    "3, whole gradients": {"stage": 3, "reduce_scatter": False, **SMALL},
}  # fmt: skip
LARGEST = 131 * 33  # elements of the largest module: what is kept is kept by modules
EVEN = ["model.hidden=32", "model.ffn=48", "model.kv_heads=1", "model.heads=4", "model.head_dim=8"]  # fewer kv heads than ranks
SPLITS = {
    2: [
        {"tensor": 2}, {"tensor": 2, "recompute": "full"}, {"sequence": 2, "recompute": "selective"}, {"sequence": 2, "stage": 3},
        {"pipeline": 2}, {"pipeline": 2, "tied": "true", "recompute": "full"},
    ],
    4: [{"pipeline": 2, "tensor": 2}, {"tensor": 2, "sequence": 2, "stage": 2}, {"pipeline": 2, "sequence": 2}, {"tensor": 2}],
}  # fmt: skip


# ---- in the processes


def worker(cases_file: Path, results_file: Path) -> None:
    """Counts what the third step of every case sends; the first process writes it down."""
    from megaspark.accelerators import settle_accelerator
    from megaspark.ranks import Ranks

    settle_accelerator()
    ranks = Ranks.from_environment()
    results = {case["name"]: measure(case, ranks) for case in json.loads(cases_file.read_text())}
    if ranks.first:
        results_file.write_text(json.dumps(results))


def measure(case: dict[str, Any], ranks: Any) -> dict[str, dict[str, int]]:
    """Bytes that the first process sends in one step by operation, after two in which DeepSpeed learns the order of modules, and
    theory's.
    """
    import torch

    from megaspark.batches import Batch
    from megaspark.comm_counters import CommCounter
    from megaspark.config import check_run, load_config
    from megaspark.engine import Engine
    from megaspark.plans import workload
    from megaspark.traffic_reports import by_op

    config, tree = load_config(case["config"], case["overrides"])
    checked = check_run(config, tree, ranks.world)
    engine = Engine(checked, ranks)
    tokens = torch.arange(checked.layout.accumulation * MICRO_BATCH * (SEQ + 1)).remainder(config.model.vocab)
    batches = [Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None) for t in tokens.view(-1, MICRO_BATCH, SEQ + 1)]
    counter = CommCounter().start()
    for _ in range(3):
        counter.take()
        engine.step(batches, 1e-3)
    sent = by_op(counter.take())
    counter.stop()
    engine.step(batches, 1e-3)
    assert not counter.take(), "it counts on after its end"
    engine.deepspeed.destroy()
    theory: Counter[str] = Counter()
    for volume in of_stage(workload(config, checked.layout), stage=0):
        theory[volume.op] += volume.sent_bytes
    return {"sent": dict(sent), "theory": dict(theory)}


# ---- the tests


def check(launch: Any, folder: Path, data: Any, world: int, cases: dict[str, list[str]]) -> None:
    """Runs all cases in one launch, and holds what was sent against theory."""
    from conftest import tiny_run

    config, _ = tiny_run(data, folder)
    described = [{"name": name, "config": str(config), "overrides": overrides} for name, overrides in cases.items()]
    (folder / "cases.json").write_text(json.dumps(described))
    launch(world, Path(__file__), str(folder / "cases.json"), str(folder / "results.json"), timeout_s=300).checked()
    for name, found in json.loads((folder / "results.json").read_text()).items():
        sent, theory = found["sent"], found["theory"]
        assert theory and set(theory) <= set(sent), name
        for op, measured in sent.items():
            # Each parameter or group is padded to divide, and a handful of scalars go along (the norm, whether all are finite).
            slack = LARGEST * 3 * 4 if "half" in name else 64
            assert measured == pytest.approx(theory.get(op, 0), rel=5e-3, abs=slack), (name, op)


@pytest.mark.launch
def test_engines_send_what_the_theory_says(launch, tiny_data, tmp_path):
    """A stage that reduces every micro-batch, or gathers twice: on a network that is the difference between fast and idle."""
    cases = {}
    for number, (name, zero) in enumerate(FILES.items()):
        path = tmp_path / f"zero-{number}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        precision, accumulation = ("bf16", "fp32")[number % 2], 1 + number % 3
        run = [f"run.micro_batch={MICRO_BATCH}", f"run.global_batch={WORLD * MICRO_BATCH * accumulation}"]
        cases[name] = [*run, f"run.precision={precision}", f"deepspeed={path}"]
    check(launch, tmp_path, tiny_data, WORLD, cases)


@pytest.mark.launch
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_splits_send_what_the_theory_says(launch, tiny_data, tmp_path, world):
    """A sum, an exchange or a gather that the plan forgets, or that is done again where the backward pass computes again."""
    cases = {}
    for split in SPLITS[world]:
        split = dict(split)
        name, stage = " ".join(f"{k}={v}" for k, v in split.items()), split.pop("stage", 1)
        run = [f"run.micro_batch={MICRO_BATCH}", "run.global_batch=8", f"run.recompute={split.pop('recompute', 'none')}"]
        model = [*EVEN, f"model.tie_embeddings={split.pop('tied', 'false')}"]
        cases[name] = [*run, *model, *(f"parallel.{k}={v}" for k, v in split.items()), f"deepspeed=zero{stage}.json"]
    check(launch, tmp_path, tiny_data, world, cases)


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
    activation, numbers = 4096 * 6656 * 2, 2 * 8 * 4096  # positions and labels go along
    ways = [sum(v.sent_bytes for v in of_stage(pipeline, stage) if v.kind == "pipeline") for stage in range(4)]
    assert ways == [4 * (activation + numbers), *[4 * (2 * activation + numbers)] * 2, 4 * activation]
    for work in (tensor, sequence):
        again = sum(sent(replace(work, recompute="full")).values())
        assert again > sum(sent(work).values())


if __name__ == "__main__":
    worker(*map(Path, sys.argv[1:3]))
    os._exit(0)  # as a run ends, see train.main
