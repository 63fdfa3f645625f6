"""Pieces of a parameter: runs of elements of the flattened whole or of some of its columns, and how two of them overlap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened parameter, or of `columns` of it (the first, their number), in `file`."""

    file: str
    start: int
    length: int
    columns: tuple[int, int] | None = None

    @classmethod
    def listed(cls, file: str, start: int, length: int, *columns: int) -> Piece:
        """From its line in the index."""
        return cls(file, start, length, (columns[0], columns[1]) if columns else None)

    def line(self) -> list[Any]:
        """Its line in the index."""
        return [self.file, self.start, self.length, *(self.columns or ())]


@dataclass(frozen=True)
class Rectangle:
    """Rows [top, bottom) x columns [left, right) of a matrix, its first element at `at` in a buffer of rows of `pitch`."""

    top: int
    bottom: int
    left: int
    right: int
    at: int
    pitch: int

    def view(self, buffer: Tensor, inner: Rectangle, base: int) -> Tensor:
        """The part `inner` of it within a buffer that holds the elements from `base` on."""
        size = (inner.bottom - inner.top, inner.right - inner.left)
        return buffer.as_strided(size, (self.pitch, 1), buffer.storage_offset() + self.place(inner) - base)

    def place(self, inner: Rectangle) -> int:
        """Where the first element of a part lies in the buffer."""
        return self.at + (inner.top - self.top) * self.pitch + inner.left - self.left

    def common(self, other: Rectangle) -> Rectangle | None:
        """The part that two of them share, or None; its place in a buffer is neither's."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Rectangle(top, bottom, left, right, 0, 0) if top < bottom and left < right else None


def rectangles(start: int, length: int, width: int, columns: tuple[int, int] | None) -> Iterator[Rectangle]:
    """At most three that make up elements [start, start + length) of a flattened matrix of `width`, or of some of its columns.

    They lie in a buffer of those elements. A vector is a matrix of one row.
    """
    left, pitch = columns or (0, width)
    at = 0
    while at < length:
        row, column = divmod(start + at, pitch)
        if column or length - at < pitch:
            count = min(pitch - column, length - at)
            yield Rectangle(row, row + 1, left + column, left + column + count, at, pitch)
            at += count
        else:
            rows = (length - at) // pitch
            yield Rectangle(row, row + rows, left, left + pitch, at, pitch)
            at += rows * pitch


def row_width(shape: tuple[int, ...]) -> int:
    """Elements of a row of a parameter; a vector is one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def strip_elements(shape: tuple[int, ...], columns: tuple[int, int] | None) -> int:
    """Elements of a parameter, or of some of its columns."""
    whole = math.prod(shape)
    return whole if columns is None else whole // row_width(shape) * columns[1]
