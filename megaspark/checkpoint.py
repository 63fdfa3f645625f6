"""Checkpoints without a layout: every process writes the fragments it holds, any number of processes reads them back.

A checkpoint is a folder `step_00001000/` of safetensors files, some a process, each with 1-D fp32 fragments under the keys
"NAME/master", "NAME/exp_avg" and "NAME/exp_avg_sq", and `checkpoint.json`: the step, the number of samples taken, what the run
is, each parameter's shape and fragments (file, start, length), the size and sha256 of every file and of itself. It is written
under another name and renamed when everything is on the disk (`checkpoint_writers.py`): it exists whole or not at all. Nothing in
it is pickled. The random state of a run is its seed and step, so none is saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment
from megaspark.pieces import Piece, Rectangle, rectangles, row_width, strip_elements
from megaspark.safetensors_files import TensorFile
from megaspark.settings import digest

FORMAT = 1
INDEX = "checkpoint.json"


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
            intact = index["sha256"] == own_digest(index)
        except FileNotFoundError:
            raise BadCheckpoint(f"{folder} is no checkpoint: it has no {INDEX}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{path} is damaged ({type(error).__name__}: {error})") from None
        if version != FORMAT:
            raise BadCheckpoint(f"{path} is of format {version}; this version reads {FORMAT}")
        if not intact:
            raise BadCheckpoint(f"{path} has changed: its sha256 is not the one that it says")
        self._check_coverage(path)
        self._open: dict[str, TensorFile] = {}

    def problem(self, files: Iterable[str] | None = None) -> str | None:
        """Re-reads files (default: all) against their sizes and sha256; says what is wrong with the first bad one."""
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            return next(filter(None, pool.map(self._problem_of, self.files if files is None else files)), None)

    def share(self, rank: int, world: int) -> list[str]:
        """The files that one of `world` processes verifies: where as many wrote them, those that it is to read itself."""
        count = len(self.files)
        return sorted(self.files)[count * rank // world : count * (rank + 1) // world]

    def _problem_of(self, name: str) -> str | None:
        path, entry = self.folder / name, self.files[name]
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{path} has {size:,} bytes, should have {entry['bytes']:,}"
        try:
            with path.open("rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != entry["sha256"]:
                    return f"{path} has changed: its sha256 is not the one in {INDEX}"
        except OSError as error:
            return f"{path} cannot be read ({error})"
        return None

    def read(
        self, name: str, kind: str = "master", start: int = 0, length: int | None = None, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Elements [start, start + length) of a flattened parameter's master or moment, put together from its fragments.

        kind: one of fragments.STATE. columns: of which columns alone these are the elements (the first, their number). Returns a
        1-D fp32 tensor. Reads those elements only.
        """
        if length is None:
            length = strip_elements(self.shapes[name], columns) - start
        out = torch.empty(length, dtype=torch.float32)
        self.read_into(out, name, kind, start, columns)
        return out

    def read_into(
        self, out: Tensor, name: str, kind: str = "master", start: int = 0, columns: tuple[int, int] | None = None
    ) -> None:
        """As `read`, into `out`: 1-D fp32, contiguous and in host memory; as many elements as it has."""
        shape = self.shapes[name]
        if start + len(out) > strip_elements(shape, columns):
            raise ValueError(f"{name} has {strip_elements(shape, columns)} elements there, not {start + len(out)}")
        for piece in self.pieces[name]:
            try:
                if piece.columns == columns:
                    first, last = max(start, piece.start), min(start + len(out), piece.start + piece.length)
                    if first < last:
                        target = out[first - start : last - start]
                        self._file(piece.file).read_into(target, f"{name}/{kind}", first - piece.start)
                else:
                    self._read_rectangles(out, name, kind, list(rectangles(start, len(out), row_width(shape), columns)), piece)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                said = f"{type(error).__name__}: {error}"
                raise BadCheckpoint(f"{self.folder / piece.file} cannot be read ({said})") from None

    def _read_rectangles(self, out: Tensor, name: str, kind: str, wanted: list[Rectangle], piece: Piece) -> None:
        """What a piece of other columns has of the elements that `out` is made of."""
        for theirs in rectangles(piece.start, piece.length, row_width(self.shapes[name]), piece.columns):
            for ours in wanted:
                if both := theirs.common(ours):
                    first = theirs.place(both)
                    found = torch.empty((both.bottom - both.top - 1) * theirs.pitch + both.right - both.left)
                    self._file(piece.file).read_into(found, f"{name}/{kind}", first)
                    ours.view(out, both, 0).copy_(theirs.view(found, both, first))

    def tensor(self, name: str) -> Tensor:
        """A parameter's fp32 master in its own shape."""
        return self.read(name).view(self.shapes[name])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a parameter's fp32 master along its first dimension."""
        shape = self.shapes[name]
        width = math.prod(shape[1:])
        return self.read(name, "master", first * width, (last - first) * width).view(last - first, *shape[1:])

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
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


def load(checkpoint: Checkpoint, held: Iterable[Fragment], kinds: Iterable[str] = STATE) -> None:
    """Fills the fragments that this process holds from a checkpoint written under any layout; of STATE only `kinds`."""

    def fill(job: tuple[Fragment, str]) -> None:
        fragment, kind = job
        target = fragment.tensors[kind].detach()
        direct = target.device.type == "cpu" and target.is_contiguous()
        found = target if direct else torch.empty(target.shape, dtype=torch.float32)
        checkpoint.read_into(found, fragment.name, kind, fragment.start, fragment.columns)
        if not direct:
            target.copy_(found)

    jobs = [(fragment, kind) for fragment in held for kind in kinds]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        for _ in pool.map(fill, jobs):
            pass


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_folders(run: Path) -> list[Path]:
    """A run's finished checkpoints, newest first."""
    return sorted((p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit()), reverse=True)


def latest(run: Path) -> str | None:
    """The name of the step folder that a run wrote last, whether or not it is there still; None if it never wrote any."""
    path = run / "latest"
    return path.read_text().strip() if path.is_file() else None


def newest(path: Path) -> Checkpoint:
    """Opens a step folder, or a run folder's latest checkpoint; raises UserError where there is none."""
    if (path / INDEX).is_file() or path.name.startswith("step_"):
        return Checkpoint(path)
    if named := latest(path):
        return Checkpoint(path / "checkpoints" / named)
    folders = step_folders(path)
    if not folders:
        raise UserError(f"{path} holds no checkpoint (neither {INDEX} nor checkpoints/step_*); give a run or step folder")
    return Checkpoint(folders[0])


def own_digest(index: dict[str, Any]) -> str:
    """The sha256 of all that an index says but its own sha256."""
    return digest(json.loads(json.dumps({key: value for key, value in index.items() if key != "sha256"})))
