"""The exported tokenizer: the same ids and the same text as SentencePiece, through `AutoTokenizer`, for every string."""

import json
import pydoc_data.topics
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megaspark.errors import UserError
from megaspark.hf_tokenizers import adversarial_texts, check_tokenizer, write_tokenizer

SYMBOLS = ["<|im_start|>", "<|im_start|>x", "ab", "bcd", "abc"]  # of which some overlap
OPTIONS = {
    "plain": {},
    "dummy-prefix": {"add_dummy_prefix": True},
    "collapse-spaces": {"remove_extra_whitespaces": True, "add_dummy_prefix": True},
    "no-bytes": {"byte_fallback": False, "add_dummy_prefix": True},
    "symbols": {"user_defined_symbols": [*SYMBOLS, "a b", "  "]},
    "symbols-dummy-prefix": {"user_defined_symbols": [*SYMBOLS, "a b", "  "], "add_dummy_prefix": True},
    "symbols-collapse": {"user_defined_symbols": SYMBOLS, "remove_extra_whitespaces": True, "byte_fallback": False},
    "own-ids": {"pad_id": 0, "unk_id": 3, "bos_id": 2, "eos_id": 1, "eos_piece": "<|end|>"},
}
MISTRAL = Path(__file__).resolve().parents[2] / "shared/corpora/tokenizers/mistral-v1.tokenizer.model"


def train(path: Path, **options) -> Path:
    """Trains a SentencePiece BPE model of 700 pieces on Python's own help texts."""
    lines = [line for topic in sorted(pydoc_data.topics.topics) for line in pydoc_data.topics.topics[topic].split("\n")]
    defaults = {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "vocab_size": 700,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines[:4000], "naïve    東京 été"] * 2),
        model_prefix=str(path.with_suffix("")),
        num_threads=1,
        minloglevel=2,
        **{**defaults, **options},
    )
    return path


@pytest.fixture(scope="module", params=[*OPTIONS, *(["mistral-v1"] if MISTRAL.is_file() else [])])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A SentencePiece model and the folder written from it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = MISTRAL if request.param == "mistral-v1" else train(folder / "t.model", **OPTIONS[request.param])
    write_tokenizer(source, folder / "hf", max_length=4096)
    return source, folder / "hf"


def test_adversarial_texts_have_the_same_ids_and_text(pair):
    """Runs of spaces, literal special tokens, NUL, U+2581, empty text: where every stock conversion differs."""
    assert check_tokenizer(*pair, adversarial_texts(5000, seed=1)) == []


def test_symbols_special_tokens_and_spaces_in_all_orders(pair):
    """Overlapping symbols, a symbol that opens the text (its dummy prefix), a special token alone between two symbols."""
    parts = [*SYMBOLS, "  ", " ", "<s>", "</s>", "<unk>", "<0x0A>", "\u2581", "x", "the"]
    texts = [a + b + c for a in parts for b in parts for c in parts]
    assert check_tokenizer(*pair, texts) == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=60) | st.text("ab \u2581\n<s/>", max_size=40), min_size=20, max_size=60))
def test_any_text(pair, texts):
    """A string that nobody thought of."""
    assert check_tokenizer(*pair, texts) == []


def test_decoding_gives_the_text_back(pair):
    """A dummy prefix left in, a space eaten, bytes not joined: a model whose normalization keeps the text must return it."""
    source, folder = pair
    if "collapse" in str(source) or "no-bytes" in str(source):
        pytest.skip("this normalization loses text by design")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ["", " ", "  two  spaces ", "def f(x):\n    return x\n", "naïve 東京 😀", "</s> <s>", "\0", "\tTab"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_have_the_ids_of_the_model(pair):
    """A BOS or EOS of another id trains or stops on the wrong token; an added one would outgrow the embedding."""
    source, folder = pair
    model, tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(source)), AutoTokenizer.from_pretrained(folder)
    for role in ("unk", "bos", "eos", "pad"):
        i = getattr(model, f"{role}_id")()
        assert getattr(tokenizer, f"{role}_token_id") == (None if i < 0 else i)
    assert len(tokenizer) == model.vocab_size()
    assert tokenizer.model_max_length == 4096
    assert tokenizer.encode("the") == model.encode("the")  # no BOS unless asked for
    assert (folder / "tokenizer.model").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "mistral"])
def test_a_model_config_beside_it_changes_nothing(tmp_path, model_type):
    """transformers picks a tokenizer class by the model's type, and some rebuild the tokenizer from its vocabulary."""
    source = train(tmp_path / "t.model", add_dummy_prefix=True)
    write_tokenizer(source, tmp_path / "hf", max_length=128)
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 700}))
    texts = adversarial_texts(700)
    assert check_tokenizer(source, tmp_path / "hf", texts) == []
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    assert check_tokenizer(source, tmp_path / "again", texts) == []


def test_bos_where_asked_for(tmp_path):
    """`add_bos` must reach plain calls and leave add_special_tokens=False alone."""
    source = train(tmp_path / "t.model")
    write_tokenizer(source, tmp_path / "hf", max_length=128, add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("the")["input_ids"] == [1, *tokenizer.encode("the", add_special_tokens=False)]
    assert check_tokenizer(source, tmp_path / "hf", ["<s>", "the"]) == []


@pytest.mark.parametrize("collapse", [False, True])
def test_charsmap(tmp_path, collapse):
    """Text in composed form, line ends and full-width letters are equal under nmt_nfkc; what is not, the check must name."""
    source = train(
        tmp_path / "t.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=collapse, add_dummy_prefix=True
    )
    write_tokenizer(source, tmp_path / "hf", max_length=128)
    texts = [
        "a\r\nb\n",
        "ＡＢＣ ﬁ ½ ①",
        "naïve été",
        "東京　こんにちは",
        "tab\there",
        "\x01",
        "a\u200bb",
        " \x01 ",
        "한국어 é",
        "👩\u200d💻",
    ]
    assert check_tokenizer(source, tmp_path / "hf", texts) == []
    assert check_tokenizer(source, tmp_path / "hf", ["plain", "Ａ\u0301"]) == ["Ａ\u0301"]


def test_runs_of_spaces_with_tied_scores(tmp_path):
    """Llama's runs of spaces all score -1e9: the leftmost must merge first, whatever lengths the vocabulary has."""
    source = train(tmp_path / "t.model", allow_whitespace_only_pieces=False)
    data = source.read_bytes()
    pieces = ["\u2581" * n for n in (2, 3, 4, 7, 8, 15, 16)]
    raw = [b"\x0a" + bytes([len(p.encode())]) + p.encode() + b"\x15" + b"\x28\x6b\x6e\xce" for p in pieces]  # -1e9 as float32
    extra = b"".join(b"\x0a" + bytes([len(r)]) + r for r in raw)
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    (tmp_path / "tied.model").write_bytes(data + extra)
    tied = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tied.model"))
    assert tied.vocab_size() > model.vocab_size() and tied.get_score(tied.vocab_size() - 1) == -1e9
    write_tokenizer(tmp_path / "tied.model", tmp_path / "hf", max_length=128)
    texts = [before + " " * n + after for n in range(70) for before in ("", "x", "\n") for after in ("", "y")]
    assert check_tokenizer(tmp_path / "tied.model", tmp_path / "hf", texts) == []


@pytest.mark.parametrize("alphabet", ["ab", "ab ", "abc"])
def test_many_ways_to_the_same_piece(tmp_path, alphabet):
    """With few letters each piece splits in many ways and overlaps itself: merges ranked or chosen wrongly show at once."""
    rng = random.Random(alphabet)
    lines = ["".join(rng.choices(alphabet, k=30)) for _ in range(400)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "t"),
        model_type="bpe",
        vocab_size=100,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    write_tokenizer(tmp_path / "t.model", tmp_path / "hf", max_length=128)
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    assert check_tokenizer(tmp_path / "t.model", tmp_path / "hf", texts) == []


def test_tokenizer_json_is_copied_and_its_special_tokens_are_text(tmp_path):
    """A tokenizer.json (StarCoder2's kind) must stay what it is, its specials found by name and harmless inside a text."""
    write_tokenizer(train(tmp_path / "t.model"), tmp_path / "first", max_length=128)
    source = tmp_path / "first/tokenizer.json"
    (tmp_path / "first/tokenizer_config.json").unlink()
    write_tokenizer(source, tmp_path / "second", max_length=64)
    assert (tmp_path / "second/tokenizer.json").read_bytes() == source.read_bytes()
    assert check_tokenizer(source, tmp_path / "second", adversarial_texts(700)) == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, None)
    assert 2 not in tokenizer.encode("</s>")
    assert Tokenizer.from_file(str(source)).encode("</s>").ids == [2]  # and would be, had nobody said otherwise


def test_check_names_the_strings_that_differ(tmp_path):
    """A check that always passes proves nothing: here the folder is of another model."""
    source, other = train(tmp_path / "a.model"), train(tmp_path / "b.model", add_dummy_prefix=True)
    write_tokenizer(other, tmp_path / "hf", max_length=128)
    assert check_tokenizer(source, tmp_path / "hf", ["", "the"]) == ["the"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram"}, "BPE"),
        ({"treat_whitespace_as_suffix": True}, "behind words"),
        ({"user_defined_symbols": ["a b"], "remove_extra_whitespaces": True}, "user-defined"),
    ],
)
def test_what_cannot_be_exact_is_refused_before_anything_is_written(tmp_path, options, words):
    """A model that `tokenizers` cannot express must not leave a folder that looks finished."""
    source = train(tmp_path / "t.model", **options)
    with pytest.raises(UserError, match=words):
        write_tokenizer(source, tmp_path / "hf", max_length=128)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["t.model", "tokenizer.json"])
def test_what_is_no_tokenizer_is_refused(tmp_path, name):
    """A wrong path or a broken file is one line, not a traceback."""
    with pytest.raises(UserError, match="no such"):
        write_tokenizer(tmp_path / name, tmp_path / "hf", max_length=128)
    (tmp_path / name).write_bytes(b"\x0a\xff not it")
    with pytest.raises(UserError, match="not a"):
        write_tokenizer(tmp_path / name, tmp_path / "hf", max_length=128)
