"""Rewrites a web page to the lines that C4 keeps (arXiv 1910.10683, section 2.2); `c4_pages` drops whole pages and comes next.

For web text only: of source code, tables and verse it leaves little.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters._shared import Count

TERMINAL = (".", "!", "?", '"', "”")
UNWANTED = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
_CITATION = re.compile(r"\[(?:\d{0,6}|edit|citation needed)\]")


def rewrite(
    doc: Document, min_words: Count = 5, terminal: tuple[str, ...] = TERMINAL, unwanted: tuple[str, ...] = UNWANTED
) -> Document:
    """The document with only those lines that end in one of `terminal`, have `min_words` words and none of `unwanted`.

    `unwanted` is looked for in any case. Wikipedia's citation marks ([1], [edit], [citation needed]) are taken out first.
    Every default is the paper's. Nothing may be left: then the document is dropped.
    """
    barred = [text.lower() for text in unwanted]
    lines = (_CITATION.sub("", line).strip() for line in doc.text.split("\n"))
    kept = [line for line in lines if line.endswith(terminal) and len(line.split()) >= min_words and not _has(line, barred)]
    text = "\n".join(kept)
    return doc if text == doc.text else replace(doc, text=text)


def _has(line: str, unwanted: list[str]) -> bool:
    lower = line.lower()
    return any(text in lower for text in unwanted)
