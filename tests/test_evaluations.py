"""Losses of datasets: every token once, in the context that is promised, over the bytes that the text really has."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from conftest import EOS, VOCAB, random_documents, write_tokens
from megaspark.errors import UserError
from megaspark.evaluations import Reading, Score, chosen_windows, evaluate, token_losses, tokens_to_score, windows
from megaspark.hf_tokenizers import adversarial_texts, write_tokenizer
from megaspark.models import llama
from megaspark.shards import TokenDataset
from megaspark.text_bytes import read_token_bytes
from megaspark.weights import build_model

READING = Reading(seq=24, stride=24, batch=3, documents=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    """Some 900 tokens in three shards, so that windows cross their borders."""
    shards = [random_documents(seed, 10) for seed in range(3)]
    return TokenDataset(write_tokens(tmp_path_factory.mktemp("data") / "a", "a", shards))


@pytest.fixture(scope="module")
def model() -> llama.Model:
    """A random model whose losses depend much on context."""
    config = llama.Config(hidden=32, layers=2, heads=4, kv_heads=2, ffn=40, vocab=VOCAB, init_std=0.3)
    model = build_model(config, seed=1)
    return model.requires_grad_(False).double()


def bigram_table() -> Tensor:
    """Logits of the next token [V, V] by the token before."""
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@settings(deadline=None)
@given(tokens=st.integers(0, 300), seq=st.integers(1, 40), data=st.data())
def test_every_token_is_scored_once_with_the_context_promised(tokens: int, seq: int, data: st.DataObject) -> None:
    """A token scored twice, or never, at a border or in the last window; or scored with less before it than is said."""
    stride = data.draw(st.integers(1, seq))
    cut = windows(tokens, seq, stride)
    scored = [i for window in cut for i in range(window.first, window.end)]
    assert scored == list(range(tokens))
    for window in cut:
        assert 0 <= window.start <= window.first < window.end <= window.start + seq
        assert window.start == 0 or window.first - window.start == seq - stride


def test_windows_refuse_gaps() -> None:
    """A stride above the window would leave tokens out in silence."""
    with pytest.raises(ValueError, match="stride 9"):
        windows(100, 8, 9)


@pytest.mark.parametrize(("stride", "batch"), [(24, 1), (24, 7), (5, 3), (1, 4)])
def test_a_bigram_model_scores_as_counted_by_hand(dataset: TokenDataset, stride: int, batch: int) -> None:
    """Labels shifted wrongly, a window's border, a filled-up row or a shard's border counted: any of them changes this sum."""
    table = bigram_table()
    score = evaluate(dataset, lambda tokens, _: table[tokens], replace(READING, stride=stride, batch=batch))
    stream = np.concatenate([[EOS], dataset.read(0, dataset.tokens)]).astype(np.int64)
    expected = -table.log_softmax(-1)[stream[:-1], stream[1:]].sum().item()
    assert score.tokens == dataset.tokens
    assert score.nats == pytest.approx(expected, rel=1e-6)  # fp32 losses of a few nats, summed in fp64
    assert score.perplexity == pytest.approx(math.exp(expected / dataset.tokens), rel=1e-6)


@pytest.mark.parametrize("documents", [True, False])
def test_context_is_that_of_training(dataset: TokenDataset, model: llama.Model, documents: bool) -> None:
    """Attention across documents, or positions that go on, would give better or worse losses than training saw."""
    score = evaluate(dataset, model, replace(READING, documents=documents))
    stream = [EOS, *dataset.read(0, dataset.tokens).tolist()]
    expected = 0.0
    for start in range(0, dataset.tokens, 24):
        inputs, labels = stream[start : start + 24], stream[start + 1 : start + 25]
        inputs = inputs[: len(labels)]
        begin = 0
        for i, label in enumerate(labels):
            if documents and i and inputs[i - 1] == EOS:
                begin = i
            logits = model(torch.tensor([inputs[begin : i + 1]]))[0, -1]
            expected -= logits.log_softmax(-1)[label].item()
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_the_batch_does_not_matter(dataset: TokenDataset, model: llama.Model) -> None:
    """Rows of a batch must not see each other, nor the fill at the end of short rows."""
    scores = [evaluate(dataset, model, replace(READING, batch=batch)).nats for batch in (1, 2, 64)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)
    assert evaluate(dataset, model, READING) == evaluate(dataset, model, READING)


def test_a_count_of_windows_is_spread_evenly(dataset: TokenDataset, model: llama.Model) -> None:
    """The first windows alone would be of the first documents only."""
    reading = replace(READING, count=7)
    chosen, every = chosen_windows(dataset.tokens, reading), chosen_windows(dataset.tokens, READING)
    assert len(chosen) == 7 and set(chosen) <= set(every)
    gaps = np.diff([every.index(window) for window in chosen])
    assert gaps.max() - gaps.min() <= 1
    score = evaluate(dataset, model, reading)
    assert score.tokens == tokens_to_score([dataset], reading) < dataset.tokens
    assert chosen_windows(dataset.tokens, replace(READING, count=10**6)) == every


def test_losses_are_cross_entropy_in_fp32() -> None:
    """bf16 logits must be widened before the softmax: summing 131 exponentials in 8 bits errs by percents."""
    logits = torch.randn(2, 700, VOCAB, generator=torch.Generator().manual_seed(2)).bfloat16() * 4
    labels = torch.randint(VOCAB, (2, 700), generator=torch.Generator().manual_seed(3))
    expected = -logits.double().log_softmax(-1).gather(2, labels[..., None])[..., 0]
    found = token_losses(logits, labels)
    assert found.dtype == torch.float32 and found.shape == labels.shape
    assert (found.double() - expected).abs().max() < 1e-5  # fp32 of values up to about 30


def test_scores_add_and_never_invent_bytes() -> None:
    """A dataset whose bytes are unknown must leave the total unknown, not smaller; nothing scored is no loss of 0."""
    total = Score(10, 20.0, 30)
    total.add(Score(5, 4.0, 6))
    assert (total.tokens, total.nats, total.text_bytes) == (15, 24.0, 36)
    assert total.bits_per_byte == pytest.approx(24 / math.log(2) / 36)
    total.add(Score(1, 1.0, None))
    assert total.figures()["bits_per_byte"] is None
    assert Score().figures() == {**dict.fromkeys(("loss", "perplexity", "bits_per_byte")), "tokens": 0, "nats": 0, "text_bytes": 0}
    json.dumps(Score(1, 1e6, 1).figures(), allow_nan=False)  # a perplexity beyond floats


# ---- bytes

TEXT = [f"def function_{i}(x):\n    return x + {i}  # é {'y' * (i % 7)} 東京\n" for i in range(300)]


def sentencepiece_model(path: Path, prefix: bool) -> Path:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, vocab_size=330, model_type="bpe", byte_fallback=True,
            add_dummy_prefix=prefix, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    return path


def byte_level(path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["prefix", "no prefix", "byte-level", "exported"])
def test_bytes_of_tokens_are_the_bytes_of_the_text(kind: str, tmp_path: Path) -> None:
    """A space of a dummy prefix, a byte token or a letter of two bytes counted wrongly would shift every bits per byte."""
    if kind == "byte-level":
        path = byte_level(tmp_path / "tokenizer.json")
    else:
        path = sentencepiece_model(tmp_path / "tokenizer.model", prefix=kind != "no prefix")
    if kind == "exported":  # SentencePiece written as a tokenizer.json, the way to-hf does it
        write_tokenizer(path, tmp_path / "out", max_length=99)
        path = tmp_path / "out" / "tokenizer.json"
    if path.suffix == ".json":
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True
        encode, eos = (lambda text: tokenizer.encode(text, add_special_tokens=False).ids), 0
    else:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        encode, eos = processor.encode, processor.eos_id()
    table = read_token_bytes(path)
    for text in adversarial_texts(2000):
        if "\u2581" in text or "\0" in text:  # SentencePiece takes the first for a space, and cuts at the second
            continue
        ids = [*encode(text), eos]
        assert table.count(np.array(ids), np.array([eos, *ids[:-1]]), {eos}) == len(text.encode()), repr(text)


def test_unknown_tokens_have_no_bytes_and_bad_files_a_reason(tmp_path: Path) -> None:
    """An <unk> stands for any text: better no figure than a wrong one."""
    table = read_token_bytes(sentencepiece_model(tmp_path / "tokenizer.model", prefix=True))
    assert table.count(np.array([5, 0, 7]), np.array([2, 5, 0]), {2}) is None
    for content in (b"{}", b"no tokenizer at all", b'{"model": {"type": "Unigram", "vocab": [["a", 1]]}}'):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="bad"):
            read_token_bytes(tmp_path / "bad")
    with pytest.raises(UserError, match="absent"):
        read_token_bytes(tmp_path / "absent")
