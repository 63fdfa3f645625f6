"""Do training and validation data share text? Asked of the manifests at every start, of the documents themselves on demand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from megaspark.shards import TokenDataset


def overlap(train: Mapping[str, TokenDataset], validation: Mapping[str, TokenDataset]) -> str | None:
    """Says, as one line for the user, what validation data are training data too, or None; reads manifests only.

    Told by shards with the same checksum, and by input files that both were made from. Datasets of one prep job may share input
    files: a job puts every text, and all its exact copies, either into the holdout or not, and into one dataset only.
    """
    shards = {info.bin_sha256: d.folder / info.name for d in train.values() for info in d.manifest.shards if info.tokens}
    inputs = [(d.folder, d.manifest.settings_sha256, _inputs(d)) for d in train.values()]
    for held in validation.values():
        for info in held.manifest.shards:
            if info.tokens and info.bin_sha256 in shards:
                same = shards[info.bin_sha256]
                return f"validation shard {held.folder / info.name} holds the same tokens as training shard {same}"
        own = _inputs(held)
        for folder, job, files in inputs:
            common = own & files if job != held.manifest.settings_sha256 else None
            if common:
                others = f" and {len(common) - 1:,} more" if len(common) > 1 else ""
                return f"validation data {held.folder} and training data {folder} were both made from {min(common)}{others}"
    return None


def shared_documents(
    train: Mapping[str, TokenDataset],
    validation: Mapping[str, TokenDataset],
    progress: Callable[[int], None] = lambda _: None,
) -> list[tuple[str, int, str, int]]:
    """Every training document equal to a validation document, token by token: (dataset, number, dataset, number) of both.

    Reads all of the training data; holds a hash for each validation document. Empty documents are left out. `progress` is told
    the tokens done with.
    """
    held: dict[bytes, tuple[str, int]] = {}
    for name, dataset in validation.items():
        for number, digest in _digests(dataset, None, lambda _: None):
            held.setdefault(digest, (name, number))
    lengths = np.unique(np.concatenate([[0], *(s.lengths for d in validation.values() for s in d.shards)]))
    return [
        (name, number, *held[digest])
        for name, dataset in train.items()
        for number, digest in _digests(dataset, lengths, progress)
        if digest in held
    ]


def _inputs(dataset: TokenDataset) -> set[str]:
    """The input files of a dataset, each spelled in one way."""
    files = {file for info in dataset.manifest.shards for file in info.inputs}
    return {file if ":" in file else os.path.abspath(file) for file in files}


def _digests(
    dataset: TokenDataset, lengths: np.ndarray | None, progress: Callable[[int], None]
) -> Iterator[tuple[int, bytes]]:
    """The number and 128-bit hash of each document that is not empty and, if given, has one of the `lengths`."""
    before = 0
    for shard in dataset.shards:
        ends = np.cumsum(shard.lengths, dtype=np.int64)
        wanted = shard.lengths > 0 if lengths is None else (shard.lengths > 0) & np.isin(shard.lengths, lengths)
        tokens = np.asarray(shard.tokens)  # slicing a plain array takes a third of the time of a memmap
        for i in np.flatnonzero(wanted).tolist():
            end = int(ends[i])
            document = tokens[end - int(shard.lengths[i]) : end].astype("<i4")
            yield before + i, hashlib.blake2b(document.tobytes(), digest_size=16).digest()
        before += shard.documents
        progress(len(shard))
