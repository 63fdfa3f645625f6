"""Lines out of plain, zstd and gzip files: every line that can be had, and a word where bytes are damaged.

Lines end at the byte `\n` and nowhere else. A damaged compressed file yields every line before the damage and, where another
frame begins behind it, every line from there on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from megaspark.data_prep.sources import open_input

MAX_LINE_BYTES = 1 << 26  # what a text costs in a tokenizer is many times its size, and a rank has about a GiB

_READ_BYTES = 1 << 14  # small, for a zstd block of a few bytes can become 128 KiB
_SEARCH_BYTES = 1 << 20
_FRAME_PROOF_BYTES = 1 << 17  # the longest gzip header (64 KiB), and as much of content


class Damage(str):
    """Stands among lines or rows where some are missing; its text says why."""


def lines(path: str) -> Iterator[bytes | Damage]:
    """The lines of a file at a path or URL, without their ends; raises OSError if it cannot be read."""
    return cut_lines(_chunks(path))


def cut_lines(chunks: Iterator[bytes | Damage]) -> Iterator[bytes | Damage]:
    """Cuts a stream at each newline; what a damage left of a line is dropped, for a whole line would have gone out before."""
    pending: list[bytes] = []
    pending_bytes = 0
    for chunk in chunks:
        if isinstance(chunk, Damage):
            rest = b"".join(pending)
            if _is_whole(rest):
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


def _whole(parts: list[bytes], size_bytes: int) -> bytes | Damage:
    return b"".join(parts) if size_bytes <= MAX_LINE_BYTES else Damage(f"a line of {size_bytes:,} bytes")


def _is_whole(line: bytes) -> bool:
    if line.rstrip().endswith(b"}"):
        with suppress(ValueError, RecursionError):
            return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    return False


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


def _chunks(path: str) -> Iterator[bytes | Damage]:
    codec = _CODECS.get(Path(path).suffix)
    with open_input(path) as file:
        if codec is None:
            while block := file.read(_SEARCH_BYTES):
                yield block
            return
        start: int | None = 0
        while start is not None:
            start = yield from _frames(file, codec, start)


def _frames(file: Any, codec: _Codec, start: int) -> Iterator[bytes | Damage]:
    """Yields the content of the frames from byte `start`; returns where to go on behind a damage, None at the end of the file.

    End of input is no error to zstd or zlib, so whether the last frame was whole is asked of the decompressor itself. Nor is
    it an error, often, to go on from a frame that is cut into the next, whose bytes then make text that nobody wrote: so a frame
    is read up to each place where another may begin, and further only if none does.
    """
    file.seek(start)
    frame, frame_start, given = codec.new(), start, start
    block, open_frame = b"", False
    while block := block or _read(file, codec.magic):
        if open_frame and block.startswith(codec.magic) and _begins_frame(file, codec, given):
            yield Damage(f"{codec.name} frame at byte {frame_start:,} is cut short, its rest is lost")
            return given
        if codec.name == "gzip" and not open_frame and given > start and not block.strip(b"\0"):
            block = b""  # gzip allows padding with zeros behind a member
            continue
        at = block.find(codec.magic, 1)
        block, rest = (block[:at], block[at:]) if at > 0 else (block, b"")
        try:
            content = frame.decompress(block)
        except (zstandard.ZstdError, zlib.error) as error:
            yield from _salvage(file, codec, frame_start, given)
            yield Damage(f"damaged {codec.name} frame at byte {frame_start:,} ({_short(error)}), its rest is lost")
            return _find(file, codec.magic, frame_start + 1)
        if content:
            yield content
        given += len(block) - len(frame.unused_data)
        open_frame, block = not frame.eof, frame.unused_data + rest
        if frame.eof:
            frame, frame_start = codec.new(), given
    if open_frame:
        yield Damage(f"{codec.name} frame at byte {frame_start:,} is cut short, its rest is lost")
        return _find(file, codec.magic, frame_start + 1)  # a short frame may have gone into the one before as if part of it
    return None


def _read(file: Any, magic: bytes) -> bytes:
    """The next bytes, not ending within a `magic`."""
    block = file.read(_READ_BYTES)
    while block.endswith(tuple(magic[:n] for n in range(1, len(magic)))) and (more := file.read(1)):
        block += more
    return block


def _begins_frame(file: Any, codec: _Codec, at: int) -> bool:
    """Whether what starts at byte `at` can be decompressed, and not only looks like a frame by its first bytes."""
    here, frame, found = file.tell(), codec.new(), False
    file.seek(at)
    try:
        for _ in range(_FRAME_PROOF_BYTES // _READ_BYTES):
            found |= bool(frame.decompress(file.read(_READ_BYTES)))
            if frame.eof:
                break
    except (zstandard.ZstdError, zlib.error):
        return False
    finally:
        file.seek(here)
    return found or frame.eof


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
