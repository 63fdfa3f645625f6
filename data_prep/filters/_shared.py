"""What several filters need: the lines of a text, how much of it is repeated, types for their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


def lines_of(text: str) -> list[str]:
    """The lines of a text, without the space around them and without blank ones; only `\\n` ends a line."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def share(part: int, whole: int) -> float:
    """part / whole; of nothing, nothing."""
    return part / whole if whole else 0.0


def repeated(pieces: Sequence[str]) -> tuple[float, float]:
    """The share of the pieces, and of their characters, that are copies of an earlier piece."""
    distinct = set(pieces)
    if len(distinct) == len(pieces):
        return 0.0, 0.0
    chars = sum(map(len, pieces))
    return share(len(pieces) - len(distinct), len(pieces)), share(chars - sum(map(len, distinct)), chars)
