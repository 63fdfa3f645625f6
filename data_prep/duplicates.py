"""What `megaspark dedup` leaves behind: which lines of which input files to drop, and the proof of which files these were.

OUTPUT/manifest.json              the counts, the settings, and each input file with its place in a .bin
OUTPUT/duplicates/00000.bin       line numbers (from 1, little-endian uint32), ascending within each file, file after file
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megaspark.data_prep.sources import DATASET, InputFile, find_inputs, is_url, size_bytes
from megaspark.errors import UserError
from megaspark.manifests import MANIFEST, UNFINISHED, sha256_of, write_atomically

FOLDER = "duplicates"
LINE = np.dtype("<u4")

_KIND, _VERSION = "duplicates", 1


@dataclass(frozen=True)
class FileRecord:
    """An input file of a dedup job: what it was, what was in it, and where its `dropped` line numbers begin in `bin`."""

    path: str
    size_bytes: int
    version: str
    sha256: str  # "" for what is not on this machine
    lines: int
    documents: int
    bad: int
    without_score: int
    dropped: int = 0
    bin: str = ""
    first: int = 0


@dataclass(frozen=True)
class DuplicateSet:
    """`manifest.json` of a dedup job: read = kept + dropped + bad, and `reason` says why the dropped were dropped."""

    settings: dict[str, Any]
    settings_sha256: str
    reason: str
    read: int
    kept: int
    dropped: int
    bad: int
    without_score: int
    clusters: int
    largest_cluster: int
    files: tuple[FileRecord, ...]
    bins: dict[str, str]  # name: sha256

    def save(self, folder: Path) -> None:
        """Writes FOLDER/manifest.json whole or not at all."""
        values = {"kind": _KIND, "format_version": _VERSION, **asdict(self)}
        write_atomically(folder / MANIFEST, (json.dumps(values, sort_keys=True, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> DuplicateSet:
        """Reads FOLDER/manifest.json; raises UserError if there is none, or if it is something else's."""
        path = folder / MANIFEST
        if not path.is_file():
            unfinished = "is not finished; the same command again goes on with it"
            why = unfinished if (folder / UNFINISHED).exists() else "has not been run"
            raise UserError(f"{folder}: no {MANIFEST} in it, its dedup job {why} (megaspark dedup JOB.yaml)")
        try:
            values = json.loads(path.read_bytes())
            if (values.pop("kind"), values.pop("format_version")) != (_KIND, _VERSION):
                raise ValueError("of another kind or version")
            return cls(**{**values, "files": tuple(FileRecord(**record) for record in values["files"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not the manifest of a dedup job ({error})") from None

    @cached_property
    def _by_path(self) -> dict[str, FileRecord]:
        return {real_path(record.path): record for record in self.files}

    def lines_to_drop(self, folder: Path, path: str) -> np.ndarray:
        """The line numbers to drop of an input file, ascending, shape (n,) uint32.

        Raises UserError if the file was not among the input, or is another than it was then, or if the .bin is damaged.
        """
        record = self._by_path.get(real_path(path))
        if record is None:
            raise UserError(f"{path}: not among the {len(self.files):,} input files of the dedup job at {folder}")
        _check_same(record, path, folder)
        name = folder / FOLDER / record.bin
        try:
            lines = np.fromfile(name, LINE, record.dropped, offset=LINE.itemsize * record.first)
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}") from None
        if len(lines) != record.dropped or (len(lines) and (lines[-1] > record.lines or not (lines[1:] > lines[:-1]).all())):
            raise UserError(f"{name}: cut short or damaged; remove {folder} and run its dedup job again")
        return lines


def real_path(path: str) -> str:
    """One name for one file of this machine, by whatever link or relative path it was found."""
    return path if is_url(path) or path.startswith(DATASET) else os.path.realpath(path)


def content_sha256(file: InputFile) -> str:
    """The sha256 of an input file on this machine, "" for any other, which its store's version must tell from another."""
    return "" if is_url(file.path) or file.path.startswith(DATASET) else sha256_of(Path(file.path))


def _check_same(record: FileRecord, path: str, folder: Path) -> None:
    """Raises UserError unless a file is what the dedup job read: by its size and version, else by size and content."""
    if path.startswith(DATASET):
        return
    changed = f"{path}: not the file that the dedup job at {folder} read"
    if size_bytes(path) != record.size_bytes:
        raise UserError(f"{changed} ({size_bytes(path):,} bytes, not {record.size_bytes:,})")
    [file] = find_inputs([path])
    if file.version != record.version and (not record.sha256 or content_sha256(file) != record.sha256):
        raise UserError(f"{changed} (its content is another)")


def digest_of(folder: Path) -> str:
    """The sha256 of a finished duplicate set, which tells it from every other; raises UserError if there is none."""
    duplicates = DuplicateSet.load(folder)
    return hashlib.sha256(json.dumps(asdict(duplicates), sort_keys=True).encode()).hexdigest()
