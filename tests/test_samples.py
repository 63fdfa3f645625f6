"""Samples: which tokens are sample i, for any number of processes, at any scale, from one integer."""

import json
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import EOS, VOCAB, write_tokens
from megaspark.samples import WINDOW, Permutation, Samples, unigram_entropy
from megaspark.shards import Manifest, TokenDataset, dtype_for


@pytest.fixture
def datasets(tiny_data) -> dict[str, TokenDataset]:
    return {name: TokenDataset(tiny_data.train / name) for name in "ab"}


@given(st.integers(1, 3000), st.text(max_size=8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, key):
    """Two indices that meet would repeat one sample and lose another, at sizes beside powers of two most likely."""
    permutation = Permutation(size, key)
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 255, 256, 257, 1023, 1024, 1025, 65536, 65537])
def test_permutation_at_the_edges(size):
    """The network's width changes at powers of four; below 4 there is hardly a network left."""
    permutation = Permutation(size, "k")
    seen = np.zeros(size, dtype=np.int64)
    for i in range(size):
        seen[permutation(i)] += 1
    assert (seen == 1).all()


def test_permutation_depends_on_its_key_and_looks_random():
    """An epoch in the order of the last one, or neighbours that stay neighbours, is no shuffle."""
    size = 5000
    orders = [np.array([Permutation(size, key)(i) for i in range(size)]) for key in ("1234/a/0", "1234/a/1", "1235/a/0")]
    for i, one in enumerate(orders):
        steps = np.diff(one)
        assert abs(np.corrcoef(np.arange(size), one)[0, 1]) < 5 / math.sqrt(size)
        assert (np.abs(steps) == 1).sum() < 20  # 2 expected
        for other in orders[:i]:
            assert (one == other).sum() < 15  # 1 expected: a fixed point of a random permutation


@pytest.mark.parametrize("size, index", [(0, 0), (5, 5), (5, -1)])
def test_permutation_refuses_what_is_outside(size, index):
    """An index past the end would walk until it falls inside, and repeat some sample."""
    with pytest.raises((IndexError, ValueError)):
        Permutation(size, "k")(index)


def expected_streams(datasets: dict[str, TokenDataset]) -> dict[str, np.ndarray]:
    """Each dataset's shards end to end, read by hand from the .bin files."""
    return {
        name: np.concatenate([np.fromfile(dataset.folder / f"{s.name}.bin", "<u2") for s in dataset.manifest.shards])
        for name, dataset in datasets.items()
    }


@pytest.mark.parametrize("seq", [1, 7, 24, 1000])
def test_samples_are_cuts_of_the_stream(datasets, seq):
    """A sample across a shard's end, or the one label shared by neighbours, off by one token."""
    samples, streams = Samples(datasets, seq, seed=1), expected_streams(datasets)
    for i in range(min(samples.epoch_samples, 400)):
        dataset, position = samples.locate(i)
        expected = streams[samples.names[dataset]][position * seq : position * seq + seq + 1]
        assert samples[i].tolist() == expected.tolist() and len(expected) == seq + 1
    crossing = datasets["a"].manifest.shards[0].tokens // seq  # the sample of `a` that holds its first shard's end
    found = next(i for i in range(samples.epoch_samples) if samples.locate(i) == (0, crossing))
    assert samples[found].tolist() == streams["a"][crossing * seq : crossing * seq + seq + 1].tolist()


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_epoch_takes_every_sample_once(datasets, epoch):
    """Without a blend every token is trained on once an epoch; the tail shorter than a sample is all that is left out."""
    samples = Samples(datasets, 24, seed=1)
    size = samples.epoch_samples
    assert size == sum((dataset.tokens - 1) // 24 for dataset in datasets.values())
    taken = Counter(samples.locate(i) for i in range(epoch * size, (epoch + 1) * size))
    assert set(taken.values()) == {1} and len(taken) == size


def test_epochs_and_seeds_have_orders_of_their_own(datasets):
    """The same order in every epoch, or a seed that does nothing."""
    samples, other = Samples(datasets, 24, seed=1), Samples(datasets, 24, seed=2)
    size = samples.epoch_samples
    first = [samples.locate(i) for i in range(size)]
    assert first != [samples.locate(i) for i in range(size, 2 * size)]
    assert first != [other.locate(i) for i in range(size)]
    assert first == [Samples(datasets, 24, seed=1).locate(i) for i in range(size)]


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_shares_of_a_window(tiny_data, weights):
    """Shares that do not add up to the window, are off by more than their rounding, or leave a dataset out."""
    dataset = TokenDataset(tiny_data.train / "a")
    blend = {f"d{i:02d}": weight for i, weight in enumerate(weights)}
    ends = Samples(dict.fromkeys(blend, dataset), 24, seed=1, blend=blend).ends
    quotas = np.diff([0, *ends])
    assert quotas.sum() == WINDOW and quotas.min() >= 1
    exact = [weight / math.fsum(weights) * WINDOW for weight in weights]
    below_one = sum(share < 1 for share in exact)  # each of them is lifted to 1, at the cost of the largest
    assert all(abs(quota - share) <= 1 + below_one for quota, share in zip(quotas, exact, strict=True))


def test_blend_counted_in_one_whole_window(datasets):
    """The shares as they really come out, and each dataset's own epochs complete within them."""
    samples = Samples(datasets, 24, seed=1, blend={"a": 0.3, "b": 0.7})
    located = [samples.locate(i) for i in range(WINDOW, 2 * WINDOW)]
    counts = Counter(dataset for dataset, _ in located)
    assert counts == {0: round(0.3 * WINDOW), 1: WINDOW - round(0.3 * WINDOW)}
    for dataset, size in enumerate(samples.sizes):
        visits = Counter(position for number, position in located if number == dataset)
        whole = counts[dataset] / size
        fewest, most = math.floor(whole) - 1, math.ceil(whole) + 1  # a window may begin and end within an epoch
        assert len(visits) == size and fewest <= min(visits.values()) <= max(visits.values()) <= most


def test_small_share_is_not_lost(datasets):
    """A share below one sample in a window would be rounded to none, for ever."""
    samples = Samples(datasets, 24, seed=1, blend={"a": 1e-9, "b": 1.0})
    assert np.diff([0, *samples.ends]).tolist() == [1, WINDOW - 1]


def test_blend_does_not_depend_on_the_order_it_is_said_in(datasets):
    """The order of keys in a YAML file, or of folders on a disk, must not change what is trained on."""
    one = Samples(datasets, 24, seed=1, blend={"a": 0.3, "b": 0.7})
    other = Samples(dict(reversed(datasets.items())), 24, seed=1, blend={"b": 0.7, "a": 0.3})
    plain, reverse = Samples(datasets, 24, seed=1), Samples(dict(reversed(datasets.items())), 24, seed=1)
    for i in range(200):
        assert one[i].tolist() == other[i].tolist()
        assert plain[i].tolist() == reverse[i].tolist()


def test_dataset_left_out_of_the_blend_is_not_read(datasets):
    """Weight nought must mean none."""
    samples = Samples(datasets, 24, seed=1, blend={"b": 1.0})
    assert samples.names == ["b"] and {samples.locate(i)[0] for i in range(500)} == {0}


@given(st.integers(0, 10**12))
def test_any_sample_can_be_asked_for_first(tiny_data, index):
    """A resumed run starts at sample i: were anything carried over from i - 1, it would see other data."""
    datasets = {name: TokenDataset(tiny_data.train / name) for name in "ab"}
    going_on = Samples(datasets, 24, seed=1)
    for i in range(max(0, index - 3), index):
        going_on[i]
    assert Samples(datasets, 24, seed=1)[index].tolist() == going_on[index].tolist()


def test_dataset_too_short_is_refused(tiny_data, tmp_path):
    """A dataset of no samples would be divided by."""
    short = TokenDataset(write_tokens(tmp_path / "s", "s", [[[3, 4, EOS]]]))
    assert Samples({"s": short}, 2, seed=1).epoch_samples == 1
    with pytest.raises(ValueError, match="s is shorter"):
        Samples({"s": short}, 3, seed=1)


def sparse_dataset(folder: Path, tokens: int) -> Path:
    """A dataset of one shard of so many zeros, which take no room on the disk; whoever reads its .idx fails."""
    write_tokens(folder, "big", [[[3, EOS]]])
    manifest = json.loads((folder / "manifest.json").read_text())
    size = tokens * dtype_for(VOCAB).itemsize
    manifest["shards"][0] |= {"tokens": tokens, "bin_bytes": size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with open(folder / "big-00000.bin", "r+b") as file:
        file.truncate(size)
    (folder / "big-00000.idx").write_bytes(b"\0" * manifest["shards"][0]["idx_bytes"])
    assert Manifest.load(folder).tokens == tokens
    return folder


def test_starting_costs_nothing_at_a_billion_tokens(tmp_path):
    """A shuffled array of samples, or reading every .idx: minutes and gigabytes in each process at SlimPajama's size."""
    folder = sparse_dataset(tmp_path / "big", 10**9)
    tracemalloc.start()
    try:
        samples = Samples({"big": TokenDataset(folder)}, 16, seed=1)
        taken = {samples.locate(i)[1] for i in range(1000)}
        samples[0]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert samples.epoch_samples == (10**9 - 1) // 16 and len(taken) == 1000
    assert peak_bytes < 1 << 20  # 62.5 million samples would take 500 MB at 8 bytes each


@pytest.mark.parametrize("limit_tokens", [1 << 24, 1000, 1])
def test_unigram_entropy(datasets, limit_tokens):
    """The mark that a first loss is held against: the natural logarithm, over what was really read."""
    text = np.concatenate([stream[:limit_tokens] for stream in expected_streams(datasets).values()])
    counts = Counter(text.tolist())
    expected = -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())
    assert unigram_entropy(datasets, limit_tokens) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_unigram_entropy_of_uniform_text(tmp_path):
    """ln V, the best there is when every id is equally likely."""
    document = np.arange(VOCAB)
    dataset = TokenDataset(write_tokens(tmp_path / "u", "u", [[document] * 10]))
    assert unigram_entropy({"u": dataset}) == pytest.approx(math.log(VOCAB), rel=1e-12)
