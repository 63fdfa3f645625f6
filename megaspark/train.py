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
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from megaspark import __version__, checkpoint, fragments, settings
from megaspark.batches import Batches
from megaspark.checkpoint import Checkpoint
from megaspark.config import Checked, RunConfig, check_run, load_config
from megaspark.engine import Engine, join, parameter_shapes, settle_accelerator
from megaspark.errors import UserError
from megaspark.guards import Guard, claim
from megaspark.models import differing
from megaspark.optim import CosineSchedule
from megaspark.ranks import Ranks
from megaspark.recorders import Recorder
from megaspark.samples import Phase, Samples, changed_past, unigram_entropy
from megaspark.shards import TokenDataset
from megaspark.signals import INTERRUPTED, Told

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
        weights = None if start else find_weights(checked, say=ranks.first)
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
    first_step, saved, told = step, True, Told()
    while step < end and not told.stop:
        lr = schedule(step)
        phase = samples.phase(taken)
        recorder.use_seq(phase.seq)
        guard.at(f"step {step + 1}", slow=step == first_step or phase.first_sample == taken)  # new lengths are compiled anew
        result = engine.step(batches.step(taken, run.global_batch), lr, guard.requests.pending)
        told = guard.requests.heard(result.asked)
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
            saved = _save(checked, engine, ranks, step, taken, samples.tokens_before(taken))
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


def agree_on_start(checked: Checked, ranks: Ranks) -> Checkpoint | None:
    """What the first process finds to start from (`find_start`), for all of them.

    Each for itself, they could find different things: a run that was told to stop may be saving still, which the first waits for.
    """
    found: list[str | None] = [None, None]
    if ranks.world > 1:
        join(ranks)
    if ranks.first:
        try:
            claim(checked.config.folder)
            start = find_start(checked, say=True)
            found = [None, str(start.folder) if start else None]
        except UserError as error:
            found = [str(error), None]
    if ranks.world > 1:
        torch.distributed.broadcast_object_list(found)
    problem, folder = found
    if problem is not None:
        if ranks.world > 1:
            torch.distributed.destroy_process_group()
        raise UserError(problem)
    return Checkpoint(Path(folder)) if folder else None


def find_start(checked: Checked, say: bool) -> Checkpoint | None:
    """The checkpoint that `run.resume` asks for: the newest one that is whole and of this model and data, or None.

    A damaged one is named and the one before it tried; raises UserError where one was found but is not this run's.
    """
    config, run = checked.config, checked.config.run
    if run.resume == "never":
        if checkpoint.step_folders(config.folder):
            raise UserError(f"{config.folder} holds checkpoints and run.resume = never; choose another run.name, or auto")
        return None
    damaged = []
    for folder in checkpoint.step_folders(config.folder):
        try:
            found = Checkpoint(folder)
            problem = found.problem()
        except checkpoint.BadCheckpoint as error:
            problem = str(error)
        if problem is None:
            _check_same_run(checked, found)
            if say:
                print(f"resuming from {folder}", flush=True)
            return found
        damaged.append(problem)
        if say:
            print(f"cannot resume from {folder}: {problem}", file=sys.stderr, flush=True)
    if damaged or run.resume == "required":
        raise UserError(f"{config.folder} holds no checkpoint to resume from ({'; '.join(damaged) or 'none was written'})")
    if say:
        print(f"no checkpoint in {config.folder}: starting at step 0", flush=True)
    return None


def find_weights(checked: Checked, say: bool) -> Checkpoint | None:
    """The checkpoint of `run.init_from`, whole and of this run's architecture; None where none is asked for.

    Raises UserError naming the first difference. Its optimizer, step and data do not matter: the run starts at step 0.
    """
    config = checked.config
    if config.run.init_from is None:
        return None
    found = checkpoint.newest(Path(config.run.init_from))
    if problem := found.problem():
        raise UserError(f"run.init_from: {problem}")
    said = {key: value for key, value in found.state["config"]["model"].items() if key in type(config.model).model_fields}
    if difference := differing(config.model, type(config.model)(**said)):
        key, ours, theirs = difference
        raise UserError(f"run.init_from = {found.folder} was made with model.{key} = {theirs}, this run has {ours}; set it to that")
    _check_shapes(checked, found)
    carried = found.state.get("source", {}).get("files", {})
    tokenizers = {name: sha256 for name, sha256 in carried.items() if name in ("tokenizer.json", "tokenizer.model")}
    if say:
        print(f"starting at step 0 from the weights of {found.folder}", flush=True)
        if tokenizers and _tokenizer(checked)[1] not in tokenizers.values():
            text = f"WARNING: the data were not tokenized with {' or '.join(tokenizers)} of {found.folder / 'source'}"
            print(f"{text}: to these weights every token may mean another", file=sys.stderr, flush=True)
    return found


def _check_shapes(checked: Checked, found: Checkpoint) -> None:
    expected = parameter_shapes(checked.config.model)
    for name in [*expected, *found.shapes]:
        ours, theirs = expected.get(name), found.shapes.get(name)
        if ours != theirs:
            raise UserError(
                f"{found.folder} is of another model: its {name} is {_shape(theirs)}, this run's is {_shape(ours)}; "
                "choose another run.name or the model that it was trained with"
            )


def _check_same_run(checked: Checked, found: Checkpoint) -> None:
    """Refuses a checkpoint whose model or data is not this run's, naming the first difference."""
    config = checked.config
    _check_shapes(checked, found)
    if "phases" not in found.state:
        raise UserError(f"{found.folder} holds weights only and cannot be resumed; move it out of the run and set run.init_from")
    recorded = [Phase(**values) for values in found.state["phases"]]
    if difference := changed_past(recorded, config.data.phases, int(found.state["samples"])):
        raise UserError(
            f"{found.folder} was trained with other data.seq, data.blend, data.packing or data.changes: {difference}; set it back "
            f"and say what shall change from now on in data.changes, from sample {int(found.state['samples'])} or later"
        )
    ours = _identity(checked)
    for key, was in found.state["identity"].items():
        if ours[key] != was:
            raise UserError(
                f"{found.folder} was trained with {key} = {was}, this run has {ours[key]}: the samples would not go on where "
                "they stopped; choose another run.name or set it back"
            )


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


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def _identity(checked: Checked) -> dict[str, Any]:
    """What must not change while a run goes on: the tokens and their order; how they are cut and blended is in the phases."""
    data = checked.config.data
    return {
        "data.document_mask": data.document_mask,
        "run.seed": checked.config.run.seed,
        "tokenizer sha256": _tokenizer(checked)[1],
        "training data sha256": data_digest(checked.train),
    }


def data_digest(datasets: Mapping[str, TokenDataset]) -> str:
    """The sha256 that names the tokens of some datasets: of the checksums of all their shards."""
    return settings.digest({name: [info.bin_sha256 for info in d.manifest.shards] for name, d in datasets.items()})


def _tokenizer(checked: Checked) -> tuple[Path, str]:
    """The tokenizer file that the data carries, and its sha256."""
    dataset = next(iter(checked.train.values()))
    return dataset.folder / dataset.manifest.tokenizer, dataset.manifest.tokenizer_sha256


def config_hash(config: RunConfig[Any]) -> str:
    """The sha256 of a resolved config."""
    return settings.digest(config.resolved())


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


def _save(checked: Checked, engine: Engine, ranks: Ranks, step: int, taken: int, tokens: int) -> bool:
    """Writes the checkpoint of `step`; says whether it was written (a full disk stops the save, not the run)."""
    config, tokenizer = checked.config, _tokenizer(checked)
    prepend_bos = next(iter(checked.train.values())).manifest.prepend_bos
    state = {
        "step": step,
        "samples": taken,
        "tokens": tokens,
        "phases": [phase.recorded() for phase in config.data.phases],
        "identity": _identity(checked),
        "config": config.resolved(),
        "config_sha256": config_hash(config),
        "tokenizer": {"path": str(tokenizer[0].resolve()), "sha256": tokenizer[1], "prepend_bos": prepend_bos},
        "written_by": f"megaspark {__version__}, {checked.layout.world} processes, ZeRO {checked.layout.stage}",
    }
    everywhere = fragments.whole(engine.deepspeed)
    held = [] if everywhere and not ranks.first else fragments.fragments(engine.deepspeed)
    target = checkpoint.step_folder(config.folder, step)
    problem = checkpoint.save(target, state, held, ranks.rank, engine.gather)
    if problem is None and ranks.first:
        checkpoint.note_latest(config.folder, target)
        checkpoint.prune(config.folder, config.run.keep_last)
    if problem is not None:
        _say(ranks, f"CHECKPOINT NOT WRITTEN: {target}: {problem}; the run goes on, older checkpoints are untouched")
    return problem is None


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, flush=True)
