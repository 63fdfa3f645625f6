"""The first stage of a dedup job: reads input files and writes, for each document, the keys that it shares with its copies."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from megaspark.data_prep.clusters import KEYS, SCORES
from megaspark.data_prep.documents import Document, batches, read_documents
from megaspark.data_prep.duplicates import FileRecord, content_sha256
from megaspark.data_prep.minhash import MinHasher, band_keys
from megaspark.data_prep.sorted_runs import RunWriter
from megaspark.data_prep.sources import InputFile
from megaspark.data_prep.stages import Result, check_not_stopped
from megaspark.errors import UserError

_BATCH_CHARS, _BATCH_DOCUMENTS = 1 << 18, 1 << 12
_MOST_LINES = 0xFFFFFFFF


class Keys(Protocol):
    """How documents are compared: two that have a key in common are copies."""

    words: int  # 64-bit words in a key

    def of(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Keys, shape (texts, keys of a text, words) uint64, and which texts have keys, shape (texts,) bool."""
        ...


@dataclass(frozen=True)
class ExactKeys:
    """One key of 128 bits: the BLAKE2 hash of the text. A text without a character has none."""

    words: int = 2

    def of(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Keys."""
        hashes = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
        return np.frombuffer(hashes, "<u8").reshape(len(texts), 1, 2), np.fromiter(map(bool, texts), bool, len(texts))


@dataclass(frozen=True)
class BandKeys:
    """One key of 64 bits for each LSH band of a MinHash signature. A text without an n-gram has none."""

    hasher: MinHasher
    bands: int
    rows: int
    words: int = 1

    def of(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Keys."""
        signatures, found = self.hasher.signatures(texts)
        return band_keys(signatures, self.bands, self.rows)[:, :, None], found


@dataclass(frozen=True)
class Reader:
    """What the stage must know of the job; `score` is "" (only the order counts), "longest", or a field with a direction."""

    keys: Keys
    text_field: str
    score: str
    score_field: str
    highest: bool
    memory_bytes: int


def sketch(reader: Reader, part: Path, unit: Sequence[InputFile]) -> Result:
    """Does some files: table KEYS (key words, id) and, where there are scores, SCORES (one for each id); ids from 0."""
    columns = reader.keys.words + 1
    files: list[dict[str, Any]] = []
    ids = 0
    with RunWriter(part / KEYS, columns, reader.memory_bytes // 2) as table, open(part / SCORES, "wb") as scores:
        for file in unit:
            record = _sketch_file(reader, file, ids, table, scores, part)
            files.append(asdict(record))
            ids += record.lines + 1  # lines count from 1
    return {"files": files, "ids": ids}


def _sketch_file(reader: Reader, file: InputFile, base: int, table: RunWriter, scores: BinaryIO, part: Path) -> FileRecord:
    counts = {"lines": 0, "documents": 0, "bad": 0, "without_score": 0}
    written = 0
    for batch in batches(_sound(reader, file, counts), _BATCH_CHARS, _BATCH_DOCUMENTS):
        check_not_stopped(part)
        lines = np.array([document.line for document in batch], np.uint64)
        keys, found = reader.keys.of([document.text for document in batch])
        ids = np.repeat(lines[found] + np.uint64(base), keys.shape[1])
        table.add(*keys[found].reshape(-1, keys.shape[2]).T, ids)
        if reader.score:
            values = np.array([_score(reader, document) for document in batch])
            counts["without_score"] += int(np.isnan(values).sum())
            ranks = np.zeros(int(lines[-1]) + 1 - written, np.uint64)
            ranks[(lines - np.uint64(written)).view(np.int64)] = rank(values if reader.highest else -values)
            scores.write(ranks.data)
            written = int(lines[-1]) + 1
    if counts["lines"] > _MOST_LINES:
        raise UserError(f"{file.path}: {counts['lines']:,} lines, a file may have {_MOST_LINES:,}; split it")
    if reader.score:
        scores.write(bytes(8 * (counts["lines"] + 1 - written)))
    file.check_unchanged()
    return FileRecord(file.path, file.size_bytes, file.version, content_sha256(file), **counts)


def _sound(reader: Reader, file: InputFile, counts: dict[str, int]) -> Iterator[Document]:
    """The documents of a file; what is none is counted."""
    for item in read_documents(file.path, reader.text_field, ""):
        counts["lines"] = max(counts["lines"], item.line or 0)
        if isinstance(item, Document):
            counts["documents"] += 1
            yield item
        else:
            counts["bad"] += 1


def _score(reader: Reader, document: Document) -> float:
    """The score of a document, NaN where it has none."""
    if reader.score == "longest":
        return float(len(document.text))
    value: Any = document.record
    for name in reader.score_field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def rank(scores: np.ndarray) -> np.ndarray:
    """Unsigned numbers in the order of the scores; 0, below all, for NaN."""
    bits = (scores + 0.0).view(np.uint64)  # + 0.0: there is but one zero
    sign = np.uint64(1 << 63)
    return np.where(np.isnan(scores), np.uint64(0), np.where(bits & sign, ~bits, bits | sign))
