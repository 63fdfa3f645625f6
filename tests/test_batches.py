"""Batches: labels, positions and who works on what."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from conftest import EOS
from megaspark.batches import Batches, document_positions, make_batch


def slow_positions(tokens: list[int], eos_id: int) -> list[int]:
    """Counted by hand: 0 at the start and after every end of a document, else one more."""
    out, position = [], 0
    for token in tokens:
        out.append(position)
        position = 0 if token == eos_id else position + 1
    return out


@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.integers(0, 4)))
def test_positions(tokens_BS):
    """An end at the first or last place, or two ends in a row, could be off by one; rows could run into each other."""
    expected = [slow_positions(row, EOS) for row in tokens_BS.tolist()]
    found = document_positions(tokens_BS, EOS)
    assert found.tolist() == expected and found.dtype == np.int64


@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 4), st.integers(2, 30)), elements=st.integers(0, 4)))
def test_batch_of_samples(samples):
    """Labels not shifted by one train the model to copy; positions taken from the labels are off by one."""
    batch = make_batch(list(samples), EOS)
    assert batch.tokens_BS.tolist() == samples[:, :-1].tolist()
    assert batch.labels_BS.tolist() == samples[:, 1:].tolist()
    assert batch.positions_BS.tolist() == [slow_positions(row[:-1], EOS) for row in samples.tolist()]
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in batch)


def test_without_documents_there_are_no_positions():
    """Positions where nobody asked for document masking would switch it on."""
    batch = make_batch([np.array([3, EOS, 4, 5], dtype=np.uint16)], None)
    assert batch.positions_BS is None and batch.tokens_BS.tolist() == [[3, EOS, 4]]


def test_extreme_ids_survive():
    """uint16 ids past 32,767 could come out negative."""
    batch = make_batch([np.array([65535, 40000, 0], dtype=np.uint16)], None)
    assert batch.tokens_BS.tolist() == [[65535, 40000]] and batch.labels_BS.tolist() == [[40000, 0]]


LAYOUTS = [(micro, world) for micro in (1, 2, 3, 4, 6, 12, 24) for world in (1, 2, 3, 4, 6, 8, 12, 24) if 24 % (micro * world) == 0]


def taken(micro: int, world: int, first: int, count: int) -> list[list[list[int]]]:
    """Per process, per micro-batch: the sample numbers, recovered from what is in the tensors."""

    def sample(i: int) -> np.ndarray:
        return np.array([i, i + 1])

    workers = [Batches(sample, None, micro, rank, world) for rank in range(world)]
    return [[batch.tokens_BS[:, 0].tolist() for batch in worker.step(first, count)] for worker in workers]


@given(st.sampled_from(LAYOUTS), st.integers(0, 10**9))
def test_a_step_takes_the_same_samples_in_every_layout(layout, step):
    """Another number of processes, micro batch or accumulation must not lose, repeat or reorder a step's samples."""
    micro, world = layout
    by_rank = taken(micro, world, 24 * step, 24)
    assert {len(batches) for batches in by_rank} == {24 // (micro * world)}
    in_order = [i for batches in zip(*by_rank, strict=True) for numbers in batches for i in numbers]
    assert in_order == list(range(24 * step, 24 * step + 24))


def test_step_that_does_not_divide_is_refused():
    """A remainder dropped in silence is data lost."""
    with pytest.raises(ValueError, match="do not divide"):
        Batches(lambda i: np.array([i, i]), None, 3, 0, 2).indices(0, 8)
