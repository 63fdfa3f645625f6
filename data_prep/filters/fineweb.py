"""Drops lists, menus and boilerplate: the filters that FineWeb found for itself (arXiv 2406.17557, section 3.6).

There they follow `gopher_repetition`, `gopher_quality` and most rules of C4. Lines are those that are not blank, without the
space around them. (datatrove's code departs from the paper: it drops from 0.01 of repeated characters on.)
"""

from __future__ import annotations

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters._shared import Count, Share, lines_of, repeated, share

# The paper says "punctuation"; this is what ends a sentence in the larger scripts, and the quotation marks after it.
TERMINAL = ".!?…\"'”’»。．｡！？」』؟۔।॥։።፧။។"


def reason_to_drop(
    doc: Document,
    min_punctuated_lines: Share | None = 0.12,
    max_repeated_line_chars: Share | None = 0.1,
    max_short_lines: Share | None = 0.67,
    short_line_chars: Count = 30,
    terminal: str = TERMINAL,
) -> str | None:
    """Says which rule a text breaks; every default is the paper's, and as there the limit itself is dropped. null: no limit.

    The share of lines that end in a character of `terminal`, the share of characters in lines that are copies of an earlier
    one, and the share of lines of fewer than `short_line_chars` characters.
    """
    lines = lines_of(doc.text)
    punctuated = share(sum(line[-1] in terminal for line in lines), len(lines))
    if min_punctuated_lines is not None and punctuated <= min_punctuated_lines:
        return "too few lines end in punctuation"
    if max_repeated_line_chars is not None and repeated(lines)[1] >= max_repeated_line_chars:
        return "characters in repeated lines"
    short = share(sum(len(line) < short_line_chars for line in lines), len(lines))
    if max_short_lines is not None and short >= max_short_lines:
        return "too many short lines"
    return None
