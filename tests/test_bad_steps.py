"""Bad steps in whole runs, as users start them: what is skipped, what is said of it, when a run goes back or ends, and replay.

The faults are real: weights with a NaN in the row of one letter, text that is unlike the rest, a learning rate out of all bounds.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from test_train import alone, pretrain
from tokenizers import decoders, models, pre_tokenizers, trainers

from conftest import Finished, tiny_run
from megaspark import checkpoint, checkpoint_writers
from megaspark.bad_steps import GAVE_UP, BadSteps, Judge, not_finite
from megaspark.config import check_run, load_config
from megaspark.data_prep.run import main as prep
from megaspark.errors import UserError
from megaspark.fragments import STATE
from megaspark.samples import Samples
from megaspark.tools.shards import main as shards
from megaspark.weights import build_model

BATCH, STEPS = 8, 16
POISON = "Z"  # a letter that only some documents have


# ---- the judge


def test_only_what_is_finite_and_below_its_limit_passes():
    """NaN compares as false with everything: a limit asked the wrong way round lets it through."""
    for loss, norm in [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, 1.0)]:
        assert not_finite(loss, norm) and Judge(BadSteps()).refuse(loss, norm)
    judge = Judge(BadSteps(loss_factor=2, norm_factor=3, window=4))
    for _ in range(3):
        judge.took(1.0, 10.0)
        assert judge.refuse(1e9, 1e9) is None  # too early to know what is usual
    judge.took(1.0, 10.0)
    assert judge.refuse(2.0, 30.0) is None
    assert judge.refuse(2.1, 10.0) == "the loss 2.1 is 2.1 times its mean 1"
    assert judge.refuse(1.0, 31.0) == "the gradient's norm 31 is 3.1 times its mean 10"
    judge.enter(phase=0)
    assert judge.refuse(2.1, 10.0)
    judge.enter(phase=512)  # other data: another loss is no spike
    assert judge.refuse(2.1, 10.0) is None


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.integers(1, 8))
def test_the_mean_is_over_the_last_steps_and_survives_json(values, window):
    """A checkpoint that keeps the mean in fewer digits, or forgets how many steps it is of, makes a resumed run judge otherwise."""
    judge, other = (Judge(BadSteps(window=window)) for _ in range(2))
    for number, value in enumerate(values, 1):
        judge.took(value, 2 * value)
        if number <= window:
            assert judge.loss == pytest.approx(sum(values[:number]) / number)
        other.took(value, 2 * value)
        other = Judge.of(other.limits, json.loads(json.dumps({"bad_steps": other.recorded()})))
    assert other == judge and judge.norm == pytest.approx(2 * judge.loss)
    assert min(values) <= judge.loss * (1 + 1e-9) and judge.loss <= max(values) * (1 + 1e-9)


def test_what_is_left_out_is_counted_once():
    """Skipped steps inside a range that a roll-back leaves out, counted again, would make the run's record wrong."""
    judge = Judge(BadSteps(in_a_row=2, then="roll_back", roll_backs=1))
    judge.left(8, 16)
    judge.took(1.0, 1.0)
    saved = {"samples": 24, "bad_steps": judge.recorded()}
    judge.left(32, 40)
    assert not judge.gives_up()
    judge.left(40, 48)
    assert judge.gives_up() and judge.may_roll_back()
    judge.rolled_back(json.loads(json.dumps(saved)), 48)
    assert judge.left_out == [[8, 16], [24, 48]] and (judge.skipped, judge.in_a_row, judge.good) == (3, 0, 1)
    assert not judge.may_roll_back()


def test_what_was_recorded_stays_as_it_was():
    """A checkpoint is written while the next steps are taken: what they leave out must get neither into it nor into one read."""
    judge = Judge(BadSteps())
    judge.left(8, 16)
    recorded = judge.recorded()
    before = json.dumps(recorded)
    judge.left(16, 24)
    judge.left(40, 48)
    Judge.of(BadSteps(), {"bad_steps": recorded}).left(64, 72)
    assert json.dumps(recorded) == before


# ---- runs


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Token datasets: 500 documents of one pattern; one in 9 has the letter POISON, one in 17 is noise."""
    folder = tmp_path_factory.mktemp("text")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]))
    model.save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(5)
    letters = "".join(chr(c) for c in torch.randint(97, 122, (40_000,), generator=generator))
    for name, kind in (("poison", 9), ("noise", 17)):
        texts = ["abcd" * 10 for _ in range(500)]
        for number in range(0, 500, kind):
            noise = letters[40 * number : 40 * number + 40]
            texts[number] = f"abcd{POISON}" + "abcd" * 5 if name == "poison" else noise
        lines = b"\n".join(json.dumps({"text": document}).encode() for document in texts)
        (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines))
        job = {"input": f"{folder}/{name}.jsonl.zst", "output": f"{folder}/{name}", "tokenizer": f"{folder}/tokenizer.json"}
        (folder / f"{name}.yaml").write_text(json.dumps(job))
        assert prep([str(folder / f"{name}.yaml")]) == 0
    return folder


def options(text: Path, data: str, **changes: str) -> list[str]:
    """Overrides for the tiny run: this data, no validation, every checkpoint kept."""
    values = {"data.train": str(text / data), "data.validation": "null", "model.vocab": "257", "run.steps": str(STEPS)}
    values |= {"run.eval_every": "0", "run.save_every": "2", "run.keep_last": "0", **changes}
    return [f"{key}={value}" for key, value in values.items()]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """What a run recorded of its steps, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "tokens", "loss", "loss_nonfinite", "lr", "grad_norm", "grad_norm_nonfinite", "skipped")
    return [{key: line[key] for key in kept if key in line} for line in lines]


def same_state(one: Path, other: Path) -> bool:
    """Whether two checkpoints are of the same bits: weights, moments, and all that is remembered of the run but its name."""
    a, b = checkpoint.Checkpoint(one), checkpoint.Checkpoint(other)
    remembered = [{k: c.state[k] for k in ("step", "samples", "tokens", "updates", "bad_steps")} for c in (a, b)]
    bits = ([c.read(name, kind).view(torch.int32) for name in a.shapes for kind in STATE] for c in (a, b))
    return remembered[0] == remembered[1] and all(map(torch.equal, *bits))


def replayed(run: Path, step: int, name: str) -> Path:
    """A copy of a run as it was when it had just saved at `step`."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for folder in checkpoint.step_folders(copy):
        if folder.name > f"step_{step:08d}":
            shutil.rmtree(folder)
    return copy


def poisoned(text: Path, folder: Path, config: Path, overrides: list[str]) -> Path:
    """A checkpoint of first weights, whose embedding of the letter POISON is NaN."""
    parsed, _ = load_config(config, overrides)
    model = build_model(parsed.model, parsed.run.seed, parsed.execution)
    model.embedding.weight.data[letter_id(text, POISON)] = math.nan
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = {"step": 0, "samples": 0, "tokens": 0, "config": parsed.resolved()}
    (folder / "step_00000000").mkdir(parents=True)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    checkpoint_writers.write_masters(folder / "step_00000000", state, shapes, lambda name, a, b: weights[name][a:b])
    return folder / "step_00000000"


def letter_id(text: Path, letter: str) -> int:
    """The token of a letter."""
    return tokenizers.Tokenizer.from_file(str(text / "tokenizer.json")).token_to_id(letter)


def samples_of(config: Path, overrides: list[str]) -> Samples:
    checked = check_run(*load_config(config, overrides), 1)
    return Samples(checked.train, checked.config.data.phases, checked.config.run.seed)


def expected_course(samples: Samples, poison: int, in_a_row: int, save_every: int) -> tuple[dict[int, bool], list[list[int]], int]:
    """What the policy makes of data in which a sample with `poison` among its inputs is bad, worked out from the data alone.

    Returns whether each step was skipped, the ranges left out, and the samples taken.
    """
    step = taken = row = 0
    skipped: dict[int, bool] = {}
    left: set[int] = set()
    saved: dict[int, tuple[int, int]] = {}
    while step < STEPS:
        bad = any(poison in samples[i][:-1] for i in range(taken, taken + BATCH))
        step, taken, row = step + 1, taken + BATCH, row + 1 if bad else 0
        skipped[step] = bad
        left |= set(range(taken - BATCH, taken)) if bad else set()
        if row == in_a_row:
            step, first = max(saved[s] for s in saved if saved[s][0] <= step)
            left |= set(range(first, taken))
            skipped, row = {s: was for s, was in skipped.items() if s <= step}, 0
            saved = {s: at for s, at in saved.items() if s <= step}
        elif step % save_every == 0 and row == 0:
            saved[step] = (step, taken)
    ranges = [[i, i + BATCH] for i in sorted(left) if i % BATCH == 0]
    joined: list[list[int]] = []
    for first, end in ranges:
        if joined and joined[-1][1] == first:
            joined[-1][1] = end
        else:
            joined.append([first, end])
    return skipped, joined, taken


@pytest.fixture(scope="module")
def poisoned_run(text, tmp_path_factory) -> tuple[Path, Path, list[str], Finished]:
    """A finished run of two processes that skipped steps and rolled back: its folder, config, overrides, and what was said."""
    folder = tmp_path_factory.mktemp("poisoned")
    config, _ = tiny_run_at(folder)
    policy = {"bad_steps.in_a_row": "2", "bad_steps.then": "roll_back", "run.seed": "20"}
    overrides = options(text, "poison", **{**policy, "deepspeed": "zero2.json"})
    start = poisoned(text, folder / "start", config, overrides)
    overrides.append(f"run.init_from={start}")
    return folder / "runs/tiny", config, overrides, pretrain(2, config, *overrides).checked()


def tiny_run_at(folder: Path) -> tuple[Path, list[str]]:
    """The tiny run's config, whose data every test here replaces."""
    from conftest import TinyData

    return tiny_run(TinyData(folder, folder, folder), folder)


@pytest.mark.launch
def test_steps_are_skipped_and_rolled_back_as_the_data_say(poisoned_run, text):
    """One process meets the letter, both must skip; what is skipped, left out and counted follows from the data alone."""
    run, config, overrides, said = poisoned_run
    poison = letter_id(text, POISON)
    skipped, left_out, taken = expected_course(samples_of(config, overrides), poison, in_a_row=2, save_every=2)
    lines = lines_of(run)
    assert {line["step"]: "skipped" in line for line in lines} == skipped
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert any(skipped.values()) and taken > STEPS * BATCH, "no step alone was bad, or no two in a row: nothing was tested"
    assert "is removed: bad steps led to it" in said.stdout  # a checkpoint between two bad steps is none to go back to
    assert all((line["loss"] is None) == ("skipped" in line) for line in lines)
    final = checkpoint.newest(run).state
    assert final["samples"] == taken and final["updates"] == STEPS - sum(skipped.values())
    assert final["bad_steps"]["left_out"] == left_out
    counted = final["bad_steps"]["skipped"], final["bad_steps"]["roll_backs"]
    assert said.stdout.count(" skipped: the loss is nan") == counted[0] and said.stdout.count("rolled back to") == counted[1]
    assert f"{counted[0]} bad steps were skipped, {counted[1]} times it rolled back" in said.stdout


@pytest.mark.launch
def test_the_log_leads_to_the_text(poisoned_run, capsys):
    """A number that is off by one, counted in another order or in another dataset would accuse innocent text."""
    run, _, _, said = poisoned_run
    line = r"skipped: the loss is nan; its samples, (.*): megaspark (shards decode \S+ --samples (\d+):(\d+))"
    commands = re.findall(line, said.stdout)
    assert commands
    own = {number for log in run.glob("logs/*") for number in re.findall(r"loss nan: sample (.*)", log.read_text())}
    for named, command, first, end in commands:
        assert shards(command.split()[1:]) == 0
        texts = dict(re.findall(r"== sample (\d+): poison \d+\n([^=]*)", capsys.readouterr().out))
        assert list(texts) == [str(number) for number in range(int(first), int(end))]
        assert any(POISON in text for text in texts.values()) and named.startswith("poison ")
        for number, shown in texts.items():  # a micro-batch of two is bad if one of them is
            if POISON in shown[:-1]:
                assert any(f"{number} (poison" in pair for pair in own), number


@pytest.mark.launch
def test_replay_from_a_checkpoint_is_the_run_that_never_stopped(poisoned_run):
    """What a run remembers and a checkpoint forgets (the updates, the row, the samples passed over) changes all that follows."""
    run, config, overrides, _ = poisoned_run
    copy = replayed(run, 4, "again")
    before, after = (checkpoint.newest(folder).state for folder in (copy / "checkpoints/step_00000004", run))
    assert before["updates"] < before["step"] and before["samples"] > before["step"] * BATCH
    assert 0 < before["bad_steps"]["roll_backs"] < after["bad_steps"]["roll_backs"], "no roll-back is played again"
    pretrain(2, config, *overrides, "run.name=again").checked()
    assert lines_of(copy) == lines_of(run)
    assert same_state(checkpoint.newest(copy).folder, checkpoint.newest(run).folder)


def test_a_spike_is_refused_and_replayed(text, tmp_path):
    """Text unlike the rest, a loss far above its mean: refused, and with the same loss to the last bit when it is played again."""
    config, _ = tiny_run_at(tmp_path)
    limits = {"bad_steps.loss_factor": "3", "bad_steps.window": "4", "run.steps": "32"}
    overrides = options(text, "noise", **limits)
    done = alone("pretrain", "--config", str(config), *overrides).checked()
    lines = lines_of(tmp_path / "runs/tiny")
    bad = [line["step"] for line in lines if "skipped" in line]
    samples = samples_of(config, overrides)
    usual = [*(letter_id(text, letter) for letter in "abcd"), samples.datasets[0].eos_id]
    assert bad and bad[0] < 31, done.stdout
    for step in bad:
        read = np.concatenate([samples[i] for i in range((step - 1) * BATCH, step * BATCH)])
        assert not np.isin(read, usual).all(), step
        assert re.fullmatch(r"the loss \S+ is \S+ times its mean \S+", lines[step - 1]["skipped"]) and lines[step - 1]["loss"] < 10
    copy = replayed(tmp_path / "runs/tiny", (bad[0] - 1) // 2 * 2, "again")
    alone("pretrain", "--config", str(config), *overrides, "run.name=again").checked()
    assert lines_of(copy) == lines
    assert same_state(checkpoint.newest(copy).folder, checkpoint.newest(tmp_path / "runs/tiny").folder)


@pytest.mark.parametrize("policy", ["stop", pytest.param("roll_back", marks=pytest.mark.long)])
def test_a_run_that_cannot_go_on_ends(policy, text, tmp_path):
    """With a rate out of bounds every step after the first is bad, whatever the data: it must not skip for ever, nor roll back
    for ever, nor save what it has, nor exit as if all were well."""
    config, _ = tiny_run_at(tmp_path)
    limits = {"bad_steps.in_a_row": "3", "bad_steps.then": policy, "bad_steps.roll_backs": "2", "run.save_every": "1"}
    overrides = options(text, "noise", **limits, **{"optim.lr": "1e30", "optim.warmup_steps": "0"})
    done = alone("pretrain", "--config", str(config), *overrides)
    assert done.returncode == GAVE_UP and "Traceback" not in done.stderr, done.stderr[-2000:]
    (last,) = [line for line in done.stdout.splitlines() if "stopped without a save" in line]
    assert "3 bad steps in a row" in last and "bad_steps." in last
    assert "stopped at step 4" in done.stdout
    folders = [folder.name for folder in checkpoint.step_folders(tmp_path / "runs/tiny")]
    # The weights of step 1 are finite, but lead nowhere. Steps 2 and 3 were saved amid bad ones, step 4 was the last.
    assert folders == ["step_00000003", "step_00000002", "step_00000001"]
    if policy == "roll_back":
        assert done.stdout.count("rolled back to") == 2 and done.stdout.count("step_00000003 is removed") == 2
        assert "samples 8 to 31 are left out" in done.stdout and "samples 8 to 55 are left out" in done.stdout
    else:
        assert "bad_steps.then=roll_back" in last


@pytest.mark.long
def test_a_run_without_a_checkpoint_cannot_roll_back(text, tmp_path):
    """To go back to the first weights would be to train from nothing, which nobody asked for."""
    config, _ = tiny_run_at(tmp_path)
    limits = {"bad_steps.in_a_row": "2", "bad_steps.then": "roll_back", "run.save_every": "0"}
    overrides = options(text, "noise", **limits, **{"optim.lr": "1e30", "optim.warmup_steps": "0"})
    done = alone("pretrain", "--config", str(config), *overrides)
    assert done.returncode == GAVE_UP and "there is no checkpoint to roll back to" in done.stdout
    assert not checkpoint.step_folders(tmp_path / "runs/tiny")


def test_the_gradients_norm_is_not_to_be_switched_off(text, tmp_path):
    """DeepSpeed can leave the norm out, to save a message; then nobody would see a bad gradient."""
    config, _ = tiny_run_at(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}, "gradient_clipping": 0}')
    with pytest.raises(UserError, match="compute_grad_norm = false"):
        check_run(*load_config(config, options(text, "noise", **{"deepspeed": str(tmp_path / "ds.json"), "optim.clip": "0"})), 1)
