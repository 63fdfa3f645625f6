"""Drops documents that are too short or too long.

SlimPajama drops those of under 200 characters, punctuation and space not counted: `{min_chars: 200, bare: true}`
(https://huggingface.co/datasets/cerebras/SlimPajama-627B).
"""

from __future__ import annotations

import string

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters._shared import Count

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PIECE_CHARS = 4096


def reason_to_drop(doc: Document, min_chars: Count = 0, max_chars: Count | None = None, bare: bool = False) -> str | None:
    """Says "too short" or "too long" of a text of fewer than `min_chars` or more than `max_chars` Unicode characters.

    With `bare`, white space and ASCII punctuation do not count.
    """
    length = _bare_length(doc.text, min_chars if max_chars is None else max_chars + 1) if bare else len(doc.text)
    if length < min_chars:
        return "too short"
    if max_chars is not None and length > max_chars:
        return "too long"
    return None


def _bare_length(text: str, enough: int) -> int:
    """The characters that are neither white space nor ASCII punctuation, counted until there are `enough`."""
    count = 0
    for start in range(0, len(text), _PIECE_CHARS):
        piece = text[start : start + _PIECE_CHARS].translate(_WITHOUT_PUNCTUATION)
        count += sum(map(len, piece.split()))
        if count >= enough:
            break
    return count
