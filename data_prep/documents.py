"""Reads documents from `.jsonl`, `.jsonl.zst` and `.jsonl.gz` files: each line is a document, or bad for a named reason.

Lines end at the byte `\\n` and nowhere else (U+2028 inside a text is text); a `\\r` before it is tolerated. orjson reads them;
what it refuses is read again by `json`, so that a good text is not lost to a NaN or a lone surrogate in a field beside it. A
bad line costs no other line. A damaged compressed file yields every line before the damage and, where another frame begins
behind it, every line from there on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megaspark.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
UNKNOWN_SOURCE = "unknown"
BROKEN_BELOW_BYTES = 100  # a failed download of SlimPajama leaves about 15 bytes
MAX_LINE_BYTES = 1 << 30

_READ_BYTES = 1 << 14  # small, for a zstd block of a few bytes can become 128 KiB
_SEARCH_BYTES = 1 << 20


@dataclass(slots=True)
class Document:
    """One text, the name of the set that it belongs to, and the whole JSON object that it came in."""

    text: str
    source: str
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadInput:
    """A line (from 1), or a whole file where `line` is None, that gave no document."""

    file: str
    line: int | None
    reason: str
    source: str = UNKNOWN_SOURCE


class _Damage(str):
    """Stands among the chunks of a stream where bytes are missing; its text says why."""


def check_suffix(path: str) -> None:
    """Raises UserError if no reader for this kind of file exists."""
    if not path.endswith(SUFFIXES):
        raise UserError(f"{path}: input files end in {', '.join(SUFFIXES)}")


def read_documents(path: str, text_field: str, source_field: str) -> Iterator[Document | BadInput]:
    """Yields what each line of a file is, in order; `text_field` and `source_field` may be dotted (`meta.set_name`).

    Blank lines are nothing. Raises UserError for an unknown kind of file, OSError for one that cannot be read.
    """
    check_suffix(path)
    size_bytes = Path(path).stat().st_size
    found: Iterator[Document | BadInput] = _read(path, text_field, source_field)
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
    if not isinstance(record, dict):
        return "not a JSON object", UNKNOWN_SOURCE
    source = _lookup(record, source_field)
    source = source if isinstance(source, str) and source and _is_unicode(source) else UNKNOWN_SOURCE
    text = _lookup(record, text_field)
    if not isinstance(text, str):
        return (f"no {text_field}" if text is None else f"{text_field} is no string"), source
    if not text.isascii() and not _is_unicode(text):
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
    for name in dotted.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: str, text_field: str, source_field: str) -> Iterator[Document | BadInput]:
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        if isinstance(line, _Damage):
            yield BadInput(path, number, str(line))
        elif line.strip():
            item = parse(line, text_field, source_field)
            yield item if isinstance(item, Document) else BadInput(path, number, *item)


def _lines(chunks: Iterator[bytes | _Damage]) -> Iterator[bytes | _Damage]:
    """Cuts a stream at each newline; what a damage left of a line is dropped, for a whole line would have gone out before."""
    pending: list[bytes] = []
    pending_bytes = 0
    for chunk in chunks:
        if isinstance(chunk, _Damage):
            rest = b"".join(pending)
            if rest.rstrip().endswith(b"}") and isinstance(_parse_again(rest)[0], dict):
                yield rest  # the cut fell just before the newline
            yield chunk
            pending, pending_bytes = [], 0
            continue
        head, newline, tail = chunk.partition(b"\n")
        if pending_bytes <= MAX_LINE_BYTES:
            pending.append(head)
        pending_bytes += len(head)
        if not newline:
            continue
        yield _whole(pending, pending_bytes)
        *whole, last = tail.split(b"\n")
        yield from whole
        pending, pending_bytes = [last], len(last)
    if pending_bytes:
        yield _whole(pending, pending_bytes)


def _whole(parts: list[bytes], size_bytes: int) -> bytes | _Damage:
    return b"".join(parts) if size_bytes <= MAX_LINE_BYTES else _Damage(f"a line of {size_bytes:,} bytes")


# ---- compressed streams


@dataclass(frozen=True)
class _Codec:
    """A compression format of frames laid end to end: a zstd frame or a gzip member."""

    name: str
    magic: bytes
    new: Callable[[], Any]  # an object with decompress(), eof and unused_data


_CODECS = {
    # 2**31 bytes is the longest window that zstd knows; the default refuses what `zstd --long=31` wrote.
    ".zst": _Codec("zstd", b"\x28\xb5\x2f\xfd", lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()),
    ".gz": _Codec("gzip", b"\x1f\x8b\x08", lambda: zlib.decompressobj(wbits=31)),
}


def _chunks(path: str) -> Iterator[bytes | _Damage]:
    codec = _CODECS.get(Path(path).suffix)
    with open(path, "rb") as file:
        if codec is None:
            while block := file.read(_SEARCH_BYTES):
                yield block
            return
        start: int | None = 0
        while start is not None:
            start = yield from _frames(file, codec, start)


def _frames(file: Any, codec: _Codec, start: int) -> Iterator[bytes | _Damage]:
    """Yields the content of the frames from byte `start`; returns where to go on behind a damage, None at the end of the file.

    End of input is no error to zstd or zlib, so whether the last frame was whole is asked of the decompressor itself.
    """
    file.seek(start)
    frame, frame_start, given = codec.new(), start, start
    block, open_frame = b"", False
    while block := block or file.read(_READ_BYTES):
        if codec.name == "gzip" and not open_frame and given > start and not block.strip(b"\0"):
            block = b""  # gzip allows padding with zeros behind a member
            continue
        try:
            content = frame.decompress(block)
        except (zstandard.ZstdError, zlib.error) as error:
            yield from _salvage(file, codec, frame_start, given)
            yield _Damage(f"damaged {codec.name} frame at byte {frame_start:,} ({_short(error)}), its rest is lost")
            return _find(file, codec.magic, frame_start + 1)
        if content:
            yield content
        given += len(block) - len(frame.unused_data)
        open_frame, block = not frame.eof, frame.unused_data
        if frame.eof:
            frame, frame_start = codec.new(), given
    if open_frame:
        yield _Damage(f"{codec.name} frame at byte {frame_start:,} is cut short, its rest is lost")
        return _find(file, codec.magic, frame_start + 1)  # a short frame may have gone into the one before as if part of it
    return None


def _salvage(file: Any, codec: _Codec, frame_start: int, given: int) -> Iterator[bytes]:
    """Decompresses a damaged frame again, from `given` on byte by byte: yields what the failed call held back."""
    frame = codec.new()
    file.seek(frame_start)
    while frame_start < given:
        frame_start += len(block := file.read(min(_READ_BYTES, given - frame_start)))
        frame.decompress(block)
    with suppress(zstandard.ZstdError, zlib.error):
        while byte := file.read(1):
            if content := frame.decompress(byte):
                yield content


def _find(file: Any, magic: bytes, start: int) -> int | None:
    """The offset of the next `magic` from byte `start` on, or None."""
    file.seek(start)
    overlap = b""
    while block := file.read(_SEARCH_BYTES):
        at = (overlap + block).find(magic)
        if at >= 0:
            return start - len(overlap) + at
        start += len(block)
        overlap = (overlap + block)[1 - len(magic) :]
    return None


def _short(error: Exception) -> str:
    return str(error).removeprefix("zstd decompressor error: ")
