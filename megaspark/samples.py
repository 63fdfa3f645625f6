"""Which tokens are sample number i: a pure function of the seed and i, the same for any number of processes.

The order is a keyed permutation, computed when asked, not a shuffled array: starting takes O(shards) time and memory however
many samples there are, and the whole state of reading is one integer, the number of samples taken. numpy only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megaspark.shards import TokenDataset

WINDOW = 1 << 16  # in every aligned window of so many samples a blend's shares are met exactly (rounded to 1/65,536)
ROUNDS = 6  # of the Feistel network; 4 suffice for a pseudo-random permutation (Luby and Rackoff 1988)


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of range(size), one element at a time, keyed by text.

    A balanced Feistel network over the smallest even number of bits that holds `size`, walked until the value falls inside
    (cycle walking: Black and Rogaway 2002), on average fewer than four times.
    """

    size: int
    key: str

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a permutation of {self.size} elements")

    def __call__(self, index: int) -> int:
        """Where `index` in [0, size) goes."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in range({self.size})")
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        while True:
            left, right = index >> half, index & mask
            for number in range(ROUNDS):
                left, right = right, left ^ (self._round(number, right) & mask)
            index = left << half | right
            if index < self.size:
                return index

    def _round(self, number: int, value: int) -> int:
        digest = hashlib.blake2b(f"{self.key}/{number}/{value}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


class Samples:
    """Samples of seq + 1 tokens from a blend of datasets, shuffled anew in every epoch of each.

    Sample k of a dataset is its tokens [k seq, k seq + seq], shards taken end to end: neighbours share one token, which is
    the last label of the one and the first input of the other. Only the tail shorter than a sample is left out.
    """

    def __init__(self, datasets: Mapping[str, TokenDataset], seq: int, seed: int, blend: Mapping[str, float] | None = None):
        names = sorted(blend) if blend else sorted(datasets)
        self.seq, self.seed = seq, seed
        self.datasets = [datasets[name] for name in names]
        self.names = names
        self.sizes = [(dataset.tokens - 1) // seq for dataset in self.datasets]
        for name, size in zip(names, self.sizes, strict=True):
            if size < 1:
                raise ValueError(f"dataset {name} is shorter than one sample of {seq + 1} tokens")
        self.ends = np.cumsum(self._quotas([blend[name] for name in names])) if blend else None

    @property
    def epoch_samples(self) -> int:
        """Samples of all datasets together, each once."""
        return sum(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` >= 0: [seq + 1] tokens; a view into the shard unless the sample crosses into the next one."""
        dataset, position = self.locate(index)
        return self.datasets[dataset].read(position * self.seq, self.seq + 1)

    def locate(self, index: int) -> tuple[int, int]:
        """The dataset's number and the sample's number in it, for global sample `index`."""
        if index < 0:
            raise IndexError(f"sample {index}")
        if self.ends is None:
            # All datasets are one long one: each gets its share of the tokens.
            position = self._shuffled(index, sum(self.sizes), "all")
            for dataset, size in enumerate(self.sizes):
                if position < size:
                    return dataset, position
                position -= size
        window, slot = divmod(index, WINDOW)
        slot = Permutation(WINDOW, f"{self.seed}/blend/{window}")(slot)
        dataset = int(np.searchsorted(self.ends, slot, side="right"))
        start = int(self.ends[dataset - 1]) if dataset else 0
        taken = window * (int(self.ends[dataset]) - start) + slot - start
        return dataset, self._shuffled(taken, self.sizes[dataset], self.names[dataset])

    def _shuffled(self, taken: int, size: int, name: str) -> int:
        epoch, position = divmod(taken, size)
        return Permutation(size, f"{self.seed}/{name}/{epoch}")(position)

    @staticmethod
    def _quotas(weights: list[float]) -> list[int]:
        """Samples of each dataset in a window: shares of WINDOW, rounded by the largest remainder; none less than 1."""
        exact = [weight / math.fsum(weights) * WINDOW for weight in weights]
        quotas = [max(1, math.floor(x)) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (quotas[i] - exact[i], i))
        for i in by_remainder[: max(0, WINDOW - sum(quotas))]:
            quotas[i] += 1
        while sum(quotas) > WINDOW:
            quotas[quotas.index(max(quotas))] -= 1
        return quotas


def unigram_entropy(datasets: Mapping[str, TokenDataset], limit_tokens: int = 1 << 24) -> float:
    """Nats a token of the best model that looks at no context, from the first `limit_tokens` of each dataset."""
    counts = np.zeros(max(dataset.manifest.vocab for dataset in datasets.values()), dtype=np.int64)
    for dataset in datasets.values():
        start, end = 0, min(dataset.tokens, limit_tokens)
        while start < end:
            length = min(1 << 20, end - start)
            found = np.bincount(dataset.read(start, length))
            counts[: len(found)] += found
            start += length
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
