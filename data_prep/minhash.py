"""MinHash signatures of texts and their LSH bands, vectorized.

Two texts whose sets of n-grams have Jaccard similarity s agree in each number of their signatures with probability s (Broder,
On the resemblance and containment of documents, 1997), so in one of b bands of r numbers with probability 1 - (1 - s^r)^b.

An n-gram is hashed to 32 bits, well mixed; a permutation of these is their product with an odd number modulo 2^32. In sets of
n n-grams chance agreements add about n / 2^32 to a similarity: 0.001 in a text of 4 million characters.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache

import numpy as np

_ODD = np.uint64(6364136223846793005)  # base of the polynomials; Knuth's MMIX multiplier, of full order modulo 2^64
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # the finalizer of MurmurHash3
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 16  # numbers in a pass: two buffers of 256 KiB stay in a core's second-level cache
_NOTHING = np.uint32(0xFFFFFFFF)
_PUNCTUATION = string.punctuation.encode()


class MinHasher:
    """Makes signatures of `permutations` numbers over the n-grams of characters (`of="char"`) or words (`of="word"`).

    A word is a run of letters, digits and underscores (`\\w`). The text is stripped and lower-cased; `normalize="bare"` also
    deletes ASCII punctuation and makes each run of white space one space. A text shorter than one n-gram is one n-gram.
    """

    def __init__(self, ngram: int, of: str, permutations: int, seed: int = 1, normalize: str = "lower"):
        self.ngram, self.of, self.normalize = ngram, of, normalize
        counter = np.arange(1, permutations + 1, dtype=np.uint64) * _GOLDEN  # SplitMix64, which starts far apart for each seed
        random = _mix(counter + _mix(np.array([seed], np.uint64)))
        self.multipliers = (random >> np.uint64(32)).astype(np.uint32) | np.uint32(1)

    def signatures(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Signatures, shape (texts, permutations) uint32, and which texts have any n-gram at all, shape (texts,) bool."""
        units, lengths = (_words if self.of == "word" else _characters)([self._normal(text) for text in texts])
        found = lengths > 0
        out = np.full((len(texts), len(self.multipliers)), _NOTHING)
        if found.any():
            grams, counts = _grams(units, lengths[found], self.ngram)
            out[found] = self._minima(grams, np.cumsum(counts) - counts)
        return out, found

    def _normal(self, text: str) -> str:
        text = text.lower()
        if self.normalize == "bare":
            bare = text.encode("utf-8", "surrogatepass").translate(None, _PUNCTUATION)  # 30 times faster than of str
            return " ".join(bare.decode("utf-8", "surrogatepass").split())
        return text.strip()

    def _minima(self, grams: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The least permuted hash of each text, shape (texts, permutations); the grams of text i begin at starts[i]."""
        out = np.full((len(self.multipliers), len(starts)), _NOTHING)
        product = np.empty(min(_BLOCK, len(grams)), np.uint32)
        for begin in range(0, len(grams), _BLOCK):
            block = grams[begin : begin + _BLOCK]
            here = product[: len(block)]
            first = np.searchsorted(starts, begin, "right") - 1
            last = np.searchsorted(starts, begin + len(block))
            cuts = np.maximum(starts[first:last] - begin, 0)
            for row, multiplier in zip(out[:, first:last], self.multipliers, strict=True):
                np.multiply(block, multiplier, out=here)
                np.minimum(row, np.minimum.reduceat(here, cuts), out=row)
        return out.T


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One 64-bit hash for each band of `rows` numbers, shape (texts, bands) uint64; that of another band never means the same.

    Among n keys about n^2 / 2^65 pairs agree by chance: one pair in the 5e9 keys of 600 million texts.
    """
    values = signatures[:, : bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    keys = np.broadcast_to(_mix(np.arange(1, bands + 1, dtype=np.uint64)), values.shape[:2])
    for row in range(rows):
        keys = _mix((keys ^ values[:, :, row]) * _ODD)
    return keys


def match_probability(similarity: float | np.ndarray, bands: int, rows: int) -> float | np.ndarray:
    """The S-curve: how likely two texts of this Jaccard similarity share a band."""
    return 1 - (1 - similarity**rows) ** bands


@cache
def best_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """The bands and rows with the least area of false positives below the threshold and false negatives above it."""
    s = np.linspace(0, 1, 2001)

    def error(bands: int, rows: int) -> float:
        curve = match_probability(s, bands, rows)
        return float(np.where(s < threshold, curve, 1 - curve).sum())

    choices = [(b, r) for b in range(1, permutations + 1) for r in range(1, permutations // b + 1)]
    return min(choices, key=lambda choice: error(*choice))


# ---- texts to numbers


def _characters(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The code points of all texts, one after the other, and the number of each text's."""
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return points, np.fromiter(map(len, texts), np.int64, len(texts))


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of each word of all texts, one after the other, and the number of each text's words.

    A word is hashed as a polynomial: the difference of two running sums, divided by the power at which it begins.
    """
    points, lengths = _characters([f"{text}\n" for text in texts])
    inside = np.concatenate([[False], _word_characters()[points], [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    begins, ends = edges[::2], edges[1::2]
    sums = np.concatenate([[np.uint64(0)], np.cumsum(points * _powers(int(_ODD), len(points)), dtype=np.uint64)])
    inverse = _powers(pow(int(_ODD), -1, 1 << 64), len(points))
    hashes = _mix((sums[ends] - sums[begins]) * inverse[begins])
    return hashes, np.diff(np.searchsorted(begins, np.cumsum(lengths)), prepend=0)


@cache
def _word_characters() -> np.ndarray:
    """Which code points are part of a word, shape (0x110000,) bool."""
    table = np.zeros(0x110000, bool)
    for match in re.finditer(r"\w+", "".join(map(chr, range(0x110000)))):
        table[match.start() : match.end()] = True
    return table


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1 ... modulo 2^64, shape (count,)."""
    out = np.full(count, base, np.uint64)
    out[:1] = 1
    return np.multiply.accumulate(out)


def _grams(units: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """32-bit hashes of the n-grams of all texts, one after the other, and the number of each text's: at least one."""
    units, lengths = _padded(units, lengths, n)
    windows = len(units) - n + 1
    hashes = np.empty(windows, np.uint32)
    for begin in range(0, windows, _BLOCK):
        block = units[begin : begin + _BLOCK + n - 1].astype(np.uint64)
        hashes[begin : begin + _BLOCK] = _mix(_polynomials(block, n)) >> np.uint64(32)
    within_one = np.ones(windows, bool)
    across = (np.cumsum(lengths)[:-1, None] - np.arange(1, n)).ravel()
    within_one[across] = False
    return hashes[within_one], lengths - n + 1


def _padded(units: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with zeros behind each text that is shorter than n."""
    long_enough = np.maximum(lengths, n)
    shift = np.cumsum(long_enough - lengths) - (long_enough - lengths)
    if not np.array_equal(lengths, long_enough):
        out = np.zeros(int(long_enough.sum()), units.dtype)
        out[np.arange(len(units)) + np.repeat(shift, lengths)] = units
        units = out
    return units, long_enough


def _polynomials(units: np.ndarray, n: int) -> np.ndarray:
    """Polynomials of each n consecutive units, shape (len(units) - n + 1,): windows of 1, 2, 4 ... joined as n's bits say."""
    joined, joined_length = None, 0
    window, length = units, 1
    while True:
        if n & length:
            joined = window if joined is None else _join(window, joined, length, joined_length)
            joined_length += length
        if 2 * length > n:
            return joined[: len(units) - n + 1]
        window = _join(window, window, length, length)
        length *= 2


def _join(left: np.ndarray, right: np.ndarray, left_length: int, right_length: int) -> np.ndarray:
    """Windows of both lengths together, from windows of each."""
    count = len(right) - left_length
    return left[:count] * np.uint64(pow(int(_ODD), right_length, 1 << 64)) + right[left_length:]


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads every bit of 64-bit numbers over all of them (a bijection)."""
    shift = np.uint64(33)
    values = (values ^ (values >> shift)) * _MIX_1
    values = (values ^ (values >> shift)) * _MIX_2
    return values ^ (values >> shift)
