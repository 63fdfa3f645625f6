"""Where a run starts, the same for all its processes: its newest whole checkpoint, the weights of another run, or step 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaspark import checkpoint, checkpoint_writers, fragments, settings
from megaspark.accelerators import join
from megaspark.checkpoint import BadCheckpoint, Checkpoint
from megaspark.config import Checked, RunConfig
from megaspark.engine import Engine
from megaspark.errors import UserError
from megaspark.guards import claim
from megaspark.meters import MetricsLog
from megaspark.models import differing
from megaspark.ranks import Ranks
from megaspark.samples import Phase, changed_past
from megaspark.shards import TokenDataset
from megaspark.weights import parameter_shapes

Verify = Callable[[Checkpoint], str | None]  # reads a checkpoint's files; says what is wrong with it


@dataclass(frozen=True)
class Position:
    """How far a run is: its steps, the samples taken, and the updates of its weights.

    A refused step makes no update; after a roll-back more samples were taken than the steps had.
    """

    step: int = 0
    samples: int = 0
    updates: int = 0

    @classmethod
    def of(cls, found: Checkpoint | None) -> Position:
        """Where a checkpoint was written; the beginning without one."""
        return cls(found.step, int(found.state["samples"]), int(found.state.get("updates", found.step))) if found else cls()


def restore(engine: Engine, found: Checkpoint) -> None:
    """Makes a checkpoint's weights, moments and count of updates the engine's; returns when all processes have read it."""
    checkpoint.load(found, fragments.fragments(engine.deepspeed))
    fragments.set_step(engine.deepspeed, Position.of(found).updates)
    fragments.push(engine.deepspeed)
    engine.gather(None)  # nobody writes into the run folder before everybody has read from it


def agree_on_start(checked: Checked, ranks: Ranks) -> Checkpoint | None:
    """What the first process finds to start from (`find_start`), for all of them; they share the work of verifying it.

    Each for itself, they could find different things: a run that was told to stop may be saving still, which the first waits for.
    """
    if ranks.world > 1:
        join(ranks)

    def find(problem: Verify) -> Checkpoint | None:
        claim(checked.config.folder)
        return find_start(checked, say=True, problem=problem)

    try:
        return _together(find, ranks)
    except UserError:
        if ranks.world > 1:
            torch.distributed.destroy_process_group()
        raise


def agree_on_roll_back(checked: Checked, ranks: Ranks) -> Checkpoint | None:
    """The newest whole checkpoint that was not written amid bad steps, for all processes; those after it are removed."""
    run = checked.config.folder

    def find(problem: Verify) -> Checkpoint | None:
        for folder in checkpoint.step_folders(run):
            found, bad = _opened(folder, problem)
            if found is None:
                print(f"cannot roll back to {folder}: {bad}", file=sys.stderr, flush=True)
            elif not found.state.get("bad_steps", {}).get("in_a_row"):
                for removed in checkpoint_writers.discard_after(run, found.step):
                    print(f"{removed} is removed: bad steps led to it, or it is damaged", flush=True)
                return found
        return None

    return _together(find, ranks)


def _together(find: Callable[[Verify], Checkpoint | None], ranks: Ranks) -> Checkpoint | None:
    """What `find` returns to, or raises in, the first process, on all of them; the others verify what it has verified."""
    if ranks.world == 1:
        return find(Checkpoint.problem)
    word, said = _lead(find, ranks) if ranks.first else _follow(ranks)
    if word == "refuse":
        raise UserError(str(said))
    return Checkpoint(Path(said)) if said else None


def _lead(find: Callable[[Verify], Checkpoint | None], ranks: Ranks) -> tuple[str, str | None]:
    """The first process decides; the others verify what it asks them to, until they hear what was decided."""

    def problem(found: Checkpoint) -> str | None:
        _broadcast(("verify", str(found.folder)))
        return _problem_together(str(found.folder), ranks)

    try:
        found = find(problem)
        return _broadcast(("start", str(found.folder) if found else None))
    except UserError as error:
        return _broadcast(("refuse", str(error)))


def _follow(ranks: Ranks) -> tuple[str, str | None]:
    while True:
        word, said = _broadcast(None)
        if word != "verify":
            return word, said
        _problem_together(said, ranks)


def _problem_together(folder: str, ranks: Ranks) -> str | None:
    """Has every process verify its share of a checkpoint's files: one alone would hash for minutes what all wrote in seconds."""
    try:
        found = Checkpoint(Path(folder))
        mine = found.problem(found.share(ranks.rank, ranks.world))
    except BadCheckpoint as error:
        mine = str(error)
    problems: list[str | None] = [None] * ranks.world
    torch.distributed.all_gather_object(problems, mine)
    return next(filter(None, problems), None)


def _broadcast(message: Any) -> Any:
    """The first process's message, on all."""
    box = [message]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _opened(folder: Path, problem: Verify) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint whose every byte is as written, or what is wrong with it."""
    try:
        found = Checkpoint(folder)
        bad = problem(found)
    except BadCheckpoint as error:
        return None, str(error)
    return (found, None) if bad is None else (None, bad)


def find_start(checked: Checked, say: bool, problem: Verify = Checkpoint.problem) -> Checkpoint | None:
    """The checkpoint that `run.resume` asks for: the newest one that is whole and of this model and data, or None.

    A damaged one is named and the one before it tried; raises UserError where one was found but is not this run's, and where
    there were checkpoints once and are none now. problem: verifies one; says what is wrong with it.
    """
    config, run = checked.config, checked.config.run
    folders = checkpoint.step_folders(config.folder)
    if run.resume == "never":
        if folders:
            raise UserError(f"{config.folder} holds checkpoints and run.resume = never; choose another run.name, or auto")
        return None
    damaged = []
    for folder in folders:
        found, bad = _opened(folder, problem)
        if found is not None:
            _check_same_run(checked, found)
            if say:
                print(f"resuming from {folder}", flush=True)
            return found
        damaged.append(str(bad))
        if say:
            print(f"cannot resume from {folder}: {bad}", file=sys.stderr, flush=True)
    if damaged or run.resume == "required":
        raise UserError(f"{config.folder} holds no checkpoint to resume from ({'; '.join(damaged) or 'none was written'})")
    lost = _check_nothing_is_gone(config)
    if say:
        print(f"no checkpoint in {config.folder}: starting at step 0", flush=True)
        if lost:
            text = f"WARNING: {config.folder} was at step {lost} and had not saved yet: these steps are computed again"
            print(text, file=sys.stderr, flush=True)
    return None


def _check_nothing_is_gone(config: RunConfig[Any]) -> int:
    """Refuses to start at step 0 a run that must have saved before; returns the step that one reached which had not saved yet."""
    folder, every = config.folder, config.run.save_every
    reached = MetricsLog(folder).last_step()
    named = checkpoint.latest(folder)
    if named or (every and reached >= 2 * every):  # the first may have been under way still when the second was due
        what = f"{folder}/latest names {named}" if named else f"{folder}/metrics.jsonl goes to step {reached}"
        raise UserError(
            f"{what}, and there is no checkpoint: it would begin again at step 0; put checkpoints/ back, choose another "
            "run.name, or say run.resume=never to throw these steps away"
        )
    return reached


def agree_on_weights(checked: Checked, ranks: Ranks) -> Checkpoint | None:
    """As `find_weights`, for all processes together; they share the work of verifying them."""
    if ranks.world == 1:
        return find_weights(checked, say=True)
    return find_weights(checked, ranks.first, lambda found: _problem_together(str(found.folder), ranks))


def find_weights(checked: Checked, say: bool, problem: Verify = Checkpoint.problem) -> Checkpoint | None:
    """The checkpoint of `run.init_from`, whole and of this run's architecture; None where none is asked for.

    Raises UserError naming the first difference. Its optimizer, step and data do not matter: the run starts at step 0.
    """
    config = checked.config
    if config.run.init_from is None:
        return None
    found = checkpoint.newest(Path(config.run.init_from))
    if bad := problem(found):
        raise UserError(f"run.init_from: {bad}")
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
