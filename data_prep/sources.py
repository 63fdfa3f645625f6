"""Where documents come from: paths and globs, here or in any store that fsspec knows, and Hugging Face datasets.

Names in a job's `input` become a sorted list of InputFile, which depends on nothing but what lies there. A dataset is written
`datasets:PATH_OR_ID?split=train&name=...`; each of its shards counts as one file, named `...#SHARD/SHARDS`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Annotated, Any
from urllib.parse import parse_qsl, urlencode

from pydantic import BeforeValidator

from megaspark.errors import UserError
from megaspark.settings import nearest

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
DATASET = "datasets:"

_DATASET_OPTIONS = ("split", "name", "revision", "data_dir", "data_files")
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "checksum", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class InputFile:
    """An input file as it was when the work was planned; `version` changes with its content, `size_bytes` is 0 if unknown."""

    path: str
    size_bytes: int
    version: str

    def check_unchanged(self) -> None:
        """Raises UserError if the file is no longer what was planned for; a dataset is trusted to stay what it was."""
        if not self.path.startswith(DATASET) and _look(self.path) != self:
            raise UserError(f"{self.path} changed while it was read; start the job anew, with another output")


def is_url(path: str) -> bool:
    """Whether a name is fsspec's rather than this machine's."""
    return "://" in path


def open_input(path: str) -> IO[bytes]:
    """Opens a path or URL for reading and seeking; raises OSError if it cannot be read."""
    if not is_url(path):
        return open(path, "rb")
    filesystem, name = _filesystem(path)
    return filesystem.open(name, "rb")


def size_bytes(path: str) -> int:
    """The size of a file at a path or URL."""
    return _look(path).size_bytes


def check_suffix(path: str) -> None:
    """Raises UserError if no reader for this kind of file exists, or its library is missing."""
    if not path.endswith(SUFFIXES):
        raise UserError(f"{path}: input files end in {', '.join(SUFFIXES)}")
    if path.endswith(".parquet"):
        require("pyarrow", f"input: {path}")


def require(library: str, who: str) -> None:
    """Raises UserError, with what to install, if a library of the extra `data` is missing."""
    if find_spec(library) is None:
        raise UserError(f"{who} needs the library {library}: pip install 'megaspark[data]'")


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that the patterns match, sorted by path; one file found twice is kept once, by whatever name it was found.

    Raises UserError for a pattern that matches no file, for a file of an unknown kind, and for a store whose library is
    missing or that refuses.
    """
    shards = [shard for pattern in patterns if pattern.startswith(DATASET) for shard in _dataset_shards(pattern)]
    names: set[str] = set()
    for pattern in patterns:
        if pattern.startswith(DATASET):
            continue
        found = _match_url(pattern) if is_url(pattern) else _match(pattern)
        if not found:
            where = "" if is_url(pattern) else f" in {os.getcwd()}"
            raise UserError(f"input: no file matches {pattern!r}{where}{_folder(pattern)}")
        names.update(found)
    by_file: dict[str, str] = {}
    for name in sorted(names):
        check_suffix(name)
        if not is_url(name) and not os.path.isfile(name):
            raise UserError(f"input: {name} is no file (a link to nothing?)")
        by_file.setdefault(name if is_url(name) else os.path.realpath(name), name)
    if not by_file and not shards:
        raise UserError(f"input: names no file (of the kinds {', '.join(SUFFIXES)})")
    return [_look(name) for name in by_file.values()] + sorted(set(shards), key=_dataset_order)


def _match(pattern: str) -> list[str]:
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    return [path for path in found if not os.path.isdir(path)]


def _folder(pattern: str) -> str:
    return f"; it is a folder, its files are {pattern}/**/*.jsonl.zst" if os.path.isdir(pattern) else ""


def _look(path: str) -> InputFile:
    """A file as it is now."""
    if not is_url(path):
        stat = os.stat(path)
        return InputFile(path, stat.st_size, str(stat.st_mtime_ns))
    filesystem, name = _filesystem(path)
    filesystem.invalidate_cache()
    info = filesystem.info(name)
    return InputFile(path, int(info.get("size") or 0), next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


# ---- fsspec


def _match_url(pattern: str) -> list[str]:
    filesystem, name = _filesystem(pattern)
    try:
        if glob.has_magic(name):
            found = filesystem.glob(name, detail=True)
            files = [path for path, info in found.items() if info["type"] != "directory"]
        else:
            files = [name] if filesystem.isfile(name) else []
    except Exception as error:  # each store has its own
        raise UserError(f"input: {pattern}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else [filesystem.protocol]):
        return files  # file:///data/x is /data/x
    return [filesystem.unstrip_protocol(path) for path in files]


def _filesystem(url: str) -> tuple[Any, str]:
    """The store of a URL, and the name there."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        said = str(error)
        package = re.search(r"[Ii]nstall (?:the )?['\"`]?([\w\[\]-]+)", said) or re.search(r'"([\w\[\]-]+)"', said)
        install = f": pip install {package[1]}" if package else ""
        raise UserError(f"input: {url} needs a library that is missing ({said}){install}") from None
    except ValueError as error:
        raise UserError(f"input: {url}: {error}") from None


# ---- Hugging Face datasets


def dataset_name(options: Mapping[str, Any]) -> str:
    """The one-line name of a dataset that a job gives as a mapping: {datasets: PATH_OR_ID, split: train, name: ...}."""
    known = ("datasets", *_DATASET_OPTIONS)
    for key in options:
        if key not in known:
            raise UserError(f"unknown key {key} in input{nearest(key, known)}")
    if not isinstance(options.get("datasets"), str):
        raise UserError("input: a mapping names a dataset: {datasets: PATH_OR_ID, split: train}")
    query = urlencode({key: options[key] for key in _DATASET_OPTIONS if key in options}, safe="/*,:")
    return f"{DATASET}{options['datasets']}{'?' * bool(query)}{query}"


def _one_or_many(value: Any) -> Any:
    values = [value] if isinstance(value, str | Mapping) else value
    if not isinstance(values, Sequence):
        return values
    return [dataset_name(item) if isinstance(item, Mapping) else item for item in values]


# The `input` of a job's settings: one name or several, a dataset perhaps as a mapping.
Inputs = Annotated[list[str], BeforeValidator(_one_or_many)]


def open_dataset(name: str) -> Any:
    """The streaming dataset, or the one shard of it, that a name stands for."""
    name, _, shard = name.partition("#")
    _, dataset = _load_dataset(name)
    number, _, count = shard.partition("/")
    return dataset.shard(num_shards=int(count), index=int(number)) if shard else dataset


def _dataset_shards(name: str) -> Iterator[InputFile]:
    builder, dataset = _load_dataset(name)
    count = dataset.num_shards
    known = builder.info.splits or {}
    total_bytes = getattr(known.get(_parse(name)[1]["split"]), "num_bytes", 0) or 0
    version = f"{builder.config_id} {builder.hash}"
    for number in range(count):
        yield InputFile(f"{name}#{number}/{count}", total_bytes // count, version)


def _dataset_order(shard: InputFile) -> tuple[str, int]:
    name, _, number = shard.path.rpartition("#")
    return name, int(number.partition("/")[0])


def _parse(name: str) -> tuple[str, dict[str, str]]:
    path, _, query = name.removeprefix(DATASET).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in _DATASET_OPTIONS:
            raise UserError(f"input: {name}: unknown option {key}{nearest(key, _DATASET_OPTIONS)}")
    return path, {"split": "train", **options}


def _load_dataset(name: str) -> tuple[Any, Any]:
    path, options = _parse(name)
    require("datasets", f"input: {name}")
    import datasets

    split = options.pop("split")
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(path if not Path(path).is_dir() else str(Path(path)), **options)
        return builder, builder.as_streaming_dataset(split=split)
    except Exception as error:  # the library raises what its parts do
        raise UserError(f"input: {name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
