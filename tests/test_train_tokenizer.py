"""Training a tokenizer: what it learns of newlines and indentation, Llama's ids, the same bytes every time, exact export."""

import argparse
import dataclasses
import gzip
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaspark.errors import UserError
from megaspark.hf_tokenizers import adversarial_texts, check_tokenizer, write_tokenizer
from megaspark.tools.train_tokenizer import find_files, main, read_sample

ROOT = Path(__file__).resolve().parents[1]


def documents() -> list[str]:
    """Source files of the standard library, each cut into pieces of about 2,000 characters."""
    texts = [inspect.getsource(module) for module in (argparse, dataclasses, inspect, json.decoder, subprocess)]
    return [text[i : i + 2000] for text in texts for i in range(0, len(text), 2000)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The same layout as a demo corpus, in three compressions."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in documents()]
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[0::3])))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[1::3])))
    (folder / "c.jsonl").write_bytes(b"not json\n" + b"".join(lines[2::3]))
    return folder


@pytest.fixture(scope="module")
def model(corpus) -> Path:
    """A tokenizer of 1,000 pieces."""
    out = corpus.parent / f"{corpus.name}-out" / "tokenizer.model"
    assert main([str(corpus), "--vocab", "1000", "--out", str(out)]) == 0
    return out


def test_ids_are_llamas_and_indentation_is_learnt(model):
    """SentencePiece splits its input at newlines by default, and then spells each one as a byte; Python is half indentation."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == 1000
    assert processor.id_to_piece(3) == "<0x00>"
    assert processor.encode("\n\n", out_type=str) == ["\n\n"]
    assert processor.encode("        return", out_type=str) == ["\u2581" * 8, "return"]
    assert processor.encode("\t", out_type=str) == ["\t"]
    assert processor.encode("2024", out_type=str) == ["2", "0", "2", "4"]
    assert processor.encode("x", out_type=str) == ["x"]  # no dummy prefix


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_decoding_gives_back_any_text(model, text):
    """A lost space or a normalized letter is lost for every model trained on it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert processor.decode(processor.encode(text)) == text.replace("\u2581", " ")


def test_export_is_exact(model, tmp_path):
    """Whatever this command trains, the exported tokenizer must equal."""
    write_tokenizer(model, tmp_path / "hf", max_length=128)
    assert check_tokenizer(model, tmp_path / "hf", [*adversarial_texts(2000, seed=3), *documents()]) == []


def test_same_bytes_in_another_process(corpus, model, tmp_path):
    """Token ids are in every shard and checkpoint: a tokenizer that comes out otherwise makes them worthless."""
    code = "import sys; from megaspark.tools.train_tokenizer import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONHASHSEED": "11", "PYTHONPATH": str(ROOT), "LC_ALL": "C"}
    command = [sys.executable, "-c", code, str(corpus), "--vocab", "1000", "--out", str(tmp_path / "new/t.model")]
    result = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert (tmp_path / "new/t.model").read_bytes() == model.read_bytes()
    assert "1 bad lines left out" in result.stderr
    assert "bytes a token on" in result.stdout


def test_finished_one_is_reused_and_force_replaces_it(corpus, tmp_path, capsys):
    """A second start must cost nothing, and never put another vocabulary under the same name unasked."""
    out = tmp_path / "t.model"
    command = [str(corpus), "--out", str(out), "--megabytes", "0.2"]
    assert main([*command, "--vocab", "500"]) == 0
    made = out.stat().st_mtime_ns
    assert main([*command, "--vocab", "500"]) == 0
    assert out.stat().st_mtime_ns == made and "reused" in capsys.readouterr().out
    with pytest.raises(UserError, match="500 pieces, not 600"):
        main([*command, "--vocab", "600"])
    assert main([*command, "--vocab", "600", "--force"]) == 0
    assert sentencepiece.SentencePieceProcessor(model_file=str(out)).vocab_size() == 600


def test_sample_takes_every_files_share_and_holds_documents_out(corpus):
    """A sample of the first file alone learns one set; a held-out text that was learnt from flatters the figure."""
    texts, held_out = read_sample(find_files([str(corpus)]), "text", 150_000)
    everything = documents()
    for start in range(3):
        assert sum(len(t) for t in texts if t in everything[start::3]) > 30_000
    assert len(held_out) == (len(texts) + len(held_out)) // 50
    assert sum(len(t.encode()) for t in texts + held_out) <= 150_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{corpus}/absent*.jsonl", "--out", "{tmp}/t.model"], "no text in"),
        (["{tmp}", "--out", "{tmp}/t.model"], "no text in"),
        (["{corpus}", "--out", "{tmp}/t.json"], "end in .model"),
        (["{corpus}", "--out", "{tmp}/t.model", "--vocab", "100"], "cannot train 100 pieces"),
        (["{corpus}", "--out", "{tmp}/t.model", "--vocab", "900000"], "cannot train 900,000 pieces"),
        (["{corpus}", "--out", "{tmp}/t.model", "--megabytes", "0"], "above 0"),
        (["{corpus}", "--out", "{tmp}/t.model", "--text-field", "txt"], "only 0 documents"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(corpus, tmp_path, arguments, words):
    """A typo must be one line, before a file appears that the next command takes for a tokenizer."""
    with pytest.raises(UserError, match=words):
        main([a.format(corpus=corpus, tmp=tmp_path) for a in arguments])
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_tokenizer_is_not_replaced(corpus, tmp_path):
    """--out may name the wrong file."""
    (tmp_path / "t.model").write_text("weights")
    with pytest.raises(UserError, match="no tokenizer"):
        main([str(corpus), "--out", str(tmp_path / "t.model")])
    assert (tmp_path / "t.model").read_text() == "weights"
