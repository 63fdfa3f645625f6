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
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import yaml

from megaspark import __version__, checkpoint, fragments
from megaspark.batches import Batches
from megaspark.checkpoint import Checkpoint
from megaspark.config import Checked, RunConfig, check_run, load_config
from megaspark.engine import Engine, settle_accelerator
from megaspark.errors import UserError
from megaspark.fragments import Fragment
from megaspark.guards import Guard, claim
from megaspark.optim import CosineSchedule
from megaspark.ranks import Ranks
from megaspark.recorders import Recorder
from megaspark.samples import Samples, unigram_entropy
from megaspark.savers import Saver
from megaspark.signals import INTERRUPTED, Told
from megaspark.starts import agree_on_start, agree_on_weights, config_hash, data_digest, identity, tokenizer_file

DEMO = "llama-demo.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says and ends the process; raises UserError before anything is written or started."""
    args = _parser().parse_intermixed_args(argv)
    ranks = Ranks.from_environment()
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
    step, taken = (start.step, int(start.state["samples"])) if start else (0, 0)
    _check_changes(config, taken)
    if ranks.first:
        _open_folder(checked)
    if step >= end:
        _say(ranks, f"{folder} is at step {step} of {end} already: nothing to do")
        return 0
    with Guard(folder, ranks, run.hang_after_s) as guard:
        return _train(checked, ranks, start, weights, guard, end)


def _train(
    checked: Checked, ranks: Ranks, start: Checkpoint | None, weights: Checkpoint | None, guard: Guard, end: int
) -> int:
    """The run proper, watched by `guard`; the folder is there."""
    config, run = checked.config, checked.config.run
    folder = config.folder
    step, taken = (start.step, int(start.state["samples"])) if start else (0, 0)
    engine = Engine(checked, ranks)
    if start:
        _restore(engine, start, ranks)
    elif weights:
        checkpoint.load(weights, fragments.fragments(engine.deepspeed), kinds=("master",))
        fragments.push(engine.deepspeed)
    samples = Samples(checked.train, config.data.phases, run.seed)
    batches = _batches(checked, samples, ranks)
    held_out = _batches(checked, Samples(checked.validation, config.data.seq, run.seed), ranks) if checked.validation else None
    for first, name, count in samples.left_out:
        _say(ranks, f"at sample {first:,} the cut changes: {count:,} samples of {name} are left out of its epoch")
    schedule = CosineSchedule(config.optim.lr, config.optim.min_lr, config.optim.warmup_steps, run.steps)
    recorder = Recorder(checked, ranks, engine, step, end)
    keep = (run.keep_last, run.keep_every)
    saver = Saver(folder, ranks.rank, engine.gather, keep, _held(engine, ranks) if run.save_async and run.save_every else None)

    def asked() -> list[float]:
        return [*saver.pending(), *guard.requests.pending()]

    first_step, saved, told = step, True, Told()
    while step < end and not told.stop:
        lr = schedule(step)
        phase = samples.phase(taken)
        recorder.use_seq(phase.seq)
        guard.at(f"step {step + 1}", slow=step == first_step or phase.first_sample == taken)  # new lengths are compiled anew
        result = engine.step(batches.step(taken, run.global_batch), lr, asked)
        saver.heard(result.asked[:1])
        told = guard.requests.heard(result.asked[1:])
        step, taken = step + 1, taken + run.global_batch
        recorder.step(step, samples.tokens_before(taken), result.loss, lr, result.grad_norm)
        if held_out and run.eval_every and (step % run.eval_every == 0 or step == run.steps):
            guard.at(f"the evaluation after step {step}", slow=True)
            loss = engine.evaluate(held_out.step(0, run.eval_batches * run.global_batch))
            recorder.evaluation(step, samples.tokens_before(taken), loss)
        if told.save or told.stop:
            _say(ranks, f"told by a signal to save{' and stop' if told.stop else ''}: at step {step}")
        if step == end or told.save or told.stop or (run.save_every and step % run.save_every == 0):
            guard.at(f"the save of step {step}", slow=True)
            state = _state(checked, step, taken, samples.tokens_before(taken))
            saved = saver.save(state, _held(engine, ranks), wait=step == end or told.stop)
            recorder.pause_over()
    guard.at(f"the end at step {step}", slow=True)
    recorder.close()
    engine.wait_for_all()
    done = f"{'done' if step == end else 'stopped'} at step {step}, {samples.tokens_before(taken):,} tokens"
    _say(ranks, f"{folder}: {done}")
    if not saved:
        _say(ranks, f"{folder}: the last checkpoint could not be written, see above")
    guard.log.say(done if saved else f"{done}; the last checkpoint could not be written")
    return (told.status if step < end else 0) if saved else 1


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
    eos_id = samples.datasets[0].eos_id if checked.config.data.document_mask else None
    return Batches(samples.__getitem__, eos_id, checked.config.run.micro_batch, ranks.rank, checked.layout.data_parallel)


def _restore(engine: Engine, start: Checkpoint, ranks: Ranks) -> None:
    checkpoint.load(start, fragments.fragments(engine.deepspeed))
    fragments.set_step(engine.deepspeed, start.step)
    fragments.push(engine.deepspeed)
    engine.gather(None)  # nobody writes into the run folder before everybody has read from it


def _held(engine: Engine, ranks: Ranks) -> Iterable[Fragment]:
    """What this process must write; where everybody holds the same, the first one writes it."""
    return [] if fragments.whole(engine.deepspeed) and not ranks.first else fragments.fragments(engine.deepspeed)


def _state(checked: Checked, step: int, taken: int, tokens: int) -> dict[str, Any]:
    """All that a checkpoint of `step` says besides tensors; `taken` samples and `tokens` tokens were seen."""
    config, tokenizer = checked.config, tokenizer_file(checked)
    prepend_bos = next(iter(checked.train.values())).manifest.prepend_bos
    return {
        "step": step,
        "samples": taken,
        "tokens": tokens,
        "phases": [phase.recorded() for phase in config.data.phases],
        "identity": identity(checked),
        "config": config.resolved(),
        "config_sha256": config_hash(config),
        "tokenizer": {"path": str(tokenizer[0].resolve()), "sha256": tokenizer[1], "prepend_bos": prepend_bos},
        "written_by": f"megaspark {__version__}, {checked.layout.world} processes, ZeRO {checked.layout.stage}",
    }


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, flush=True)
