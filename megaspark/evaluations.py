"""How well a model predicts the tokens of datasets: loss, perplexity and bits per byte of each, whoever computes the logits.

Rule of context: a dataset is one stream of tokens, read as training reads it, in windows of `seq` tokens from its start; each
token is scored exactly once. With a `stride` below `seq` windows overlap, and every token but those of the first window has at
least seq - stride tokens before it. The first token of all is predicted from an end-of-text token. With documents kept apart,
positions restart and attention stays inside each, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megaspark.batches import document_positions
from megaspark.shards import TokenDataset
from megaspark.text_bytes import TokenBytes

CHUNK_TOKENS = 1024  # of fp32 logits at a time
# tokens [B, S] int64, positions [B, S] int64 or None (one document each) -> logits [B, S, V], any float dtype
Logits = Callable[[Tensor, Tensor | None], Tensor]


class Window(NamedTuple):
    """Targets [start, end) of a stream, of which those from `first` on are scored."""

    start: int
    end: int
    first: int


@dataclass(frozen=True)
class Reading:
    """How a stream is cut: `seq` tokens a window, `stride` apart, `batch` windows at a time; `count` of them, or all.

    A count takes windows evenly spread over the stream. `documents`: keep attention inside each document.
    """

    seq: int
    stride: int
    batch: int
    documents: bool
    count: int | None = None


@dataclass
class Score:
    """What was measured: negative log-likelihood in nats over `tokens` tokens that stand for `text_bytes` bytes of text.

    text_bytes is None where they cannot be counted.
    """

    tokens: int = 0
    nats: float = 0.0
    text_bytes: int | None = 0

    @property
    def loss(self) -> float | None:
        """Nats a token."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss): among how many equally likely tokens the model wavers."""
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed for a byte of text, whatever the tokenizer."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    def add(self, other: Score) -> None:
        """Adds another's tokens, nats and bytes."""
        self.tokens, self.nats = self.tokens + other.tokens, self.nats + other.nats
        known = self.text_bytes is not None and other.text_bytes is not None
        self.text_bytes = self.text_bytes + other.text_bytes if known else None

    def figures(self) -> dict[str, Any]:
        """All of it as plain data; null for what is unknown or not finite."""
        values = {
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "nats": self.nats,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}


def windows(tokens: int, seq: int, stride: int) -> list[Window]:
    """The windows of a stream of `tokens` targets: each is scored in exactly one of them; 0 < stride <= seq."""
    if not 0 < stride <= seq:
        raise ValueError(f"stride {stride} is not within 1 and seq = {seq}")
    out, scored = [], 0
    while scored < tokens:
        start = len(out) * stride
        end = min(start + seq, tokens)
        out.append(Window(start, end, scored))
        scored = end
    return out


def chosen_windows(tokens: int, reading: Reading) -> list[Window]:
    """The windows that a reading of so many tokens takes: all, or `count` of them evenly spread."""
    every = windows(tokens, reading.seq, reading.stride)
    if reading.count is None or reading.count >= len(every):
        return every
    return [every[i * len(every) // reading.count] for i in range(reading.count)]


def evaluate(
    dataset: TokenDataset,
    logits: Logits,
    reading: Reading,
    token_bytes: TokenBytes | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Score:
    """Scores a dataset; `progress` is told the tokens just scored. The same call gives the same bits.

    The bytes are the manifest's where the whole dataset is scored and it counted them, else those of `token_bytes`.
    """
    manifest = dataset.manifest
    specials = {i for i in (manifest.eos_id, manifest.bos_id) if i is not None}
    chosen = chosen_windows(dataset.tokens, reading)
    total = Score(text_bytes=0 if token_bytes else None)
    for start in range(0, len(chosen), reading.batch):
        part = chosen[start : start + reading.batch]
        inputs_BS, labels_BS, scored_BS = _rows(dataset, part)
        positions = torch.from_numpy(document_positions(inputs_BS, dataset.eos_id)) if reading.documents else None
        losses_BS = token_losses(logits(torch.from_numpy(inputs_BS), positions), torch.from_numpy(labels_BS))
        nats = float(losses_BS[torch.from_numpy(scored_BS)].double().sum())
        labels_N, inputs_N = labels_BS[scored_BS], inputs_BS[scored_BS]
        total.add(Score(len(labels_N), nats, token_bytes.count(labels_N, inputs_N, specials) if token_bytes else None))
        progress(len(labels_N))
    if total.tokens == dataset.tokens and manifest.text_bytes:
        total.text_bytes = manifest.text_bytes
    return total


@torch.no_grad()
def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each token in fp32, on the CPU.

    logits_BSV: [B, S, V] of any float dtype and device; labels_BS: [B, S] int64 below V. Returns [B, S].
    """
    logits_NV, labels_N = logits_BSV.flatten(0, 1), labels_BS.flatten().to(logits_BSV.device)
    rows = (slice(i, i + CHUNK_TOKENS) for i in range(0, len(labels_N), CHUNK_TOKENS))
    losses = [F.cross_entropy(logits_NV[row].float(), labels_N[row], reduction="none").cpu() for row in rows]
    return torch.cat(losses).view(labels_BS.shape)


def _rows(dataset: TokenDataset, part: Sequence[Window]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and labels [B, S] int64 of some windows, and where they are scored [B, S] bool; short ones are filled with EOS."""
    longest = max(window.end - window.start for window in part)
    inputs_BS = np.full((len(part), longest), dataset.eos_id, np.int64)
    labels_BS, scored_BS = inputs_BS.copy(), np.zeros(inputs_BS.shape, bool)
    for row, (start, end, first) in enumerate(part):
        read = dataset.read(max(0, start - 1), end - max(0, start - 1))
        labels_BS[row, : end - start] = read[-(end - start) :]
        inputs_BS[row, : end - start] = read[:-1] if start else [dataset.eos_id, *read[:-1]]
        scored_BS[row, first - start : end - start] = True
    return inputs_BS, labels_BS, scored_BS


def tokens_to_score(datasets: Sequence[TokenDataset], reading: Reading) -> int:
    """How many tokens `evaluate` will score in all these datasets."""
    return sum(window.end - window.first for dataset in datasets for window in chosen_windows(dataset.tokens, reading))
