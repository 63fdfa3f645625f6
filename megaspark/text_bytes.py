"""How many UTF-8 bytes of text each token of a tokenizer stands for, so that losses per token become bits per byte.

Bits per byte compares models whatever their tokenizers. The count is of the text that the tokens decode to; where a tokenizer
normalizes what it reads, the manifest's count of the original text is the better one, and `evaluations` takes that if it can.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaspark.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space
UNKNOWN = -1


@dataclass(frozen=True)
class TokenBytes:
    """Bytes by token id, shape (V,) int64, UNKNOWN where a token has no text of its own; `prefix`: of a space before each text."""

    by_id: np.ndarray
    prefix: bool

    def count(self, tokens: np.ndarray, before: np.ndarray, specials: set[int]) -> int | None:
        """Bytes of `tokens` (N,), each read after the token in `before` (N,); None if one of them is unknown.

        specials: the ids of EOS and BOS, after which a text begins.
        """
        counts = np.where(np.isin(tokens, list(specials)), 0, self.by_id[tokens])
        if counts.size and counts.min() < 0:
            return None
        begins = np.isin(before, list(specials)) & (counts > 0) if self.prefix else np.zeros(0)
        return int(counts.sum() - begins.sum())


def read_token_bytes(tokenizer: Path) -> TokenBytes:
    """The table of a SentencePiece `.model` or of a `tokenizer.json` (byte-level, or SentencePiece-like); raises UserError."""
    try:
        head = tokenizer.read_bytes()[:64].lstrip()
        return _from_json(tokenizer) if head.startswith(b"{") else _from_sentencepiece(tokenizer)
    except OSError as error:
        raise UserError(f"{tokenizer}: cannot be read ({error.strerror})") from None


def _from_sentencepiece(path: Path) -> TokenBytes:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose module differs by version
        raise UserError(f"{path}: neither a SentencePiece .model nor a tokenizer.json ({error})") from None
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    counts = np.zeros(model.vocab_size(), np.int64)
    for i in range(len(counts)):
        if model.is_unknown(i):
            counts[i] = UNKNOWN
        elif not model.is_control(i):
            counts[i] = 1 if model.is_byte(i) else _piece_bytes(model.id_to_piece(i))
    return TokenBytes(counts, proto.normalizer_spec.add_dummy_prefix)


def _from_json(path: Path) -> TokenBytes:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        model, added = told["model"], told.get("added_tokens", [])
        vocab = {token: int(i) for token, i in model["vocab"].items()}
        steps = {kind: _steps(told.get(kind)) for kind in ("decoder", "pre_tokenizer", "normalizer")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a tokenizer.json of a kind whose bytes can be counted ({error!r})") from None
    byte_level = any(step["type"] == "ByteLevel" for step in steps["decoder"])
    letters = _byte_level_letters()
    counts = np.full(max([*vocab.values(), *(token["id"] for token in added)]) + 1, UNKNOWN, np.int64)
    for token, i in vocab.items():
        if byte_level:
            counts[i] = len(token) if letters.issuperset(token) else UNKNOWN
        else:
            counts[i] = 1 if model.get("byte_fallback") and _is_byte(token) else _piece_bytes(token)
    if not byte_level and model.get("unk_token") in vocab:
        counts[vocab[model["unk_token"]]] = UNKNOWN
    for token in added:
        if not (token["special"] and token["content"] == model.get("unk_token")):
            counts[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    prefix = any(
        step.get("add_prefix_space") or step.get("prepend_scheme", "never") != "never" or step["type"] == "Prepend"
        for step in (*steps["pre_tokenizer"], *steps["normalizer"])
    )
    return TokenBytes(counts, prefix)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder, pre-tokenizer or normalizer, whether it is one or a sequence."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("pretokenizers") or part.get("normalizers")
    return [step for one in inner for step in _steps(one)] if inner else [part]


def _piece_bytes(piece: str) -> int:
    return len(piece.replace(SPACE, " ").encode())


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level_letters() -> set[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary: themselves if printable, else from U+0100 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return {chr(i) for i in plain} | {chr(256 + i) for i in range(256 - len(plain))}
