"""What a data-prep job is: its settings, its input files, and the work units that follow from these alone.

The plan is fixed before work starts and depends on nothing but the input, so the output is the same, byte for byte, for any
number of workers, any order in which they finish, and any interruption.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megaspark import settings
from megaspark.data_prep.documents import Document, read_documents
from megaspark.data_prep.encode import BatchEncoder, Encoder, load_tokenizer
from megaspark.data_prep.fast_encoders import AUTO, REFERENCE, load_encoder
from megaspark.data_prep.sources import DATASET, InputFile, Inputs, find_inputs
from megaspark.data_prep.steps import Spec, Step, load_steps
from megaspark.errors import UserError

# Tokens that 100 bytes of a file are taken for when work is cut into units. SlimPajama: 627e9 tokens in 895e9 bytes of .zst;
# 4 bytes of plain text a token, which is also what a dataset says of itself; gzip and parquet between the two.
_TOKENS_PER_100_BYTES = {".jsonl": 25, ".gz": 60, ".zst": 70, ".parquet": 50}
_FREE = {"input", "output", "tokenizer", "workers", "on_bad_input", "encoder"}  # settings that decide no byte of the output
_SAMPLE_FILES = 512
_SAMPLE_CHARS = 1 << 21


class PrepSettings(settings.Section):
    """A data-prep job as its YAML file says it; paths are relative to the current folder.

    `input` may hold paths, globs, URLs of fsspec's and datasets, `holdout` is the fraction of texts that go to OUTPUT/holdout.
    """

    input: Inputs
    output: str
    tokenizer: str
    encoder: Literal["auto", "reference", "gigatoken", "kitoken"] = AUTO
    holdout: float = Field(default=0.0, ge=0, lt=1)
    split_by: Literal["source"] | None = None
    shard_tokens: int = Field(default=1 << 30, gt=0)
    append_eos: bool = True
    prepend_bos: bool = False
    steps: list[Spec] = Field(default_factory=list)
    on_bad_input: Literal["skip", "fail"] = "skip"
    text_field: str = "text"
    source_field: str = "meta.redpajama_set_name"
    workers: int | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class Unit:
    """Consecutive input files that together make about one shard; done by one worker, whole or not at all."""

    number: int
    files: tuple[InputFile, ...]

    @property
    def name(self) -> str:
        """The unit's folder among the work in progress."""
        return f"unit-{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """A checked job: all that a worker must know, and it pickles; `encoder_name` is what it runs, for the same ids."""

    settings: PrepSettings
    tokenizer_sha256: str
    units: tuple[Unit, ...]
    encoder_name: str = REFERENCE
    step_inputs: tuple[str, ...] = ()  # fingerprints of what steps read beside the documents

    @property
    def output(self) -> Path:
        """The folder that the job fills."""
        return Path(self.settings.output)

    @property
    def files(self) -> Iterator[InputFile]:
        """All input files, in order."""
        return (file for unit in self.units for file in unit.files)

    def encoder(self) -> Encoder:
        """The job's tokenizer; raises UserError if its file is no longer the one that the job began with."""
        encoder = load_tokenizer(self.settings.tokenizer)
        if encoder.sha256 != self.tokenizer_sha256:
            raise UserError(f"{self.settings.tokenizer} changed since the job began; start it anew, with another output")
        return encoder

    def batch_encoder(self) -> BatchEncoder:
        """What the job runs: the job's tokenizer, or a faster one with the same ids."""
        return load_encoder(self.encoder_name, self.settings.tokenizer)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output, as JSON: a job may go on only with the same."""
        return {
            "settings": self.settings.model_dump(exclude=_FREE),
            "tokenizer_sha256": self.tokenizer_sha256,
            "step_inputs": list(self.step_inputs),
            "inputs": [[file.path, file.size_bytes, file.version] for file in self.files],
        }

    def settings_sha256(self) -> str:
        """The hash of the settings and the tokenizer, without the input."""
        identity = self.identity()
        return settings.digest([identity["settings"], identity["tokenizer_sha256"], identity["step_inputs"]])


def load_job(path: str, overrides: Sequence[str]) -> Job:
    """Reads and checks a job file, finds its input and plans the work; raises UserError, nothing is written yet."""
    chosen, _ = settings.load(path, overrides, PrepSettings)
    encoder = load_tokenizer(chosen.tokenizer)
    if chosen.prepend_bos and encoder.bos_id is None:
        raise UserError(f"prepend_bos: {chosen.tokenizer} has no begin-of-text token")
    fingerprints = tuple(_fingerprints(load_steps(chosen.steps)))
    units = tuple(plan_units(find_inputs(chosen.input), chosen.shard_tokens))
    return Job(chosen, encoder.sha256, units, step_inputs=fingerprints)


def _fingerprints(steps: Sequence[Step]) -> Iterator[str]:
    """What the steps that read more than documents say of it, by the `fingerprint` of their modules."""
    for step in steps:
        fingerprint = getattr(sys.modules[step.function.__module__], "fingerprint", None)
        if fingerprint:
            yield fingerprint(**step.arguments)


def plan_units(files: Sequence[InputFile], shard_tokens: int) -> Iterator[Unit]:
    """Groups consecutive files until the next would bring the estimate over `shard_tokens`."""
    number, group, tokens = 0, [], 0
    for file in files:
        estimate = _estimated_tokens(file, shard_tokens)
        if group and tokens + estimate > shard_tokens:
            yield Unit(number, tuple(group))
            number, group, tokens = number + 1, [], 0
        group.append(file)
        tokens += estimate
    if group:
        yield Unit(number, tuple(group))


def _estimated_tokens(file: InputFile, shard_tokens: int) -> int:
    """About how many tokens a file makes; one of unknown size is taken for a whole unit."""
    if file.path.startswith(DATASET):
        return file.size_bytes // 4 or shard_tokens
    return file.size_bytes * _TOKENS_PER_100_BYTES[Path(file.path).suffix] // 100


def sample_texts(job: Job) -> list[str]:
    """About two million characters of the job's own text: the first documents of files from all over the input."""
    files = list(job.files)
    chosen = random.Random(0).sample(files, min(_SAMPLE_FILES, len(files)))
    texts: list[str] = []
    total_chars = 0
    for file in chosen:
        end_chars = total_chars + _SAMPLE_CHARS // min(64, len(files))
        for item in takewhile(lambda _: total_chars < end_chars, _documents(job, file)):  # noqa: B023 (used up at once)
            texts.append(item.text[:_SAMPLE_CHARS])
            total_chars += len(texts[-1])
        if total_chars >= _SAMPLE_CHARS:
            break
    return texts


def _documents(job: Job, file: InputFile) -> Iterator[Document]:
    found = read_documents(file.path, job.settings.text_field, job.settings.source_field)
    return (item for item in found if isinstance(item, Document))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities of a job, in words."""
    old, new = before["settings"], now["settings"]
    said = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        said.append("the tokenizer is another")
    if before.get("step_inputs", []) != now["step_inputs"]:
        said.append("what a step reads, such as a set of duplicates, is another")
    old_files, new_files = ({path: rest for path, *rest in identity["inputs"]} for identity in (before, now))
    for words, paths in (
        ("new", new_files.keys() - old_files.keys()),
        ("gone", old_files.keys() - new_files.keys()),
        ("changed", {path for path in old_files.keys() & new_files.keys() if old_files[path] != new_files[path]}),
    ):
        if paths:
            said.append(f"{len(paths)} input files are {words} ({min(paths)}{' ...' if len(paths) > 1 else ''})")
    return said
