"""Drops texts that repeat themselves: the repetition filter of MassiveText (Gopher, arXiv 2112.11446, table A1).

Implementations of that table differ where the paper is silent; here: a word is what stands between white space, and an n-gram
is n words. Characters are those of words; each is counted once, however many repeated n-grams it lies in. A repeated n-gram is
one that occurs twice or more, and all its occurrences count; of lines and paragraphs only the copies of an earlier one count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated

import numpy as np
from pydantic import Field

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters._shared import Share, lines_of, repeated

TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

Limits = dict[Annotated[int, Field(ge=2)], Share]


def reason_to_drop(
    doc: Document,
    max_lines: Share = 0.30,
    max_paragraphs: Share = 0.30,
    max_line_chars: Share = 0.20,
    max_paragraph_chars: Share = 0.20,
    top_ngrams: Limits = TOP_NGRAMS,
    repeated_ngrams: Limits = REPEATED_NGRAMS,
) -> str | None:
    """Says what is repeated too much; every default is the paper's.

    The share of lines and of paragraphs (lines between blank ones) that are copies, and of the characters in them; for each n
    of `top_ngrams` the share of characters in the most frequent n-gram (the longest of them, then the first), and for each n of
    `repeated_ngrams` that in all repeated n-grams. A table that is given replaces the default table.
    """
    lines, line_chars = repeated(lines_of(doc.text))
    paragraphs, paragraph_chars = repeated(_paragraphs(doc.text))
    for what, found, limit in (
        ("repeated lines", lines, max_lines),
        ("repeated paragraphs", paragraphs, max_paragraphs),
        ("characters in repeated lines", line_chars, max_line_chars),
        ("characters in repeated paragraphs", paragraph_chars, max_paragraph_chars),
    ):
        if found > limit:
            return what
    return _repeated_ngrams(doc.text.split(), top_ngrams, repeated_ngrams)


def _paragraphs(text: str) -> list[str]:
    lines = map(str.strip, text.split("\n"))
    return ["\n".join(group) for full, group in groupby(lines, key=bool) if full]


def _repeated_ngrams(words: Sequence[str], top: Mapping[int, float], all_repeated: Mapping[int, float]) -> str | None:
    """Goes up from pairs of words and stops as soon as no longer n-gram can matter.

    A repeated n-gram consists of repeated shorter ones, so the characters in repeated n-grams only become fewer as n grows, and
    those of the most frequent one are among them.
    """
    longest = max((*top, *all_repeated), default=0)
    if len(words) < 2 or not longest:
        return None
    codes = {word: code for code, word in enumerate(dict.fromkeys(words))}
    word_ids = np.fromiter(map(codes.__getitem__, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))])
    ids = word_ids
    for n in range(2, min(longest, len(words)) + 1):
        # Numbers below words * vocabulary, so below 2**63, made small again by `unique`.
        keys = ids[:-1] * len(codes) + word_ids[n - 1 :]
        _, ids, counts = np.unique(keys, return_inverse=True, return_counts=True)
        in_repeated = _share_of_chars(np.flatnonzero(counts[ids] > 1), n, ends)
        if in_repeated <= min(limit for table in (top, all_repeated) for m, limit in table.items() if m >= n):
            return None
        if n in top and _share_of_chars(_top(ids, counts, n, ends), n, ends) > top[n]:
            return f"characters in the top {n}-gram"
        if n in all_repeated and in_repeated > all_repeated[n]:
            return f"characters in repeated {n}-grams"
    return None


def _top(ids: np.ndarray, counts: np.ndarray, n: int, ends: np.ndarray) -> np.ndarray:
    """Where the most frequent n-gram starts (word numbers): of several the one with most characters, then the first.

    `ids` (words - n + 1,) and `counts` (distinct n-grams,) describe the n-grams, `ends` (words + 1,) characters before a word.
    """
    candidates = np.flatnonzero(counts[ids] == counts.max())
    chars = ends[candidates + n] - ends[candidates]
    return np.flatnonzero(ids == ids[candidates[np.argmax(chars)]])


def _share_of_chars(starts: np.ndarray, n: int, ends: np.ndarray) -> float:
    """The share of all characters that lies in the n-grams which start at the words `starts`, ascending."""
    if not len(starts):
        return 0.0
    stops = np.append(np.minimum(starts[:-1] + n, starts[1:]), starts[-1] + n)  # up to where the next one goes on
    return float((ends[stops] - ends[starts]).sum() / ends[-1])
