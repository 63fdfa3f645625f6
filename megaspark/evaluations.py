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
from megaspark.errors import UserError
from megaspark.shards import TokenDataset
from megaspark.text_bytes import TokenBytes, read_token_bytes

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
        return math.inf if self.loss >= 700 else math.exp(self.loss)

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
    chosen = chosen_windows(dataset.tokens, reading)
    total = Score(text_bytes=text_bytes(dataset, chosen, token_bytes))
    for start in range(0, len(chosen), reading.batch):
        part = chosen[start : start + reading.batch]
        inputs_BS, labels_BS, scored_BS = window_rows(dataset, part, len(part), max(window.end - window.start for window in part))
        positions = torch.from_numpy(document_positions(inputs_BS, dataset.eos_id)) if reading.documents else None
        losses_BS = token_losses(logits(torch.from_numpy(inputs_BS), positions), torch.from_numpy(labels_BS))
        total.tokens += int(scored_BS.sum())
        total.nats += float(losses_BS[torch.from_numpy(scored_BS)].double().sum())
        progress(int(scored_BS.sum()))
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


def window_rows(
    dataset: TokenDataset, part: Sequence[Window], rows: int, seq: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and labels [rows, seq] int64 of some windows, and where they are scored, bool of that shape.

    Short windows and rows to spare are filled with EOS, which is not scored.
    """
    inputs_BS = np.full((rows, seq), dataset.eos_id, np.int64)
    labels_BS, scored_BS = inputs_BS.copy(), np.zeros(inputs_BS.shape, bool)
    for row, (start, end, first) in enumerate(part):
        labels_BS[row, : end - start], inputs_BS[row, : end - start] = _read(dataset, start, end)
        scored_BS[row, first - start : end - start] = True
    return inputs_BS, labels_BS, scored_BS


def text_bytes(dataset: TokenDataset, chosen: Sequence[Window], token_bytes: TokenBytes | None) -> int | None:
    """Bytes of the text that the scored tokens of some windows stand for; None where they cannot be counted.

    The manifest's where the windows score the whole dataset and it counted them, else those of `token_bytes`.
    """
    manifest = dataset.manifest
    if manifest.text_bytes and sum(window.end - window.first for window in chosen) == dataset.tokens:
        return manifest.text_bytes
    if token_bytes is None:
        return None
    specials = {i for i in (manifest.eos_id, manifest.bos_id) if i is not None}
    counts = [token_bytes.count(*_read(dataset, window.first, window.end), specials) for window in chosen]
    return None if None in counts else sum(counts)


def token_bytes_of(dataset: TokenDataset) -> TokenBytes | None:
    """The table of a dataset's tokenizer, or None where its bytes cannot be counted."""
    try:
        return read_token_bytes(dataset.folder / dataset.manifest.tokenizer)
    except UserError:
        return None


def _read(dataset: TokenDataset, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets [start, end) of a stream, and the token before each of them: (labels, inputs), each (end - start,)."""
    read = dataset.read(max(0, start - 1), end - max(0, start - 1))
    return read[-(end - start) :], read[:-1] if start else np.concatenate([[dataset.eos_id], read[:-1]])


def tokens_to_score(datasets: Sequence[TokenDataset], reading: Reading) -> int:
    """How many tokens `evaluate` will score in all these datasets."""
    return sum(window.end - window.first for dataset in datasets for window in chosen_windows(dataset.tokens, reading))
