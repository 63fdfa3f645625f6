"""Files of examples for post-training (JSON Lines or Parquet), read whole, checked row by row and hashed."""

from __future__ import annotations

import glob
import gzip
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megaspark.errors import UserError
from megaspark.manifests import sha256_of
from megaspark.settings import nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
BESIDES = ("tools", "chat_template_kwargs")  # what TRL reads besides, where a chat template wants it


@dataclass(frozen=True)
class Examples:
    """The rows of some files, all of one form: the same columns, each text or (conversational) a list of messages.

    files: {"file", "sha256", "rows"} of each; left_out: how many rows had a column that training does not read, by its name.
    """

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    conversational: bool
    files: list[dict[str, Any]]
    left_out: Mapping[str, int]


def read_examples(patterns: Sequence[str], forms: Sequence[tuple[str, ...]], place: str) -> Examples:
    """Reads every file that `patterns` name (globs too), in the order of patterns and then of names.

    forms: the sets of columns that a row may have; the first row decides which of them it is for all. `place` is where the
    patterns were said. Raises UserError for a missing or unreadable file, no rows at all, or a row that is not of the form.
    """
    rows: list[dict[str, Any]] = []
    files, left_out, form, conversational = [], {}, (), False
    for path in _find(patterns, place):
        before = len(rows)
        for where, row in _rows(path):
            if not form:
                form = _form(row, forms, where)
                conversational = isinstance(row[form[-1]], list) and form != ("input_ids",)
            besides = ("labels",) if form == ("input_ids",) else BESIDES  # a text's "labels" would be taken for its tokens'
            kept = {name: row[name] for name in (*form, *besides) if name in row}
            _check(kept, form, conversational, where)
            for name in row.keys() - kept.keys():
                left_out[name] = left_out.get(name, 0) + 1
            rows.append(kept)
        files.append({"file": str(path), "sha256": sha256_of(path), "rows": len(rows) - before})
    if not rows:
        raise UserError(f"{', '.join(patterns)} ({place}): no example in it")
    return Examples(rows, form, conversational, files, left_out)


def _find(patterns: Sequence[str], place: str) -> list[Path]:
    found = []
    for pattern in patterns:
        paths = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
        if not paths:
            beside = [str(path) for path in Path(pattern).parent.glob("*") if path.name.endswith(SUFFIXES)]
            raise UserError(f"no such file: {pattern} ({place}){nearest(pattern, beside) if beside else ''}")
        found += paths
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} ({place}) is of no kind that is read here: {', '.join(SUFFIXES)}")
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:ROW", row) of one file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            number = 0
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", {key: value for key, value in row.items() if value is not None}
            return
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = orjson.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: should be an object with named columns, is a {type(row).__name__}")
                yield f"{path}:{number}", row
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error})") from None
    except (OSError, EOFError, zstandard.ZstdError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _opened(path: Path) -> Any:
    if path.suffix == ".zst":
        return io.BytesIO(_unzstd(path.read_bytes()))
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _unzstd(data: bytes) -> bytes:
    """All frames' content; the library's own reader takes a frame that is cut off for the end."""
    out = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        out.append(frame.decompress(data))
        if not frame.eof:
            raise EOFError("its last frame is cut off")
        data = frame.unused_data
    return b"".join(out)


def _form(row: Mapping[str, Any], forms: Sequence[tuple[str, ...]], where: str) -> tuple[str, ...]:
    for form in forms:
        if all(name in row for name in form):
            return form
    wanted = "; or ".join(" and ".join(form) for form in forms)
    close = max(forms, key=lambda form: sum(name in row for name in form))
    missing = next(name for name in close if name not in row)
    unused = [name for name in row if name not in close]
    hint = nearest(missing, unused) if unused else ""
    hint = hint.replace("; did you mean", "; is it called") if hint.startswith("; did") else ""
    raise UserError(f"{where}: no column {missing}; a row has {wanted}, this one has {', '.join(row)}{hint}")


def _check(row: Mapping[str, Any], form: tuple[str, ...], conversational: bool, where: str) -> None:
    for name in form:
        if name not in row:
            raise UserError(f"{where}: no column {name}, which the rows before it have")
        value = row[name]
        if form == ("input_ids",):
            right = isinstance(value, list) and all(isinstance(number, int) for number in value)
        elif conversational:
            right = isinstance(value, list) and bool(value) and all(map(_is_message, value))
        else:
            right = isinstance(value, str)
        if not right:
            kind = "a list of messages {role, content}" if conversational else "token ids" if form == ("input_ids",) else "text"
            raise UserError(f"{where}: {name} should be {kind}, as in the first row, is {str(value)[:60]!r}")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and ("content" in value or "tool_calls" in value)
