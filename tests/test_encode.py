"""Tokenizers: what each library itself says is right comes out, and a special token in a text stays text."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from megaspark.data_prep.encode import load_tokenizer
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
