"""The engine in real processes: every ZeRO stage and number of processes trains one model, and any takes up where any stopped.

This file is also what the processes run: `python test_engine.py CASES RESULTS` (see `worker`). One launch builds many engines
in turn, so that the seconds that DeepSpeed's import takes are paid once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STAGES, WORLDS, PRECISIONS = range(4), (1, 2), ("fp32", "bf16")
STEPS, SAVED_AT = 6, 3
# A gradient summed in another order is off by some roundings of 2^-24, and Adam passes that on undamped to every step:
# 1.1e-7 was the worst seen. Forgetting the moments or the step shifts losses by 5e-3 (test_what_is_forgotten_is_seen).
FP32_TOLERANCE = 1e-6
# In bf16 a weight's last bit is 4e-3 of it; 2.2e-4 was the worst seen. Resumed weights are compared by their bits besides.
BF16_TOLERANCE = 1e-3
# With eps this large the step follows the gradient's size, which AdamW otherwise takes out: wrong clipping then shows.
CLIPPING = ["optim.clip=0.02", "optim.eps=0.01", "optim.lr=0.5", "optim.min_lr=0.1"]
TIED = ["model.tie_embeddings=true", "run.global_batch=6", "run.micro_batch=1"]  # with it, an accumulation not a power of two


# ---- in the processes


def worker(cases_file: Path, results_file: Path) -> None:
    """Runs every case of a JSON file in turn, in all processes; the first writes down what came out."""
    from megaspark.accelerators import settle_accelerator
    from megaspark.ranks import Ranks

    settle_accelerator()
    ranks = Ranks.from_environment()
    results = {case["name"]: run_case(case, ranks) for case in json.loads(cases_file.read_text())}
    if ranks.first:
        results_file.write_text(json.dumps(results))
    os._exit(0)  # as a run ends, see train.main


def run_case(case: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """Builds an engine, maybe loads a checkpoint, trains, maybe saves one on the way."""
    from megaspark.checkpoint import Checkpoint
    from megaspark.config import check_run, load_config
    from megaspark.engine import Engine

    config, tree = load_config(case["config"], case["overrides"])
    checked = check_run(config, tree, ranks.world)
    engine = Engine(checked, ranks)
    train, held_out, schedule = batches_of(checked, ranks)
    out: dict[str, Any] = {"pristine": all(engine.gather(is_pristine(engine, config)))}
    out["evaluated"] = held_out.figures(engine.evaluate(held_out.batches()))
    out["read_ahead"] = most_read_ahead(engine, held_out)
    batch, first = config.run.global_batch, 0
    if case.get("load"):
        found = Checkpoint(Path(case["load"]))
        forget = case.get("forget")
        out["same_bits"] = restore(engine, found, forget)
        out["loaded_loss"] = loss_of(engine, held_out)
        engine.step(train.step(0, batch), lr=0.0)
        out["still_loss"] = loss_of(engine, held_out)
        restore(engine, found, forget)
        first = found.step
    out |= {"losses": [], "norms": []}
    for step in range(first, case["steps"]):
        if step == case.get("save_at"):
            out["saved_loss"] = loss_of(engine, held_out)
            save(engine, Path(case["save"]), step, ranks)
        result = engine.step(train.step(step * batch, batch), schedule(step))
        out["losses"].append(result.loss)
        out["norms"].append(result.grad_norm)
    out["counted_steps"] = sorted(set(counted_steps(engine)))
    out["fine_masters"] = any(engine.gather(has_fine_masters(engine)))
    engine.deepspeed.destroy()
    return out


def batches_of(checked: Any, ranks: Any) -> tuple[Any, Any, Any]:
    """Training batches, held-out samples and the schedule, as the training loop makes them."""
    from megaspark.batches import Batches
    from megaspark.evaluations import Reading
    from megaspark.optim import CosineSchedule
    from megaspark.samples import Samples
    from megaspark.validations import Validation

    data, run, optim = checked.config.data, checked.config.run, checked.config.optim
    place = checked.layout.place(ranks.rank)
    samples = Samples(checked.train, data.seq, run.seed)
    eos_id = next(iter(checked.train.values())).eos_id if data.document_mask else None
    train = Batches(samples.__getitem__, eos_id, run.micro_batch, place.data, checked.layout.data_parallel)
    # Three sources of five samples each: half-filled micro-batches of two, and of two processes one has nothing to do at last.
    sources = {**checked.train, "held out": checked.validation["a"]}
    reading = Reading(data.seq, data.seq, run.micro_batch, data.document_mask, 5)
    held_out = Validation(sources, reading, place.data, checked.layout.data_parallel)
    return train, held_out, CosineSchedule(optim.lr, optim.min_lr, optim.warmup_steps, run.steps)


def loss_of(engine: Any, held_out: Any) -> float:
    """The loss of an evaluation, of all sources together."""
    return held_out.figures(engine.evaluate(held_out.batches()))["validation"]["loss"]


def most_read_ahead(engine: Any, held_out: Any) -> int:
    """How many micro-batches of an evaluation were read, at most, and not yet passed through the model."""
    ahead = [0, 0]

    def read() -> Iterator[Any]:
        for batch in held_out.batches():
            ahead[:] = ahead[0] + 1, max(ahead[1], ahead[0] + 1)
            yield batch

    hook = engine.deepspeed.module.register_forward_hook(lambda *_: ahead.__setitem__(0, ahead[0] - 1))
    engine.evaluate(read())
    hook.remove()
    return ahead[1]


def is_pristine(engine: Any, config: Any) -> bool:
    """Whether this process's masters are the model's first weights, in its precision, with moments and steps at zero."""
    from megaspark.fragments import MOMENTS, fragments
    from megaspark.weights import build_model

    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    weights = dict(build_model(config.model, config.run.seed).to(dtype).named_parameters())
    for fragment in fragments(engine.deepspeed):
        whole = weights[fragment.name].detach().float()
        first, count = fragment.columns or (0, whole.shape[-1])
        held = whole[..., first : first + count].flatten() if fragment.columns else whole.flatten()
        expected = held[fragment.start : fragment.start + fragment.length]
        moments = [fragment.tensors[kind] for kind in MOMENTS]
        if not torch.equal(fragment.tensors["master"].float(), expected) or any(moment.any() for moment in moments):
            return False
    return set(counted_steps(engine)) == {0.0}


def has_fine_masters(engine: Any) -> bool:
    """Whether some master weight has more bits than bf16 holds."""
    from megaspark.fragments import fragments

    masters = [fragment.tensors["master"] for fragment in fragments(engine.deepspeed)]
    return any(bool((master != master.bfloat16().float()).any()) for master in masters)


def counted_steps(engine: Any) -> Iterator[float]:
    """The steps that the torch optimizer believes it took, for each of its tensors."""
    optimizer = engine.deepspeed.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        yield float(state["step"])


def save(engine: Any, folder: Path, step: int, ranks: Any) -> None:
    """As the training loop saves: where everybody holds the same, the first writes it."""
    from megaspark import checkpoint_writers

    problem = checkpoint_writers.save(folder, {"step": step}, engine.owned(), ranks.rank, engine.gather)
    assert problem is None, problem


def restore(engine: Any, found: Any, forget: str | None) -> bool:
    """As the training loop resumes, but for what is to be forgotten; whether the engine then holds the checkpoint's bits."""
    from megaspark import checkpoint, fragments

    checkpoint.load(found, fragments.fragments(engine.deepspeed))
    if forget == "moments":
        for fragment in fragments.fragments(engine.deepspeed):
            for kind in fragments.MOMENTS:
                fragment.tensors[kind].zero_()
    if forget != "step":
        fragments.set_step(engine.deepspeed, found.step)
    if forget != "push":
        fragments.push(engine.deepspeed)
    same = True
    for fragment in fragments.fragments(engine.deepspeed):
        for kind in fragments.STATE:
            expected = found.read(fragment.name, kind, fragment.start, fragment.length, fragment.columns)
            same &= torch.equal(fragment.tensors[kind].view(torch.int32), expected.view(torch.int32))
    return all(engine.gather(same))


# ---- the launches


def launch_cases(launch: Any, folder: Path, world: int, cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs cases in one launch of `world` processes; returns their results by name."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.json"
    launch(world, Path(__file__), str(folder / "cases.json"), str(results), timeout_s=max(300, 30 * len(cases))).checked()
    return json.loads(results.read_text())


def layout(stage: int, precision: str) -> list[str]:
    return [f"deepspeed=zero{stage}.json", f"run.precision={precision}"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def config(tiny_data, home) -> str:
    from conftest import tiny_run

    return str(tiny_run(tiny_data, home)[0])


@pytest.fixture(scope="module")
def fresh(launch, home, config) -> dict[str, dict[str, Any]]:
    """Runs from the beginning: "KIND STAGE PRECISION WORLD" -> losses, norms ...; the plain ones leave checkpoints."""
    results = {}
    for world in WORLDS:
        cases = []
        for stage in STAGES:
            for precision in PRECISIONS:
                name = f"{stage} {precision} {world}"
                base = {"config": config, "steps": STEPS}
                saving = {"save": str(source(home, stage, precision, world)), "save_at": SAVED_AT}
                cases.append({**base, **saving, "name": f"plain {name}", "overrides": layout(stage, precision)})
                cases.append({**base, "steps": 5, "name": f"clip {name}", "overrides": [*layout(stage, precision), *CLIPPING]})
            cases.append({**base, "steps": 5, "name": f"tied {stage} fp32 {world}", "overrides": [*layout(stage, "fp32"), *TIED]})
        results |= launch_cases(launch, home / f"fresh{world}", world, cases)
    return results


def source(home: Path, stage: int, precision: str, world: int) -> Path:
    return home / f"zero{stage}-{precision}-{world}" / f"step_{SAVED_AT:08d}"


def resume(launch: Any, home: Path, config: str, name: str, pairs: list[tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
    """Resumes (from stage, from world, to stage, to world, precision, forget) cases from the fresh runs' checkpoints."""
    results = {}
    for world in WORLDS:
        cases = [
            {
                "name": " ".join(map(str, pair)), "config": config, "steps": STEPS, "forget": pair[5],
                "overrides": layout(pair[2], pair[4]), "load": str(source(home, pair[0], pair[4], pair[1])),
            }
            for pair in pairs if pair[3] == world
        ]  # fmt: skip
        if cases:
            results |= launch_cases(launch, home / f"{name}{world}", world, cases)
    return results


# Every layout is left once and entered once, to another stage and another number of processes; and goes on in itself.
SAME = [(stage, world, stage, world, precision, None) for stage in STAGES for world in WORLDS for precision in PRECISIONS]
OTHER = [
    (stage, world, (stage + shift) % 4, 3 - world, precision, None)
    for stage in STAGES
    for world in WORLDS
    for precision, shift in zip(PRECISIONS, (1, 3), strict=True)
]
FORGETFUL = [(stage, 2, stage, 2, "fp32", what) for stage in (1, 3) for what in ("moments", "step")]
FORGETFUL += [(stage, 2, stage, 2, "bf16", "push") for stage in STAGES]


@pytest.fixture(scope="module")
def resumed(launch, home, config, fresh) -> dict[str, dict[str, Any]]:
    return resume(launch, home, config, "resumed", [*SAME, *OTHER, *FORGETFUL])


def plain_torch(config_file: str, overrides: list[str], steps: int) -> tuple[list[float], list[float]]:
    """The same run as a dozen lines of torch: one process, the whole batch at once. Losses and gradient norms."""
    from megaspark.config import check_run, load_config
    from megaspark.optim import adamw
    from megaspark.ranks import Ranks
    from megaspark.weights import build_model

    config, tree = load_config(config_file, [*overrides, "run.micro_batch=1"])
    train, _, schedule = batches_of(check_run(config, tree, 1), Ranks())
    train.micro_batch = batch = config.run.global_batch
    model = build_model(config.model, config.run.seed, config.execution)
    optimizer = adamw(model, 1.0, config.optim.betas, config.optim.eps, config.optim.weight_decay)
    losses, norms = [], []
    for step in range(steps):
        (whole,) = train.step(step * batch, batch)
        loss = model(whole.tokens_BS, whole.positions_BS, whole.labels_BS)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or float("inf")).item())
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def worst(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; infinite where one is no number or the lengths differ."""
    if len(found) != len(expected):
        return float("inf")
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return max(float("inf") if d != d else d for d in differences)


# ---- what must hold

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind, overrides, steps", [("plain", [], STEPS), ("clip", CLIPPING, 5), ("tied", TIED, 5)])
def test_every_stage_is_plain_torch(fresh, config, kind, overrides, steps, stage, world):
    """Gradients summed where they should be averaged, clipped per process, per micro-batch or not at all, documents
    attended across, a tied table stepped twice: any of it moves losses or norms away from a plain loop."""
    losses, norms = plain_torch(config, overrides, steps)
    result = fresh[f"{kind} {stage} fp32 {world}"]
    assert worst(result["losses"], losses) <= FP32_TOLERANCE
    assert worst(result["norms"], norms) <= 10 * FP32_TOLERANCE  # a gradient has less to average over than a loss


def test_clipping_in_these_runs_is_active_and_its_size_shows(config):
    """The comparison above says nothing of clipping if no gradient was long enough, or if AdamW took its length out."""
    losses, norms = plain_torch(config, CLIPPING, 5)
    assert min(norms) > 2 * 0.02
    for other in ("0", "0.021", "0.04"):
        assert worst(plain_torch(config, [*CLIPPING, f"optim.clip={other}"], 5)[0], losses) > 100 * FP32_TOLERANCE


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind, overrides, steps", [("plain", [], STEPS), ("clip", CLIPPING, 5)])
def test_bf16_is_fp32_within_noise(fresh, config, kind, overrides, steps, stage, world):
    """Weights stepped in bf16 stand still or drift; a loss or a norm taken of something else is off by far more."""
    losses, norms = plain_torch(config, overrides, steps)
    result = fresh[f"{kind} {stage} bf16 {world}"]
    assert worst(result["losses"], losses) <= BF16_TOLERANCE
    assert worst(result["norms"], norms) <= 50 * BF16_TOLERANCE


def test_every_layout_starts_from_the_same_bits(fresh):
    """ZeRO-0 with bf16 takes a real optimizer step while it is built: weights decayed, moments and step begun."""
    assert [name for name, result in fresh.items() if not result["pristine"]] == []


@pytest.mark.parametrize("kind, precision", [("plain", "fp32"), ("plain", "bf16"), ("tied", "fp32")])
def test_an_evaluation_is_the_same_in_every_layout(fresh, kind, precision):
    """Bit for bit: a source weighed otherwise, a filled-up sample counted, one read twice by two processes, or sums in the
    order of ranks would make two runs' figures incomparable."""
    found = {name: result["evaluated"] for name, result in fresh.items() if name.startswith(kind) and precision in name}
    assert len(found) == len(STAGES) * len(WORLDS)
    assert len({json.dumps(figures) for figures in found.values()}) == 1, found
    (figures, *_) = found.values()
    assert {split: line["samples"] for split, line in figures.items()} == {
        "validation/a": 5, "validation/b": 5, "validation/held out": 5, "validation": 15,
    }  # fmt: skip
    assert len({line["loss"] for line in figures.values()}) == 4


def test_an_evaluation_reads_a_micro_batch_when_it_is_due(fresh):
    """All read first, the watchdog would time the whole evaluation as one micro-batch, and end a run whose evaluation is long."""
    assert {name: result["read_ahead"] for name, result in fresh.items() if result["read_ahead"] != 1} == {}


def test_every_tensor_counts_the_steps_taken(fresh):
    """A step tensor shared by two groups counts double, one that was replaced stands still: Adam's correction is off."""
    for name, result in fresh.items():
        assert result["counted_steps"] == [len(result["losses"])], name


def test_bf16_keeps_fp32_masters(fresh):
    """Without them updates below a weight's last bf16 bit are lost, which no short run's loss would show."""
    assert all(result["fine_masters"] for name, result in fresh.items() if "bf16" in name)


# ---- taking up where another stopped


def check_resumed(fresh: Any, result: dict[str, Any], pair: tuple[Any, ...]) -> None:
    """A resumed run holds the checkpoint's bits, computes with them, and goes on as the run that it was saved by."""
    from_stage, from_world, stage, world, precision, _ = pair
    before = fresh[f"plain {from_stage} {precision} {from_world}"]
    assert result["same_bits"], pair
    assert result["loaded_loss"] == before["saved_loss"], f"{pair}: not the same weights, or not the same evaluation"
    assert result["still_loss"] == result["loaded_loss"], f"{pair}: a step at rate 0 changed the weights"
    assert result["counted_steps"] == [STEPS], pair
    rest = before["losses"][SAVED_AT:]
    if (from_stage, from_world) == (stage, world):
        assert result["losses"] == rest, f"{pair}: not the bits of the run that never stopped"
        assert result["norms"] == before["norms"][SAVED_AT:], pair
    else:
        assert worst(result["losses"], rest) <= (FP32_TOLERANCE if precision == "fp32" else BF16_TOLERANCE), pair


@pytest.mark.parametrize("pair", SAME, ids=lambda pair: f"{pair[0]}x{pair[1]} {pair[4]}")
def test_resumes_in_its_own_layout_bit_for_bit(fresh, resumed, pair):
    """Anything left out of a checkpoint, rounded in it or restored in another order."""
    check_resumed(fresh, resumed[" ".join(map(str, pair))], pair)


@pytest.mark.parametrize("pair", OTHER, ids=lambda pair: f"{pair[0]}x{pair[1]} to {pair[2]}x{pair[3]} {pair[4]}")
def test_resumes_in_another_layout(fresh, resumed, pair):
    """The traps of every stage: partitions padded on the last rank, only the first group linked, weights not pushed."""
    check_resumed(fresh, resumed[" ".join(map(str, pair))], pair)


@pytest.mark.parametrize("pair", FORGETFUL, ids=lambda pair: f"{pair[5]} at {pair[0]} {pair[4]}")
def test_what_is_forgotten_is_seen(fresh, resumed, pair):
    """The comparisons above are worth nothing if a resume without moments, step or push passed them too."""
    result = resumed[" ".join(map(str, pair))]
    before = fresh[f"plain {pair[0]} {pair[4]} {pair[1]}"]
    if pair[5] == "push":
        assert abs(result["loaded_loss"] - before["saved_loss"]) > 1e-3
        # The first step copies the masters anyway: the weights jump at a rate of 0.
        assert result["still_loss"] == before["saved_loss"]
    else:
        assert worst(result["losses"], before["losses"][SAVED_AT:]) > 100 * FP32_TOLERANCE


ALL_PAIRS = [(a, v, b, w, p, None) for a in STAGES for v in WORLDS for b in STAGES for w in WORLDS for p in PRECISIONS]


@pytest.mark.long
def test_any_layout_to_any_other(launch, home, config, fresh):
    """All 128 changes of stage, number of processes and precision's layout."""
    results = resume(launch, home, config, "all", ALL_PAIRS)
    for pair in ALL_PAIRS:
        check_resumed(fresh, results[" ".join(map(str, pair))], pair)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # as train.main does, and for its reason: a thread of torch's aborts some shutdowns
