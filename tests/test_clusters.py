"""Sorted runs and connected components on disk: right for every graph, and within their memory."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.data_prep.clusters import KEYS, SCORES, Clustering, find_drops
from megaspark.data_prep.sorted_runs import RunWriter, count_rows, read_range
from megaspark.data_prep.stages import part_folder

TINY = 1024  # bytes: 8 ids in a range, 2 rows in a block


def write_keys(work: Path, parts, scores=None, words: int = 1) -> tuple[int, ...]:
    """The keys stage as sketches would leave it: for each part (ids, rows of (key words ..., local id)); returns the bases."""
    bases = [0]
    for number, (ids, rows) in enumerate(parts):
        folder = part_folder(work / "keys", number)
        folder.mkdir(parents=True)
        with RunWriter(folder / KEYS, words + 1, TINY) as table:
            table.add(*np.array(rows, np.uint64).reshape(-1, words + 1).T)
        bases.append(bases[-1] + ids)
        if scores is not None:
            np.array(scores[bases[-2] : bases[-1]], np.uint64).tofile(folder / SCORES)
    return tuple(bases)


def drops(work: Path, bases, scored=False, words=1, memory_bytes=TINY) -> tuple[list[int], int, int]:
    """(ids to drop, clusters, largest cluster)."""
    plan = Clustering(work / "keys", words, bases, memory_bytes, scored)
    folder, said = find_drops(plan, work, 1)
    ids = [int(i) for block in plan.read(folder, "drops", 1, 0, bases[-1]) for i in block[0]]
    assert len(set(ids)) == len(ids)
    return sorted(ids), sum(part["clusters"] for part in said), max(part["largest"] for part in said)


def expected(n: int, edges, scores) -> tuple[list[int], int, int]:
    """The same by union-find."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in edges:
        parent[root(a)] = root(b)
    groups = defaultdict(list)
    for i in range(n):
        groups[root(i)].append(i)
    kept = {min(group, key=lambda i: (-scores[i], i)) for group in groups.values()}
    sizes = [len(group) for group in groups.values()]
    return sorted(set(range(n)) - kept), sum(size > 1 for size in sizes), max(sizes)


def spread(number: int) -> int:
    """A 64-bit key that looks random, as a hash does."""
    return (number + 1) * 0x9E3779B97F4A7C15 * 0xD1B54A32D192ED03 % (1 << 64)


def parts_of(n: int, cut: int, edges) -> list:
    """Every edge as a key that its two ends share; ids below `cut` lie in one part, the others in the next."""
    rows = [(spread(k), end) for k, edge in enumerate(edges) for end in edge]
    return [(cut, [row for row in rows if row[1] < cut]), (n - cut, [(k, i - cut) for k, i in rows if i >= cut])]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_components_are_those_of_union_find(data):
    """Any graph, over several ranges of ids, two parts, any scores: a lost edge would keep two copies of a text."""
    n = data.draw(st.integers(1, 40))
    edges = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=45))
    scores = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) if data.draw(st.booleans()) else None
    with tempfile.TemporaryDirectory() as folder:
        bases = write_keys(Path(folder), parts_of(n, data.draw(st.integers(0, n)), edges), scores)
        found = drops(Path(folder), bases, scored=scores is not None)
    assert found == expected(n, edges, scores or [0] * n)


@pytest.mark.parametrize("order", ["ascending", "random"])
def test_long_chains_take_few_rounds(tmp_path, order):
    """A chain of copies, each near the next only: rounds that move labels one step would take as many as it is long."""
    n = 3000
    names = np.arange(n) if order == "ascending" else np.random.default_rng(1).permutation(n)
    edges = [(int(a), int(b)) for a, b in zip(names[1:], names[:-1], strict=True)]
    bases = write_keys(tmp_path, parts_of(n, 1000, edges))
    assert drops(tmp_path, bases, memory_bytes=1 << 18) == ([*range(1, n)], 1, n)
    assert len([*tmp_path.glob("small-*.json")]) <= 16  # 2^12 > 3,000


def test_a_key_shared_by_many_needs_no_memory_for_them(tmp_path):
    """A page that was crawled a million times is one group, which no division of the keys makes smaller."""
    n = 5000
    bases = write_keys(tmp_path, [(n, [(7 << 60, i) for i in range(n)])])
    assert drops(tmp_path, bases, memory_bytes=1 << 15) == ([*range(1, n)], 1, n)


def test_keys_of_two_words_are_equal_only_as_a_whole(tmp_path):
    """128-bit hashes are sorted by their first word: that the second decides too must not be forgotten."""
    rows = [(5 << 60, 1, 0), (5 << 60, 2, 1), (5 << 60, 1, 2), (6 << 60, 1, 3), (5 << 60, 2, 4), (5 << 60, 3, 5)]
    bases = write_keys(tmp_path, [(6, rows)], words=2)
    assert drops(tmp_path, bases, words=2, memory_bytes=1 << 20) == ([2, 4], 2, 2)
    other = tmp_path / "other"
    bases = write_keys(other, [(6, rows)], words=2)
    assert drops(other, bases, words=2) == ([2, 4], 2, 2)


def test_other_memory_after_a_stop_takes_nothing_for_done_that_is_not(tmp_path):
    """Ranges follow from the memory: parts that were finished for other ranges would be holes in these."""
    edges = [(i, (i * 7) % 60) for i in range(0, 60, 2)]
    bases = write_keys(tmp_path, parts_of(60, 30, edges))
    right = drops(tmp_path, bases)
    for memory_bytes in (2048, 4096, 1 << 20):
        assert drops(tmp_path, bases, memory_bytes=memory_bytes) == right == expected(60, edges, [0] * 60)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_runs_give_every_row_once(data):
    """Rows at the ends of the range of 64-bit keys, equal keys, ranges of nothing: each row belongs to just one range."""
    keys = data.draw(st.lists(st.sampled_from([0, 1, 5, 1 << 63, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1), max_size=60))
    cuts = sorted(data.draw(st.lists(st.integers(0, 1 << 64), max_size=4)))
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table"
        with RunWriter(table, 2, data.draw(st.integers(1, 2000))) as out:
            for begin in range(0, len(keys), 7):
                out.add(np.array(keys[begin : begin + 7], np.uint64), np.arange(begin, min(begin + 7, len(keys))))
        assert count_rows(table, 2) == len(keys)
        found = []
        for low, high in zip([0, *cuts], [*cuts, 1 << 64], strict=True):
            for block in read_range(table, 2, low, high, data.draw(st.integers(1, 9))):
                assert all(low <= int(key) < high for key in block[0])
                found += [(int(key), int(row)) for key, row in block.T]
    assert sorted(found, key=lambda pair: pair[1]) == [(key, i) for i, key in enumerate(keys)]


MEMORY = """
import json, sys
import numpy as np
from pathlib import Path
from megaspark.data_prep import clusters
from megaspark.data_prep.sorted_runs import RunWriter
from megaspark.data_prep.stages import part_folder

def peak_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

def run(work, n, memory_bytes):
    generator = np.random.default_rng(1)
    bases = [0]
    for number in range(4):
        part = part_folder(work / "keys", number)
        part.mkdir(parents=True)
        with RunWriter(part / clusters.KEYS, 2, 1 << 20) as table:
            for _ in range(0, n // 4, 1 << 14):
                keys = generator.integers(0, 4 * n, 1 << 14, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
                table.add(keys, generator.integers(0, n // 4, 1 << 14, dtype=np.uint64))
        bases.append(bases[-1] + n // 4)
    plan = clusters.Clustering(work / "keys", 1, tuple(bases), memory_bytes, False)
    before = peak_kib()
    folder, said = clusters.find_drops(plan, work, 1)
    return plan.ranges, (peak_kib() - before) / 1024, sum(part["clusters"] for part in said)

work = Path(sys.argv[1])
run(work / "small", 1 << 16, 1 << 20)  # libraries and caches
print(json.dumps(run(work / "large", int(sys.argv[2]), int(sys.argv[3]))))
"""


def test_memory_is_bounded_by_the_setting(tmp_path, run_python):
    """Half a million ids and keys take 20 MB at once, and twice that to sort them; only the setting may count."""
    ids, memory_mb = 1 << 19, 4
    ranges, grown_mb, found = json.loads(run_python(MEMORY, str(tmp_path), str(ids), str(memory_mb << 20)).checked().stdout)
    assert found > 1000 and ranges == ids * 128 >> 22
    assert grown_mb < memory_mb, "memory grew with the corpus"
