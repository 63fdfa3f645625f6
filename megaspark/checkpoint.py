"""Checkpoints without a layout: every process writes the fragments it holds, any number of processes reads them back.

A checkpoint is a folder `step_00001000/` of safetensors files, one a process, each with 1-D fp32 fragments under the keys
"NAME/master", "NAME/exp_avg" and "NAME/exp_avg_sq", and `checkpoint.json`: the step, the number of samples taken, what the run
is, each parameter's shape and fragments (file, start, length), the size and sha256 of every file and of itself. It is written
under another name and renamed when everything is on the disk: it exists whole or not at all. Nothing in it is pickled. The
random state of a run is its seed and step, so none is saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment
from megaspark.pieces import Piece, rectangles, row_width
from megaspark.safetensors_files import Rows, plan_shards, write_file
from megaspark.settings import digest

FORMAT = 1
INDEX = "checkpoint.json"
MASTERS_FILE_BYTES = 16 * 10**9


class BadCheckpoint(UserError):
    """A checkpoint that cannot be used, with the file at fault."""


class Checkpoint:
    """An opened checkpoint: its state and, on demand, any part of any parameter.

    Raises BadCheckpoint, naming the file, where the index is missing, not ours, or does not cover every parameter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.state: dict[str, Any] = index["state"]
            self.files: dict[str, dict[str, Any]] = index["files"]
            self.shapes = {name: tuple(entry["shape"]) for name, entry in index["parameters"].items()}
            self.pieces = {
                name: [Piece.listed(*piece) for piece in entry["fragments"]]
                for name, entry in index["parameters"].items()
            }
            version, self.step = index["format"], int(self.state["step"])
            intact = index["sha256"] == _own_digest(index)
        except FileNotFoundError:
            raise BadCheckpoint(f"{folder} is no checkpoint: it has no {INDEX}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{path} is damaged ({type(error).__name__}: {error})") from None
        if version != FORMAT:
            raise BadCheckpoint(f"{path} is of format {version}; this version reads {FORMAT}")
        if not intact:
            raise BadCheckpoint(f"{path} has changed: its sha256 is not the one that it says")
        self._check_coverage(path)
        self._open: dict[str, Any] = {}

    def problem(self, files: Iterable[str] | None = None) -> str | None:
        """Re-reads files (default: all) against their sizes and sha256; says what is wrong with the first bad one."""
        for name in self.files if files is None else files:
            path, entry = self.folder / name, self.files[name]
            if not path.is_file():
                return f"{path} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{path} has {size:,} bytes, should have {entry['bytes']:,}"
            with path.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                    return f"{path} has changed: its sha256 is not the one in {INDEX}"
        return None

    def read(
        self, name: str, kind: str = "master", start: int = 0, length: int | None = None, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Elements [start, start + length) of a flattened parameter's master or moment, put together from its fragments.

        kind: one of fragments.STATE. columns: of which columns alone these are the elements (the first, their number). Returns a
        1-D fp32 tensor. Reads those elements only.
        """
        shape = self.shapes[name]
        whole, width = math.prod(shape), row_width(shape)
        length = (whole if columns is None else whole // width * columns[1]) - start if length is None else length
        out = torch.empty(length, dtype=torch.float32)
        wanted = list(rectangles(start, length, width, columns))
        for piece in self.pieces[name]:
            for theirs in rectangles(piece.start, piece.length, width, piece.columns):
                for ours in wanted:
                    if both := theirs.common(ours):
                        first = theirs.place(both)
                        last = first + (both.bottom - both.top - 1) * theirs.pitch + both.right - both.left
                        found = self._file(piece.file).get_slice(f"{name}/{kind}")[first:last]
                        ours.view(out, both, 0).copy_(theirs.view(found, both, first))
        return out

    def tensor(self, name: str) -> Tensor:
        """A parameter's fp32 master in its own shape."""
        return self.read(name).view(self.shapes[name])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a parameter's fp32 master along its first dimension; lets go of what reading it mapped."""
        shape = self.shapes[name]
        width = math.prod(shape[1:])
        found = self.read(name, "master", first * width, (last - first) * width).view(last - first, *shape[1:])
        self._open.clear()  # pages of a mapping that stays open count as this process's memory
        return found

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise BadCheckpoint(f"{self.folder / name} cannot be read ({error})") from None
        return self._open[name]

    def _check_coverage(self, path: Path) -> None:
        for name, pieces in self.pieces.items():
            shape = self.shapes[name]
            whole, width = math.prod(shape), row_width(shape)
            right = 0
            for left, count in sorted({piece.columns or (0, width) for piece in pieces}):
                end = 0
                for piece in sorted(pieces, key=lambda piece: piece.start):
                    if (piece.columns or (0, width)) == (left, count):
                        if piece.start != end or piece.length < 0 or piece.file not in self.files:
                            raise BadCheckpoint(f"{path} is damaged: {name} has a gap or an overlap at element {end}")
                        end += piece.length
                if left != right or end != whole // width * count:
                    raise BadCheckpoint(f"{path} is damaged: columns {left} to {left + count} of {name} end at element {end}")
                right = left + count
            if right != width:
                raise BadCheckpoint(f"{path} is damaged: {name} has {right} columns of {width}")


def save(
    folder: Path,
    state: dict[str, Any],
    held: Iterable[Fragment],
    rank: int,
    gather: Callable[[Any], list[Any]],
) -> str | None:
    """Writes one checkpoint together with all other processes; returns None, or what went wrong (then nothing is left).

    folder: `.../checkpoints/step_00001000`, on a disk that all processes see. held: what this process must write; nothing
    where another holds the same. gather: everybody's value on everybody.
    """
    partial = folder.with_name(folder.name + ".partial")
    problem = None
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        problem = _attempt(lambda: partial.mkdir(parents=True))
    problem = next((p for p in gather(problem) if p), None)
    entry: dict[str, Any] = {}
    if problem is None:
        problem = _attempt(lambda: entry.update(_write_fragments(partial, f"rank_{rank:05d}.safetensors", held)))
    entries = gather((problem, entry))
    problem = next((p for p, _ in entries if p), None)
    if rank == 0:
        if problem is None:
            problem = _attempt(lambda: _complete(partial, folder, state, [e for _, e in entries if e]))
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return gather(problem)[0]


def load(checkpoint: Checkpoint, held: Iterable[Fragment], kinds: Iterable[str] = STATE) -> None:
    """Fills the fragments that this process holds from a checkpoint written under any layout; of STATE only `kinds`."""
    with torch.no_grad():
        for fragment in held:
            for kind in kinds:
                found = checkpoint.read(fragment.name, kind, fragment.start, fragment.length, fragment.columns)
                fragment.tensors[kind].copy_(found)


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


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """A run's finished checkpoints, newest first."""
    return sorted((p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit()), reverse=True)


def newest(path: Path) -> Checkpoint:
    """Opens a step folder, or a run folder's latest checkpoint; raises UserError where there is none."""
    if (path / INDEX).is_file() or path.name.startswith("step_"):
        return Checkpoint(path)
    latest = path / "latest"
    if latest.is_file():
        return Checkpoint(path / "checkpoints" / latest.read_text().strip())
    folders = step_folders(path)
    if not folders:
        raise UserError(f"{path} holds no checkpoint (neither {INDEX} nor checkpoints/step_*); give a run or step folder")
    return Checkpoint(folders[0])


def note_latest(run: Path, folder: Path) -> None:
    """Makes `latest` name a checkpoint, in one atomic step."""
    _write_file(run / "latest.partial", folder.name + "\n")
    os.replace(run / "latest.partial", run / "latest")
    _sync_folder(run)


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints (0 keeps all)."""
    for folder in step_folders(run)[keep:] if keep else []:
        doomed = folder.with_name(folder.name + ".partial")
        folder.rename(doomed)  # first out of sight, so that a kill in mid-removal leaves no half checkpoint
        shutil.rmtree(doomed)


def _attempt(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_fragments(partial: Path, name: str, held: Iterable[Fragment]) -> dict[str, Any]:
    """Writes this process's file; returns its index entry, empty where it holds nothing."""
    tensors, listed = {}, []
    for fragment in held:
        if fragment.length:
            for kind in STATE:
                tensors[f"{fragment.name}/{kind}"] = fragment.tensors[kind].detach().cpu().contiguous()
            piece = Piece(name, fragment.start, fragment.length, fragment.columns)
            listed.append((fragment.name, list(fragment.shape), piece.line()))
    if not tensors:
        return {}
    path = partial / name
    save_file(tensors, path)
    path.chmod(0o644)  # save_file makes it private, and others of the team convert it
    with path.open("rb") as f:
        os.fsync(f.fileno())
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": {name: {"bytes": path.stat().st_size, "sha256": sha256}}, "fragments": listed}


def _complete(partial: Path, folder: Path, state: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Writes the index over everybody's files and gives the checkpoint its name."""
    parameters: dict[str, Any] = {}
    for entry in entries:
        for name, shape, piece in entry["fragments"]:
            parameters.setdefault(name, {"shape": shape, "fragments": []})["fragments"].append(piece)
    files = {name: facts for entry in entries for name, facts in entry["file"].items()}
    _write_index(partial, state, files, parameters)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _sync_folder(folder.parent)


def _write_index(folder: Path, state: dict[str, Any], files: dict[str, Any], parameters: dict[str, Any]) -> None:
    index = {"format": FORMAT, "state": state, "files": files, "parameters": parameters}
    index["sha256"] = _own_digest(index)
    _write_file(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False))
    Checkpoint(folder)  # whatever is missing is found now, not at the next start
    _sync_folder(folder)


def _own_digest(index: dict[str, Any]) -> str:
    """The sha256 of all that an index says but its own sha256."""
    return digest(json.loads(json.dumps({key: value for key, value in index.items() if key != "sha256"})))


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
