"""Text to token ids and back, by the tokenizers that define what is right: sentencepiece and Hugging Face `tokenizers`.

Faster libraries that give the same ids are in fast_encoders. A special token spelled out in a text (`</s>`,
`<|endoftext|>`) is text like any other: only data_prep itself adds EOS and BOS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megaspark.errors import UserError
from megaspark.shards import sha256_of

# What a tokenizer.json without a tokenizer_config.json beside it calls its special tokens: the first that it has.
USUAL_NAMES = {
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
}


class Ids(NamedTuple):
    """The ids of texts laid end to end, shape (tokens,), and how many each text has, shape (texts,) int64."""

    flat: np.ndarray
    lengths: np.ndarray


class BatchEncoder(Protocol):
    """What turns texts into ids, without BOS or EOS, on the calling thread alone; texts hold no lone surrogate."""

    def encode(self, texts: Sequence[str]) -> Ids:
        """The ids of all texts."""
        ...


class Encoder(BatchEncoder, Protocol):
    """A reference tokenizer; `vocab` is one more than its highest id, `sha256` that of its file.

    `library` is who wrote it, `special_texts` are what its special tokens look like, spelled out.
    """

    name: str
    library: str
    sha256: str
    vocab: int
    eos_id: int
    bos_id: int | None
    special_texts: tuple[str, ...]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; BOS and EOS at its ends are left out."""
        ...


@lru_cache(maxsize=2)
def load_tokenizer(path: str | Path) -> Encoder:
    """Loads a sentencepiece `.model` or a Hugging Face `tokenizer.json`, once a process.

    Raises UserError if the file is missing, neither of the two, or has no end-of-text token.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such tokenizer: {path}; it is a sentencepiece .model or a Hugging Face tokenizer.json")
    with open(path, "rb") as file:
        is_json = file.read(64).lstrip()[:1] == b"{"  # a .model is a protobuf and starts with 0x0a, its field 1
    return HuggingFaceEncoder(path) if is_json else SentencePieceEncoder(path)


def joined(ids: Sequence[Sequence[int]]) -> Ids:
    """Lists of ids as arrays."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return Ids(np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths)


class SentencePieceEncoder:
    """A sentencepiece `.model`."""

    library = "sentencepiece"

    def __init__(self, path: Path):
        import sentencepiece

        self.name, self.sha256 = path.name, sha256_of(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise UserError(f"{path}: neither a sentencepiece .model nor a Hugging Face tokenizer.json ({error})") from None
        self.vocab = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        if self.eos_id < 0:
            raise UserError(f"{path}: this sentencepiece model has no end-of-text token")
        model, ids = self._model, range(self.vocab)
        self.special_texts = tuple(model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def encode(self, texts: Sequence[str]) -> Ids:
        return joined(self.encode_batch(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(_without_ends(ids, self))


class HuggingFaceEncoder:
    """A Hugging Face `tokenizer.json`; its special tokens are named by the tokenizer_config.json beside it, if there is one."""

    library = "tokenizers"

    def __init__(self, path: Path):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores are taken by processes
        import tokenizers

        self.name, self.sha256 = path.name, sha256_of(path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path}: neither a sentencepiece .model nor a Hugging Face tokenizer.json ({error})") from None
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        ids = self._model.get_vocab(with_added_tokens=True)
        self.special_texts = tuple(token.content for token in self._model.get_added_tokens_decoder().values())
        names = _special_names(path, set(self.special_texts))
        self.vocab = max(ids.values(), default=-1) + 1
        self.bos_id = ids.get(names["bos"])
        eos_id = ids.get(names["eos"])
        if eos_id is None:
            known = f"; it may be named in {path.with_name('tokenizer_config.json')} as eos_token"
            raise UserError(f"{path}: no end-of-text token found (looked for {names['eos'] or USUAL_NAMES['eos']}){known}")
        self.eos_id = eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, texts: Sequence[str]) -> Ids:
        return joined(self.encode_batch(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(_without_ends(ids, self), skip_special_tokens=False)


def _without_ends(ids: Sequence[int], encoder: Encoder) -> list[int]:
    ids = [int(i) for i in ids]
    start = 1 if ids and ids[0] == encoder.bos_id else 0
    stop = len(ids) - 1 if len(ids) > start and ids[-1] == encoder.eos_id else len(ids)
    return ids[start:stop]


def _special_names(path: Path, added: set[str]) -> dict[str, str]:
    """The names of EOS and BOS ("" where there is none): as tokenizer_config.json says, else the usual one that was added."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {role: next((name for name in names if name in added), "") for role, names in USUAL_NAMES.items()}
    try:
        config = json.loads(beside.read_bytes())
        said: dict[str, Any] = {role: config.get(f"{role}_token") for role in USUAL_NAMES}
    except (ValueError, AttributeError):
        raise UserError(f"{beside}: not a JSON mapping") from None
    return {role: str(name.get("content", "") if isinstance(name, dict) else name or "") for role, name in said.items()}
