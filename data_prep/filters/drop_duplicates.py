"""Drops the documents that `megaspark dedup` found to be copies of others: `{drop_duplicates: {path: OUTPUT}}`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from megaspark.data_prep.documents import Document
from megaspark.data_prep.duplicates import DuplicateSet, digest_of


def reason_to_drop(doc: Document, path: str) -> str | None:
    """Says "near_duplicate" or "exact_duplicate" of a line that the dedup job with the output `path` lists.

    Raises UserError if the document's file is not one that the job read, or has changed since.
    """
    lines = _lines(path, doc.file)
    at = lines.searchsorted(doc.line)
    return _duplicates(path).reason if at < len(lines) and lines[at] == doc.line else None


def fingerprint(path: str) -> str:
    """The sha256 of the duplicate set, for a job to know that it is still the same; raises UserError if there is none."""
    return digest_of(Path(path))


@lru_cache(maxsize=4)
def _duplicates(path: str) -> DuplicateSet:
    return DuplicateSet.load(Path(path))


@lru_cache(maxsize=4)  # documents come file by file
def _lines(path: str, file: str) -> np.ndarray:
    return _duplicates(path).lines_to_drop(Path(path), file)
