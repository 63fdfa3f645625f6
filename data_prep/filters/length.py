"""Drops documents that are too short or too long.

SlimPajama drops those under 200 characters: https://huggingface.co/datasets/cerebras/SlimPajama-627B
"""

from __future__ import annotations

from megaspark.data_prep.documents import Document


def reason_to_drop(doc: Document, min_chars: int = 0, max_chars: int | None = None) -> str | None:
    """Says "too short" or "too long" of a text of fewer than `min_chars` or more than `max_chars` Unicode characters."""
    if len(doc.text) < min_chars:
        return "too short"
    if max_chars is not None and len(doc.text) > max_chars:
        return "too long"
    return None
