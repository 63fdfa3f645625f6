"""Rewrites a text in Unicode normalization form C, as SlimPajama does first of all.

Canonical equivalents, such as e with a combining acute and é, become one sequence of code points (Unicode Annex 15), and so
one sequence of tokens. The tables are those of the running Python (`unicodedata.unidata_version`).
"""

from __future__ import annotations

import re
import sys
import unicodedata
from dataclasses import replace
from functools import lru_cache

from megaspark.data_prep.documents import Document

# Python sorts combining marks in quadratic time: 40,000 in a row take a second, a hostile line of 5 MB hours. Text has a few.
_LONG_RUN = 512
_STRIDE = 64  # looking at every 64th character is enough to find such a run


def rewrite(doc: Document) -> Document:
    """The document with its text in NFC; the very document if it is so already."""
    if doc.text.isascii():
        return doc
    text = unicodedata.normalize("NFC", _sorted_marks(doc.text))
    return doc if text == doc.text else replace(doc, text=text)


def _sorted_marks(text: str) -> str:
    """A canonical equivalent of `text` whose long runs of combining marks are decomposed and in canonical order."""
    marks = "".join("m" if unicodedata.combining(character) else " " for character in text[::_STRIDE])
    return _long_runs().sub(_sorted_run, text) if "m" * (_LONG_RUN // _STRIDE) in marks else text


def _sorted_run(run: re.Match[str]) -> str:
    parts = "".join(unicodedata.normalize("NFD", mark) for mark in run[0])
    return "".join(sorted(parts, key=unicodedata.combining))  # stable, as the canonical ordering algorithm is


@lru_cache(maxsize=1)
def _long_runs() -> re.Pattern[str]:
    marks = [code for code in range(0x300, sys.maxunicode + 1) if unicodedata.combining(chr(code))]
    starts = [code for code in marks if not unicodedata.combining(chr(code - 1))]
    ends = [code for code in marks if code == sys.maxunicode or not unicodedata.combining(chr(code + 1))]
    ranges = "".join(f"{chr(a)}-{chr(b)}" for a, b in zip(starts, ends, strict=True))
    return re.compile(f"[{ranges}]{{{_LONG_RUN},}}+")
