"""Two ways to cut a dataset into samples of seq + 1 tokens: `plain`, straight through the stream, and `best_fit`.

Best fit (Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830) puts whole documents together so that few
are cut. It works on one chunk of a shard at a time, when a sample of it is first asked for; how many samples a chunk gives is
known without looking at it, so starting stays O(shards). Nothing is padded: the gaps that best fit leaves are closed by
cutting a few documents to pieces, so every sample weighs the same and every token is read. numpy only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from megaspark.permutations import EpochOrder
from megaspark.shards import Shard, TokenDataset

UNIT_TOKENS = 1 << 17  # neighbouring tokens that are read close in time; also the longest seq that can follow in mid-epoch
SHELF_TOKENS = 1 << 29  # tokens that are shuffled together: 131,072 samples of 4,096
CHUNK_TOKENS = 1 << 22  # tokens that are packed together


class Cut(Protocol):
    """A dataset cut into `size` samples; `unit_tokens` names where units begin: cuts that agree in it can follow each other."""

    size: int
    order: EpochOrder
    unit_tokens: int | None

    def read(self, number: int) -> np.ndarray:
        """Sample `number`, shape (seq + 1,)."""
        ...


class PlainCut:
    """Sample k is tokens [k seq, k seq + seq] of the shards laid end to end.

    Neighbours share one token, the last label of the one and the first input of the other; only the tail shorter than a sample
    is left out. A sample is a view into its shard unless it crosses into the next one.
    """

    def __init__(self, dataset: TokenDataset, seq: int):
        self.dataset, self.seq = dataset, seq
        self.size = (dataset.tokens - 1) // seq
        unit = max(1, UNIT_TOKENS // seq)
        self.order = EpochOrder(self.size, unit, max(1, SHELF_TOKENS // UNIT_TOKENS))
        self.unit_tokens = UNIT_TOKENS if unit * seq == UNIT_TOKENS else None

    def read(self, number: int) -> np.ndarray:
        return self.dataset.read(number * self.seq, self.seq + 1)


class PackedCut:
    """Samples of whole documents where they fit; a longer document is cut every seq + 1 tokens and its rest packed.

    Samples share no token. In a sample every piece but the last ends its document, so that end-of-text tokens still tell where
    documents begin. Left out are less than seq + 1 tokens of each shard. The packing takes no seed: an epoch brings the same
    samples in another order.
    """

    unit_tokens = None

    def __init__(self, dataset: TokenDataset, seq: int):
        self.dataset, self.length = dataset, seq + 1
        self.chunk_samples = max(1, CHUNK_TOKENS // self.length)
        self.ends = list(accumulate(len(shard) // self.length for shard in dataset.shards))
        self.size = self.ends[-1] if self.ends else 0
        shelf_chunks = max(1, SHELF_TOKENS // (self.chunk_samples * self.length))
        self.order = EpochOrder(self.size, self.chunk_samples, shelf_chunks)
        self._packed = lru_cache(maxsize=2 * shelf_chunks + 2)(self.pack)  # past an odd shard a unit lies in two chunks

    def read(self, number: int) -> np.ndarray:
        k = bisect_right(self.ends, number)
        chunk, place = divmod(number - (self.ends[k - 1] if k else 0), self.chunk_samples)
        tokens = self.dataset.shards[k].tokens
        pieces = list(self._packed(k, chunk).pieces(place))
        if len(pieces) == 1:
            start, length = pieces[0]
            return tokens[start : start + length]
        return np.concatenate([tokens[start : start + length] for start, length in pieces])

    def chunk_bounds(self, k: int, chunk: int) -> tuple[int, int]:
        """The tokens of shard `k` that its chunk `chunk` is made of."""
        low = chunk * self.chunk_samples * self.length
        return low, min(low + self.chunk_samples * self.length, len(self.dataset.shards[k]))

    def pack(self, k: int, chunk: int) -> Packed:
        """Packs one chunk of shard `k`."""
        low, high = self.chunk_bounds(k, chunk)
        return pack(document_ends(self.dataset.shards[k]), low, high, self.length)


CUTS = {"plain": PlainCut, "best_fit": PackedCut}


# ---- best fit


class Packed(NamedTuple):
    """A packed chunk: sample i is pieces ends[i] to ends[i + 1], piece p the lengths[p] tokens from base + starts[p] on.

    starts, lengths: (pieces,) uint32; ends: (samples + 1,) uint32.
    """

    base: int
    starts: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray

    def pieces(self, sample: int) -> Iterator[tuple[int, int]]:
        """The (start, length) of each piece of a sample."""
        first, last = int(self.ends[sample]), int(self.ends[sample + 1])
        starts, lengths = self.starts[first:last].tolist(), self.lengths[first:last].tolist()
        return ((self.base + start, length) for start, length in zip(starts, lengths, strict=True))


Piece = tuple[int, int]  # (start, length)


def document_ends(shard: Shard) -> np.ndarray:
    """Where each document of a shard ends, shape (documents,) int64, in tokens."""
    return np.cumsum(shard.lengths, dtype=np.int64)


def pack(ends: np.ndarray, low: int, high: int, capacity: int) -> Packed:
    """Packs tokens [low, high) of a shard whose documents end at `ends` into (high - low) // capacity full samples."""
    pieces = _cut_documents(ends, low, high, capacity)
    last = int(np.searchsorted(ends, high))
    unfinished = pieces[-1:] if last < len(ends) and ends[last] != high and pieces[-1][1] < capacity else []
    pieces = pieces[: len(pieces) - len(unfinished)]
    samples = [[pieces[i] for i in bin] for bin in best_fit([length for _, length in pieces], capacity)]
    # A piece that goes on in the next chunk comes last of all: nothing may follow it in its sample.
    samples = _close_gaps(samples, unfinished, (high - low) // capacity, capacity)
    flat = np.array([piece for sample in samples for piece in sample], dtype=np.int64).reshape(-1, 2)
    bounds = np.cumsum([0, *map(len, samples)])
    return Packed(low, (flat[:, 0] - low).astype(np.uint32), flat[:, 1].astype(np.uint32), bounds.astype(np.uint32))


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Puts lengths from 1 to `capacity` into bins, longest first, each where the least room remains; returns numbers by bin.

    O(n capacity / 64) at worst, through a set of rooms kept as the bits of one integer.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity)]  # bins by how much room they have
    rooms = 0  # bit r: some bin has room r
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length, room = lengths[i], capacity
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[number].append(i)
        else:
            number = len(bins)
            bins.append([i])
        if room > length:
            with_room[room - length].append(number)
            rooms |= 1 << room - length
    return bins


def _cut_documents(ends: np.ndarray, low: int, high: int, capacity: int) -> list[Piece]:
    """The documents in [low, high), cut at both and every `capacity` tokens of their own, in order."""
    inside = ends[np.searchsorted(ends, low, "right") : np.searchsorted(ends, high, "left")]
    bounds = np.concatenate([[low], inside, [high]])
    lengths = np.diff(bounds)
    counts = -(-lengths // capacity)
    firsts = np.cumsum(counts) - counts
    offsets = (np.arange(counts.sum()) - np.repeat(firsts, counts)) * capacity
    starts = np.repeat(bounds[:-1], counts) + offsets
    rest = np.minimum(np.repeat(lengths, counts) - offsets, capacity)
    return list(zip(starts.tolist(), rest.tolist(), strict=True))


def _close_gaps(samples: list[list[Piece]], last: list[Piece], count: int, capacity: int) -> list[list[Piece]]:
    """`count` of the samples, their gaps filled with the pieces of the others and then `last`, cut where they must be.

    Whichever are given up, what is kept has gaps for just their tokens, into which hardly a document fits as a whole. So those
    of the fewest documents are given up, then the emptiest; a full one may be a part of a document and never is.
    """
    filled = [sum(length for _, length in sample) for sample in samples]
    by_cost = sorted(range(len(samples)), key=lambda i: (filled[i] < capacity, -len(samples[i]), -filled[i]))
    kept = [samples[i] for i in by_cost[:count]] + [[] for _ in range(count - len(samples))]
    spare = [piece for i in by_cost[count:] for piece in samples[i]] + last
    spare.reverse()
    for sample in reversed(kept):
        room = capacity - sum(length for _, length in sample)
        while room:
            start, length = spare.pop()
            if length > room:
                spare.append((start + room, length - room))
                length = room
            sample.append((start, length))
            room -= length
    return kept


# ---- how many documents are cut


@dataclass
class Truncation:
    """How many documents a way of cutting cuts; `fitting` are those of at most seq + 1 tokens, which need not be cut."""

    documents: int = 0
    cut: int = 0
    fitting: int = 0
    fitting_cut: int = 0

    @property
    def rate(self) -> float:
        """The share of documents of which no sample holds the whole."""
        return self.cut / max(1, self.documents)

    def add(self, whole: np.ndarray, lengths: np.ndarray, capacity: int) -> None:
        """Counts documents: (documents,) bool and int."""
        fits = lengths <= capacity
        self.documents, self.cut = self.documents + len(lengths), self.cut + int((~whole).sum())
        self.fitting, self.fitting_cut = self.fitting + int(fits.sum()), self.fitting_cut + int((fits & ~whole).sum())


def truncation(cut: PlainCut | PackedCut, limit_tokens: int = 1 << 26) -> Truncation:
    """Measures the documents in the first `limit_tokens` of a dataset (rounded up to whole shards), empty ones left out."""
    found, before = Truncation(), 0
    for k, shard in enumerate(cut.dataset.shards):
        if before >= limit_tokens:
            break
        ends = document_ends(shard)
        lengths = np.diff(ends, prepend=0)
        if isinstance(cut, PlainCut):
            samples = np.minimum((before + ends - lengths) // cut.seq, cut.size - 1)
            whole, capacity = before + ends <= (samples + 1) * cut.seq + 1, cut.seq + 1
        else:
            whole, capacity = _whole_documents(cut, k, ends, lengths), cut.length
        found.add(whole[lengths > 0], lengths[lengths > 0], capacity)
        before += len(shard)
    return found


def _whole_documents(cut: PackedCut, k: int, ends: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Which documents of shard `k` are one piece of one sample, shape (documents,) bool."""
    whole = np.zeros(len(ends), bool)
    for chunk in range(-(-(len(cut.dataset.shards[k]) // cut.length) // cut.chunk_samples)):
        packed = cut.pack(k, chunk)
        documents = np.searchsorted(ends, packed.base + packed.starts.astype(np.int64), "right")
        whole[documents[packed.lengths == lengths[documents]]] = True
    return whole
