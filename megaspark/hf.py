"""Our parameters as Hugging Face safetensors and back, by the name table of an architecture; knows no model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def hf_names(table: Mapping[str, str], ours: list[str]) -> dict[str, str]:
    """The Hugging Face name of each of our parameters, in the order of `ours`.

    table: "blocks.{i}.x" -> "model.layers.{i}.y" patterns. Raises KeyError for a parameter that the table does not know.
    """
    out = {}
    for name in ours:
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        pattern = ".".join("{i}" if part.isdigit() else part for part in parts)
        out[name] = table[pattern].replace("{i}", numbers[0]) if numbers else table[pattern]
    return out


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


def write_safetensors(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], dtype: torch.dtype, max_shard_bytes: int
) -> Iterator[str]:
    """Writes tensors into one file, or several with an index as transformers reads them, yielding each name when it is read.

    shapes: by Hugging Face name, in file order; read: gives the tensor of a name, any float dtype, rounded here to `dtype`.
    Holds at most one output file in memory.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    files = [SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            tensors[name] = read(name).to(dtype).contiguous()
            yield name
        save_file(tensors, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)  # save_file makes it private
    if len(files) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
