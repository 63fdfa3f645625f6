"""Reads GGUF and tokenizes as llama.cpp does by what the file says: what we hold our own exports against.

Written from the format's description and from what llama.cpp's tokenizers do, without the `gguf` package that writes them.
Format: github.com/ggml-org/ggml, docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import heapq
import math
import struct
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TENSOR_DTYPES = {0: torch.float32, 30: torch.bfloat16}
CONTROL, USER_DEFINED = 3, 4  # token types
SPACE = "\u2581"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> the patterns that cut a text into words, one after the other
PATTERNS = {"gpt-2": [GPT2], "starcoder": [r"\p{N}", GPT2], "llama-bpe": [LLAMA3]}


class GGUF:
    """An opened GGUF file: `metadata` by key, and its tensors. Raises ValueError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self._places: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {}
        with path.open("rb") as file:
            if file.read(4) != b"GGUF" or _scalar(file, "I") != 3:
                raise ValueError(f"{path} is no GGUF file of version 3")
            tensors, keys = _scalar(file, "Q"), _scalar(file, "Q")
            for _ in range(keys):
                key = _string(file)
                self.metadata[key] = _value(file, _scalar(file, "I"))
            for _ in range(tensors):
                name = _string(file)
                dims = [_scalar(file, "Q") for _ in range(_scalar(file, "I"))]
                dtype, offset = _TENSOR_DTYPES[_scalar(file, "I")], _scalar(file, "Q")
                self._places[name] = (tuple(reversed(dims)), dtype, offset)
            alignment = self.metadata.get("general.alignment", 32)
            self._data = -(-file.tell() // alignment) * alignment

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name, rows first as in torch."""
        return {name: shape for name, (shape, _, _) in self._places.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor along its first dimension, in its own dtype."""
        shape, dtype, offset = self._places[name]
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        place = self._data + offset + first * row_bytes
        content = np.fromfile(self.path, np.uint8, (last - first) * row_bytes, offset=place)
        return torch.from_numpy(content).view(dtype).view(last - first, *shape[1:])


def _scalar(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        inner, length = _scalar(file, "I"), _scalar(file, "Q")
        return [_value(file, inner) for _ in range(length)]
    return _scalar(file, _SCALARS[kind])


class GGUFTokenizer:
    """Text -> ids by a file's metadata, as llama.cpp without parse_special: special tokens in a text are text."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        said = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
        self.tokens: list[str] = said["tokens"]
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        self.kind: str = said["model"]
        symbols = [text for text, kind in zip(self.tokens, said["token_type"], strict=True) if kind == USER_DEFINED]
        self.symbols = sorted(symbols, key=len, reverse=True)
        self.scores: list[float] = said.get("scores", [])
        self.prefix = bool(said.get("add_space_prefix", self.kind == "llama"))
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(said.get("merges", []))}
        self.pre: str = said.get("pre", "default")
        self._words_seen: dict[str, list[int]] = {}
        if self.kind == "gpt2" and self.pre not in PATTERNS:
            raise ValueError(f"tokenizer.ggml.pre = {self.pre!r} is not known here")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS or EOS."""
        out: list[int] = []
        after_symbol = True  # llama.cpp puts the prefix after every special token, not only at the start
        for part, is_symbol in self._parts(text):
            if is_symbol:
                out.append(self.ids[part])
            elif self.kind == "gpt2":
                out += [i for word in self._words(part) for i in self._merge_by_rank(word)]
            else:
                prefixed = " " + part if self.prefix and after_symbol else part
                out += self._merge_by_score(prefixed.replace(" ", SPACE))
            after_symbol = is_symbol
        return out

    def _parts(self, text: str) -> list[tuple[str, bool]]:
        """The text cut at user-defined symbols: the longest symbol everywhere first, then the next."""
        parts = [(text, False)] if text else []
        for symbol in self.symbols:
            cut: list[tuple[str, bool]] = []
            for part, is_symbol in parts:
                pieces = [part] if is_symbol else part.split(symbol)
                for number, piece in enumerate(pieces):
                    cut += [(symbol, True)] if number else []
                    cut += [(piece, is_symbol)] if piece else []
            parts = cut
        return parts

    def _merge_by_score(self, text: str) -> list[int]:
        """SentencePiece's BPE: the adjacent pair of the highest score first, the leftmost among equals; the rest as bytes."""
        pieces: list[str] = list(text)
        before, after = list(range(-1, len(pieces) - 1)), [*range(1, len(pieces)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (i := self.ids.get(pieces[left] + pieces[right])) is not None:
                heapq.heappush(queue, (-self.scores[i], left, right, pieces[left] + pieces[right]))

        for place in range(len(pieces) - 1):
            offer(place, place + 1)
        while queue:
            _, left, right, whole = heapq.heappop(queue)
            if pieces[left] and pieces[right] and pieces[left] + pieces[right] == whole and after[left] == right:
                pieces[left], pieces[right] = whole, ""
                after[left] = after[right]
                if after[left] >= 0:
                    before[after[left]] = left
                offer(before[left], left)
                offer(left, after[left])
        return [i for piece in pieces if piece for i in self._ids_or_bytes(piece)]

    def _ids_or_bytes(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]

    def _words(self, text: str) -> list[str]:
        """The words of a text under every pattern in turn, what none matches included, their bytes spelled as letters."""
        import regex

        words = [text]
        for pattern in PATTERNS[self.pre]:
            words = [part for word in words for part in regex.split(f"({pattern})", word) if part]
        return ["".join(_byte_letters()[byte] for byte in word.encode()) for word in words]

    def _merge_by_rank(self, word: str) -> list[int]:
        """Byte-level BPE: the pair of the lowest rank first; llama-bpe takes a word that is a token whole."""
        if word in self._words_seen:
            return self._words_seen[word]
        pieces = [word] if self.pre == "llama-bpe" and word in self.ids else list(word)
        while len(pieces) > 1:
            ranked = [(self.ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(pieces))]
            rank, place = min(ranked)
            if rank == math.inf:
                break
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
        self._words_seen[word] = [self.ids[piece] for piece in pieces]
        return self._words_seen[word]


@lru_cache(maxsize=1)
def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printable, else the next letter from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return letters
