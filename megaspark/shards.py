"""The token format: writes, maps and verifies the shards in which data_prep and the trainer meet.

A dataset is a folder of `NAME-00000.bin/.idx` pairs in Megatron's indexed format, a `manifest.json` that says what they hold,
and a copy of the tokenizer. A `.bin` is bare tokens. An `.idx` is, little-endian: `MMIDIDX\\0\\0`, u64 version 1, u8 dtype
code, u64 sequences, u64 documents + 1, then i32 lengths (tokens), i64 offsets (bytes), i64 document index. Every document that
we write is one sequence; of Megatron's own, read here too, one may have several or none, and an i8 mode for each sequence may
follow. Nothing read from disk is believed before it was checked. numpy and the standard library only.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megaspark.errors import UserError
from megaspark.manifests import CODES, DTYPES, HEADER, MANIFEST, Manifest, ShardInfo, fsync_folder, sha256_of
from megaspark.manifests import UNFINISHED as UNFINISHED
from megaspark.manifests import Counts as Counts
from megaspark.manifests import datasets_in as datasets_in
from megaspark.manifests import dtype_for as dtype_for
from megaspark.manifests import write_atomically as write_atomically

_MAGIC = b"MMIDIDX\0\0"
_BLOCK_TOKENS = 1 << 22


# ---- writing


class ShardWriter:
    """Writes one shard, document by document; under their final names its files are complete or absent, whatever happens."""

    def __init__(self, folder: str | Path, name: str, dtype: np.dtype, source: str = "", inputs: Sequence[str] = ()):
        self.folder, self.name, self.dtype = Path(folder), name, np.dtype(dtype)
        self.source, self.inputs = source, tuple(inputs)
        self.info: ShardInfo | None = None
        self._code = CODES[self.dtype]
        self._lengths = array("i")
        self._hash = hashlib.sha256()
        # The process id keeps a worker that outlived its killed job from writing into the file of its successor.
        self._temporary = {end: self.folder / f".{name}.{os.getpid()}.{end}.tmp" for end in ("bin", "idx")}
        self._file = open(self._temporary["bin"], "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close or discard)

    def add(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Appends one document: whole numbers, shape (T,), any T from 0; raises ValueError if one does not fit the dtype."""
        self.add_many(np.asarray(tokens) if len(tokens) else np.empty(0, self.dtype), [len(tokens)])

    def add_many(self, flat: np.ndarray, lengths: np.ndarray | Sequence[int]) -> None:
        """Appends documents laid end to end: `flat` of shape (tokens,), cut by `lengths`; raises ValueError as `add` does."""
        if flat.ndim != 1 or flat.dtype.kind not in "iu":
            raise ValueError(f"{self.name}: a document is a row of whole numbers, not {flat.dtype} of shape {flat.shape}")
        cuts = np.asarray(lengths, np.int64)
        if (cuts.size and cuts.min() < 0) or cuts.sum() != len(flat):
            raise ValueError(f"{self.name}: documents of {cuts.sum():,} tokens in all, but {len(flat):,} are given")
        if flat.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            if flat.size and not limits.min <= flat.min() <= flat.max() <= limits.max:
                raise ValueError(f"{self.name}: token ids from {flat.min()} to {flat.max()} do not fit {self.dtype.name}")
            flat = flat.astype(self.dtype)
        content = np.ascontiguousarray(flat).data
        self._lengths.frombytes(cuts.astype(np.intc).tobytes())
        self._hash.update(content)
        self._file.write(content)

    def close(self) -> ShardInfo:
        """Completes both files, makes them durable and gives them their names."""
        lengths = np.array(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
        offsets = ends - lengths.astype("<i8") * self.dtype.itemsize
        header = HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(lengths) + 1)
        idx = b"".join([header, lengths.tobytes(), offsets.tobytes(), np.arange(len(lengths) + 1, dtype="<i8").tobytes()])
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with open(self._temporary["idx"], "wb") as file:
            file.write(idx)
            file.flush()
            os.fsync(file.fileno())
        for end, temporary in self._temporary.items():
            os.replace(temporary, self.folder / f"{self.name}.{end}")
        fsync_folder(self.folder)
        tokens = int(lengths.sum(dtype=np.int64))
        self.info = ShardInfo(
            self.name, self.source, tokens, len(lengths), tokens * self.dtype.itemsize, self._hash.hexdigest(),
            len(idx), hashlib.sha256(idx).hexdigest(), self.inputs,
        )  # fmt: skip
        return self.info

    def discard(self) -> None:
        """Gives up: nothing of the shard stays on disk."""
        with suppress(OSError):  # a full disk refuses the last buffer once more
            self._file.close()
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None and self.info is None:
                self.close()
        finally:
            if self.info is None:
                self.discard()


# ---- reading


class _Index(NamedTuple):
    lengths: np.ndarray  # (documents,) i32, tokens
    offsets: np.ndarray  # (documents,) i64, bytes


class Shard:
    """One shard, memory-mapped; opening it looks at sizes and at most 34 bytes, the rest is mapped and checked at first use.

    `shard` is the manifest's ShardInfo, against which the sizes are checked, or a bare name. With `dtype` given not even the
    header is read before the `.idx` is needed. Raises UserError naming the file and what is wrong with it.
    """

    def __init__(self, folder: str | Path, shard: ShardInfo | str, dtype: np.dtype | None = None):
        self.info = shard if isinstance(shard, ShardInfo) else None
        self.name = shard.name if isinstance(shard, ShardInfo) else shard
        self.bin_path, self.idx_path = (Path(folder) / f"{self.name}.{end}" for end in ("bin", "idx"))
        bin_bytes, idx_bytes = _size(self.bin_path), _size(self.idx_path)
        if self.info:
            _expect_size(self.bin_path, bin_bytes, self.info.bin_bytes, MANIFEST)
            _expect_size(self.idx_path, idx_bytes, self.info.idx_bytes, MANIFEST)
        if dtype is None or self.info is None:
            found, _, self.documents = self._read_header(idx_bytes)
            if dtype is not None and found != dtype:
                raise UserError(f"{self.idx_path}: holds {found.name}, {np.dtype(dtype).name} was expected")
            dtype = found
        else:
            self.documents = self.info.documents
        self.dtype, self.bin_bytes = np.dtype(dtype), bin_bytes
        if bin_bytes % self.dtype.itemsize:
            raise UserError(f"{self.bin_path}: {bin_bytes:,} bytes are no whole number of {self.dtype.name} tokens")

    def __len__(self) -> int:
        return self.bin_bytes // self.dtype.itemsize

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens of the shard, shape (tokens,): a read-only view of the file, nothing copied."""
        return _map(self.bin_path, self.bin_bytes, at_random=True).view(self.dtype)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, shape (documents,) int32."""
        return self._index.lengths

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i` (from 0), shape (length,): a view, nothing copied."""
        if not 0 <= i < self.documents:
            raise IndexError(f"{self.name} has documents 0 to {self.documents - 1}, not {i}")
        start = int(self._index.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self._index.lengths[i])]

    def _read_header(self, idx_bytes: int) -> tuple[np.dtype, int, int]:
        """Dtype, numbers of sequences and of documents, after everything that the header and the size can prove."""
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise UserError(f"{self.idx_path}: cut short, {len(header)} bytes are no whole header")
        magic, version, code, sequences, documents = HEADER.unpack(header)
        if magic != _MAGIC:
            raise UserError(f"{self.idx_path}: not a Megatron index (it starts with {magic!r}, not {_MAGIC!r})")
        if version != 1:
            raise UserError(f"{self.idx_path}: index version {version}, only 1 is known")
        if code not in DTYPES:
            raise UserError(f"{self.idx_path}: dtype code {code}; known are 8 (uint16) and 4 (int32)")
        if not documents:
            raise UserError(f"{self.idx_path}: no document bounds; it should be one more than documents")
        plain_bytes = HEADER.size + 12 * sequences + 8 * documents
        if idx_bytes != plain_bytes + sequences:  # with a mode for each sequence
            _expect_size(self.idx_path, idx_bytes, plain_bytes, "its header")
        if self.info and documents - 1 != self.info.documents:
            raise UserError(f"{self.idx_path}: {documents - 1} documents, {MANIFEST} says {self.info.documents}")
        return DTYPES[code], sequences, documents - 1

    @cached_property
    def _index(self) -> _Index:
        """The `.idx`, every number of it checked: O(documents), once."""
        size = _size(self.idx_path)
        dtype, n, documents = self._read_header(size)
        if dtype != self.dtype:
            raise UserError(f"{self.idx_path}: holds {dtype.name}, {self.dtype.name} was expected")
        content = _map(self.idx_path, size)[HEADER.size : HEADER.size + 12 * n + 8 * (documents + 1)]
        lengths, offsets, bounds = (
            part.view(kind) for part, kind in zip(np.split(content, [4 * n, 12 * n]), ("<i4", "<i8", "<i8"), strict=True)
        )
        if n and lengths.min() < 0:
            raise UserError(f"{self.idx_path}: sequence {int(np.argmax(lengths < 0))} has a negative length")
        if bounds[0] != 0 or bounds[-1] != n or (np.diff(bounds) < 0).any():
            raise UserError(f"{self.idx_path}: its document index does not rise from 0 to {n}")
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * dtype.itemsize])
        wrong = np.flatnonzero(offsets != ends[:-1])
        if len(wrong):
            raise UserError(f"{self.idx_path}: sequence {wrong[0]} does not start where the one before it ends")
        if ends[-1] != self.bin_bytes:
            raise UserError(f"{self.idx_path}: describes {ends[-1]:,} bytes, {self.bin_path.name} has {self.bin_bytes:,}")
        if np.array_equal(bounds, np.arange(n + 1)):
            return _Index(lengths, offsets)
        if self.info:  # ours by its manifest, and ours have one sequence a document; Megatron's may have any number
            raise UserError(f"{self.idx_path}: its document index is not 0, 1, 2, ... {n}")
        starts = ends[bounds]
        return _Index((np.diff(starts) // dtype.itemsize).astype("<i4"), starts[:-1])


def _map(path: Path, size_bytes: int, at_random: bool = False) -> np.ndarray:
    """The bytes of a file as a read-only mapping, shape (size,) uint8; refused if its size is no longer `size_bytes`.

    at_random: it is read in small pieces here and there, so the kernel should not read ahead (by megabytes, on some disks).
    """
    _expect_size(path, _size(path), size_bytes, "its size at opening")
    if not size_bytes:
        return np.empty(0, np.uint8)  # an empty file cannot be mapped
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ)
    if at_random and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, np.uint8)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing") from None


def _expect_size(path: Path, found: int, expected: int, who: str) -> None:
    if found != expected:
        how = "cut short" if found < expected else "too long"
        raise UserError(f"{path}: {how} or changed: it has {found:,} bytes, {who} says {expected:,}")


class TokenDataset:
    """A dataset as one stream of tokens, its shards in manifest order; opening costs two stat() a shard, reading maps lazily.

    Raises UserError for a missing, truncated or changed file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self.dtype = np.dtype(self.manifest.dtype)
        self.eos_id, self.vocab = self.manifest.eos_id, self.manifest.vocab
        self.shards = [Shard(folder, info, self.dtype) for info in self.manifest.shards]
        self._ends = list(accumulate(len(shard) for shard in self.shards))
        self.tokens = self._ends[-1] if self._ends else 0
        self.documents = self.manifest.documents

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, shape (length,): a view within a shard, a copy only across shards."""
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"{self.folder}: tokens {start} to {start + length} asked for, it has 0 to {self.tokens}")
        parts = list(self._parts(start, length))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def document(self, i: int) -> np.ndarray:
        """The tokens of document `i` (from 0, over all shards), shape (length,): a view."""
        ends = list(accumulate(shard.documents for shard in self.shards))
        if not 0 <= i < self.documents:
            raise IndexError(f"{self.folder} has documents 0 to {self.documents - 1}, not {i}")
        k = bisect.bisect_right(ends, i)
        return self.shards[k].document(i - (ends[k] - self.shards[k].documents))

    def _parts(self, start: int, length: int) -> Iterator[np.ndarray]:
        k = bisect.bisect_right(self._ends, start)
        while length:
            first = start - (self._ends[k] - len(self.shards[k]))
            part = self.shards[k].tokens[first : first + length]
            if len(part):
                yield part
            start, length, k = start + len(part), length - len(part), k + 1


# ---- verifying


def verify(folder: str | Path, progress: Callable[[int], None] = lambda _: None) -> list[str]:
    """Reads every byte of a dataset again and returns what is wrong, a line each; `progress` is told the bytes just read."""
    folder = Path(folder)
    try:
        manifest = Manifest.load(folder)
    except UserError as error:
        return [str(error)]
    problems = [line for info in manifest.shards for line in _shard_problems(folder, info, manifest, progress)]
    tokenizer = folder / manifest.tokenizer
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest.tokenizer_sha256:
        problems.append(f"{tokenizer}: missing, or not the tokenizer that {MANIFEST} names")
    known = {f"{info.name}{end}" for info in manifest.shards for end in (".bin", ".idx")}
    strays = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".idx") and file.name not in known)
    return problems + [f"{folder / name}: not in {MANIFEST}" for name in strays]


def _shard_problems(folder: Path, info: ShardInfo, manifest: Manifest, progress: Callable[[int], None]) -> Iterator[str]:
    try:
        shard = Shard(folder, info, np.dtype(manifest.dtype))
        shard.lengths  # noqa: B018 (checks the whole .idx)
    except UserError as error:
        yield str(error)
        return
    if sha256_of(shard.idx_path, progress) != info.idx_sha256:
        yield f"{shard.idx_path}: its sha256 is not the manifest's"
    if sha256_of(shard.bin_path, progress) != info.bin_sha256:
        yield f"{shard.bin_path}: its sha256 is not the manifest's"
    blocks = (shard.tokens[i : i + _BLOCK_TOKENS] for i in range(0, len(shard), _BLOCK_TOKENS))
    if any(int(block.max()) >= manifest.vocab or int(block.min()) < 0 for block in blocks):
        yield f"{shard.bin_path}: holds a token outside of the vocabulary of {manifest.vocab}"
