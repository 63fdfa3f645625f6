"""What a run's evaluations read, and what the losses come to: by source, the same for any number of processes.

The samples are the windows of `megaspark eval --windows N`, N = run.eval_batches x run.global_batch of each source, evenly
spread, or all where there are fewer; so their figures are that command's. The unit is the micro-batch: run.micro_batch windows
of one source, of data.seq tokens, filled up with tokens that do not count. Which windows make a micro-batch does not depend on
who computes it, and the losses are summed in the micro-batches' order, in fp64: of the same weights, in whatever number of
processes and under whatever ZeRO stage, an evaluation gives the same bits. Another run.micro_batch, and layouts that take a
matrix product apart (tensor), change the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from megaspark.batches import Batch, document_positions
from megaspark.evaluations import Reading, Score, Window, chosen_windows, text_bytes, token_bytes_of, window_rows, windows
from megaspark.models.blocks import IGNORED
from megaspark.shards import TokenDataset

WHOLE = "validation"  # the split of all sources together; a source's is below it


class Validation:
    """The validation samples of a run, `reading.count` of each dataset, `reading.batch` of them a micro-batch."""

    def __init__(self, datasets: Mapping[str, TokenDataset], reading: Reading, rank: int, data_parallel: int) -> None:
        self.datasets, self.reading = datasets, reading
        self.rank, self.data_parallel = rank, data_parallel
        self.chosen = {name: chosen_windows(dataset.tokens, reading) for name, dataset in datasets.items()}
        self._parts: list[tuple[str, list[Window]]] = []
        for name, chosen in self.chosen.items():
            self._parts += [(name, chosen[i : i + reading.batch]) for i in range(0, len(chosen), reading.batch)]

    @cached_property
    def text_bytes(self) -> dict[str, int | None]:
        """The bytes of text that the samples of each source stand for; None where they cannot be counted."""
        return {n: text_bytes(self.datasets[n], chosen, token_bytes_of(self.datasets[n])) for n, chosen in self.chosen.items()}

    def described(self) -> list[str]:
        """What is read of each source, and of which the bytes cannot be counted, in lines for people."""
        parts = []
        for name, chosen in self.chosen.items():
            every = len(windows(self.datasets[name].tokens, self.reading.seq, self.reading.stride))
            parts.append(f"{name} {len(chosen):,} of {every:,} samples" if len(chosen) < every else f"{name} all {every:,} samples")
        lines = [f"validation: {', '.join(parts)}"]
        if unknown := [name for name, count in self.text_bytes.items() if count is None]:
            lines.append(f"validation: no bits per byte of {', '.join(unknown)}: the tokenizer's bytes cannot be counted")
        return lines

    @property
    def count(self) -> int:
        """How many micro-batches every process works on."""
        return -(-len(self._parts) // self.data_parallel)

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches, each `data_parallel`-th; of the last round some may count for nothing."""
        for number in range(self.rank, self.count * self.data_parallel, self.data_parallel):
            yield self._batch(*(self._parts[number] if number < len(self._parts) else (self._parts[-1][0], [])))

    def _batch(self, name: str, part: Sequence[Window]) -> Batch:
        dataset, reading = self.datasets[name], self.reading
        inputs_BS, labels_BS, scored_BS = window_rows(dataset, part, reading.batch, reading.seq)
        labels_BS[~scored_BS] = IGNORED
        positions_BS = torch.from_numpy(document_positions(inputs_BS, dataset.eos_id)) if reading.documents else None
        return Batch(torch.from_numpy(inputs_BS), torch.from_numpy(labels_BS), positions_BS)

    def figures(self, losses: Sequence[float]) -> dict[str, dict[str, Any]]:
        """Loss, perplexity, bits per byte and samples by split: "validation/NAME" of each source, "validation" of all bits.

        losses: the mean of every micro-batch, in order; those that counted for nothing follow at the end.
        """
        scores = {name: Score(text_bytes=count) for name, count in self.text_bytes.items()}
        for (name, part), loss in zip(self._parts, losses[: len(self._parts)], strict=True):
            tokens = sum(window.end - window.first for window in part)
            scores[name].tokens += tokens
            scores[name].nats += loss * tokens
        whole = Score()
        for score in scores.values():
            whole.add(score)
        by_split = {f"{WHOLE}/{name}": (score, len(self.chosen[name])) for name, score in scores.items()}
        by_split[WHOLE] = whole, sum(map(len, self.chosen.values()))
        return {split: _line(score, samples) for split, (score, samples) in by_split.items()}


def _line(score: Score, samples: int) -> dict[str, Any]:
    return {
        "loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte, "samples": samples,
    }  # fmt: skip
