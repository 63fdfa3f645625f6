"""From keys that documents share to the documents to drop, with memory that does not grow with the corpus.

A document's id is its line in the whole input. Ids are cut into ranges; a part of a stage looks at one range, keeps a few
numbers for each id of it in memory and streams the rest through sorted runs. Connected components by large-star and small-star
in turn, O(log n) rounds in practice: Kiveris et al., Connected Components in MapReduce and Beyond, 2014.
"""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from megaspark.data_prep.sorted_runs import RunWriter, count_rows, read_range
from megaspark.data_prep.stages import Result, part_folder, run_stage

KEYS, SCORES = "keys", "scores.bin"  # in the folder of a part that made the keys
_NONE = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Clustering:
    """What every part must know; `bases` holds the first id of each part of the stage `source`, and the end.

    Of `memory_bytes` about a third holds what is known of a range (40 bytes an id), a third goes to sorting what is written,
    the rest to the blocks in between: nothing else grows with the corpus, save the lists of files and parts.
    """

    source: Path
    key_words: int
    bases: tuple[int, ...]
    memory_bytes: int
    scored: bool

    @property
    def range_ids(self) -> int:
        """Ids in a range."""
        return max(1, self.memory_bytes // 128)

    @property
    def ranges(self) -> int:
        """How many ranges all ids make."""
        return max(1, -(-self.bases[-1] // self.range_ids))

    @property
    def block_rows(self) -> int:
        """Rows that are looked at together."""
        return max(1, self.memory_bytes // 512)

    @property
    def pair_rows(self) -> int:
        """Rows of keys that are sorted together."""
        return max(2, self.memory_bytes // (100 * (self.key_words + 1)))

    def bounds(self, number: int) -> tuple[int, int]:
        """The first id of a range, and the end."""
        return number * self.range_ids, min((number + 1) * self.range_ids, self.bases[-1])

    def writer(self, folder: Path, columns: int, writers: int = 1) -> RunWriter:
        """A writer that takes its share of a third of the memory."""
        return RunWriter(folder, columns, self.memory_bytes // 3 // writers)

    def read(self, stage: Path, table: str, columns: int, low: int, high: int) -> Iterator[np.ndarray]:
        """The rows of one table of all parts of a stage, with low <= first column < high, in blocks."""
        for part in sorted(stage.glob("part-*")):
            yield from read_range(part / table, columns, low, high, self.block_rows)

    def scores(self, low: int, high: int) -> np.ndarray:
        """The scores of the ids of a range, shape (high - low,) uint64: zeros where only the order counts."""
        out = np.zeros(high - low, np.uint64)
        first = bisect_right(self.bases, low) - 1
        for number in range(first, len(self.bases) - 1) if self.scored else ():
            base, end = self.bases[number], self.bases[number + 1]
            if base >= high:
                break
            a, b = max(low, base), min(high, end)
            path = part_folder(self.source, number) / SCORES
            out[a - low : b - low] = np.fromfile(path, np.uint64, b - a, offset=8 * (a - base))
        return out


def find_drops(plan: Clustering, work: Path, workers: int) -> tuple[Path, list[Result]]:
    """Runs all stages from the keys on; returns the folder of the stage that names the ids to drop, and what its parts said."""
    rows = sum(count_rows(part / KEYS, plan.key_words + 1) for part in plan.source.glob("part-*"))
    key_ranges = max(1, -(-2 * rows // plan.pair_rows))
    suffix = f"{key_ranges}-{plan.ranges}"  # with other memory_mb, other ranges: what was done for these is no use then

    def stage(name: str, function: Callable[..., Result], before: Path | None, parts: int = plan.ranges) -> list[Result]:
        results = run_stage(work, f"{name}-{suffix}", partial(function, plan, before), range(parts), workers)
        if before:
            shutil.rmtree(before, ignore_errors=True)
        return results

    stage("pairs", partial(match_keys, key_ranges), None, key_ranges)
    edges = work / f"pairs-{suffix}"
    for turn in count(1):
        splits = stage(f"small-{turn}", small_star, edges)
        moves = stage(f"large-{turn}", large_star, work / f"small-{turn}-{suffix}")
        edges = work / f"large-{turn}-{suffix}"
        if not any(result["changed"] for result in splits + moves):
            break
    stage("members", list_members, edges)
    return work / f"drops-{suffix}", stage("drops", choose, work / f"members-{suffix}")


# ---- keys to pairs


def match_keys(key_ranges: int, plan: Clustering, _: None, part: Path, number: int) -> Result:
    """Table `up` (larger id, smaller id) of one range of keys: in each group of one key, all with the first."""
    low, high = ((n << 64) // key_ranges for n in (number, number + 1))
    pairs = 0
    with plan.writer(part / "up", 2) as up:
        for held in _held(_key_blocks(plan, low, high), plan.pair_rows):
            larger, smaller, kept = _match(np.concatenate(held, axis=1))
            held[:] = [kept]  # one row a key: a key that millions share takes no memory
            up.add(larger, smaller)
            pairs += len(larger)
    return {"pairs": pairs}


def _held(blocks: Iterator[np.ndarray], most_rows: int) -> Iterator[list[np.ndarray]]:
    """Yields the list in which blocks gather, each time that it holds enough rows, and at the end; the caller shrinks it."""
    held: list[np.ndarray] = []
    new_rows = 0
    for block in blocks:
        held.append(block)
        new_rows += block.shape[1]
        if sum(b.shape[1] for b in held) >= most_rows:
            yield held
            new_rows = 0
    if new_rows:
        yield held


def _key_blocks(plan: Clustering, low: int, high: int) -> Iterator[np.ndarray]:
    for number, base in enumerate(plan.bases[:-1]):
        folder = part_folder(plan.source, number) / KEYS
        for block in read_range(folder, plan.key_words + 1, low, high, plan.block_rows):
            block[-1] += np.uint64(base)
            yield block


def _match(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of (key words ..., id): (larger ids, the least id of the same key), and one row with the least id for each key."""
    rows = rows[:, np.lexsort(rows[-2::-1]) if len(rows) > 2 else np.argsort(rows[0])]
    changes = np.flatnonzero((rows[:-1, 1:] != rows[:-1, :-1]).any(axis=0)) + 1
    starts = np.concatenate([[0], changes])[: rows.shape[1]]
    least = np.minimum.reduceat(rows[-1], starts) if len(starts) else rows[-1]
    first = np.repeat(least, np.diff(starts, append=rows.shape[1]))
    others = rows[-1] != first
    return rows[-1, others], first[others], np.concatenate([rows[:-1, starts], least[None]])


# ---- pairs to components


def small_star(plan: Clustering, source: Path, part: Path, number: int) -> Result:
    """Each id of the range, and its smaller neighbours, to the least of these; tables `up` and `down` (smaller, larger)."""
    low, high = plan.bounds(number)
    parents = _parents(plan, source, low, high)
    changed = 0
    with plan.writer(part / "up", 2, writers=2) as up, plan.writer(part / "down", 2, writers=2) as down:
        for ids, smaller in plan.read(source, "up", 2, low, high):
            least = parents[_index(ids, low)]
            others = smaller != least
            changed += int(others.sum())
            up.add(smaller[others], least[others])
            down.add(least[others], smaller[others])
        for begin in range(0, high - low, plan.block_rows):
            block = parents[begin : begin + plan.block_rows]
            ids = np.flatnonzero(block != _NONE)
            up.add(ids + (low + begin), block[ids])
            down.add(block[ids], ids + (low + begin))
    return {"changed": changed}


def large_star(plan: Clustering, source: Path, part: Path, number: int) -> Result:
    """Each larger neighbour of an id of the range to that id's least neighbour; table `up`."""
    low, high = plan.bounds(number)
    parents = _parents(plan, source, low, high)
    changed = 0
    with plan.writer(part / "up", 2) as up:
        for ids, larger in plan.read(source, "down", 2, low, high):
            least = np.minimum(parents[_index(ids, low)], ids)  # _NONE is above every id
            changed += int((least != ids).sum())
            up.add(larger, least)
    return {"changed": changed}


def _parents(plan: Clustering, source: Path, low: int, high: int) -> np.ndarray:
    """The least smaller neighbour of each id of the range, or _NONE; shape (high - low,)."""
    out = np.full(high - low, _NONE)
    for ids, smaller in plan.read(source, "up", 2, low, high):
        np.minimum.at(out, _index(ids, low), smaller)
    return out


def _index(ids: np.ndarray, low: int) -> np.ndarray:
    return (ids - np.uint64(low)).view(np.int64)


# ---- components to the one that is kept


def list_members(plan: Clustering, source: Path, part: Path, number: int) -> Result:
    """Table `members` (centre, id, score) of the ids of the range that are in a component and not its centre."""
    low, high = plan.bounds(number)
    parents, scores = _parents(plan, source, low, high), plan.scores(low, high)
    with plan.writer(part / "members", 3) as members:
        for begin in range(0, high - low, plan.block_rows):
            block = parents[begin : begin + plan.block_rows]
            at = np.flatnonzero(block != _NONE)
            members.add(block[at], at + (low + begin), scores[at + begin])
    return {}


def choose(plan: Clustering, source: Path, part: Path, number: int) -> Result:
    """Table `drops` (id): all but the one of the highest score, the first of equals, of the components centred in the range."""
    low, high = plan.bounds(number)
    own, best, sizes = plan.scores(low, high), plan.scores(low, high), np.ones(high - low, np.uint32)
    for centres, _, scores in plan.read(source, "members", 3, low, high):
        np.maximum.at(best, _index(centres, low), scores)
        np.add.at(sizes, _index(centres, low), np.uint32(1))
    winners = np.where(own == best, np.arange(low, high, dtype=np.uint64), _NONE)
    for centres, ids, scores in plan.read(source, "members", 3, low, high):
        at = _index(centres, low)
        equal = scores == best[at]
        np.minimum.at(winners, at[equal], ids[equal])
    with plan.writer(part / "drops", 1) as drops:
        for centres, ids, _ in plan.read(source, "members", 3, low, high):
            drops.add(ids[ids != winners[_index(centres, low)]])
        for begin in range(0, high - low, plan.block_rows):
            ids = np.arange(low + begin, min(high, low + begin + plan.block_rows), dtype=np.uint64)
            here = slice(begin, begin + len(ids))
            drops.add(ids[(sizes[here] > 1) & (winners[here] != ids)])
    return {"clusters": int((sizes > 1).sum()), "largest": int(sizes.max(initial=1))}
