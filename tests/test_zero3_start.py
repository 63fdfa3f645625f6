"""Under ZeRO-3 no process may ever hold the whole model, also not at the start: measured on real processes.

This file is also what the processes run: `python test_zero3_start.py CASES RESULTS`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from test_footprints import LARGE, SMALL, model_overrides

from megaspark.flops import Shape, parameters
from megaspark.footprints import footprint
from megaspark.workloads import Workload, Zero

WORLD = 2
ALLOWED = 0.65  # of the model in fp32, for a rank's share and what it needs to get there, holes in its heap included
# Nearly as many weights, 50 million, in two blocks: whoever makes a block whole before he shares it out holds 97 % of the model.
WIDE = Shape(layers=2, hidden=1280, heads=10, kv_heads=2, head_dim=128, ffn=5120, vocab=1100)
SHAPES = {"many blocks": LARGE, "two blocks": WIDE}


# ---- in the processes


def worker(cases_file: Path, results_file: Path) -> None:
    """Builds the engine of a small case, which brings in all code, and of a large one; the first process writes down its peaks."""
    from megaspark.accelerators import settle_accelerator
    from megaspark.ranks import Ranks

    settle_accelerator()
    ranks = Ranks.from_environment()
    small, large = json.loads(cases_file.read_text())
    measure(small, ranks)
    found = measure(large, ranks)
    if ranks.first:
        results_file.write_text(json.dumps(found))
    os._exit(0)  # as a run ends, see train.main


def measure(case: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """Bytes that the largest process held above what it held before, at their most: making the weights, and all of the engine."""
    from megaspark import placements
    from megaspark.config import check_run, load_config
    from megaspark.engine import Engine

    found, place_model = {}, placements.place_model

    def watched(*arguments: Any) -> Any:
        model = place_model(*arguments)
        found["weights"], found["weights_rest"] = resident("VmHWM") - before, resident("VmRSS") - before
        return model

    checked = check_run(*load_config(case["config"], case["overrides"]), ranks.world)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on, see proc(5)
    with patch.object(placements, "place_model", watched):
        engine = Engine(checked, ranks)
    found["engine"], found["engine_rest"] = resident("VmHWM") - before, resident("VmRSS") - before
    held = sum(parameter.ds_tensor.ds_numel for parameter in engine.deepspeed.module.parameters())
    everybody = engine.gather(found)
    engine.deepspeed.destroy()
    return {"held": held, **{key: max(each[key] for each in everybody) for key in found}}


def resident(key: str) -> int:
    """Bytes in memory, now (VmRSS) or at their most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# ---- the tests


def measured(launch: Any, data: Any, folder: Path, shape: Shape, precision: str) -> dict[str, float]:
    """What processes of their own found: freed memory stays with a process, and would hide what the next one takes."""
    from conftest import tiny_run

    config, _ = tiny_run(data, folder)
    base = ["run.micro_batch=1", f"run.global_batch={WORLD}", "deepspeed=zero3.json", f"run.precision={precision}"]
    cases = [{"config": str(config), "overrides": [*base, *model_overrides(each)]} for each in (SMALL, shape)]
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(WORLD, Path(__file__), str(folder / "cases.json"), str(folder / "results.json"), timeout_s=600).checked()
    return json.loads((folder / "results.json").read_text())


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", SHAPES)
def test_no_process_holds_all_weights_while_they_are_made(launch, tiny_data, tmp_path, kind, precision):
    """A model made whole and then cut up needs all of the host's memory, times its processes, before the first step."""
    shape, element = SHAPES[kind], 2 if precision == "bf16" else 4
    found, count = measured(launch, tiny_data, tmp_path, shape, precision), parameters(shape)
    model = 4 * count
    # This rank's share, and one parameter whole: as it is drawn in fp32, and in the run's precision beside it.
    whole = max(shape.vocab, shape.ffn) * shape.hidden * (4 if element == 4 else 4 + element)
    reckoned = element * count / WORLD + whole
    work = Workload(shape, False, WORLD, 24, 1, 1, precision, zero=Zero(3))
    formula = footprint(work)
    # DeepSpeed takes a step with zeros at its start: the gradients are there, and in fp32 those that are stepped.
    states = formula.weights + formula.optimizer + formula.gradients + 4 * count / WORLD
    print(f"{kind} {precision}: {count:,} weights; of the {model / 1e6:,.0f} MB in fp32 a rank held at its peak, and then,")
    for part, reckoning in {"weights": reckoned, "engine": states}.items():
        peak, rest = found[part] / model, found[f"{part}_rest"] / model
        print(f"  {part}: {peak:.3f}, {rest:.3f} (formula: {reckoning / model:.3f})")
    assert found["held"] == pytest.approx(count / WORLD, rel=1e-3)
    assert found["weights"] < ALLOWED * model


if __name__ == "__main__":
    worker(*map(Path, sys.argv[1:3]))
