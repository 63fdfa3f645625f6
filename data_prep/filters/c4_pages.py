"""Drops web pages as C4 does: placeholder text, code, hardly a sentence (arXiv 1910.10683, section 2.2); see also `c4_lines`.

C4's list of bad words is not used. For web text only: a curly bracket is reason enough, so no source code is left.
"""

from __future__ import annotations

import re
from itertools import islice

from megaspark.data_prep.documents import Document
from megaspark.data_prep.filters._shared import Count

# Sentence ends: possessive, and begun only at the first mark of a row, so that no row of dots is walked twice.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s|\Z)|[。！？]++")


def reason_to_drop(
    doc: Document, min_sentences: Count = 3, phrases: tuple[str, ...] = ("lorem ipsum",), characters: str = "{"
) -> str | None:
    """Says which rule a page breaks: it has one of `characters`, one of `phrases` (in any case), or too few sentences.

    A sentence ends in . ! or ?, perhaps a closing quotation mark or bracket, and white space or the end of the text; or in one
    of 。！？. Every default is the paper's.
    """
    if any(character in doc.text for character in characters):
        return "curly bracket" if characters == "{" else "unwanted character"
    lower = doc.text.lower()
    if phrase := next((phrase for phrase in phrases if phrase.lower() in lower), None):
        return phrase
    if len(list(islice(_SENTENCE_END.finditer(doc.text), min_sentences))) < min_sentences:
        return "too few sentences"
    return None
