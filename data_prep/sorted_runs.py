"""Tables on disk that are larger than memory: rows of unsigned 64-bit numbers, in files each sorted by its first column.

A writer holds no more rows than its memory allows; when that is full they go out as one sorted file, a run. Any range of the
first column is then found in any run by bisection and read in blocks, so that who reads decides how to divide the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaspark.manifests import fsync_folder

_SUFFIX = ".run"  # the columns one after the other, little-endian


class RunWriter:
    """Writes a table of `columns` columns as sorted runs into `folder`, which it makes; holds at most `memory_bytes`."""

    def __init__(self, folder: Path, columns: int, memory_bytes: int):
        self.folder, self.columns = folder, columns
        self.most_rows = max(1, memory_bytes // (8 * columns + 32))  # while writing: one column gathered, sorted; their order
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.rows = self.runs = 0
        folder.mkdir()

    def add(self, *columns: np.ndarray) -> None:
        """Appends rows, given as columns of equal length."""
        begin, count = 0, len(columns[0])
        while begin < count:
            end = min(count, begin + self.most_rows - self.rows)
            self.parts.append(tuple(np.array(column[begin:end], np.uint64) for column in columns))
            self.rows += end - begin
            begin = end
            if self.rows == self.most_rows:
                self._flush()

    def _flush(self) -> None:
        if not self.rows:
            return
        order = np.argsort(np.concatenate([part[0] for part in self.parts]))
        with open(self.folder / f"{self.runs:05d}{_SUFFIX}", "wb") as file:
            for i in range(self.columns):
                file.write(np.concatenate([part[i] for part in self.parts])[order].data)
            file.flush()
            os.fsync(file.fileno())
        self.runs += 1
        self.parts, self.rows = [], 0

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self._flush()
            fsync_folder(self.folder)


def read_range(folder: Path, columns: int, low: int, high: int, most_rows: int) -> Iterator[np.ndarray]:
    """Yields the rows with low <= first column < high in blocks of shape (columns, <= most_rows), sorted within each run."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        rows = path.stat().st_size // (8 * columns)
        first, last = _bisect(path, rows, low, high)
        for begin in range(first, last, most_rows):
            count = min(most_rows, last - begin)
            yield np.stack(
                [np.fromfile(path, np.uint64, count, offset=8 * (column * rows + begin)) for column in range(columns)]
            )


def count_rows(folder: Path, columns: int) -> int:
    """The rows of a table."""
    return sum(path.stat().st_size for path in folder.glob(f"*{_SUFFIX}")) // (8 * columns)


def _bisect(path: Path, rows: int, low: int, high: int) -> tuple[int, int]:
    """The first row of a run from `low` on, and the first from `high` on; `high` may be 2^64."""
    column = np.memmap(path, np.uint64, "r", shape=(rows,))  # only the pages that the search meets are read
    ends = [rows if bound > 0xFFFFFFFFFFFFFFFF else int(np.searchsorted(column, np.uint64(bound))) for bound in (low, high)]
    return ends[0], ends[1]
