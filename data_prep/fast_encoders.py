"""Faster tokenizer libraries, used only where they prove to give the reference's ids.

A job proves one at its start, in a process of its own: on texts of its input, on strings that tokenizers get wrong, and on the
tokenizer's special tokens spelled out. While it works, `Watched` goes on comparing a document now and then. gigatoken
(MIT, https://github.com/marcelroed/gigatoken) and kitoken (BSD-2, https://github.com/Systemcluster/kitoken) are optional.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from megaspark.data_prep.encode import BatchEncoder, Encoder, Ids, SentencePieceEncoder, joined, load_tokenizer
from megaspark.errors import UserError
from megaspark.hf_tokenizers import adversarial_texts, build, read_model

REFERENCE = "reference"
AUTO = "auto"
SAMPLE_BYTES = 1 << 20  # less of a job's text proves nothing, and is tokenized by the reference in a blink

_CACHE_BYTES = 192 << 20  # that gigatoken may keep of what it saw
_WATCH_EVERY_CHARS = 1 << 24  # costs one CPU second in a hundred
_WATCH_CHARS = 1 << 15


class UnequalIds(Exception):
    """A fast tokenizer gave other ids than the reference."""


class Gigatoken:
    """gigatoken: str only, for bytes that are not UTF-8 crash it; its cache, which it never bounds, is thrown away in time."""

    def __init__(self, path: Path):
        if _is_json(path):
            self._json = _without_special_tokens(path.read_text(encoding="utf-8"))
        else:
            self._json = build(read_model(path), path).to_str()
        self._load()

    def encode(self, texts: Sequence[str]) -> Ids:
        model = self._model
        ids = [model.encode(text) for text in texts]  # this call keeps its cache; the one for batches does not
        self._seen_chars += sum(map(len, texts))
        if _memory_bytes(self._seen_chars) - self._start_bytes > _CACHE_BYTES:
            self._load()
        return Ids(np.concatenate([np.empty(0, np.uint32), *ids]), np.fromiter(map(len, ids), np.int64, len(ids)))

    def _load(self) -> None:
        import gigatoken

        self._model = None
        self._model = gigatoken.Tokenizer.from_json(self._json).backend
        self._seen_chars = 0
        self._start_bytes = _memory_bytes(0)


class Kitoken:
    """kitoken, which looks at special tokens when it cuts text into words, even where it does not use them."""

    def __init__(self, path: Path):
        import kitoken

        if _is_json(path):
            self._model = kitoken.Kitoken.from_tokenizers(_without_special_tokens(path.read_text(encoding="utf-8")).encode())
        else:
            self._model = kitoken.Kitoken.from_sentencepiece(path.read_bytes())

    def encode(self, texts: Sequence[str]) -> Ids:
        return joined(self._model.encode_all(list(texts), False))


_FAST: dict[str, Callable[[Path], BatchEncoder]] = {"gigatoken": Gigatoken, "kitoken": Kitoken}  # the fastest first


@dataclass(frozen=True)
class Choice:
    """The encoder that a job runs, and a line that says why."""

    name: str
    words: str


def choose(wanted: str, path: str, sample: Sequence[str]) -> Choice:
    """The fastest encoder, or the `wanted` one, that proves itself on `sample`; the reference if none does.

    Raises UserError if the wanted one is not installed.
    """
    reference = load_tokenizer(path)
    own = f"{reference.name} by {reference.library}, the reference"
    if wanted == REFERENCE:
        return Choice(REFERENCE, f"{own}, as encoder: {REFERENCE} says")
    size_bytes = sum(len(text.encode()) for text in sample)
    if wanted == AUTO and size_bytes < SAMPLE_BYTES:
        return Choice(REFERENCE, f"{own}: the input is too small to prove a faster one")
    reasons = []
    for name in _FAST if wanted == AUTO else [wanted]:
        install = f"{name} is not installed: pip install 'megaspark[data]'"
        if find_spec(name) is None:
            if wanted != AUTO:
                raise UserError(f"encoder: {install}")
            reasons.append(install)
            continue
        trial = _try_apart(name, path, sample)
        if not trial.problem:
            proof = f"{size_bytes / 1e6:.1f} MB of the input and {trial.strings:,} hard strings"
            speed = f"{size_bytes / trial.fast_s / 1e6:.0f} MB/s a core, not {size_bytes / trial.reference_s / 1e6:.1f}"
            words = f"{reference.name} by {name}: the same ids as {reference.library} on {proof}; {speed}"
            return Choice(name, words)
        reasons.append(f"{name} {trial.problem}")
    return Choice(REFERENCE, f"{own}: {'; '.join(reasons)}")


@lru_cache(maxsize=4)
def load_encoder(name: str, path: str) -> BatchEncoder:
    """The encoder of a Choice, once a process; a fast one is watched."""
    reference = load_tokenizer(path)
    return reference if name == REFERENCE else Watched(_FAST[name](Path(path)), reference, name)


class Watched:
    """A fast encoder; now and then one document is encoded by the reference too, UnequalIds if it says otherwise."""

    def __init__(self, fast: BatchEncoder, reference: Encoder, name: str):
        self.fast, self.reference, self.name = fast, reference, name
        self.unwatched_chars = _WATCH_EVERY_CHARS
        self.watched = 0

    def encode(self, texts: Sequence[str]) -> Ids:
        ids = self.fast.encode(texts)
        self.unwatched_chars += sum(map(len, texts))
        short = [k for k, text in enumerate(texts) if len(text) <= _WATCH_CHARS]
        if self.unwatched_chars >= _WATCH_EVERY_CHARS and short:
            k = short[self.watched % len(short)]
            if not self._is_equal(texts[k], ids, k):
                raise UnequalIds(f"{self.name} gives other ids than {self.reference.library} for {texts[k][:60]!r}")
            self.unwatched_chars = 0
            self.watched += 1
        return ids

    def _is_equal(self, text: str, ids: Ids, k: int) -> bool:
        start = int(ids.lengths[:k].sum())
        (expected,) = self.reference.encode_batch([text])
        return expected == ids.flat[start : start + int(ids.lengths[k])].tolist()


# ---- the proof


@dataclass(frozen=True)
class Trial:
    """What came of comparing: a problem in words or "", how many hard strings were compared, CPU seconds for the sample."""

    problem: str = ""
    strings: int = 0
    fast_s: float = 1.0
    reference_s: float = 1.0


def prove(name: str, path: str, sample: Sequence[str]) -> Trial:
    """Compares a fast encoder with the reference, in this process."""
    reference = load_tokenizer(path)
    try:
        fast = _FAST[name](Path(path))
        special = reference.special_texts
        hard = [*adversarial_texts(), *special, *(f"a {text} b{text}{text}\n{text}" for text in special)]
        problem = _difference(hard, fast.encode(hard), reference.encode(hard))
        start_s = time.process_time()
        expected = reference.encode(sample)
        middle_s = time.process_time()
        found = fast.encode(sample)
        fast_s, reference_s = time.process_time() - middle_s, middle_s - start_s
        return Trial(problem or _difference(sample, found, expected), len(hard), max(fast_s, 1e-6), max(reference_s, 1e-6))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        return Trial(f"cannot be used ({' '.join(str(error).split())[:120]})")


def _try_apart(name: str, path: str, sample: Sequence[str]) -> Trial:
    """The proof in a process of its own, which a library may crash."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        try:
            return executor.submit(prove, name, path, sample).result()
        except BrokenProcessPool:
            return Trial("crashed")


def _difference(texts: Sequence[str], found: Ids, expected: Ids) -> str:
    """The first text whose ids differ, in words, or ""."""
    if np.array_equal(found.lengths, expected.lengths) and np.array_equal(found.flat, expected.flat):
        return ""
    pairs = ((np.split(ids.flat, np.cumsum(ids.lengths)[:-1])) for ids in (found, expected))
    wrong = next((k for k, (a, b) in enumerate(zip(*pairs, strict=False)) if not np.array_equal(a, b)), 0)
    return f"gives other ids for {texts[wrong][:60]!r}"


def _is_json(path: Path) -> bool:
    return not isinstance(load_tokenizer(path), SentencePieceEncoder)


def _without_special_tokens(text: str) -> str:
    """A tokenizer.json by which a special token in a text is text."""
    values = json.loads(text)
    values["added_tokens"] = [token for token in values.get("added_tokens") or [] if not token.get("special")]
    values["truncation"] = values["padding"] = values["post_processor"] = None
    return json.dumps(values)


def _memory_bytes(seen_chars: int) -> int:
    """The memory of this process; where that is not told, what was seen times what random text needs."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 10 * seen_chars
