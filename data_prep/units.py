"""Does one work unit: input files in, a shard for each dataset and a record of every document out."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

import numpy as np

from megaspark.data_prep.documents import BadInput, Document, batches, read_documents
from megaspark.data_prep.encode import Ids
from megaspark.data_prep.fast_encoders import REFERENCE, UnequalIds
from megaspark.data_prep.jobs import Job, Unit
from megaspark.data_prep.sources import InputFile
from megaspark.data_prep.steps import apply_steps, load_steps
from megaspark.errors import UserError
from megaspark.shards import UNFINISHED, Counts, ShardInfo, ShardWriter, dtype_for, write_atomically

BAD = "bad.jsonl"
HOLDOUT = "holdout"
STOP = "stop"  # while a file of this name lies among the work in progress, workers end

_DONE = "done.json"
_BATCH_CHARS = 1 << 20
_MAX_SOURCES = 256  # each is an open file
_REPORT_S = 1.0


@dataclass
class Record:
    """What became of a unit: its shards, still under staging names, and its documents by source.

    To `counts` a text that went to the holdout is one dropped for the reason HOLDOUT; `holdout_counts` are of these alone.
    """

    shards: list[ShardInfo] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)
    holdout_shards: list[ShardInfo] = field(default_factory=list)
    holdout_counts: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record of a finished unit, None while it is not finished."""
        try:
            values = json.loads((folder / _DONE).read_bytes())
        except FileNotFoundError:
            return None
        shards, held = (
            [ShardInfo(**{**shard, "inputs": tuple(shard["inputs"])}) for shard in values[name]]
            for name in ("shards", "holdout_shards")
        )
        counts, held_counts = (
            {source: Counts(**said) for source, said in values[name].items()} for name in ("counts", "holdout_counts")
        )
        return cls(shards, counts, held, held_counts)


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
    if name.startswith(".") or name in (BAD, HOLDOUT):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return name


def in_holdout(text: str, fraction: float) -> bool:
    """Whether a text belongs to the holdout: decided by its SHA-256 alone, so that equal texts are on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


def with_ends(ids: Ids, before: Sequence[int], after: Sequence[int]) -> Ids:
    """Puts the ids `before` before each text's ids and `after` behind them; at most one each."""
    lengths = ids.lengths + len(before) + len(after)
    ends = np.cumsum(lengths)
    flat = np.empty(ends[-1], ids.flat.dtype)
    inner = np.ones(len(flat), bool)
    for end, places in ((before, ends - lengths), (after, ends - 1)):
        if end:
            flat[places], inner[places] = end[0], False
    flat[inner] = ids.flat
    return Ids(flat, lengths)


def encode_unit(job: Job, unit: Unit) -> Record:
    """Does a unit from its first file to its completion record; whatever an earlier attempt left is thrown away."""
    try:
        return _UnitWork(job, unit).run()
    except UnequalIds as error:
        print(f"megaspark prep: {error}; {unit.name} is done again by the reference", file=sys.stderr, flush=True)
        return _UnitWork(replace(job, encoder_name=REFERENCE), unit).run()


class _UnitWork:
    """The state of one unit's work."""

    def __init__(self, job: Job, unit: Unit):
        self.job, self.unit, self.folder = job, unit, unit_folder(job, unit)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        reference = job.encoder()
        self.encoder, self.vocab = job.batch_encoder(), reference.vocab
        self.steps = load_steps(job.settings.steps)
        self.before = [reference.bos_id] if job.settings.prepend_bos and reference.bos_id is not None else []
        self.after = [reference.eos_id] if job.settings.append_eos else []
        self.record = Record()
        self.writers: dict[tuple[str, bool], ShardWriter] = {}
        self.progress = {"files": 0, "input_bytes": 0, "text_bytes": 0, "tokens": 0}
        self.reported_s = 0.0

    def run(self) -> Record:
        with ExitStack() as open_files:
            bad: TextIO = open_files.enter_context(open(self.folder / BAD, "w", encoding="utf-8"))
            for file in self.unit.files:
                for batch in batches(self._kept(self._sound(file, bad)), _BATCH_CHARS):
                    self._write(batch, open_files)
                    self._report()
                file.check_unchanged()
                self.progress["files"] += 1
                self.progress["input_bytes"] += file.size_bytes
        done = [(held, writer.info) for (_, held), writer in sorted(self.writers.items()) if writer.info]
        self.record.shards = [info for held, info in done if not held]
        self.record.holdout_shards = [info for held, info in done if held]
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
            result = apply_steps(document, self.steps)
            if isinstance(result, str):
                self._counts(document.source).drop(result)
            else:
                yield result

    def _write(self, batch: Sequence[Document], open_files: ExitStack) -> None:
        """Adds a batch to the shards: one for each set, in the order of the input, and one for its holdout."""
        groups: dict[tuple[str, bool], list[Document]] = {}
        fraction, by_source = self.job.settings.holdout, self.job.settings.split_by
        for document in batch:
            held = bool(fraction) and in_holdout(document.text, fraction)
            groups.setdefault((document.source if by_source else "", held), []).append(document)
        for (source, held), documents in groups.items():
            ids = self.encoder.encode([document.text for document in documents])
            if ids.flat.size and not 0 <= ids.flat.min() <= ids.flat.max() < self.vocab:
                raise ValueError(f"ids from {ids.flat.min()} to {ids.flat.max()}, but the vocabulary is {self.vocab}")
            if not ids.lengths.all():  # a tokenizer may make nothing of a text of spaces
                documents = self._without_empty(documents, ids)
                ids = Ids(ids.flat, ids.lengths[ids.lengths > 0])
            if documents:
                ids = with_ends(ids, self.before, self.after)
                self._writer(source, held, open_files).add_many(ids.flat, ids.lengths)
                self._count(documents, ids.lengths, held)

    def _without_empty(self, documents: Sequence[Document], ids: Ids) -> list[Document]:
        kept = []
        for document, length in zip(documents, ids.lengths, strict=True):
            if length:
                kept.append(document)
            else:
                self._counts(document.source).drop("empty")
        return kept

    def _count(self, documents: Sequence[Document], lengths: np.ndarray, held: bool) -> None:
        sources = [document.source for document in documents]
        for source in dict.fromkeys(sources):
            mine = np.array([source == other for other in sources])
            texts = [document.text for document in documents if document.source == source]
            counts = self._counts(source)
            if held:
                counts.dropped[HOLDOUT] = counts.dropped.get(HOLDOUT, 0) + len(texts)
                counts = self.record.holdout_counts.setdefault(source, Counts())
                counts.read += len(texts)
            tokens = int(lengths[mine].sum())
            text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            counts.kept += len(texts)
            counts.tokens += tokens
            counts.text_bytes += text_bytes
            self.progress["tokens"] += tokens
            self.progress["text_bytes"] += text_bytes

    def _writer(self, source: str, held: bool, open_files: ExitStack) -> ShardWriter:
        """The shard for a source, opened when its first document comes."""
        if (source, held) not in self.writers:
            folder = self.folder / HOLDOUT if held else self.folder
            folder.mkdir(exist_ok=True)
            name = folder_name(source) if source else "all"
            writer = ShardWriter(folder, name, dtype_for(self.vocab), source, [file.path for file in self.unit.files])
            self.writers[source, held] = open_files.enter_context(writer)
        return self.writers[source, held]

    def _report(self, last: bool = False) -> None:
        """Once a second: tells how far the unit is, and ends it if the job is stopping."""
        now = time.monotonic()
        if now - self.reported_s < _REPORT_S and not last:
            return
        self.reported_s = now
        self.folder.with_suffix(".progress").write_text(json.dumps(self.progress))
        if (self.folder.parent / STOP).exists():
            raise RuntimeError("another unit failed")


def _bad_line(item: BadInput) -> dict[str, Any]:
    return {"file": item.file, "line": item.line, "reason": item.reason}


def describe(bad: dict[str, Any]) -> str:
    """A line of bad.jsonl in words: FILE:LINE: reason."""
    return f"{bad['file']}{'' if bad['line'] is None else ':' + str(bad['line'])}: {bad['reason']}"
