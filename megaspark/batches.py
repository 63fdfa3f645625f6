"""This process's share of each step's samples, as tensors with labels and positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch.

    tokens_BS, labels_BS: [B, S] int64, labels shifted by one; positions_BS: [B, S] int64 restarting at 0 in each document, or
    None where attention runs over the whole sample.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor | None


def document_positions(tokens_BS: np.ndarray, eos_id: int) -> np.ndarray:
    """The place of every token in its document; a document ends with `eos_id`, and a sample starts at 0 in any case.

    tokens_BS: [B, S] integers. Returns [B, S] int64.
    """
    index_S = np.arange(tokens_BS.shape[1], dtype=np.int64)
    starts_BS = np.zeros(tokens_BS.shape, dtype=np.int64)
    starts_BS[:, 1:] = np.where(tokens_BS[:, :-1] == eos_id, index_S[1:], 0)
    return index_S - np.maximum.accumulate(starts_BS, axis=1)


def make_batch(samples: list[np.ndarray], eos_id: int | None) -> Batch:
    """Samples of S + 1 tokens each as one micro-batch; with `eos_id` their positions restart after it."""
    tokens = np.stack(samples).astype(np.int64)
    positions = None if eos_id is None else torch.from_numpy(document_positions(tokens[:, :-1], eos_id))
    both = torch.from_numpy(tokens)
    return Batch(both[:, :-1].contiguous(), both[:, 1:].contiguous(), positions)


class Batches:
    """Cuts the global order of samples into steps, the steps into processes and micro-batches.

    Whatever the number of processes, the micro batch and the accumulation, a step takes the same `global_batch` consecutive
    samples; only who works on which of them differs.
    """

    def __init__(
        self, sample: Callable[[int], np.ndarray], eos_id: int | None, micro_batch: int, rank: int, data_parallel: int
    ) -> None:
        self.sample, self.eos_id, self.micro_batch = sample, eos_id, micro_batch
        self.rank, self.data_parallel = rank, data_parallel

    def indices(self, first: int, count: int) -> list[list[int]]:
        """The sample numbers of this process's micro-batches in a step over samples [first, first + count)."""
        per_pass = self.micro_batch * self.data_parallel
        if count % per_pass:
            raise ValueError(f"{count} samples do not divide into {self.data_parallel} processes x {self.micro_batch}")
        starts = range(first + self.rank * self.micro_batch, first + count, per_pass)
        return [list(range(start, start + self.micro_batch)) for start in starts]

    def step(self, first: int, count: int) -> Iterator[Batch]:
        """This process's micro-batches of the step over samples [first, first + count)."""
        for numbers in self.indices(first, count):
            yield make_batch([self.sample(i) for i in numbers], self.eos_id)
