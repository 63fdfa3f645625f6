"""Our parameters as Hugging Face safetensors and back, by the name table of an architecture; knows no model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaspark.errors import UserError
from megaspark.safetensors_files import Rows, plan_shards, write_file
from megaspark.settings import nearest

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
READ_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # each of them exact in fp32
FREQUENCIES = ".rotary_emb.inv_freq"  # a buffer that Llama 2's files still carry; it follows from theta


def hf_names(table: Mapping[str, str], ours: Iterable[str]) -> dict[str, str]:
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


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    rows: Rows,
    dtype: torch.dtype,
    max_shard_bytes: int,
    done: Callable[[int], object] = bool,
) -> None:
    """Writes tensors into one file, or several with an index as transformers reads them, piece by piece.

    shapes: by Hugging Face name, in file order; rows: gives a part of a tensor, any float dtype, rounded here to `dtype`;
    done: told the bytes as they are written.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    files = [SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: shapes[name] for name in names}, rows, dtype, done)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder; raises UserError where there is none."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a Hugging Face folder with {CONFIG} and *.safetensors")
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG}: it is no Hugging Face model")
    return _json(path)


class Weights:
    """The tensors of a Hugging Face folder: of model.safetensors, or of the files that its index names.

    shapes, dtypes: by name. Nothing is kept in memory: each part is read when asked for. Raises UserError, naming the file,
    for what is missing, truncated, not as the index says, of a dtype that fp32 cannot hold, or pickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        listed = self._listed()
        for path in [folder / file for file in dict.fromkeys(listed.values())] if listed else [folder / SINGLE]:
            self._add(path)
        for name, file in listed.items():
            if name not in self.files or self.files[name].name != file:
                raise UserError(f"{folder / INDEX} says that {name} is in {file}, but it is not")
        if listed and (extra := next((name for name in self.files if name not in listed), None)):
            raise UserError(f"{self.files[extra]} holds {extra}, which {INDEX} does not know")

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor along its first dimension, in its own dtype."""
        with safe_open(self.files[name], framework="pt") as file:  # opened anew: a mapping kept would fill the memory
            return file.get_slice(name)[first:last].clone()

    def check(self, expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> None:
        """Refuses, by UserError, tensors that are missing, extra or of another shape than `expected`.

        tied: names that may be there beside `expected` if they equal, bit for bit, the tensor they are tied to. The
        rotary buffers of old files are dropped from `shapes`.
        """
        for name in [name for name in self.shapes if name.endswith(FREQUENCIES)]:
            del self.shapes[name]
        for name in [name for name in self.shapes if name in tied and name not in expected]:
            self._drop_tied(name, tied[name])
        missing, extra = ([n for n in a if n not in b] for a, b in ((expected, self.shapes), (self.shapes, expected)))
        if missing:
            hint = nearest(missing[0], extra) if extra else ""
            raise UserError(f"{self.folder} lacks {len(missing)} tensors that its {CONFIG} asks for, first {missing[0]}{hint}")
        if extra:
            raise UserError(f"{self.folder} holds {len(extra)} tensors that its {CONFIG} does not ask for, first {extra[0]}")
        for name, shape in expected.items():
            if self.shapes[name] != shape:
                found, asked = ("x".join(map(str, s)) for s in (self.shapes[name], shape))
                raise UserError(f"{self.files[name]}: {name} is {found}, but {CONFIG} makes it {asked}")

    def frequencies(self) -> dict[str, Tensor]:
        """The rotary frequencies [D/2] that old files carry, by name; ask before `check`."""
        return {n: self.rows(n, 0, s[0]).float() for n, s in self.shapes.items() if n.endswith(FREQUENCIES) and len(s) == 1}

    def _drop_tied(self, name: str, to: str) -> None:
        whole = [self.rows(n, 0, self.shapes[n][0]) for n in (name, to) if n in self.shapes]
        if len(whole) == 2 and not torch.equal(*whole):
            raise UserError(f"{self.files[name]}: {name} differs from {to}, but {CONFIG} ties them (tie_word_embeddings)")
        del self.shapes[name]

    def _listed(self) -> dict[str, str]:
        """tensor -> file by the index; empty where there is but one file."""
        if (self.folder / INDEX).is_file():
            listed = _json(self.folder / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise UserError(f"{self.folder / INDEX} has no weight_map")
            odd = next((f for f in listed.values() if not isinstance(f, str) or Path(f).name != f), None)
            if odd is not None:
                raise UserError(f"{self.folder / INDEX} names {odd!r}, which is no plain file name")
            return listed
        if not (self.folder / SINGLE).is_file():
            pickled = next((path for pattern in PICKLED for path in sorted(self.folder.glob(pattern))), None)
            if pickled:
                raise UserError(
                    f"{pickled} is pickled and could run code when it is opened: it is not read; "
                    "save the model as safetensors where you trust it (save_pretrained of transformers does)"
                )
            raise UserError(f"{self.folder} holds no weights (neither {SINGLE} nor {INDEX})")
        return {}

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing, but {INDEX} names it")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() not in READ_DTYPES:
                        raise UserError(f"{path}: {name} is {part.get_dtype()}; only {', '.join(READ_DTYPES)} are read")
                    self.files[name] = path
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = READ_DTYPES[part.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read, it is truncated or no safetensors file ({error})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: should be a mapping")
    return values
