"""Does one work unit: input files in, a shard for each dataset and a record of every document out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

import numpy as np

from megaspark.data_prep.documents import BadInput, Document, read_documents
from megaspark.data_prep.encode import Encoder
from megaspark.data_prep.jobs import InputFile, Job, Unit
from megaspark.data_prep.steps import Step, load_steps, reason_to_drop
from megaspark.errors import UserError
from megaspark.shards import UNFINISHED, Counts, ShardInfo, ShardWriter, dtype_for, write_atomically

BAD = "bad.jsonl"
STOP = "stop"  # while a file of this name lies among the work in progress, workers end

_DONE = "done.json"
_BATCH_CHARS = 1 << 20
_MAX_SOURCES = 256  # each is an open file
_REPORT_S = 1.0


@dataclass
class Record:
    """What became of a unit: its shards, still under staging names, and its documents by source."""

    shards: list[ShardInfo] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record of a finished unit, None while it is not finished."""
        try:
            values = json.loads((folder / _DONE).read_bytes())
        except FileNotFoundError:
            return None
        shards = [ShardInfo(**{**shard, "inputs": tuple(shard["inputs"])}) for shard in values["shards"]]
        return cls(shards, {source: Counts(**counts) for source, counts in values["counts"].items()})


def unit_folder(job: Job, unit: Unit) -> Path:
    """Where a unit's shards wait for the others."""
    return job.output / UNFINISHED / unit.name


def read_progress(job: Job, unit: Unit) -> dict[str, int]:
    """How far a unit is: files, input_bytes, text_bytes and tokens done; empty before the first report."""
    try:
        return json.loads(unit_folder(job, unit).with_suffix(".progress").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def folder_name(source: str) -> str:
    """A source's name as a folder: what a file name cannot hold is percent-encoded, so different sources stay different."""
    name = quote(source, safe=" +,=@")
    if name.startswith(".") or name == BAD:
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return name


def encode_unit(job: Job, unit: Unit) -> Record:
    """Does a unit from its first file to its completion record; whatever an earlier attempt left is thrown away."""
    folder = unit_folder(job, unit)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return _UnitWork(job, unit, folder).run()


class _UnitWork:
    """The state of one unit's work."""

    def __init__(self, job: Job, unit: Unit, folder: Path):
        self.job, self.unit, self.folder = job, unit, folder
        self.encoder: Encoder = job.encoder()
        self.steps: list[Step] = load_steps(job.settings.steps)
        self.before = [self.encoder.bos_id] if job.settings.prepend_bos else []
        self.after = [self.encoder.eos_id] if job.settings.append_eos else []
        self.record = Record()
        self.writers: dict[str, ShardWriter] = {}
        self.progress = {"files": 0, "input_bytes": 0, "text_bytes": 0, "tokens": 0}
        self.reported_s = 0.0

    def run(self) -> Record:
        with ExitStack() as open_files:
            bad: TextIO = open_files.enter_context(open(self.folder / BAD, "w", encoding="utf-8"))
            for file in self.unit.files:
                for batch in _batches(self._kept(self._sound(file, bad))):
                    self._write(batch, open_files)
                    self._report()
                file.check_unchanged()
                self.progress["files"] += 1
                self.progress["input_bytes"] += file.size_bytes
        self.record.shards = [writer.info for _, writer in sorted(self.writers.items()) if writer.info]
        write_atomically(self.folder / _DONE, json.dumps(asdict(self.record), sort_keys=True).encode())
        self._report(last=True)
        return self.record

    def _counts(self, source: str) -> Counts:
        if source not in self.record.counts and len(self.record.counts) >= _MAX_SOURCES:
            name = self.job.settings.source_field
            raise UserError(f"source_field: {name} has over {_MAX_SOURCES} values; it should name the set of a document")
        return self.record.counts.setdefault(source, Counts())

    def _sound(self, file: InputFile, bad: TextIO) -> Iterator[Document]:
        """The documents of a file; what is none is counted and written down, or ends the job."""
        options = self.job.settings
        for item in read_documents(file.path, options.text_field, options.source_field):
            counts = self._counts(item.source)
            counts.read += 1
            if isinstance(item, Document):
                yield item
                continue
            counts.bad += 1
            if options.on_bad_input == "fail":
                raise UserError(f"{describe(asdict(item))}; with on_bad_input: skip it would be counted and left out")
            bad.write(json.dumps(_bad_line(item)) + "\n")

    def _kept(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            reason = reason_to_drop(document, self.steps)
            if reason:
                self._counts(document.source).drop(reason)
            else:
                yield document

    def _write(self, batch: list[Document], open_files: ExitStack) -> None:
        for document, ids in zip(batch, self.encoder.encode_batch([d.text for d in batch]), strict=True):
            counts = self._counts(document.source)
            if not len(ids):  # a tokenizer may make nothing of a text of spaces
                counts.drop("empty")
                continue
            tokens = np.concatenate([self.before, ids, self.after], dtype=np.int64, casting="unsafe")
            self._writer(document.source, open_files).add(tokens)
            size_bytes = len(document.text) if document.text.isascii() else len(document.text.encode())
            counts.kept += 1
            counts.tokens += len(tokens)
            counts.text_bytes += size_bytes
            self.progress["tokens"] += len(tokens)
            self.progress["text_bytes"] += size_bytes

    def _writer(self, source: str, open_files: ExitStack) -> ShardWriter:
        """The shard for a source, opened when its first document comes."""
        name, source = (folder_name(source), source) if self.job.settings.split_by else ("all", "")
        if name not in self.writers:
            inputs = [file.path for file in self.unit.files]
            writer = ShardWriter(self.folder, name, dtype_for(self.encoder.vocab), source, inputs)
            self.writers[name] = open_files.enter_context(writer)
        return self.writers[name]

    def _report(self, last: bool = False) -> None:
        """Once a second: tells how far the unit is, and ends it if the job is stopping."""
        now = time.monotonic()
        if now - self.reported_s < _REPORT_S and not last:
            return
        self.reported_s = now
        self.folder.with_suffix(".progress").write_text(json.dumps(self.progress))
        if (self.folder.parent / STOP).exists():
            raise RuntimeError("another unit failed")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups documents until a batch holds about a million characters."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _bad_line(item: BadInput) -> dict[str, Any]:
    return {"file": item.file, "line": item.line, "reason": item.reason}


def describe(bad: dict[str, Any]) -> str:
    """A line of bad.jsonl in words: FILE:LINE: reason."""
    return f"{bad['file']}{'' if bad['line'] is None else ':' + str(bad['line'])}: {bad['reason']}"
