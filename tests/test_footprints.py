"""The memory formula against what real engines hold, byte for byte where it can be, and against what a plan must get right.

This file is also what the processes run: `python test_footprints.py CASES RESULTS`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megaspark.flops import Shape, parameters
from megaspark.footprints import LOGITS_BYTES, block_bytes, footprint
from megaspark.workloads import Workload, Zero

S30B = Shape(layers=60, hidden=6656, heads=64, kv_heads=64, head_dim=104, ffn=17920, vocab=32000)
WHOLE = Workload(S30B, tied=False, world=8, seq=4096, micro_batch=1, accumulation=1)
# 54.5 M weights, and sizes that are no powers of two; buckets small enough not to hide an error in the rest.
LARGE = Shape(layers=12, hidden=640, heads=10, kv_heads=2, head_dim=64, ffn=1792, vocab=1100)
SMALL = Shape(layers=2, hidden=33, heads=4, kv_heads=2, head_dim=8, ffn=41, vocab=131)
WORLD, SEQ, MICRO_BATCH, ACCUMULATION = 2, 24, 2, 2


# ---- in the processes


def worker(cases_file: Path, results_file: Path) -> None:
    """Measures every case of a JSON file in turn; the first process writes down what it held."""
    from megaspark.accelerators import settle_accelerator
    from megaspark.ranks import Ranks

    settle_accelerator()
    ranks = Ranks.from_environment()
    results = {case["name"]: measure(case, ranks) for case in json.loads(cases_file.read_text())}
    if ranks.first:
        results_file.write_text(json.dumps(results))


def measure(case: dict[str, Any], ranks: Any) -> dict[str, int]:
    """Bytes of all tensors alive: between two steps, while the optimizer steps, and the most at the end of a backward pass."""
    from megaspark.batches import Batch
    from megaspark.config import check_run, load_config
    from megaspark.engine import Engine

    config, tree = load_config(case["config"], case["overrides"])
    checked = check_run(config, tree, ranks.world)
    before = live_bytes()
    engine = Engine(checked, ranks)
    out = {"stepping": 0, "reduced": 0, "resting": 0}

    def watch(owner: Any, method: str, key: str, first: bool) -> None:
        plain = getattr(owner, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            if first:
                out[key] = max(out[key], live_bytes() - before)
            result = plain(*arguments, **named)
            if not first:
                out[key] = max(out[key], live_bytes() - before)
            return result

        setattr(owner, method, watched)

    watch(getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer), "step", "stepping", first=True)
    watch(engine.deepspeed, "backward", "reduced", first=False)
    for _ in range(2):
        tokens = torch.randint(0, config.model.vocab, (ACCUMULATION, MICRO_BATCH, SEQ + 1))
        engine.step([Batch(t[:, :-1].contiguous(), t[:, 1:].contiguous(), None) for t in tokens], 1e-3)
    out["resting"] = live_bytes() - before
    engine.deepspeed.destroy()
    return out


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows of, and of their gradients."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# ---- the tests


def model_overrides(shape: Shape) -> list[str]:
    return [f"model.{name}={value}" for name, value in vars(shape).items()]


def check_against_engines(launch: Any, data: Any, folder: Path, shape: Shape) -> dict[str, dict[str, float]]:
    """Builds an engine of every stage and precision on two processes; returns measured / formula for each."""
    from conftest import tiny_run

    config, _ = tiny_run(data, folder)
    cases, works = [], {}
    for stage in range(4):
        path = folder / f"zero{stage}.json"
        zero = {"stage": stage, "reduce_bucket_size": 10_000_000, "stage3_max_reuse_distance": 0}
        path.write_text(json.dumps({"zero_optimization": zero}))
        for precision in ("bf16", "fp32"):
            name = f"ZeRO-{stage} {precision}"
            run = [f"run.micro_batch={MICRO_BATCH}", f"run.global_batch={WORLD * MICRO_BATCH * ACCUMULATION}"]
            overrides = [*model_overrides(shape), *run, f"run.precision={precision}", f"deepspeed={path}"]
            cases.append({"name": name, "config": str(config), "overrides": overrides})
            read = Zero.read({"zero_optimization": zero})
            works[name] = Workload(shape, False, WORLD, SEQ, MICRO_BATCH, ACCUMULATION, precision, zero=read)  # type: ignore[arg-type]
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(WORLD, Path(__file__), str(folder / "cases.json"), str(folder / "results.json"), timeout_s=900).checked()
    measured = json.loads((folder / "results.json").read_text())
    ratios = {}
    for name, work in works.items():
        found, zero = footprint(work), work.zero
        bucket = zero.reduce_bucket_size * work.element_bytes if zero.stage == 1 else 0  # 2 has given it back by then
        reduced = found.resting if zero.stage == 3 else found.weights + found.optimizer + found.gradients + bucket
        formula = {"resting": found.resting, "stepping": found.weights + found.optimizer + found.stepping, "reduced": reduced}
        ratios[name] = {key: measured[name][key] / formula[key] for key in formula}
    return ratios


@pytest.mark.long
@pytest.mark.launch
def test_engines_hold_what_the_formula_says(launch, tiny_data, tmp_path):
    """A term forgotten, or counted at another stage: a plan that fits would run out of memory hours into the queue."""
    ratios = check_against_engines(launch, tiny_data, tmp_path, LARGE)
    print(json.dumps(ratios))
    for name, found in ratios.items():
        for key, ratio in found.items():
            assert ratio == pytest.approx(1, abs=1e-3), (name, key)


@pytest.mark.parametrize(
    ("stage", "bytes_a_weight"), [(0, 2 + 2 + 12), (1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, (2 + 2 + 12) / 8)]
)
def test_stages_divide_what_the_paper_says(stage, bytes_a_weight):
    """Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1: 16 bytes a weight, and which of them each stage divides by 8."""
    found = footprint(replace(WHOLE, zero=Zero(stage)))
    held = found.weights + found.gradients + found.optimizer
    assert held == pytest.approx(bytes_a_weight * parameters(S30B), rel=1e-6)


def test_every_way_of_sharing_lessens_memory():
    """A split that the formula forgets would send people to the wrong one; none of them may raise the peak."""
    base = replace(WHOLE, world=64, zero=Zero(1), accumulation=8)
    for change in ({"tensor": 8}, {"pipeline": 4}, {"sequence": 8}, {"recompute": "full"}, {"recompute": "selective"}):
        assert footprint(replace(base, **change)).peak < 0.95 * footprint(base).peak, change
    peaks = [footprint(replace(base, zero=Zero(stage))).peak for stage in (0, 1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    offloaded = footprint(replace(base, zero=Zero(3, offload_optimizer=True)))
    assert offloaded.peak < peaks[3] and offloaded.optimizer == 0 < offloaded.host


def test_first_stage_keeps_the_most_micro_batches():
    """Under 1F1B stage s holds p - s of them: a plan that looks at the last one only promises too little."""
    work = replace(WHOLE, world=4, pipeline=4, accumulation=16, zero=Zero(1))
    from megaspark.footprints import of_stage

    kept = [of_stage(work, stage).activations / work.stage_blocks(stage) for stage in range(4)]
    assert kept == sorted(kept, reverse=True) and kept[0] > 3 * kept[3]
    assert of_stage(replace(work, accumulation=1), 0).activations < kept[0] * work.stage_blocks(0) / 3


def test_logits_chunk_is_that_of_the_kernel():
    """The head's chunk was chosen for speed and may change; the plan must follow."""
    from megaspark.kernels.linear_cross_entropy import CHUNK_BYTES

    assert CHUNK_BYTES["cuda"] == LOGITS_BYTES


def test_defaults_are_deepspeeds():
    """A new DeepSpeed with another default would make every plan wrong in silence."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ours = Zero()
    for stage in range(4):
        theirs = DeepSpeedZeroConfig(stage=stage)
        assert Zero(stage).overlaps == theirs.overlap_comm
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        for said in {name, field.alias or name} & set(vars(ours)):
            if said not in ("stage", "overlap_comm", "offload_optimizer", "offload_param"):
                assert getattr(ours, said) == field.get_default(), said


def test_deepspeed_file_is_read(tmp_path):
    """ "auto" is the default, an offload to none is none, and a size may be written as 5e8."""
    zero = Zero.read({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e8, "offload_optimizer": {"device": "cpu"},
                                            "offload_param": {"device": "none"}, "overlap_comm": "auto"}})  # fmt: skip
    assert zero == Zero(3, reduce_bucket_size=100_000_000, offload_optimizer=True) and zero.overlaps
    assert Zero.read({}) == Zero()


def test_block_bytes_by_hand():
    """3B at 4,096 tokens, a figure that can be checked with a pencil: 45,824 elements and 18 numbers a token."""
    shape = Shape(layers=28, hidden=2048, heads=16, kv_heads=2, head_dim=128, ffn=11008, vocab=32000)
    work = Workload(shape, False, 8, 4096, 1, 1)
    assert block_bytes(work) == 4096 * (2 * 45824 + 4 * 18)
    assert block_bytes(replace(work, recompute="full")) == 4096 * 2 * 2048


if __name__ == "__main__":
    worker(*map(Path, sys.argv[1:3]))
    os._exit(0)  # as a run ends, see train.main
