"""Phases: a blend or a sample length that changes in mid-run, with nothing repeated or lost that need not be."""

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import EOS, random_documents, write_tokens
from megaspark import packing
from megaspark.permutations import EpochOrder, Permutation, turn, turns
from megaspark.samples import WINDOW, Phase, Samples, changed_past
from megaspark.shards import TokenDataset

SEQ = 24
BLENDS = (None, {"a": 1.0}, {"b": 2.0}, {"a": 0.9, "b": 0.1}, {"a": 1, "b": 7, "c": 2}, {"c": 1, "b": 1})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, TokenDataset]:
    """Three datasets of 60 to 400 samples of SEQ tokens."""
    folder = tmp_path_factory.mktemp("phases")
    counts = {"a": 100, "b": 40, "c": 17}
    paths = {n: write_tokens(folder / n, n, [random_documents(i + ord(n), k) for i in range(3)]) for n, k in counts.items()}
    return {name: TokenDataset(path) for name, path in paths.items()}


# ---- turns


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_turns_are_exact_and_even(shares):
    """A dataset off its share in some window, bunched together, or counted otherwise than it is taken."""
    bounds = np.cumsum([0, *shares]).tolist()
    window, taken = bounds[-1], [0] * len(shares)
    for number in range(2 * window + 1):
        assert turns(bounds, number) == taken
        for share, n in zip(shares, taken, strict=True):
            assert abs(n - number * share / window) <= math.ceil(math.log2(len(shares))) / 2 + 1e-9
        if number % window == 0:
            assert taken == [share * (number // window) for share in shares]
        member, before = turn(bounds, number)
        assert before == taken[member]
        taken[member] += 1


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=9), st.integers(0, 10**18))
def test_turns_of_very_large_numbers(shares, number):
    """Arithmetic that rounds after 2^53 would skip a sample once in a long run."""
    bounds = [0, *(sum(shares[: i + 1]) for i in range(len(shares)))]
    before, after, (member, rank) = turns(bounds, number), turns(bounds, number + 1), turn(bounds, number)
    assert sum(before) == number and rank == before[member]
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(i == member) for i in range(len(shares))]


# ---- the mixing of orders


def chi_square(observed: Counter, cells: int) -> float:
    """How many standard deviations the chi-square statistic of equally likely cells lies above its mean."""
    expected = sum(observed.values()) / cells
    statistic = sum((observed[cell] - expected) ** 2 / expected for cell in range(cells))
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("size", [10_007, 65_536, 1_000_003, 153_076_171])
def test_permutation_is_uniform(size):
    """Weak mixing shows as values, steps or pairs that favour some place: of one key, and of keys that differ in a digit."""
    place = Permutation(size, "1234/a/0")
    steps = np.linspace(0, size - 1, 10_000).astype(int).tolist()
    assert abs(chi_square(Counter(i * 32 // size * 32 + place(i) * 32 // size for i in steps), 1024)) < 5
    assert abs(chi_square(Counter((place(i + 1) - place(i)) % size * 64 // size for i in range(8000)), 64)) < 5
    for index in (0, 1, size // 2, size - 1):
        assert abs(chi_square(Counter(Permutation(size, f"1/a/{e}")(index) * 64 // size for e in range(4000)), 64)) < 5


@pytest.mark.parametrize("size", [2, 3, 5, 6, 8, 13])
def test_small_permutations_are_uniform(size):
    """A network of hardly any width can leave some place, or some pair, out of reach."""
    orders = [[Permutation(size, f"k{key}")(i) for i in range(size)] for key in range(10_000)]
    for i in range(size):
        assert abs(chi_square(Counter(order[i] for order in orders), size)) < 5
    pairs = Counter(order[0] * (size - 1) + order[1] - (order[1] > order[0]) for order in orders)
    assert abs(chi_square(pairs, size * (size - 1))) < 5


@given(st.integers(1, 3000), st.integers(1, 70), st.integers(1, 20))
def test_epoch_order_is_a_bijection(size, unit, shelf_units):
    """Odd sizes leave a tail behind the last unit or the last shelf, where samples could be lost or come twice."""
    order = EpochOrder(size, unit, shelf_units)
    assert sorted(order.sample(i, "k") for i in range(size)) == list(range(size))
    assert (order.shelves - 1) * order.shelf < size
    assert order.next_shelf(0) == 0 and order.next_shelf(1) == 1 and order.next_shelf(size) == order.shelves


def test_shelves_hold_units_from_everywhere_and_no_two_alike():
    """A shelf of neighbours would train on one corner of the data for hours; a fixed order would repeat in every epoch."""
    order = EpochOrder(size=32 * 10_000, unit=32, shelf_units=500)
    first = [order.sample(i, "1/a/0") for i in range(order.shelf)]
    units = sorted({sample // 32 for sample in first})
    assert len(units) == 500 and abs(np.mean(units) - 5000) < 5 * 10_000 / math.sqrt(12 * 500)
    assert abs(np.corrcoef(np.arange(order.shelf), first)[0, 1]) < 0.05
    assert sum(abs(a - b) == 1 for a, b in pairwise(first)) < 100  # 62 of one unit in a shelf expected
    assert len(set(units) & {order.sample(i, "1/a/1") // 32 for i in range(order.shelf)}) < 60  # 25 by chance


# ---- a change of blend


def own_order(dataset: TokenDataset, name: str, count: int, seq: int = SEQ) -> list[int]:
    """The first samples of a dataset that is trained on alone."""
    alone = Samples({name: dataset}, seq, seed=5)
    return [alone.locate(i)[1] for i in range(count)]


@st.composite
def some_phases(draw) -> list[Phase]:
    lengths = draw(st.lists(st.integers(1, 400), max_size=4))
    firsts = [0, *np.cumsum(lengths).tolist()]
    return [Phase(first, SEQ, draw(st.sampled_from(BLENDS))) for first in firsts]


@given(some_phases())
@hypothesis_settings(max_examples=30, deadline=None)
def test_change_of_blend_repeats_and_loses_nothing(datasets, phases):
    """The usual fault: after a change each dataset starts again, or jumps. Each must give what it would have given alone."""
    samples = Samples(datasets, phases, seed=5)
    given_by: dict[str, list[int]] = {name: [] for name in samples.names}
    for i in range(phases[-1].first_sample + 700):
        dataset, number = samples.locate(i)
        name = samples.names[dataset]
        given_by[name].append(number)
        blend = samples.phase(i).blend
        assert blend is None or name in blend
    for name, numbers in given_by.items():
        assert numbers == own_order(datasets[name], name, len(numbers)), name
    assert not samples.left_out


def test_windows_are_exact_after_a_change(datasets):
    """Windows that start anywhere but at the change would meet neither the old shares nor the new ones."""
    phases = [Phase(0, SEQ), Phase(1001, SEQ, {"a": 0.25, "b": 0.25, "c": 0.5}), Phase(1001 + WINDOW, SEQ, {"a": 3, "c": 1})]
    samples = Samples(datasets, phases, seed=5)
    counts = Counter(samples.locate(i)[0] for i in range(1001, 1001 + WINDOW))
    assert counts == {0: WINDOW // 4, 1: WINDOW // 4, 2: WINDOW // 2}
    counts = Counter(samples.locate(i)[0] for i in range(1001 + WINDOW, 1001 + 2 * WINDOW))
    assert counts == {0: 3 * WINDOW // 4, 2: WINDOW // 4}


@given(some_phases(), st.integers(0, 10**9))
@hypothesis_settings(max_examples=30, deadline=None)
def test_resuming_needs_only_the_number_and_the_recorded_phases(datasets, phases, index):
    """Were anything else carried along, a killed run would go on with other data."""
    recorded = json.loads(json.dumps([phase.recorded() for phase in phases]))
    again = Samples(dict(reversed(datasets.items())), [Phase(**values) for values in recorded], seed=5)
    samples = Samples(datasets, phases, seed=5)
    for i in range(max(0, index - 2), index):
        samples[i]
    assert again[index].tolist() == samples[index].tolist()
    later = [*phases, Phase(index + 1 + phases[-1].first_sample, 7, {"b": 1})]
    first = range(max(0, later[-1].first_sample - 3), later[-1].first_sample)
    assert [Samples(datasets, later, seed=5).locate(i) for i in first] == [samples.locate(i) for i in first]


# ---- a change of seq


@pytest.fixture
def small_shelves(monkeypatch):
    """Shelves of 8 units of 64 tokens, so that a small dataset has many."""
    monkeypatch.setattr(packing, "UNIT_TOKENS", 64)
    monkeypatch.setattr(packing, "SHELF_TOKENS", 512)


def labels(samples: Samples, i: int) -> range:
    """The places in the stream of the labels of sample i."""
    _, number = samples.locate(i)
    seq = samples.phase(i).seq
    return range(number * seq + 1, number * seq + seq + 1)


@pytest.mark.parametrize("seqs", [(8, 16), (16, 8), (4, 64), (64, 1), (8, 32, 4)])
@pytest.mark.parametrize("changes", [(3,), (64, 3), (70, 40)])
def test_change_of_seq_repeats_nothing_in_an_epoch(tmp_path, small_shelves, seqs, changes):
    """A new cut reads again what was read, or skips: each token at most once in the epoch, and once but for a shelf."""
    dataset = TokenDataset(write_tokens(tmp_path / "s", "s", [np.arange(5000).reshape(5, 1000) % 131]))
    firsts = np.cumsum([0, *changes]).tolist()
    phases = [Phase(first, seq) for first, seq in zip(firsts, seqs, strict=False)]
    samples = Samples({"s": dataset}, phases, seed=1)
    read: Counter = Counter()
    for i in range(10_000):
        if i >= phases[-1].first_sample and read.total() and set(labels(samples, i)) & set(read):
            break  # the epoch is over
        read.update(labels(samples, i))
    seq_at = dict(zip(firsts, [None, *seqs], strict=False))
    left_out = sum(count * seq_at[first] for first, _, count in samples.left_out)
    assert max(read.values()) == 1
    most_tail = max(phase.seq for phase in phases)
    assert 4999 - most_tail < read.total() + left_out <= 4999
    assert left_out < 512 * 2 * (len(phases) - 1)


def test_seq_that_does_not_fit_the_units_starts_the_next_epoch(datasets, small_shelves):
    """It is said what happens to the rest of the epoch, and the next one is whole."""
    samples = Samples({"a": datasets["a"]}, [Phase(0, 8), Phase(100, 12)], seed=1)
    size_8, size_12 = ((datasets["a"].tokens - 1) // seq for seq in (8, 12))
    assert samples.left_out == [(100, "a", size_8 - 100)]
    assert sorted(samples.locate(i)[1] for i in range(100, 100 + size_12)) == list(range(size_12))
    on_the_dot = Samples({"a": datasets["a"]}, [Phase(0, 8), Phase(2 * size_8, 12)], seed=1)
    assert on_the_dot.left_out == []
    alone = own_order(datasets["a"], "a", 3 * size_12, seq=12)[2 * size_12 :]
    assert [Samples({"a": datasets["a"]}, [Phase(0, 8), Phase(2 * size_8, 12)], seed=5).locate(2 * size_8 + i)[1]
            for i in range(size_12)] == alone  # fmt: skip


def test_dataset_out_of_the_blend_is_not_recut(datasets):
    """A dataset that waits while others are read in another length has lost nothing when its old length comes back."""
    phases = [Phase(0, SEQ), Phase(50, 7, {"b": 1}), Phase(90, SEQ, {"a": 1, "b": 1})]
    samples = Samples(datasets, phases, seed=5)
    numbers = [n for d, n in map(samples.locate, range(300)) if d == 0]
    assert numbers == own_order(datasets["a"], "a", len(numbers))
    assert {name for _, name, _ in samples.left_out} == {"b"}


def test_tokens_are_counted_through_phases(datasets):
    """samples x seq of the last phase would rewrite the run's history of tokens."""
    samples = Samples(datasets, [Phase(0, 24), Phase(10, 7, {"a": 1}), Phase(15, 100)], seed=1)
    for index in (0, 1, 9, 10, 11, 15, 16, 400):
        assert samples.tokens_before(index) == sum(len(samples[i]) - 1 for i in range(index))


def test_blend_that_names_no_dataset(datasets):
    """A misspelt dataset must not be trained without."""
    with pytest.raises(ValueError, match="names aa, which is none of the datasets a, b, c"):
        Samples(datasets, [Phase(0, 8), Phase(5, 8, {"aa": 1})], seed=1)


@pytest.mark.parametrize("firsts", [[], [1], [0, 0], [0, 5, 5], [0, 5, 3]])
def test_phases_out_of_order_are_refused(datasets, firsts):
    """Two phases from one sample: one of them would be ignored."""
    with pytest.raises(ValueError):
        Samples(datasets, [Phase(first, 8) for first in firsts], seed=1)


@pytest.mark.parametrize("values", [(-1, 8), (0, 0), (0, 8, {}), (0, 8, {"a": 0}), (0, 8, {"a": math.nan}), (0, 8, None, "x")])
def test_phases_that_mean_nothing_are_refused(values):
    """Weights that are nought or no numbers would come out as some other blend."""
    with pytest.raises(ValueError):
        Phase(*values)


def test_the_past_may_not_change():
    """A resumed run whose blend differed before the checkpoint would repeat and lose samples; only the future is free."""
    old = [Phase(0, 8, {"b": 1, "a": 2}), Phase(100, 8)]
    assert changed_past(old, [Phase(0, 8, {"a": 2, "b": 1}), Phase(100, 8)], 500) is None
    assert changed_past(old, [*old, Phase(500, 16)], 500) is None
    assert changed_past(old, [old[0], Phase(200, 16)], 100) is None
    assert "missing" in changed_past(old, old[:1], 101)
    assert "phase from sample 50 is new" in changed_past(old[:1], [old[0], Phase(50, 8)], 51)
    assert "seq was 8, is 16" in changed_past(old, [Phase(0, 16, {"a": 2, "b": 1}), Phase(100, 8)], 0)
    assert "from sample 100" in changed_past(old, [old[0], Phase(100, 8, {"a": 1})], 101)


# ---- nothing is copied


def test_a_sample_is_a_view_of_its_file(datasets):
    """A copy of a shard, or a wider type, for every sample: gigabytes a second of memory traffic for nothing."""
    samples, views = Samples(datasets, SEQ, seed=1), 0
    for i in range(samples.epoch_samples):
        sample, (dataset, _) = samples[i], samples.locate(i)
        assert sample.dtype == np.uint16 and sample.nbytes == 2 * (SEQ + 1)
        shared = any(np.shares_memory(sample, shard.tokens) for shard in samples.datasets[dataset].shards)
        assert shared or sample.base is None or sample.base.nbytes == sample.nbytes
        assert not sample.flags.writeable or not shared
        views += shared
    assert samples.epoch_samples - views <= sum(len(d.shards) - 1 for d in datasets.values())


def test_eos_is_where_it_was(datasets):
    """The documents of a sample are told by their ends alone."""
    samples = Samples(datasets, SEQ, seed=1)
    ends = sum(int((samples[i][1:] == EOS).sum()) for i in range(samples.epoch_samples))
    assert abs(ends - sum(d.documents for d in datasets.values())) <= SEQ * len(datasets)
