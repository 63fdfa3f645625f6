"""Orders that are computed, not stored: a keyed permutation, the order of an epoch, the turns that datasets take in a blend.

Each answers for one number at a time, in O(1) time and memory however many there are. The standard library only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

ROUNDS = 6  # of the Feistel network; 4 suffice for a pseudo-random permutation of a large set (Luby and Rackoff 1988)
SMALL, SMALL_ROUNDS = 1024, 12  # with 6 rounds the pairs of 6 elements are measurably uneven, with 12 they are not
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of range(size), one element at a time, keyed by text.

    A Feistel network over the pairs (left, right) of a rectangle of about sqrt(size) x sqrt(size), walked until the value falls
    inside (Black and Rogaway 2002), hardly ever more than once. Its rounds mix as splitmix64 ends (Steele et al. 2014): good
    statistics, no cryptography.
    """

    size: int
    key: str

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a permutation of {self.size} elements")

    @cached_property
    def _network(self) -> tuple[int, int, list[tuple[int, int]]]:
        """The sides of the rectangle, and the keys of the rounds two by two."""
        columns = math.isqrt(self.size - 1) + 1
        rounds = SMALL_ROUNDS if self.size < SMALL else ROUNDS
        digest = hashlib.shake_128(self.key.encode()).digest(8 * rounds)
        keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
        return -(-self.size // columns), columns, list(zip(keys[::2], keys[1::2], strict=True))

    def __call__(self, index: int) -> int:
        """Where `index` in [0, size) goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in range({self.size})")
        rows, columns, keys = self._network
        while True:
            left, right = divmod(index, columns)
            for one, other in keys:
                left = (left + _mixed(right + one)) % rows
                right = (right + _mixed(left + other)) % columns
            index = left * columns + right
            if index < self.size:
                return index


def _mixed(value: int) -> int:
    """64 bits of which each depends on every bit of `value`."""
    value &= _64_BITS
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64_BITS
    return value ^ value >> 31


@lru_cache(maxsize=4096)
def permutation(size: int, key: str) -> Permutation:
    """The same as Permutation(size, key), kept for the next call."""
    return Permutation(size, key)


@dataclass(frozen=True)
class EpochOrder:
    """In which order an epoch of `size` samples takes them: shelf after shelf, each shelf shuffled.

    `unit` neighbouring samples stay on one shelf; a shelf holds units from all over the dataset, at most `shelf_units` of them.
    So what was read at any time is whole shelves and a part of one, which makes it possible to go on with the rest in other
    pieces; and a shelf's pages of the files are read close in time. A dataset of one shelf is shuffled as a whole.
    """

    size: int
    unit: int
    shelf_units: int

    @cached_property
    def _units(self) -> int:
        return max(1, self.size // self.unit)

    @cached_property
    def shelf(self) -> int:
        """Samples on each shelf but the last, which may hold a few more or fewer."""
        shelves = -(-self._units // self.shelf_units)
        return -(-self._units // shelves) * self.unit

    @cached_property
    def shelves(self) -> int:
        """How many shelves an epoch has."""
        return -(-self._units * self.unit // self.shelf)

    def sample(self, position: int, key: str) -> int:
        """The sample at `position` in [0, size) of the epoch that `key` names."""
        number = min(position // self.shelf, self.shelves - 1)
        start = number * self.shelf
        length = self.shelf if number < self.shelves - 1 else self.size - start
        place = start + permutation(length, f"{key}/{number}")(position - start)
        if self.shelves == 1 or place >= self._units * self.unit:
            return place
        unit, offset = divmod(place, self.unit)
        return permutation(self._units, key)(unit) * self.unit + offset

    def next_shelf(self, position: int) -> int:
        """The first shelf of which nothing was taken when the first `position` samples were."""
        return min(-(-position // self.shelf), self.shelves)


# ---- turns


def turn(bounds: Sequence[int], number: int) -> tuple[int, int]:
    """Which of the takers has turn `number`, and how many turns it had before.

    Taker i has bounds[i + 1] - bounds[i] of every bounds[-1] turns, evenly spread. Halves of the takers are weighed against
    each other, then halves of the half: a taker is never further from its share than half a turn for each halving.
    """
    low, high = 0, len(bounds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        part, whole = bounds[middle] - bounds[low], bounds[high] - bounds[low]
        before = (2 * number * part + whole) // (2 * whole)
        if (2 * (number + 1) * part + whole) // (2 * whole) > before:
            high, number = middle, before
        else:
            low, number = middle, number - before
    return low, number


def turns(bounds: Sequence[int], number: int) -> list[int]:
    """How many of the first `number` turns each taker had."""
    if len(bounds) < 3:
        return [number]
    middle = (len(bounds) - 1) // 2
    part, whole = bounds[middle] - bounds[0], bounds[-1] - bounds[0]
    before = (2 * number * part + whole) // (2 * whole)
    return turns([b - bounds[0] for b in bounds[: middle + 1]], before) + turns(
        [b - bounds[middle] for b in bounds[middle:]], number - before
    )
