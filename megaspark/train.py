"""Training, top to bottom: settings, data, engine, resume, the loop with its meters, evaluations and checkpoints.

The order of events in a step is fixed, and everything that a step depends on is a function of the settings, the step and the
number of samples taken before it; so a run that was killed and started again computes the bits of one that never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import yaml

from megaspark import __version__, checkpoint, fragments, launchers
from megaspark.accelerators import settle_accelerator
from megaspark.bad_steps import GAVE_UP, Judge
from megaspark.batches import Batch, Batches
from megaspark.checkpoint import Checkpoint
from megaspark.config import Checked, RunConfig, check_run, load_config
from megaspark.engine import Engine
from megaspark.errors import UserError
from megaspark.evaluations import Reading
from megaspark.guards import Guard, claim
from megaspark.optim import CosineSchedule
from megaspark.ranks import Ranks
from megaspark.recorders import SAVE, Recorder
from megaspark.refusals import Refusals
from megaspark.samples import Samples, unigram_entropy
from megaspark.savers import Saver
from megaspark.signals import INTERRUPTED, Told
from megaspark.starts import (
    Position,
    agree_on_start,
    agree_on_weights,
    config_hash,
    data_digest,
    identity,
    restore,
    tokenizer_file,
)
from megaspark.validations import Validation

DEMO = "llama-demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says and ends the process; raises UserError before anything is written or started."""
    args = _parser().parse_intermixed_args(argv)
    ranks = Ranks.from_environment()
    launchers.runner()  # while it is there: verifying a checkpoint takes minutes, and the guard must know whom to miss
    settle_accelerator()
    config, tree = load_config(args.config, args.overrides)
    checked = check_run(config, tree, ranks.world)
    start = agree_on_start(checked, ranks)
    try:
        weights = None if start else agree_on_weights(checked, ranks)
        status = train(checked, ranks, start, weights)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, UserError):
            raise
        traceback.print_exc()
        status = INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of Python's shutdown: once, when it still was, a process of a finished run aborted on its way out (exit status
    # -6, "terminate called without an active exception"), and the launcher called the run failed. The cause was not found.
    # And after an error it could wait for ever for what the other processes do not send any more.
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaspark pretrain",
        description="Pre-trains a model from token shards. Under the deepspeed launcher: on many processes and hosts.",
        epilog="example: deepspeed --num_gpus 2 megaspark/pretrain.py --config ds_configs/llama-demo.yaml run.steps=100",
    )
    parser.add_argument("--config", default=DEMO, help=f"a run's YAML, a path or the name of a shipped one (default: {DEMO})")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher says it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    return parser


def train(checked: Checked, ranks: Ranks, start: Checkpoint | None, weights: Checkpoint | None = None) -> int:
    """Runs from `start`, or from the beginning (with given `weights`), to the last step; returns the exit status."""
    config, run = checked.config, checked.config.run
    folder = config.folder
    end = min(run.steps, run.stop_after or run.steps)
    at = Position.of(start)
    _check_changes(config, at.samples)
    if ranks.first:
        _open_folder(checked)
    if at.step >= end:
        _say(ranks, f"{folder} is at step {at.step} of {end} already: nothing to do")
        return 0
    with Guard(folder, ranks, run.hang_after_s) as guard:
        return _train(checked, ranks, start, weights, guard, end)


def _train(
    checked: Checked, ranks: Ranks, start: Checkpoint | None, weights: Checkpoint | None, guard: Guard, end: int
) -> int:
    """The run proper, watched by `guard`; the folder is there."""
    config, run = checked.config, checked.config.run
    folder, batch, at = config.folder, config.run.global_batch, Position.of(start)
    engine = _engine(checked, ranks, start, weights)
    samples = Samples(checked.train, config.data.phases, run.seed)
    batches = _batches(checked, samples, ranks)
    validation = _validation(checked, ranks) if checked.validation and run.eval_every else None
    _say_what_is_read(ranks, samples, validation)
    schedule = CosineSchedule(config.optim.lr, config.optim.min_lr, config.optim.warmup_steps, run.steps)
    recorder = Recorder(checked, ranks, engine, at.step, end)
    keep = (run.keep_last, run.keep_every)
    saver = Saver(folder, ranks.rank, engine.gather, keep, engine.owned() if run.save_async and run.save_every else None)
    refusals = Refusals(checked, engine, guard, saver, start.state if start else {})

    def asked() -> list[float]:
        return [*saver.pending(), *guard.requests.pending()]

    first_step, saved, told = at.step, True, Told()
    while at.step < end and not told.stop and not refusals.gave_up:
        lr = schedule(at.step)
        phase = samples.phase(at.samples)
        recorder.use_seq(phase.seq)
        refusals.judge.enter(phase.first_sample)
        new_length = at.step == first_step or phase.first_sample == at.samples
        guard.at(f"step {at.step + 1}", slow=new_length)  # it is compiled anew
        result = engine.step(batches.step(at.samples, batch), lr, asked, refusals.judge.refuse)
        saver.heard(result.asked[:1])
        told = guard.requests.heard(result.asked[1:])
        at = Position(at.step + 1, at.samples + batch, at.updates + (result.refused is None))
        recorder.step(at.step, samples.tokens_before(at.samples), result, lr)
        after = refusals.settle(at, result, batches, samples, recorder)
        if after is not at or refusals.gave_up:
            at, first_step = after, after.step
            continue
        if validation and (at.step % run.eval_every == 0 or at.step == run.steps):
            losses = engine.evaluate(_watched(validation, guard, recorder, at.step))
            recorder.evaluation(at.step, samples.tokens_before(at.samples), validation, losses)
        if told.save or told.stop:
            _say(ranks, f"told by a signal to save{' and stop' if told.stop else ''}: at step {at.step}")
        if at.step == end or told.save or told.stop or (run.save_every and at.step % run.save_every == 0):
            guard.at(f"the save of step {at.step}", slow=True)
            state = _state(checked, at, samples.tokens_before(at.samples), refusals.judge)
            saved = saver.save(state, engine.owned(), wait=at.step == end or told.stop)
            recorder.pause_over(SAVE)
    guard.at(f"the end at step {at.step}", slow=True)
    saver.finish()  # of a run that gave up, one may still be under way
    recorder.close()
    engine.wait_for_all()
    whole = at.step == end and not refusals.gave_up
    tokens = samples.tokens_before(at.samples)
    done = f"{'done' if whole else 'stopped'} at step {at.step}, {tokens:,} tokens{refusals.summary()}"
    _say(ranks, f"{folder}: {done}")
    if not saved:
        _say(ranks, f"{folder}: the last checkpoint could not be written, see above")
    guard.log.say(done if saved else f"{done}; the last checkpoint could not be written")
    if refusals.gave_up:
        return GAVE_UP
    return (0 if whole else told.status) if saved else 1


def _engine(checked: Checked, ranks: Ranks, start: Checkpoint | None, weights: Checkpoint | None) -> Engine:
    """The engine, as the checkpoint left it, or with given weights, or as it begins."""
    engine = Engine(checked, ranks)
    if start:
        restore(engine, start)
    elif weights:
        checkpoint.load(weights, fragments.fragments(engine.deepspeed), kinds=("master",))
        fragments.push(engine.deepspeed)
    return engine


def _say_what_is_read(ranks: Ranks, samples: Samples, validation: Validation | None) -> None:
    for line in validation.described() if validation and ranks.first else ():
        _say(ranks, line)
    for first, name, count in samples.left_out:
        _say(ranks, f"at sample {first:,} the cut changes: {count:,} samples of {name} are left out of its epoch")


def _check_changes(config: RunConfig[Any], taken: int) -> None:
    """Refuses samples of another length within one step."""
    batch = config.run.global_batch
    for before, after in pairwise(config.data.phases):
        ahead = after.first_sample - taken
        if ahead > 0 and before.seq != after.seq and ahead % batch:
            near = taken + max(1, round(ahead / batch)) * batch
            raise UserError(
                f"data.changes: seq changes at sample {after.first_sample}, in the middle of a step of {batch} samples; "
                f"nearest: sample {near}"
            )


def _open_folder(checked: Checked) -> None:
    """Makes the run folder with its resolved config and what there is to know of its data."""
    config, folder = checked.config, checked.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.resolved(), sort_keys=False)
    (folder / "config.yaml").write_text(f"# resolved by megaspark {__version__}; sha256 {config_hash(config)}\n{text}")
    claim(folder, wait_s=0)  # of a folder that is there already it was taken before
    facts = {
        "train": {name: {"folder": str(d.folder), "tokens": d.tokens} for name, d in checked.train.items()},
        "data_sha256": data_digest(checked.train),
        "unigram_entropy": unigram_entropy(checked.train),
    }
    (folder / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
    tokens = sum(dataset.tokens for dataset in checked.train.values())
    print(f"training data: {tokens:,} tokens, unigram entropy {facts['unigram_entropy']:.3f} nats a token")


def _batches(checked: Checked, samples: Samples, ranks: Ranks) -> Batches:
    place = checked.layout.place(ranks.rank)
    eos_id = samples.datasets[0].eos_id if checked.config.data.document_mask else None
    return Batches(samples.__getitem__, eos_id, checked.config.run.micro_batch, place.data, checked.layout.data_parallel)


def _validation(checked: Checked, ranks: Ranks) -> Validation:
    data, run = checked.config.data, checked.config.run
    count = run.eval_batches * run.global_batch
    reading = Reading(data.seq, data.seq, run.micro_batch, data.document_mask, count)
    place = checked.layout.place(ranks.rank)
    return Validation(checked.validation, reading, place.data, checked.layout.data_parallel)


def _watched(validation: Validation, guard: Guard, recorder: Recorder, step: int) -> Iterator[Batch]:
    """The micro-batches of the evaluation after `step`, each of which may take as long as a slow step."""
    for number, batch in enumerate(validation.batches(), 1):
        guard.at(f"micro-batch {number} of {validation.count} of the evaluation after step {step}", slow=True)
        recorder.evaluating(step, number, validation.count)
        yield batch


def _state(checked: Checked, at: Position, tokens: int, judge: Judge) -> dict[str, Any]:
    """All that a checkpoint of a position says besides tensors; `tokens` tokens were seen."""
    config, tokenizer = checked.config, tokenizer_file(checked)
    prepend_bos = next(iter(checked.train.values())).manifest.prepend_bos
    return {
        "step": at.step,
        "samples": at.samples,
        "tokens": tokens,
        "updates": at.updates,
        "bad_steps": judge.recorded(),
        "phases": [phase.recorded() for phase in config.data.phases],
        "identity": identity(checked),
        "config": config.resolved(),
        "config_sha256": config_hash(config),
        "tokenizer": {"path": str(tokenizer[0].resolve()), "sha256": tokenizer[1], "prepend_bos": prepend_bos},
        "written_by": f"megaspark {__version__}, {checked.layout.world} processes, {checked.layout.words()}",
    }


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, flush=True)
