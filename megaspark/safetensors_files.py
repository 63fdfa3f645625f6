"""Safetensors files written a piece at a time: a tensor larger than memory passes through a buffer of some megabytes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PIECE_ELEMENTS = 1 << 21  # 8 MiB in fp32

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
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            file.write(content)

        put(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for first, last in row_ranges(shape):
                piece = rows(name, first, last).to(dtype).contiguous()
                if piece.shape != (last - first, *shape[1:]):
                    raise ValueError(f"{name}: rows of shape {tuple(piece.shape)} where {(last - first, *shape[1:])} belong")
                put(piece.reshape(-1).view(torch.uint8).numpy().data)
                done(piece.nbytes)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}
