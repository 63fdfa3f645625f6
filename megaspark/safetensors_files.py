"""Safetensors files, a piece at a time in both directions: a tensor larger than memory passes through some megabytes of it.

Written at the disk's speed: one thread writes, another hashes the same bytes, a third brings to the disk what was written. Read
straight into the tensor that is to be filled. (The library's own `save_file` copies everything first and knows no hash; its
reader maps the file, which costs a fault for every page.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE_ELEMENTS = 1 << 21  # 8 MiB in fp32
UNHASHED_PIECES = 8  # how far the writing may be ahead of the hashing
SYNC_BYTES = 32 << 20  # so much is written before the disk is told to take it, while further bytes are written
READ_BYTES = 1 << 30  # one call of the kernel's reads less than 2 GiB

# rows(name, first, last): rows [first, last) of a tensor along its first dimension, any float dtype.
Rows = Callable[[str, int, int], Tensor]


def plan_shards(sizes_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Cuts tensors, in order, into files of at most `max_shard_bytes` each (a larger tensor gets a file of its own)."""
    shards: list[list[str]] = []
    filled = math.inf
    for name, size in sizes_bytes.items():
        if filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Consecutive (first, last) over the first dimension, each of at most PIECE_ELEMENTS elements (but at least a row)."""
    width = math.prod(shape[1:])
    step = max(1, PIECE_ELEMENTS // max(1, width))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], rows: Rows, dtype: torch.dtype, done: Callable[[int], object] = bool
) -> dict[str, int | str]:
    """Writes tensors of `shapes`, in that order and rounded to `dtype`, into one file and waits until the disk has it.

    done: told the bytes of each piece. Returns {"bytes": size, "sha256": digest} of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for first, last in row_ranges(shape):
                piece = rows(name, first, last).to(dtype).contiguous()
                if piece.shape != (last - first, *shape[1:]):
                    raise ValueError(f"{name}: rows of shape {tuple(piece.shape)} where {(last - first, *shape[1:])} belong")
                file.write(_bytes_of(piece))
                done(piece.nbytes)
        return file.finish()


class HashedFile:
    """A new file that is hashed and brought to the disk by two threads while it is written; `finish` before leaving it.

    What is given to `write` must stay as it is until `finish`; as many as UNHASHED_PIECES of it are held.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._hasher, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hashing: deque[Future[None]] = deque()
        self._syncing: Future[None] | None = None
        self._size, self._synced = 0, 0

    def write(self, content: bytes | memoryview) -> None:
        """Appends bytes; raises OSError where the disk takes no more."""
        self._hashing.append(self._hasher.submit(self._digest.update, content))
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        self._size += len(content)
        if self._size - self._synced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._wait_for_disk()
            self._syncing, self._synced = self._syncer.submit(os.fdatasync, self._file.fileno()), self._size
        while len(self._hashing) > UNHASHED_PIECES:
            self._hashing.popleft().result()

    def finish(self) -> dict[str, int | str]:
        """Waits until the disk has it all; returns {"bytes": size, "sha256": digest}."""
        self._wait_for_disk()
        os.fsync(self._file.fileno())
        for hashed in self._hashing:
            hashed.result()
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def _wait_for_disk(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # raises what the disk said

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hasher.shutdown()
        self._syncer.shutdown()
        self._file.close()


class TensorFile:
    """An open file of tensors, of which any part can be read, by several threads at once.

    Raises OSError, or ValueError, KeyError or TypeError where it is cut off or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"no safetensors file, or cut off at byte {size}")
        header = json.loads(self._file.read(length))
        self._places = {}
        for name in header.keys() - {"__metadata__"}:
            dtype, shape, (start, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"cut off at byte {size}: {name} ends at {8 + length + end}")
            self._places[name] = (dtype, math.prod(shape), 8 + length + start, 8 + length + end)

    def read_into(self, out: Tensor, name: str, first: int = 0) -> None:
        """Fills `out`, 1-D and contiguous in host memory, with the elements of a flattened tensor from `first` on."""
        dtype, elements, start, end = self._places[name]
        place, last = start + first * out.itemsize, first + out.numel()
        if dtype != DTYPES.get(out.dtype) or not 0 <= first <= last <= elements or end - start != elements * out.itemsize:
            raise ValueError(f"{name} is {dtype} [{elements}]: elements {first} to {last} of {DTYPES.get(out.dtype)} are not in it")
        view = _bytes_of(out)
        while view:
            got = os.preadv(self._file.fileno(), [view[:READ_BYTES]], place)
            if not got:
                raise ValueError(f"cut off at byte {place}")
            view, place = view[got:], place + got


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory, byte by byte."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
