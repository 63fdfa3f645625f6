"""What a data-prep job is: its settings, its input files, and the work units that follow from these alone.

The plan is fixed before work starts and depends on nothing but the input, so the output is the same, byte for byte, for any
number of workers, any order in which they finish, and any interruption.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megaspark import settings
from megaspark.data_prep.documents import SUFFIXES, check_suffix
from megaspark.data_prep.encode import Encoder, load_tokenizer
from megaspark.data_prep.steps import Spec, load_steps
from megaspark.errors import UserError

# Tokens that 100 bytes of a file are taken for when work is cut into units. SlimPajama: 627e9 tokens in 895e9 bytes of .zst;
# 4 bytes of plain text a token; gzip between the two.
_TOKENS_PER_100_BYTES = {".jsonl": 25, ".gz": 60, ".zst": 70}


class PrepSettings(settings.Section):
    """A data-prep job as its YAML file says it; paths are relative to the current folder."""

    input: list[str]
    output: str
    tokenizer: str
    split_by: Literal["source"] | None = None
    shard_tokens: int = Field(default=1 << 30, gt=0)
    append_eos: bool = True
    prepend_bos: bool = False
    steps: list[Spec] = Field(default_factory=list)
    on_bad_input: Literal["skip", "fail"] = "skip"
    text_field: str = "text"
    source_field: str = "meta.redpajama_set_name"
    workers: int | None = Field(default=None, gt=0)

    @field_validator("input", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class InputFile:
    """An input file as it was when the work was planned."""

    path: str
    size_bytes: int
    mtime_ns: int

    def check_unchanged(self) -> None:
        """Raises UserError if the file is no longer what was planned for."""
        stat = os.stat(self.path)
        if (stat.st_size, stat.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise UserError(f"{self.path} changed while it was read; start the job anew, with another output")


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
    """A checked job: all that a worker must know, and it pickles."""

    settings: PrepSettings
    tokenizer_sha256: str
    units: tuple[Unit, ...]

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

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output, as JSON: a job may go on only with the same."""
        free = {"input", "output", "tokenizer", "workers", "on_bad_input"}
        return {
            "settings": self.settings.model_dump(exclude=free),
            "tokenizer_sha256": self.tokenizer_sha256,
            "inputs": [[file.path, file.size_bytes, file.mtime_ns] for file in self.files],
        }

    def settings_sha256(self) -> str:
        """The hash of the settings and the tokenizer, without the input."""
        identity = self.identity()
        return settings.digest([identity["settings"], identity["tokenizer_sha256"]])


def load_job(path: str, overrides: Sequence[str]) -> Job:
    """Reads and checks a job file, finds its input and plans the work; raises UserError, nothing is written yet."""
    chosen, _ = settings.load(path, overrides, PrepSettings)
    encoder = load_tokenizer(chosen.tokenizer)
    if chosen.prepend_bos and encoder.bos_id is None:
        raise UserError(f"prepend_bos: {chosen.tokenizer} has no begin-of-text token")
    load_steps(chosen.steps)
    return Job(chosen, encoder.sha256, tuple(plan_units(find_inputs(chosen.input), chosen.shard_tokens)))


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that the patterns match, sorted by path; one file found twice is kept once, by whatever name it was found.

    Raises UserError for a pattern that matches no file and for a file of an unknown kind.
    """
    names: set[str] = set()
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            files = f"; it is a folder, its files are {pattern}/**/*.jsonl.zst" if os.path.isdir(pattern) else ""
            raise UserError(f"input: no file matches {pattern!r} in {os.getcwd()}{files}")
        names.update(found)
    by_file: dict[str, str] = {}
    for name in sorted(names):
        check_suffix(name)
        if not os.path.isfile(name):
            raise UserError(f"input: {name} is no file (a link to nothing?)")
        by_file.setdefault(os.path.realpath(name), name)
    if not by_file:
        raise UserError(f"input: names no file (of the kinds {', '.join(SUFFIXES)})")
    stats = {name: os.stat(name) for name in by_file.values()}
    return [InputFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]


def plan_units(files: Sequence[InputFile], shard_tokens: int) -> Iterator[Unit]:
    """Groups consecutive files until the next would bring the estimate over `shard_tokens`."""
    number, group, tokens = 0, [], 0
    for file in files:
        estimate = file.size_bytes * _TOKENS_PER_100_BYTES[Path(file.path).suffix] // 100
        if group and tokens + estimate > shard_tokens:
            yield Unit(number, tuple(group))
            number, group, tokens = number + 1, [], 0
        group.append(file)
        tokens += estimate
    if group:
        yield Unit(number, tuple(group))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities of a job, in words."""
    old, new = before["settings"], now["settings"]
    said = [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if before["tokenizer_sha256"] != now["tokenizer_sha256"]:
        said.append("the tokenizer is another")
    old_files, new_files = ({path: rest for path, *rest in identity["inputs"]} for identity in (before, now))
    for words, paths in (
        ("new", new_files.keys() - old_files.keys()),
        ("gone", old_files.keys() - new_files.keys()),
        ("changed", {path for path in old_files.keys() & new_files.keys() if old_files[path] != new_files[path]}),
    ):
        if paths:
            said.append(f"{len(paths)} input files are {words} ({min(paths)}{' ...' if len(paths) > 1 else ''})")
    return said
