"""Tokenizers: what each library itself says is right comes out, whoever is fastest, and a special token in text is text."""

import io
import json
import os
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from megaspark.data_prep import fast_encoders
from megaspark.data_prep.encode import Ids, load_tokenizer
from megaspark.data_prep.fast_encoders import Watched, choose, load_encoder, prove
from megaspark.errors import UserError

TEXT = ["The shard is a row of tokens.", "naïve 日本語 🙂 x = f(y)\n\tpass", "<s> </s> <|endoftext|> is text"] * 20


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def huggingface_json(tmp_path_factory):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>", "<fim_prefix>"]
    )
    model.train_from_iterator(TEXT, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(params=["sentencepiece_model", "huggingface_json"])
def tokenizer_path(request):
    return request.getfixturevalue(request.param)


texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<s>", "</s>x", "<|endoftext|>", "a\0b", " \n "])
)


@given(texts)
@settings(max_examples=60, deadline=None)
def test_text_comes_back_and_no_control_token_goes_in(sentencepiece_model, huggingface_json, texts):
    """A literal `</s>` taken for EOS would end a document in its middle, in every corpus that speaks of tokenizers."""
    for path in (sentencepiece_model, huggingface_json):
        encoder = load_tokenizer(path)
        batch = encoder.encode_batch(texts)
        for text, ids in zip(texts, batch, strict=True):
            assert not {encoder.eos_id, encoder.bos_id} & set(ids)
            assert all(0 <= i < encoder.vocab for i in ids)
            assert encoder.decode([*ids, encoder.eos_id]) == text


def test_ids_are_the_librarys_own(sentencepiece_model, huggingface_json):
    """Ids of our own making would train a model that no other program can talk to."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    encoder = load_tokenizer(sentencepiece_model)
    assert encoder.encode_batch(TEXT[:3]) == [reference.encode(text) for text in TEXT[:3]]
    assert (encoder.vocab, encoder.eos_id, encoder.bos_id) == (reference.vocab_size(), reference.eos_id(), reference.bos_id())
    plain = tokenizers.Tokenizer.from_file(str(huggingface_json))
    encoder = load_tokenizer(huggingface_json)
    assert encoder.encode_batch(TEXT[:2]) == [plain.encode(text).ids for text in TEXT[:2]]
    assert (encoder.eos_id, encoder.vocab) == (0, plain.get_vocab_size())


def test_config_beside_names_the_special_tokens(huggingface_json, tmp_path):
    """The usual names are a guess; where the tokenizer says itself what ends a text, the guess must not win."""
    path = tmp_path / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(huggingface_json))
    model.add_special_tokens([AddedToken("<end>", special=True)])
    model.save(str(path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}, "bos_token": None}))
    encoder = load_tokenizer(path)
    assert (encoder.eos_id, encoder.bos_id) == (model.token_to_id("<end>"), None)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 1}', b"\x0a\x0b not a model", None])
def test_what_is_no_tokenizer_is_one_clear_error(tmp_path, content):
    """A tokenizer that is the error page of a download must be named, not crash in a library hours later."""
    path = tmp_path / "tokenizer.any"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.any") as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


def test_tokenizer_without_end_is_refused(tmp_path):
    """Without EOS documents would run into each other unnoticed."""
    tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "tokenizer.json")


# ---- faster libraries


def rows(ids: Ids) -> list[list[int]]:
    """The ids of each text."""
    ends = [0, *np.cumsum(ids.lengths).tolist()]
    assert ends[-1] == len(ids.flat)
    return [ids.flat[a:b].tolist() for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", ["gigatoken", "kitoken"])
def test_proven_encoder_gives_the_reference_ids(name, tokenizer_path):
    """A fast library is trusted with all text after a proof; here its ids are compared on everything that the proof uses."""
    pytest.importorskip(name)
    trial = prove(name, str(tokenizer_path), TEXT)
    assert not trial.problem and trial.strings > 5000
    encoder = load_encoder(name, str(tokenizer_path))
    for batch in (TEXT, [], [""], ["", "</s>", "", "x\0y"]):
        assert rows(encoder.encode(batch)) == load_tokenizer(tokenizer_path).encode_batch(batch)


@given(texts)
@settings(max_examples=60, deadline=None)
def test_fast_libraries_agree_on_any_text(sentencepiece_model, texts):
    """Strings that no one thought of: hypothesis looks for one on which the libraries part."""
    for name in ("gigatoken", "kitoken"):
        pytest.importorskip(name)
        encoder = load_encoder(name, str(sentencepiece_model)).fast
        assert rows(encoder.encode(texts)) == load_tokenizer(sentencepiece_model).encode_batch(texts)


class Wrong:
    """A library that gives one wrong id for texts that hold `secret`."""

    secret = "row of tokens"

    def __init__(self, path):
        self.reference = load_tokenizer(path)

    def encode(self, texts):
        ids = self.reference.encode(texts)
        if any(self.secret in text for text in texts):
            ids.flat[-1] += 1
        return ids


class Crashing(Wrong):
    """A library that takes its process down."""

    def encode(self, texts):
        os.abort()


def test_unequal_or_crashing_library_is_not_used(sentencepiece_model, monkeypatch):
    """One wrong id among billions trains a model that no other program can talk to; a crash must not end the job."""
    monkeypatch.setattr(fast_encoders, "_FAST", {"gigatoken": Wrong, "kitoken": Crashing})
    monkeypatch.setattr(fast_encoders, "SAMPLE_BYTES", 1)
    monkeypatch.setattr(fast_encoders, "find_spec", lambda _: True)
    assert "gives other ids for" in prove("gigatoken", str(sentencepiece_model), TEXT).problem
    assert not prove("gigatoken", str(sentencepiece_model), ["fine"]).problem
    monkeypatch.setattr(fast_encoders, "_try_apart", fast_encoders.prove)
    choice = choose("gigatoken", str(sentencepiece_model), TEXT)
    assert choice.name == "reference" and "gigatoken gives other ids for" in choice.words and "\n" not in choice.words
    watched = Watched(Wrong(sentencepiece_model), load_tokenizer(sentencepiece_model), "gigatoken")
    assert rows(watched.encode(["fine"])) == rows(watched.reference.encode(["fine"]))
    watched.unwatched_chars = 1 << 30
    with pytest.raises(fast_encoders.UnequalIds, match="gigatoken gives other ids than sentencepiece"):
        watched.encode([Wrong.secret])


def test_library_that_crashes_its_process_is_told_of(run_python, sentencepiece_model):
    """A segmentation fault in the proof must leave a job that runs, by the next best tokenizer."""
    text = """
import os, sys
from megaspark.data_prep import fast_encoders
class Crashing:
    def __init__(self, path): os.abort()
fast_encoders._FAST = {"gigatoken": Crashing}
fast_encoders.SAMPLE_BYTES, fast_encoders.find_spec = 1, lambda _: True
if __name__ == "__main__":
    print(fast_encoders.choose("auto", sys.argv[1], ["text"]).words)
"""
    script = sentencepiece_model.with_name("crash.py")
    script.write_text(text)
    done = run_python(
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        str(script),
        str(sentencepiece_model),
    )
    assert "the reference: gigatoken crashed" in done.stdout, done.stderr


def test_choice_is_told_in_one_line(sentencepiece_model, monkeypatch):
    """Whoever pays for a cluster must see which tokenizer runs, why, and how fast."""
    path = str(sentencepiece_model)
    assert choose("auto", path, ["little"]).words.endswith("the input is too small to prove a faster one")
    assert choose("reference", path, []).name == "reference"
    big = ["The shard is a row of tokens, 日本語 🙂 " * 50] * 800
    for name in ("gigatoken", "kitoken"):
        pytest.importorskip(name)
        choice = choose(name, path, big)
        assert choice.name == name and " MB of the input and 5,0" in choice.words and "MB/s a core" in choice.words
    monkeypatch.setattr(fast_encoders, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gigatoken is not installed: pip install 'megaspark\[data\]'"):
        choose("gigatoken", path, big)
    assert "kitoken is not installed" in choose("auto", path, big).words


def test_memory_of_gigatoken_is_bounded(sentencepiece_model, run_python):
    """Its cache of words grows without end: a rank of a long job would be killed for want of memory."""
    pytest.importorskip("gigatoken")
    text = """
import random, resource, sys
from megaspark.data_prep.fast_encoders import Gigatoken
from pathlib import Path
encoder, rng = Gigatoken(Path(sys.argv[1])), random.Random(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(24):
    encoder.encode([" ".join(f"{rng.getrandbits(36):x}" for _ in range(100_000))])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(run_python(text, str(sentencepiece_model)).checked().stdout) < 700
