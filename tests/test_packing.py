"""Packing: every token read, full samples, few documents cut, and samples that tell where documents begin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import EOS, write_tokens
from megaspark import packing
from megaspark.batches import document_positions
from megaspark.packing import PackedCut, PlainCut, best_fit, pack, truncation
from megaspark.samples import Phase, Samples
from megaspark.shards import TokenDataset


def numbered(folder, name: str, shards: list[list[int]]) -> TokenDataset:
    """A dataset of documents of these lengths, whose tokens are 3, 4, 5 ... through all shards, but for EOS at each end."""
    start, written = 3, []
    for lengths in shards:
        documents = []
        for length in lengths:
            documents.append([*range(start, start + length - 1), EOS] if length else [])
            start += length
        written.append(documents)
    assert start < 1 << 16
    return TokenDataset(write_tokens(folder, name, written))


def lengths_like_text(seed: int, count: int, median: int) -> list[int]:
    """Log-normal lengths, as those of web documents are; some empty."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), 1.2, count).astype(int)
    return np.where(np.arange(count) % 50 == 49, 0, drawn + 1).tolist()


# ---- best fit


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The fills of the bins, by looking at every bin for every length."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


@given(st.integers(1, 80).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_best_fit_is_best_fit(drawn):
    """A bit of the set of rooms left on or off: bins too full, or more bins than need be."""
    capacity, lengths = drawn
    bins = best_fit(lengths, capacity)
    assert sorted(i for bin in bins for i in bin) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in bin) for bin in bins) == slow_best_fit(lengths, capacity)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=40), st.integers(2, 30), st.data())
def test_a_chunk_is_packed_without_gap_or_loss(lengths, capacity, data):
    """A token lost, read twice or out of place; or a piece that does not end its document followed by another."""
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    low = data.draw(st.integers(0, total))
    high = data.draw(st.integers(low, total))
    count = (high - low) // capacity
    if not count:
        return
    packed = pack(ends, low, high, capacity)
    samples = [list(packed.pieces(i)) for i in range(count)]
    assert len(packed.ends) == count + 1
    assert all(sum(length for _, length in sample) == capacity for sample in samples)
    tokens = [t for sample in samples for start, length in sample for t in range(start, start + length)]
    assert len(set(tokens)) == len(tokens) == count * capacity and low <= min(tokens) and max(tokens) < high
    document = np.searchsorted(ends, np.arange(total), "right")
    for sample in samples:
        for number, (start, length) in enumerate(sample):
            assert document[start] == document[start + length - 1]  # one piece is of one document
            assert number == len(sample) - 1 or start + length in ends
    again = pack(ends, low, high, capacity)
    assert all(np.array_equal(a, b) for a, b in zip(packed, again, strict=True))


# ---- samples


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of about 1,000 tokens, shelves of two of them: many of each in a small dataset."""
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 1000)
    monkeypatch.setattr(packing, "SHELF_TOKENS", 2000)
    monkeypatch.setattr(packing, "UNIT_TOKENS", 500)


@pytest.mark.parametrize("seq", [1, 15, 31, 400])
def test_an_epoch_reads_every_token_once(tmp_path, small_chunks, seq):
    """What packing leaves out must be less than a sample a shard, in every epoch, whatever the chunks and shelves."""
    dataset = numbered(tmp_path / "p", "p", [lengths_like_text(k, 120, 40) for k in range(4)] + [[3]])
    samples = Samples({"p": dataset}, [Phase(0, seq, packing="best_fit")], seed=1)
    stream = np.concatenate([shard.tokens for shard in dataset.shards])
    assert samples.epoch_samples == sum(len(shard) // (seq + 1) for shard in dataset.shards)
    for epoch in range(2):
        numbers = range(epoch * samples.epoch_samples, (epoch + 1) * samples.epoch_samples)
        read = np.concatenate([samples[i] for i in numbers])
        texts = read[read != EOS]
        assert len(np.unique(texts)) == len(texts) and np.isin(texts, stream).all()
        assert len(stream) - (seq + 1) * len(dataset.shards) < len(read) <= len(stream)


def test_documents_are_told_apart_by_their_ends(tmp_path, small_chunks):
    """Were a cut piece followed by another document, the mask by end-of-text tokens would join the two."""
    dataset = numbered(tmp_path / "p", "p", [lengths_like_text(k, 150, 30) for k in range(3)])
    cut = PackedCut(dataset, 63)
    for number in range(cut.size):
        sample = cut.read(number)
        positions = document_positions(sample[None], EOS)[0]
        assert len(sample) == 64
        inside = np.flatnonzero(positions[1:] > 0) + 1
        steps = sample[inside].astype(int) - sample[inside - 1].astype(int)
        assert (steps[sample[inside] != EOS] == 1).all()  # within a document every token follows the one before it


def test_a_chunk_is_packed_at_most_twice_an_epoch(tmp_path, small_chunks):
    """An order that jumps between more chunks than are kept packs one for every sample; a unit in two chunks packs two."""
    dataset = numbered(tmp_path / "p", "p", [lengths_like_text(k, 200, 40) for k in range(4)])
    cut = PackedCut(dataset, 15)
    chunks = sum(-(-(len(shard) // 16) // cut.chunk_samples) for shard in dataset.shards)
    assert cut.order.shelves > 5
    for position in range(cut.size):
        cut.read(cut.order.sample(position, "1/p/0"))
    found = cut._packed.cache_info()
    assert chunks > 20 and found.misses <= 2 * chunks and found.currsize <= found.maxsize <= 2 * 2 + 2


def test_plain_and_packed_phases_follow_each_other(tmp_path, small_chunks):
    """A change of packing recuts the tokens: it must not go on in the middle of the other's epoch."""
    dataset = numbered(tmp_path / "p", "p", [lengths_like_text(k, 120, 40) for k in range(3)])
    samples = Samples({"p": dataset}, [Phase(0, 31), Phase(40, 31, packing="best_fit")], seed=1)
    size = samples.epoch_samples
    assert samples.left_out == [(40, "p", (dataset.tokens - 1) // 31 - 40)]
    assert sorted(samples.locate(i)[1] for i in range(40, 40 + size)) == list(range(size))


def test_dataset_of_short_shards_is_refused(tmp_path):
    """Shards that hold no sample: nothing to divide by."""
    dataset = numbered(tmp_path / "p", "p", [[5], [4]])
    with pytest.raises(ValueError, match="shorter than one sample of 9"):
        Samples({"p": dataset}, [Phase(0, 8, packing="best_fit")], seed=1)


def test_a_sample_copies_itself_and_no_more(tmp_path):
    """One document as one sample is a view; pieces are put together once."""
    dataset = numbered(tmp_path / "p", "p", [[16, 16, 5, 11, 16, 40]])
    cut = PackedCut(dataset, 15)
    views = [np.shares_memory(cut.read(i), dataset.shards[0].tokens) for i in range(cut.size)]
    assert sum(views) == 5 and cut.size == 6  # three documents of 16, two cuts of 40; 5 + 11 together; 8 are left out
    assert all(cut.read(i).nbytes == 2 * 16 for i in range(cut.size))


# ---- truncation


def slow_truncation(cut: PlainCut | PackedCut, lengths: list[int]) -> tuple[int, int]:
    """Documents, and those that no sample holds whole, by looking for each in every sample."""
    texts = [" ".join(map(str, cut.read(number).tolist())) + " " for number in range(cut.size)]
    documents = [d.tolist() for shard in cut.dataset.shards for d in map(shard.document, range(shard.documents)) if len(d)]
    whole = [any(f"{' '.join(map(str, document))} " in text for text in texts) for document in documents]
    assert len(documents) == sum(length > 0 for length in lengths)
    return len(documents), whole.count(False)


@pytest.mark.parametrize("kind", [PlainCut, PackedCut])
@pytest.mark.parametrize("seq", [20, 63])
def test_truncation_is_counted_right(tmp_path, small_chunks, kind, seq):
    """Off by the token that plain samples share, or blind to what a shard's end leaves out."""
    shards = [[length and length + 2 for length in lengths_like_text(k, 90, 25)] for k in range(3)]
    dataset = numbered(tmp_path / "p", "p", shards)
    found = truncation(kind(dataset, seq))
    assert (found.documents, found.cut) == slow_truncation(kind(dataset, seq), [n for lengths in shards for n in lengths])
    assert found.fitting == sum(0 < length <= seq + 1 for lengths in shards for length in lengths)
    assert 0 < found.fitting_cut < found.cut < found.documents


def test_best_fit_cuts_far_fewer_documents(tmp_path):
    """What it is for: of the documents that fit into a sample plain cutting cuts many, best fit hardly any."""
    dataset = numbered(tmp_path / "p", "p", [lengths_like_text(7, 900, 30)])
    plain, packed = truncation(PlainCut(dataset, 255)), truncation(PackedCut(dataset, 255))
    assert plain.fitting == packed.fitting > 850
    assert packed.fitting_cut < 0.01 * packed.fitting < 0.1 * plain.fitting < plain.fitting_cut * 2
    assert packed.rate < plain.rate / 5
