"""Checkpoints written: every process its fragments, the first one the index over them, and the name when all is on the disk.

`Save` has the phases one by one, so that the long one, `write`, can go on in a thread (`savers.py`); `save` does them in a row.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaspark.checkpoint import FORMAT, INDEX, Checkpoint, own_digest, step_folder, step_folders
from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment
from megaspark.pieces import Piece
from megaspark.safetensors_files import Rows, plan_shards, write_file

MASTERS_FILE_BYTES = 16 * 10**9
FILES_AT_MOST = 4  # of one process
FILE_ELEMENTS = 1 << 23  # a process that holds no more, 100 MB, writes a single one
PARTIAL = ".partial"


class Save:
    """One checkpoint on its way: `begin` together, `write` each for itself, `collect` together, `complete` by the first process.

    folder: `.../checkpoints/step_00001000`, on a disk that all processes see. gather: everybody's value on everybody.
    problem: what went wrong, or None; after a phase that all take together it is the same on all.
    """

    def __init__(self, folder: Path, state: dict[str, Any], rank: int, gather: Callable[[Any], list[Any]]) -> None:
        self.folder, self.state, self.rank, self.gather = folder, state, rank, gather
        self.partial = folder.with_name(folder.name + PARTIAL)
        self.problem: str | None = None
        self.file_bytes = 0  # of all files; known after `collect`
        self._part: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []

    def begin(self) -> str | None:
        """Makes the folder to write into, and removes what killed saves left behind; returns the problem."""
        if self.rank == 0:
            self.problem = attempt(self._make_room)
        self.problem = next(filter(None, self.gather(self.problem)), None)
        return self.problem

    def write(self, held: Iterable[Fragment]) -> None:
        """Writes this process's files, if it holds anything, and waits for the disk. Needs nobody else; raises nothing."""
        self.problem = attempt(lambda: self._part.update(_write_fragments(self.partial, self.rank, held)))

    def collect(self) -> str | None:
        """Hears from everybody what was written; returns the problem. After one nothing is left of the save."""
        told = self.gather((self.problem, self._part))
        self.problem = next((problem for problem, _ in told if problem), None)
        self._parts = [part for _, part in told if part]
        self.file_bytes = sum(facts["bytes"] for part in self._parts for facts in part["files"].values())
        if self.problem and self.rank == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        return self.problem

    def complete(self) -> str | None:
        """Writes the index over everybody's files and gives the checkpoint its name; returns the problem. First process only."""
        self.problem = attempt(self._complete)
        if self.problem:
            shutil.rmtree(self.partial, ignore_errors=True)
        return self.problem

    def _make_room(self) -> None:
        for left in self.folder.parent.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(left)
        self.partial.mkdir(parents=True)

    def _complete(self) -> None:
        parameters: dict[str, Any] = {}
        for part in self._parts:
            for name, shape, piece in part["fragments"]:
                parameters.setdefault(name, {"shape": shape, "fragments": []})["fragments"].append(piece)
        files = {name: facts for part in self._parts for name, facts in part["files"].items()}
        _write_index(self.partial, self.state, files, parameters)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)
        _sync_folder(self.folder.parent)


def save(
    folder: Path,
    state: dict[str, Any],
    held: Iterable[Fragment],
    rank: int,
    gather: Callable[[Any], list[Any]],
) -> str | None:
    """Writes one checkpoint together with all other processes; returns None, or what went wrong (then nothing is left).

    held: what this process must write; nothing where another holds the same. The rest as of `Save`.
    """
    saving = Save(folder, state, rank, gather)
    if saving.begin():
        return saving.problem
    saving.write(held)
    if saving.collect() is None and rank == 0:
        saving.complete()
    return gather(saving.problem)[0]


def write_masters(
    folder: Path, state: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], rows: Rows, done: Callable[[int], object] = bool
) -> None:
    """Writes a checkpoint of weights alone, without moments, piece by piece into `folder`, which the caller renames.

    shapes: of the parameters by name; rows: gives a part of one; done: told the bytes as they are written.
    """
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    files, parameters = {}, {}
    for number, names in enumerate(plan_shards(sizes, MASTERS_FILE_BYTES)):
        file = f"masters_{number:05d}.safetensors"
        flat = {f"{name}/master": (math.prod(shapes[name]),) for name in names}
        files[file] = write_file(folder / file, flat, lambda key, a, b: _elements(rows, shapes, key, a, b), torch.float32, done)
        for name in names:
            parameters[name] = {"shape": list(shapes[name]), "fragments": [[file, 0, math.prod(shapes[name])]]}
    _write_index(folder, state, files, parameters)


def _elements(rows: Rows, shapes: Mapping[str, tuple[int, ...]], key: str, first: int, last: int) -> Tensor:
    """Elements [first, last) of a flattened parameter, cut out of the rows that hold them."""
    name = key.removesuffix("/master")
    width = math.prod(shapes[name][1:])
    top = first // width
    found = rows(name, top, -(-last // width)).to(torch.float32).reshape(-1)
    return found[first - top * width : last - top * width]


def note_latest(run: Path, folder: Path) -> None:
    """Makes `latest` name a checkpoint, in one atomic step."""
    _write_file(run / "latest.partial", folder.name + "\n")
    os.replace(run / "latest.partial", run / "latest")
    _sync_folder(run)


def prune(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Removes all but the newest `keep_last` checkpoints (0 keeps all) and those whose step divides by `keep_every` (0: none)."""
    for folder in step_folders(run)[keep_last:] if keep_last else []:
        if keep_every and int(folder.name.removeprefix("step_")) % keep_every == 0:
            continue
        _remove(folder)


def discard_after(run: Path, step: int) -> list[Path]:
    """Removes the checkpoints of later steps than `step`, and makes that one the latest; returns what was removed."""
    doomed = [folder for folder in step_folders(run) if folder > step_folder(run, step)]
    note_latest(run, step_folder(run, step))
    for folder in doomed:
        _remove(folder)
    return doomed


def _remove(folder: Path) -> None:
    doomed = folder.with_name(folder.name + PARTIAL)
    folder.rename(doomed)  # first out of sight, so that a kill in mid-removal leaves no half checkpoint
    shutil.rmtree(doomed)


def attempt(action: Callable[[], Any]) -> str | None:
    """Does it; returns what went wrong, in words: a save that fails must not stop the run that it is for."""
    try:
        action()
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_fragments(partial: Path, rank: int, held: Iterable[Fragment]) -> dict[str, Any]:
    """Writes this process's files; returns its index entry, empty where it holds nothing.

    Several files of equal size, so that several cores can hash them, now and at every start: sha256 is slower than many a disk.
    """
    listed = [fragment for fragment in held if fragment.length]
    elements = sum(fragment.length for fragment in listed)
    count = min(FILES_AT_MOST, -(-elements // FILE_ELEMENTS))
    names = [f"rank_{rank:05d}{f'_{number}' if number else ''}.safetensors" for number in range(count)]
    parts = _cut(listed, elements, count)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        facts = pool.map(lambda name, part: _write_part(partial / name, part), names, parts)
        files = dict(zip(names, facts, strict=True))
    pieces = [
        (f.name, list(f.shape), Piece(name, f.start, f.length, f.columns).line())
        for name, part in zip(names, parts, strict=True)
        for f in part
    ]
    return {"files": files, "fragments": pieces} if files else {}


def _cut(held: list[Fragment], elements: int, count: int) -> list[list[Fragment]]:
    """The same elements in `count` lists of equal length, or one more; fragments are cut where need be."""
    bounds = [elements * number // count for number in range(count + 1)] if count else []
    out: list[list[Fragment]] = [[] for _ in range(count)]
    begin = 0
    for fragment in held:
        for part, (first, last) in zip(out, pairwise(bounds), strict=True):
            a, b = max(first - begin, 0), min(last - begin, fragment.length)
            if a < b:
                views = {kind: fragment.tensors[kind].detach().narrow(0, a, b - a) for kind in STATE}
                part.append(replace(fragment, start=fragment.start + a, length=b - a, tensors=views))
        begin += fragment.length
    return out


def _write_part(path: Path, part: list[Fragment]) -> dict[str, int | str]:
    tensors = {f"{fragment.name}/{kind}": fragment.tensors[kind] for fragment in part for kind in STATE}
    shapes = {key: (len(tensor),) for key, tensor in tensors.items()}
    return write_file(path, shapes, lambda key, first, last: tensors[key][first:last].cpu(), torch.float32)


def _write_index(folder: Path, state: dict[str, Any], files: dict[str, Any], parameters: dict[str, Any]) -> None:
    index = {"format": FORMAT, "state": state, "files": files, "parameters": parameters}
    index["sha256"] = own_digest(index)
    _write_file(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))
    Checkpoint(folder)  # whatever is missing is found now, not at the next start
    _sync_folder(folder)


def _write_file(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
