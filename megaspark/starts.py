"""Where a run starts, the same for all its processes: its newest whole checkpoint, the weights of another run, or step 0."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megaspark import checkpoint, settings
from megaspark.checkpoint import Checkpoint
from megaspark.config import Checked, RunConfig
from megaspark.engine import join
from megaspark.errors import UserError
from megaspark.guards import claim
from megaspark.models import differing
from megaspark.ranks import Ranks
from megaspark.samples import Phase, changed_past
from megaspark.shards import TokenDataset
from megaspark.weights import parameter_shapes


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
        if tokenizers and tokenizer_file(checked)[1] not in tokenizers.values():
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
    ours = identity(checked)
    for key, was in found.state["identity"].items():
        if ours[key] != was:
            raise UserError(
                f"{found.folder} was trained with {key} = {was}, this run has {ours[key]}: the samples would not go on where "
                "they stopped; choose another run.name or set it back"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape))


def identity(checked: Checked) -> dict[str, Any]:
    """What must not change while a run goes on: the tokens and their order; how they are cut and blended is in the phases."""
    data = checked.config.data
    return {
        "data.document_mask": data.document_mask,
        "run.seed": checked.config.run.seed,
        "tokenizer sha256": tokenizer_file(checked)[1],
        "training data sha256": data_digest(checked.train),
    }


def data_digest(datasets: Mapping[str, TokenDataset]) -> str:
    """The sha256 that names the tokens of some datasets: of the checksums of all their shards."""
    return settings.digest({name: [info.bin_sha256 for info in d.manifest.shards] for name, d in datasets.items()})


def tokenizer_file(checked: Checked) -> tuple[Path, str]:
    """The tokenizer file that the data carries, and its sha256."""
    dataset = next(iter(checked.train.values()))
    return dataset.folder / dataset.manifest.tokenizer, dataset.manifest.tokenizer_sha256


def config_hash(config: RunConfig[Any]) -> str:
    """The sha256 of a resolved config."""
    return settings.digest(config.resolved())
