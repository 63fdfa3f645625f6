"""The engine in real processes, with faults put into one process's loss or gradient: all refuse the step, and nothing changes.

This file is also what the processes run: `python test_refused_steps.py CASES RESULTS`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

STAGES, PRECISIONS = range(4), ("fp32", "bf16")
WORLDS = (pytest.param(1, marks=pytest.mark.long), 2)
STEPS = 8
FAULTS = {1: "loss nan", 3: "gradient nan", 4: "spike", 6: "gradient inf"}  # by step; two of them in a row
GOOD = [step for step in range(STEPS) if step not in FAULTS]
# Adam on the CPU with the state of ZeRO-2 there: the optimizer is then stepped in another way, after the same question.
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


# ---- in the processes


def worker(cases_file: Path, results_file: Path) -> None:
    """Runs every case in turn, in all processes; the first writes down what each of them saw."""
    from megaspark.accelerators import settle_accelerator
    from megaspark.ranks import Ranks

    settle_accelerator()
    ranks = Ranks.from_environment()
    results = {case["name"]: run_case(case, ranks) for case in json.loads(cases_file.read_text())}
    if ranks.first:
        results_file.write_text(json.dumps(results))


def run_case(case: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """Trains over the data of the steps in `order`, with what `FAULTS` has for them; what all processes saw."""
    from test_engine import batches_of, counted_steps, loss_of

    from megaspark.config import check_run, load_config
    from megaspark.engine import Engine

    config, tree = load_config(case["config"], case["overrides"])
    checked = check_run(config, tree, ranks.world)
    engine = Engine(checked, ranks)
    train, held_out, _ = batches_of(checked, ranks)
    batch, healthy = config.run.global_batch, engine._loss
    results, bits = [], []
    for step in case["order"]:
        faulty = step in FAULTS and ranks.rank == ranks.world - 1
        engine._loss = broken(healthy, FAULTS[step], checked.layout.accumulation) if faulty else healthy
        before = state_bits(engine)
        result = engine.step(train.step(step * batch, batch), 1e-2, lambda: [1.0], refuse_spikes)
        bits.append((before, state_bits(engine)))
        results.append(result)
    engine._loss = healthy
    out = {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "refused": engine.gather([result.refused for result in results]),
        "asked": [result.asked for result in results],
        "own_losses": engine.gather([list(result.own_losses) for result in results]),
        "unchanged": [all(engine.gather(before == after)) for before, after in bits],
        "held_out": loss_of(engine, held_out),
        "state": engine.gather(state_bits(engine)),
        "counted_steps": sorted(set(counted_steps(engine))),
    }
    engine.deepspeed.destroy()
    return json.loads(json.dumps(out).replace("NaN", '"nan"').replace("Infinity", '"inf"'))


def refuse_spikes(loss: float, norm: float) -> str | None:
    """Judges without a memory: no step of these runs has a loss of 100."""
    from megaspark.bad_steps import not_finite

    return not_finite(loss, norm) or ("spike" if loss > 100 else None)


class Spoil(torch.autograd.Function):
    """The number itself; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def broken(loss_of: Any, fault: str, count: int) -> Any:
    """`loss_of` with a fault in the last of `count` micro-batches."""
    seen = 0

    def loss(batch: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        found = loss_of(batch)
        if seen < count:
            return found
        factors = {"gradient nan": math.nan, "gradient inf": math.inf}
        return Spoil.apply(found, factors[fault]) if fault in factors else found * (math.nan if fault == "loss nan" else 1e4)

    return loss


def state_bits(engine: Any) -> str:
    """A digest of all that this process holds: masters, moments, counts, and the weights that it computes with."""
    from test_engine import counted_steps

    from megaspark.fragments import STATE, fragments

    held = {fragment.name: fragment for fragment in fragments(engine.deepspeed)}
    tensors = [fragment.tensors[kind] for fragment in held.values() for kind in STATE]
    for name, parameter in engine.deepspeed.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):  # a part, padded on the last process with what happened to be there
            tensors.append(parameter.ds_tensor.view(-1)[: held[name].length])
        else:
            tensors.append(parameter.view(-1))
    digest = hashlib.sha256(str(list(counted_steps(engine))).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- the launches


@pytest.fixture(scope="module")
def results_in(launch, tiny_data, tmp_path_factory) -> Callable[[int], dict[str, dict[str, Any]]]:
    """By number of processes, in one launch for all: under "stage precision faults" a run with all faults, under
    "stage precision without" one that never met those steps' data."""
    from conftest import tiny_run

    folder = tmp_path_factory.mktemp("refused")
    config = str(tiny_run(tiny_data, folder)[0])
    offload = {**json.loads((Path(__file__).parent.parent / "ds_configs/zero2.json").read_text()), "zero_optimization": OFFLOAD}
    (folder / "offload.json").write_text(json.dumps({**offload, "zero_force_ds_cpu_optimizer": False}))
    layouts = [(str(stage), precision, f"zero{stage}.json") for stage in STAGES for precision in PRECISIONS]
    cases = []
    for name, precision, file in [*layouts, ("offload", "bf16", str(folder / "offload.json"))]:
        base = {"config": config, "overrides": [f"deepspeed={file}", f"run.precision={precision}"]}
        cases.append({**base, "name": f"{name} {precision} faults", "order": list(range(STEPS))})
        cases.append({**base, "name": f"{name} {precision} without", "order": GOOD})
    (folder / "cases.json").write_text(json.dumps(cases))

    @cache
    def results(world: int) -> dict[str, dict[str, Any]]:
        found = folder / f"results{world}.json"
        launch(world, Path(__file__), str(folder / "cases.json"), str(found), timeout_s=300).checked()
        return json.loads(found.read_text())

    return results


LAYOUTS = [f"{stage} {precision}" for stage in STAGES for precision in PRECISIONS] + ["offload bf16"]
pytestmark = pytest.mark.launch


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_leaves_no_trace(results_in, layout, world):
    """A step that some processes take, or that moves a moment, a count, or a gradient kept for the next step, shows in the
    bits of the rest of the run, which must be those of a run that never saw these steps' data."""
    found, without = (results_in(world)[f"{layout} {kind}"] for kind in ("faults", "without"))
    for refused in found["refused"]:
        assert [bool(reason) for reason in refused] == [step in FAULTS for step in range(STEPS)]
    assert found["unchanged"] == [step in FAULTS for step in range(STEPS)]  # True elsewhere: nothing was looked at
    assert [found["losses"][step] for step in GOOD] == without["losses"]
    assert [found["norms"][step] for step in GOOD] == without["norms"]
    assert found["state"] == without["state"] and found["held_out"] == without["held_out"]
    assert found["counted_steps"] == [len(GOOD)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_said_of_a_bad_step(results_in, layout, world):
    """The reason must be the same everywhere, other numbers asked along must come through once, and the process that had the
    fault must be able to name the micro-batch: the last of its own."""
    found = results_in(world)[f"{layout} faults"]
    expected = {"loss nan": "the loss is nan", "spike": "spike"}
    assert found["asked"] == [[float(world)]] * STEPS
    for step, fault in FAULTS.items():
        assert {refused[step] for refused in found["refused"]} == {expected.get(fault, "the gradient is not finite")}
        *healthy, faulty = [losses[step] for losses in found["own_losses"]]
        assert len(faulty) == 4 // world and all(0 < loss < 100 for losses in healthy for loss in losses)
        assert all(0 < loss < 100 for loss in faulty[:-1])
        assert faulty[-1] == "nan" if fault == "loss nan" else (faulty[-1] > 100) == (fault == "spike")


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # as a run ends, see train.main
