"""Drops what does not look like prose: the quality filter of MassiveText (Gopher, arXiv 2112.11446, appendix A.1.1).

Made for English web text; on source code, tables and other languages most of its rules say nothing. A word is what stands
between white space. Lines are those that are not blank, without the space around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters._shared import Count, Share, lines_of, share

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "-")  # the paper says "bullet point"; these are datatrove's
_ELLIPSES = ("...", "…")

Ratio = Annotated[float, Field(ge=0)]


def reason_to_drop(
    doc: Document,
    min_words: Count = 50,
    max_words: Count | None = 100_000,
    min_mean_word_chars: Ratio = 3,
    max_mean_word_chars: Ratio = 10,
    max_symbols_per_word: Ratio = 0.1,
    max_bullet_lines: Share = 0.9,
    max_ellipsis_lines: Share = 0.3,
    min_alphabetic_words: Share = 0.8,
    min_stop_words: Count = 2,
    stop_words: tuple[str, ...] = STOP_WORDS,
    bullets: tuple[str, ...] = BULLETS,
) -> str | None:
    """Says which rule a text breaks; every default is the paper's.

    The number of words, their mean length in characters, hash signs and ellipses (each apart) for a word, the share of lines
    that begin with one of `bullets` and that end with an ellipsis, the share of words with a letter, and how many different
    `stop_words` there are (in any case).
    """
    text, words = doc.text, doc.text.split()
    if len(words) < min_words:
        return "too few words"
    if max_words is not None and len(words) > max_words:
        return "too many words"
    mean_chars = share(sum(map(len, words)), len(words))
    if mean_chars < min_mean_word_chars:
        return "words too short"
    if mean_chars > max_mean_word_chars:
        return "words too long"
    if share(text.count("#"), len(words)) > max_symbols_per_word:
        return "too many hash signs"
    if share(sum(map(text.count, _ELLIPSES)), len(words)) > max_symbols_per_word:
        return "too many ellipses"
    lines = lines_of(text)
    if share(sum(line.startswith(bullets) for line in lines), len(lines)) > max_bullet_lines:
        return "too many bullet lines"
    if share(sum(line.endswith(_ELLIPSES) for line in lines), len(lines)) > max_ellipsis_lines:
        return "too many lines end in an ellipsis"
    if share(_alphabetic(words, min_alphabetic_words), len(words)) < min_alphabetic_words:
        return "too few words have a letter"
    return None if _has_stop_words(words, stop_words, min_stop_words) else "too few stop words"


def _alphabetic(words: Sequence[str], enough: float) -> int:
    """How many words have a letter; those that begin with one are counted first, for nearly always they are enough."""
    first = sum(map(str.isalpha, [word[0] for word in words]))
    return first if first >= enough * len(words) else sum(any(map(str.isalpha, word)) for word in words)


def _has_stop_words(words: Sequence[str], stop_words: Sequence[str], enough: int) -> bool:
    wanted = {word.lower() for word in stop_words}
    return len(wanted.intersection(words)) >= enough or len(wanted.intersection(map(str.lower, words))) >= enough
