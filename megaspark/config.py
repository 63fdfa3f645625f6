"""A run's settings, the numbers that follow from them, and every legality check, before anything starts or is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, field_validator, model_validator

from megaspark import settings, shards
from megaspark.bad_steps import BadSteps
from megaspark.deepspeed_files import read_deepspeed_file
from megaspark.errors import UserError
from megaspark.flops import parameters
from megaspark.kernels import native
from megaspark.kernels.attention_native import MOST_FEATURES
from megaspark.kernels.dispatch import INTERPRETED, backends
from megaspark.layouts import Layout, Parallel, layout
from megaspark.models import architecture
from megaspark.models.blocks import Execution
from megaspark.overlaps import overlap
from megaspark.samples import Phase, Samples, check_phases
from megaspark.settings import Section, Tree, nearest

CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 master and two fp32 moments
FP8_MULTIPLE = 16  # matrix units take 8-bit operands in rows of 16 bytes
VOCAB_PADDING = 1024  # a model's vocabulary may be rounded up past its tokenizer's by less than this


class Change(Section):
    """What is read otherwise from a sample on; what is left unsaid stays as it was."""

    sample: int = Field(gt=0, description="the first sample that is read so; a run's samples are numbered through all steps")
    seq: int | None = Field(None, gt=0, description="tokens of one sample; the sample must begin a step")
    blend: dict[str, float] | Literal["tokens"] | None = Field(None, description="shares by dataset, or tokens: by their size")
    packing: Literal["plain", "best_fit"] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Change:
        if self.seq is None and self.blend is None and self.packing is None:
            raise ValueError(f"the change at sample {self.sample} changes nothing: give seq, blend or packing")
        return self


class Data(Section):
    """What is trained on: token datasets made by `megaspark prep`."""

    train: str
    validation: str | None = None
    seq: int = Field(gt=0, description="tokens of one sample")
    document_mask: bool = Field(True, description="attention stays inside each document and positions restart there")
    blend: dict[str, float] | None = Field(None, description="share of the samples by dataset; default: by tokens")
    packing: Literal["plain", "best_fit"] = Field("plain", description="best_fit: put documents together so that few are cut")
    changes: list[Change] = Field(default_factory=list, description="changes of seq, blend or packing in mid-run")
    tokenizer: str | None = Field(None, description="a tokenizer file that the data must have been made with")

    @field_validator("blend")
    @classmethod
    def _positive(cls, blend: dict[str, float] | None) -> dict[str, float] | None:
        if blend is not None and (not blend or min(blend.values()) <= 0):
            raise ValueError("every weight of a blend must be above 0; leave a dataset out to skip it")
        return blend

    @property
    def phases(self) -> list[Phase]:
        """The blend and the cut of the samples from the first on, and what each change makes of them."""
        phases = [Phase(0, self.seq, self.blend, self.packing)]
        for change in self.changes:
            last = phases[-1]
            blend = None if change.blend == "tokens" else change.blend or last.blend
            phases.append(Phase(change.sample, change.seq or last.seq, blend, change.packing or last.packing))
        return phases

    @model_validator(mode="after")
    def _changes_in_order(self) -> Data:
        check_phases(self.phases)
        return self


class Optim(Section):
    """AdamW with a cosine schedule."""

    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 = no clipping")
    z_loss: float = Field(0.0, ge=0, description="weight of log(softmax's denominator)^2, in the training loss and its gradient")

    @model_validator(mode="after")
    def _ordered(self) -> Optim:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr = {self.min_lr} is above optim.lr = {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas = {list(self.betas)}: each must lie in [0, 1)")
        return self


class Run(Section):
    """How long, how much at a time, and where it is kept."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: str = "runs"
    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0, description="samples a step, over all processes")
    micro_batch: int = Field(gt=0, description="samples that one process works on at a time")
    seed: int = Field(1234, ge=0)
    precision: Literal["bf16", "fp32", "fp8"] = Field("bf16", description="fp8: bf16 with the blocks' linears in 8 bits")
    fp8_scaling: Literal["tensor", "row"] = Field("tensor", description="one scale for a whole operand, or one a row")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward computes again: nothing, all but matrix products and attention, or whole blocks"
    )
    compile: bool = Field(False, description="torch.compile of every block: minutes at the start, faster steps")
    save_every: int = Field(1000, ge=0, description="steps between checkpoints; 0 = only the last")
    save_async: bool = Field(True, description="write in the background, from a copy: 12 bytes a parameter held, in host memory")
    keep_last: int = Field(2, ge=0, description="checkpoints kept; 0 = all")
    keep_every: int = Field(0, ge=0, description="checkpoints whose step divides by this are kept besides; 0 = none")
    eval_every: int = Field(1000, ge=0, description="steps between evaluations; 0 = never")
    eval_batches: int = Field(4, gt=0, description="global batches of samples of each validation dataset in one evaluation")
    resume: Literal["auto", "required", "never"] = "auto"
    init_from: str | None = Field(None, description="a checkpoint or run folder whose weights step 0 starts from")
    stop_after: int | None = Field(None, gt=0, description="end early at this step, with a checkpoint")
    hang_after_s: float = Field(600.0, ge=0, description="a step that lasts longer ends the run, with stacks; 0 = never")

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> Run:
        if self.save_every and self.keep_every % self.save_every:
            near = max(1, round(self.keep_every / self.save_every)) * self.save_every
            raise ValueError(f"run.keep_every = {self.keep_every} is no multiple of run.save_every = {self.save_every}: set {near}")
        return self


ModelT = TypeVar("ModelT", bound=Section)


class RunConfig(Section, Generic[ModelT]):
    """One YAML file: everything that a run is."""

    model: ModelT
    data: Data
    optim: Optim
    parallel: Parallel = Parallel()
    run: Run
    bad_steps: BadSteps = BadSteps()
    kernels: dict[str, str] = Field(default_factory=dict, description="the implementation of an op by name: {attention: sdpa}")
    deepspeed: str = "zero1.json"

    @field_validator("kernels")
    @classmethod
    def _known_kernels(cls, kernels: dict[str, str]) -> dict[str, str]:
        for op, backend in kernels.items():
            if op not in backends():
                raise ValueError(f"there is no op {op!r}{nearest(op, [*backends()])}")
            if backend not in backends()[op]:
                raise ValueError(f"{op} has no backend {backend!r}{nearest(backend, backends()[op])}")
        return kernels

    @property
    def execution(self) -> Execution:
        """How the model is to compute."""
        fp8 = self.run.fp8_scaling if self.run.precision == "fp8" else None
        return Execution(self.kernels, fp8, self.optim.z_loss, self.run.recompute)

    @property
    def folder(self) -> Path:
        """Where the run keeps what it makes."""
        return Path(self.run.dir) / self.run.name

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain data."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Checked:
    """A run whose every setting was found legal: the config, its layout, and what its data is."""

    config: RunConfig[Any]
    layout: Layout
    train: dict[str, shards.TokenDataset]
    validation: dict[str, shards.TokenDataset]


def load_config(path: str | Path, overrides: Sequence[str]) -> tuple[RunConfig[Any], Tree]:
    """Reads a run's YAML and its overrides; raises UserError for the first thing that is not right in them.

    Returns the config and the places where its values were said. `model.size` fills what the model section leaves unsaid.
    """
    tree = settings.read(path, overrides)
    said = tree.values.get("model", {})
    if not isinstance(said, dict):
        raise UserError(f"model = {said!r} ({tree.place('model')}) should be a section: model: {{arch: llama, size: 3b}}")
    module = architecture(str(said.get("arch", "llama")))
    size = said.get("size")
    if size is not None:
        if size not in module.SIZES:
            place = tree.place("model.size")
            raise UserError(f"model.size = {size!r} ({place}) is no preset{nearest(str(size), [*module.SIZES])}")
        for key, value in module.SIZES[size].items():
            if key not in said:
                tree.set(f"model.{key}", value, f"model.size={size}")
    return settings.check(tree, RunConfig[module.Config]), tree


def check_run(config: RunConfig[Any], tree: Tree, world: int) -> Checked:
    """Holds a config against the number of processes, the DeepSpeed file, the data and the disk; writes nothing.

    Raises UserError for the first conflict, naming both sides and the nearest legal choice.
    """
    place = tree.place("deepspeed").rpartition(":")[0]
    file = read_deepspeed_file(config.deepspeed, Path(place).parent if Path(place).is_file() else None)
    checked_layout = layout(config, file, world)
    _check_kernels(config, checked_layout)
    train = open_datasets(config.data.train)
    validation = open_datasets(config.data.validation) if config.data.validation else {}
    if config.run.eval_every and not validation and tree.place("run.eval_every") != "default":
        raise UserError(f"run.eval_every = {config.run.eval_every} needs data.validation; set it, or run.eval_every=0")
    _check_data(config, {**train, **{f"validation/{name}": d for name, d in validation.items()}})
    _check_blend(config, train)
    _check_samples(config, train)
    if validation and (found := overlap(train, validation)):
        raise UserError(f"{found}; a loss on it would say nothing: set data.validation to data that are not trained on")
    _check_disk(config)
    return Checked(config, checked_layout, train, validation)


def open_datasets(path: str) -> dict[str, shards.TokenDataset]:
    """The datasets under a folder by name; raises UserError naming the prep command where there are none."""
    return {name: shards.TokenDataset(folder) for name, folder in shards.datasets_in(path).items()}


def _not_native(op: str, config: RunConfig[Any]) -> str | None:
    """Why an op cannot be computed by its C++ in this run, or None if it can."""
    if torch.cuda.is_available():
        return "runs on CPUs, and there is a GPU here"
    if not native.available():
        return "needs a C++ compiler, and there is none here that works (on Debian: apt-get install g++)"
    if op == "attention" and config.model.dim > MOST_FEATURES:
        return f"takes heads of up to {MOST_FEATURES} features, not {config.model.dim}"
    return None


def _check_kernels(config: RunConfig[Any], layout: Layout) -> None:
    for op, backend in config.kernels.items():
        if backend == "native" and (why := _not_native(op, config)):
            raise UserError(f"kernels.{op} = native {why}; set kernels.{op}=auto")
    if not (torch.cuda.is_available() or INTERPRETED):
        for op, backend in config.kernels.items():
            if backend.startswith("triton"):
                raise UserError(
                    f"kernels.{op} = {backend} needs a GPU, and there is none here; set kernels.{op}=auto, or TRITON_INTERPRET=1 "
                    "in the environment to see its numbers, slowly"
                )
    if config.run.compile and layout.stage == 3:
        raise UserError(
            f"run.compile = true cannot go with ZeRO stage 3 ({config.deepspeed}), which gathers a module's weights around its "
            "call; set deepspeed=zero2.json or run.compile=false"
        )
    if config.run.recompute == "selective" and layout.stage == 3:
        raise UserError(
            f"run.recompute = selective cannot go with ZeRO stage 3 ({config.deepspeed}), which gathers weights amid what "
            "is computed again; set run.recompute=full or deepspeed=zero2.json"
        )
    if config.run.compile and config.run.recompute == "selective":
        raise UserError(
            "run.recompute = selective cannot go with run.compile = true, which chooses by itself what it computes again; "
            "set run.recompute=none or full"
        )
    if config.run.precision == "fp8":
        model, tokens = config.model, config.run.micro_batch * config.data.seq
        if model.layers < 3:
            raise UserError(
                f"run.precision = fp8 keeps the first and the last block in bf16, and model.layers = {model.layers} leaves none; "
                "set run.precision=bf16"
            )
        widths = {
            "model.hidden": model.hidden, "model.ffn": model.ffn, "heads x head_dim": model.heads * model.dim,
            "kv_heads x head_dim": model.kv_heads * model.dim, "run.micro_batch x data.seq": tokens,
        }  # fmt: skip
        parts = config.parallel.tensor * config.parallel.sequence
        for name, width in widths.items():
            if width % (FP8_MULTIPLE * parts):
                raise UserError(
                    f"run.precision = fp8 needs {name} = {width} to divide by {FP8_MULTIPLE}"
                    f"{f' x {parts} parts' if parts > 1 else ''}; set run.precision=bf16"
                )


def _check_data(config: RunConfig[Any], datasets: dict[str, shards.TokenDataset]) -> None:
    first_name, first = next(iter(datasets.items()))
    model = config.model
    for name, dataset in datasets.items():
        manifest = dataset.manifest
        if manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise UserError(
                f"datasets {first_name} and {name} were made with different tokenizers "
                f"({first.manifest.tokenizer} and {manifest.tokenizer}); prepare one of them again"
            )
        if dataset.tokens <= config.data.seq:
            raise UserError(
                f"{dataset.folder} holds {dataset.tokens} tokens, too few for one sample of data.seq = {config.data.seq}"
            )
        if config.data.document_mask and not manifest.append_eos:
            raise UserError(
                f"{dataset.folder} was prepared with append_eos: false, and data.document_mask = true finds documents by it; "
                "set data.document_mask=false, or prepare the data again"
            )
    vocab = first.manifest.vocab
    if not vocab <= model.vocab < vocab + VOCAB_PADDING:
        raise UserError(
            f"model.vocab = {model.vocab}, but the tokenizer of {first.folder} ({first.manifest.tokenizer}) has {vocab} "
            f"entries; set model.vocab={vocab}"
        )
    if config.data.tokenizer:
        path = Path(config.data.tokenizer)
        if not path.is_file():
            raise UserError(f"data.tokenizer = {path}: no such file")
        if shards.sha256_of(path) != first.manifest.tokenizer_sha256:
            raise UserError(
                f"data.tokenizer = {path} is not the tokenizer that {first.folder} was made with "
                f"({first.manifest.tokenizer}, sha256 {first.manifest.tokenizer_sha256[:12]}...); prepare the data with it"
            )


def _check_blend(config: RunConfig[Any], train: dict[str, shards.TokenDataset]) -> None:
    for phase in config.data.phases:
        for name in phase.blend or {}:
            if name not in train:
                raise UserError(f"data.blend names {name}, which is no dataset of {config.data.train}{nearest(name, [*train])}")


def _check_samples(config: RunConfig[Any], train: dict[str, shards.TokenDataset]) -> None:
    try:
        Samples(train, config.data.phases, config.run.seed)
    except ValueError as error:
        raise UserError(f"{config.data.train}: {error}") from None


def _check_disk(config: RunConfig[Any]) -> None:
    folder = config.folder
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"run.dir: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"run.dir: you may not write into {folder}; set run.dir to a folder of yours")
    count = parameters(config.model.shape, tied=config.model.tie_embeddings)
    need, free = count * CHECKPOINT_BYTES_PER_PARAMETER, shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            f"no space for a checkpoint in {config.folder}: {count:,} parameters take {need / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB are free; set run.dir to a larger disk"
        )
