"""Reads documents from any source: each line or row is a document, or bad for a named reason.

orjson reads the lines of `.jsonl` files; what it refuses is read again by `json`, so that a good text is not lost to a NaN or
a lone surrogate in a field beside it. U+2028 inside a text is text, a `\r` before the end of a line is tolerated. A bad line
costs no other line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from megaspark.data_prep import sources, streams, tables
from megaspark.data_prep.sources import SUFFIXES as SUFFIXES
from megaspark.data_prep.sources import check_suffix as check_suffix
from megaspark.data_prep.streams import Damage

UNKNOWN_SOURCE = "unknown"
BROKEN_BELOW_BYTES = 100  # a failed download of SlimPajama leaves about 15 bytes


@dataclass(slots=True)
class Document:
    """One text, the name of the set that it belongs to, the whole JSON object that it came in, its file and line."""

    text: str
    source: str
    record: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    line: int = 0


def batches(documents: Iterator[Document], chars: int, most: int = 1 << 20) -> Iterator[list[Document]]:
    """Groups documents until a batch holds at least `chars` characters of text, or `most` documents."""
    batch: list[Document] = []
    held_chars = 0
    for document in documents:
        batch.append(document)
        held_chars += len(document.text)
        if held_chars >= chars or len(batch) >= most:
            yield batch
            batch, held_chars = [], 0
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class BadInput:
    """A line or row (from 1), or a whole file where `line` is None, that gave no document."""

    file: str
    line: int | None
    reason: str
    source: str = UNKNOWN_SOURCE


def read_documents(path: str, text_field: str, source_field: str) -> Iterator[Document | BadInput]:
    """Yields what each line or row of a file is, in order; `text_field` and `source_field` may be dotted (`meta.set_name`).

    `path` is a path, a URL of fsspec's or a shard of a dataset. Blank lines are nothing. Raises UserError for an unknown kind
    of file, OSError for one that cannot be read.
    """
    if path.startswith(sources.DATASET):
        yield from _read_rows(path, tables.dataset_rows(path), text_field, source_field)
        return
    check_suffix(path)
    if path.endswith(".parquet"):
        found = _read_rows(path, tables.parquet_rows(path), text_field, source_field)
    else:
        found = _read_lines(path, text_field, source_field)
    size_bytes = sources.size_bytes(path)
    if size_bytes >= BROKEN_BELOW_BYTES:
        yield from found
        return
    documents = [item for item in found if isinstance(item, Document)]
    yield from documents or [BadInput(path, None, f"a file of {size_bytes} bytes without a document: a broken download?")]


def parse(line: bytes, text_field: str, source_field: str) -> Document | tuple[str, str]:
    """One line as a document, or as (reason, source) why it is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record, reason = _parse_again(line)
        if reason:
            return reason, UNKNOWN_SOURCE
        return _document(record, text_field, source_field, checked=False)
    return _document(record, text_field, source_field, checked=True)


def _document(record: Any, text_field: str, source_field: str, checked: bool) -> Document | tuple[str, str]:
    """A parsed record as a document, or as (reason, source); `checked`: its strings are known to be whole Unicode."""
    if not isinstance(record, dict):
        return "not a JSON object", UNKNOWN_SOURCE
    source = _lookup(record, source_field)
    source = source if isinstance(source, str) and source and (checked or _is_unicode(source)) else UNKNOWN_SOURCE
    text = _lookup(record, text_field)
    if not isinstance(text, str):
        return (f"no {text_field}" if text is None else f"{text_field} is no string"), source
    if not checked and not _is_unicode(text):
        return f"lone surrogate in {text_field}", source
    return Document(text, source, record)


def _parse_again(line: bytes) -> tuple[Any, str]:
    """(record, "") for what `json` reads and orjson does not: BOM, lone surrogates, NaN; else (None, why not)."""
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf").decode()), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start})"
    except RecursionError:
        return None, "JSON nested too deep"
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg})"
    except ValueError as error:  # a whole number of thousands of digits
        return None, f"not JSON ({error})"


def _lookup(record: Any, dotted: str) -> Any:
    """The value at a dotted name; a key that has the dots itself, such as a parquet column `meta.set`, comes first."""
    if dotted in record:
        return record[dotted]
    for name in dotted.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(path: str, text_field: str, source_field: str) -> Iterator[Document | BadInput]:
    for number, line in enumerate(streams.lines(path), start=1):
        if isinstance(line, Damage):
            yield BadInput(path, number, str(line))
        elif line.strip():
            yield _placed(parse(line, text_field, source_field), path, number)


def _read_rows(path: str, rows: Iterator[Any], text_field: str, source_field: str) -> Iterator[Document | BadInput]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Damage):
            yield BadInput(path, number, str(row))
        else:
            yield _placed(_document(row, text_field, source_field, checked=False), path, number)


def _placed(item: Document | tuple[str, str], path: str, number: int) -> Document | BadInput:
    """What a line or row is, with where it was."""
    if not isinstance(item, Document):
        return BadInput(path, number, *item)
    item.file, item.line = path, number
    return item
