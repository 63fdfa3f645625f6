"""What a token dataset says of itself: `manifest.json`, read and written with every field checked.

`shards` re-exports what others need of it. numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from megaspark.errors import UserError

MANIFEST = "manifest.json"
UNFINISHED = ".work"  # a data-prep job keeps this folder in its output until every manifest there is written
FORMAT_VERSION = 1
DTYPES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}  # Megatron's dtype codes; its readers know no others that we write
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")  # of an .idx: magic, version, dtype code, sequences, documents + 1
_BLOCK_BYTES = 8 << 20


def dtype_for(vocab: int) -> np.dtype:
    """The narrowest dtype of the format that holds every id below `vocab`: uint16 up to 65,536, else int32."""
    return DTYPES[8] if vocab <= 1 << 16 else DTYPES[4]


def idx_size_bytes(documents: int) -> int:
    """The exact size of the `.idx` of a shard of `documents` documents."""
    return HEADER.size + 12 * documents + 8 * (documents + 1)


@dataclass(frozen=True)
class ShardInfo:
    """What a manifest says of one shard; `inputs` are the files that its text came from."""

    name: str
    source: str
    tokens: int
    documents: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str
    inputs: tuple[str, ...] = ()


@dataclass
class Counts:
    """Where the documents went: read = kept + dropped by each reason + bad. `tokens` and `text_bytes` are of the kept ones."""

    read: int = 0
    kept: int = 0
    bad: int = 0
    tokens: int = 0
    text_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Counts one document as dropped for `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def add(self, other: Counts) -> None:
        """Adds the counts of `other` to these."""
        for name in ("read", "kept", "bad", "tokens", "text_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, n in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + n


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: all that one must know of a dataset without opening its shards.

    `counts` is by source name, `job` the totals of the whole prep job, which may have written other datasets beside this one.
    `tokenizer` is the name of the tokenizer file copied into the folder. `settings_sha256` is the hash of the job's settings.
    """

    name: str
    tokenizer: str
    tokenizer_sha256: str
    vocab: int
    dtype: str
    eos_id: int
    bos_id: int | None
    append_eos: bool
    prepend_bos: bool
    settings_sha256: str
    shards: tuple[ShardInfo, ...]
    counts: dict[str, Counts]
    job: Counts
    format_version: int = FORMAT_VERSION

    @property
    def tokens(self) -> int:
        """Tokens in all shards together."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards together."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text that became the tokens."""
        return sum(counts.text_bytes for counts in self.counts.values())

    def save(self, folder: str | Path) -> None:
        """Writes FOLDER/manifest.json whole or not at all."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        write_atomically(Path(folder) / MANIFEST, text.encode())

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads FOLDER/manifest.json; raises UserError naming file and field for what is missing, foreign or contradictory."""
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise UserError(f"{_why_no_manifest(Path(folder))}; `megaspark prep JOB.yaml` makes one")
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}")
        manifest = _typed(cls, values, str(path))
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Refuses a manifest that contradicts itself."""
        dtype = dtype_for(self.vocab)
        if self.dtype != dtype.name:
            raise UserError(f"{path}: dtype is {self.dtype} but a vocabulary of {self.vocab} takes {dtype.name}")
        for name, token in (("eos_id", self.eos_id), ("bos_id", self.bos_id)):
            if token is not None and token >= self.vocab:
                raise UserError(f"{path}: {name} is {token}, outside of the vocabulary of {self.vocab}")
        names = [shard.name for shard in self.shards]
        for name in (*names, self.tokenizer):
            if not name or Path(name).name != name:
                raise UserError(f"{path}: {name!r} is no plain file name")
        if len(set(names)) < len(names):
            raise UserError(f"{path}: names a shard twice")
        for shard in self.shards:
            if (shard.bin_bytes, shard.idx_bytes) != (shard.tokens * dtype.itemsize, idx_size_bytes(shard.documents)):
                raise UserError(f"{path}: the sizes of {shard.name} do not fit its tokens and documents")


def _why_no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"no such dataset: {folder}"
    if (folder / UNFINISHED).exists():
        return f"{folder}: its data-prep job is not finished"
    return f"{folder}: no {MANIFEST} in it, so it is no token dataset"


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number from 0"),
    "int | None": ((int, type(None)), "a whole number from 0, or null"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
    "tuple[str, ...]": (list, "a list"),
    "tuple[ShardInfo, ...]": (list, "a list"),
    "dict[str, Counts]": (dict, "a mapping"),
    "dict[str, int]": (dict, "a mapping"),
    "Counts": (dict, "a mapping"),
}


def _typed(cls: type, values: Any, where: str) -> Any:
    """Builds a dataclass of this file from JSON values after checking each field against its annotation."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: should be a mapping")
    out: dict[str, Any] = {}
    for item in fields(cls):
        kind = str(item.type)
        expected, words = _KINDS[kind]
        value = values.get(item.name, "missing")
        right = isinstance(value, expected)
        if right and kind.startswith("int") and value is not None:
            right = not isinstance(value, bool) and 0 <= value < 1 << 63
        if item.name not in values or not right:
            raise UserError(f"{where}: {item.name} should be {words}, is {repr(value)[:60]}")
        here = f"{where}: {item.name}"
        if kind == "tuple[ShardInfo, ...]":
            value = tuple(_typed(ShardInfo, shard, f"{here}[{i}]") for i, shard in enumerate(value))
        elif kind == "dict[str, Counts]":
            value = {name: _typed(Counts, counts, f"{here}.{name}") for name, counts in value.items()}
        elif kind == "Counts":
            value = _typed(Counts, value, here)
        elif kind == "tuple[str, ...]":
            value = tuple(map(str, value))
        out[item.name] = value
    return cls(**out)


def datasets_in(path: str | Path) -> dict[str, Path]:
    """The datasets at `path`: itself under its manifest's name, or its sub-folders that are datasets, sorted by name.

    Raises UserError if there is none, or if the data-prep job that writes them is not finished.
    """
    folder = Path(path)
    if (folder / UNFINISHED).exists():
        raise UserError(f"{_why_no_manifest(folder)}; the same `megaspark prep JOB.yaml` again goes on with it")
    if (folder / MANIFEST).is_file():
        return {Manifest.load(folder).name or folder.resolve().name: folder}
    found = {sub.name: sub for sub in sorted(folder.glob("*/")) if (sub / MANIFEST).is_file()}
    if not found:
        raise UserError(f"{_why_no_manifest(folder)}; `megaspark prep JOB.yaml` makes one")
    return found


def fsync_folder(folder: Path) -> None:
    """Makes the renames done in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` at `path` whole or not at all, through a temporary name in the same folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def sha256_of(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """The sha256 of a file, as 64 hex digits; `progress` is told the bytes as they are read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
