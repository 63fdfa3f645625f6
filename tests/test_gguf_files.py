"""GGUF: what llama.cpp would compute and tokenize from the file is what was exported, by readers that share nothing with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from test_to_hf import TEXT, tokenizer, write_run  # noqa: F401
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megaspark import gguf_files
from megaspark.cli import main
from megaspark.gguf_readers import GGUF, LLAMA3, GGUFTokenizer
from megaspark.hf_tokenizers import adversarial_texts

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
LLAMA3_SCALING = {"kind": "llama3", "factor": 8.0, "original_positions": 32}


def export(tmp_path: Path, tokenizer_path: Path, dtype: str, **model: Any) -> tuple[Path, torch.nn.Module]:
    run, weights = write_run(tmp_path / "run", tokenizer_path, **model)
    hf_dtype = "fp32" if dtype == "f32" else "bf16"
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--gguf", dtype, "--dtype", hf_dtype]) == 0
    return tmp_path / "hf" / f"model-{dtype}.gguf", weights


@pytest.mark.parametrize(("dtype", "model"), [
    ("bf16", {"head_dim": 26}), ("f32", {"kv_heads": 4, "rope_theta": 5e5, "norm_eps": 1e-2}),
    ("f32", {"kv_heads": 1, "vocab": 340}),
])  # fmt: skip
def test_transformers_own_gguf_loader_computes_our_logits(dtype: str, model: Any, tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """Rows of q and k not permuted, permuted twice or by the wrong head count, eps or theta lost: seen by another's reader."""
    from transformers import AutoModelForCausalLM

    path, _ = export(tmp_path, tokenizer, dtype, **model)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32).eval()
    tokens = torch.randint(330, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(tokens).logits - ours(tokens).logits).abs().max() < 1e-5
    permuted = GGUF(path).rows("blk.0.attn_q.weight", 0, 48 if "head_dim" not in model else 104)
    assert not torch.equal(permuted.float(), ours.model.layers[0].self_attn.q_proj.weight)


def test_tied_table_scaling_and_metadata(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """An output table that llama.cpp would take beside the tied one; Llama 3's scaling lost past its first context."""
    path, weights = export(tmp_path, tokenizer, "f32", tie_embeddings=True, rope_scaling=LLAMA3_SCALING, max_positions=256)
    found = GGUF(path)
    assert "output.weight" not in found.shapes
    assert torch.equal(found.rows("token_embd.weight", 5, 40), weights.embedding.weight[5:40])
    plain = 1.0 / 10000.0 ** (torch.arange(0, 12, 2) / 12)
    from megaspark.rope_scalings import RopeScaling, scaled

    factors = found.rows("rope_freqs.weight", 0, 6)
    assert torch.allclose(plain / factors, scaled(plain, RopeScaling(**LLAMA3_SCALING))) and factors.max() == 8
    said = found.metadata
    assert (said["llama.context_length"], said["llama.attention.head_count_kv"], said["llama.rope.dimension_count"]) == (256, 2, 12)
    assert said["tokenizer.ggml.eos_token_id"] == 2 and said["tokenizer.ggml.add_space_prefix"] is True
    theirs = gguf.GGUFReader(path)  # the package's own reader agrees with ours
    assert {t.name for t in theirs.tensors} == set(found.shapes)
    table = next(t for t in theirs.tensors if t.name == "token_embd.weight")
    assert np.array_equal(np.asarray(table.data), weights.embedding.weight.detach().numpy())


def byte_level(path: Path, kind: str) -> Path:
    """A byte-level BPE of the kind that llama.cpp calls `kind`, trained on the tests' text."""
    whole_words = kind == "llama-bpe"
    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    byte_step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole_words)
    steps = {"gpt-2": [], "starcoder": [pre_tokenizers.Digits(individual_digits=True)], "qwen2": [pre_tokenizers.Punctuation()],
             "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")]}[kind]  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_step]) if steps else byte_step
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator([*TEXT, "it's  they'LL 123 4567 naïve\r\n\n\t x"] * 2, trainer)
    made.save(str(path))
    return path


@pytest.mark.parametrize("kind", [pytest.param("gpt-2", marks=pytest.mark.long), "starcoder", "llama-bpe"])
def test_byte_level_tokenizers(kind: str, tmp_path: Path) -> None:
    """The wrong name of a pre-tokenizer cuts words elsewhere, and llama.cpp only warns; merges in another order likewise."""
    path, _ = export(tmp_path, byte_level(tmp_path / "tokenizer.json", kind), "bf16", vocab=400)
    found = GGUF(path)
    assert found.metadata["tokenizer.ggml.pre"] == kind
    assert "5,000 adversarial texts tokenize the same" in (path.parent / "README.md").read_text()
    other = GGUFTokenizer({**found.metadata, "tokenizer.ggml.pre": "starcoder" if kind != "starcoder" else "gpt-2"})
    right = GGUFTokenizer(found.metadata)
    assert any(other.encode(text) != right.encode(text) for text in adversarial_texts(3000))


def test_sentencepiece_without_prefix_and_symbols(tmp_path: Path) -> None:
    """A leading space added where training had none; symbols cut out of a text by the longest first."""
    model = tmp_path / "t.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, vocab_size=330, model_type="bpe", byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            user_defined_symbols=["<|a|>", "<|a|>b"],
        )  # fmt: skip
    path, _ = export(tmp_path, model, "f32")
    ours, theirs = GGUFTokenizer(GGUF(path).metadata), sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ["x<|a|>b<|a|>", "<|a|> y", "</s><s>", *TEXT[:50], *adversarial_texts(500, seed=3)]:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(("options", "words"), [
    ({"remove_extra_whitespaces": True}, "normalizes text"),
    ({"byte_fallback": False}, "no byte_fallback"),
    ({"user_defined_symbols": ["x="]}, "would tokenize"),  # llama.cpp puts a prefix after a symbol too, and none before it
])  # fmt: skip
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(
    options: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that loads and answers gibberish: refused, with nothing left."""
    model = tmp_path / "t.model"
    defaults = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, vocab_size=330, model_type="bpe", minloglevel=2,
            **{**defaults, **options},
        )  # fmt: skip
    run, _ = write_run(tmp_path / "run", model)
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--gguf", "bf16"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "hf").exists()


def test_other_byte_level_kinds_and_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pre-tokenizer that llama.cpp has under no name we know; the optional package not installed."""
    run, _ = write_run(tmp_path / "run", byte_level(tmp_path / "tokenizer.json", "qwen2"), vocab=400)
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--gguf", "f32"]) == 2
    assert "no byte-level BPE of a kind" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)  # what the import system does for a package that is not there
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--gguf", "f32"]) == 2
    assert "megaspark[gguf]" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_a_changed_weight_is_seen(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """The reading back must have teeth: one bit of one weight."""
    path, weights = export(tmp_path, tokenizer, "f32")
    from megaspark import hf
    from megaspark.models.llama import Config

    shapes = {name: tuple(p.shape) for name, p in weights.named_parameters()}
    own = {name: p.detach() for name, p in weights.named_parameters()}
    names = hf.hf_names(gguf_files.NAMES["llama"], shapes)
    config = Config(**json.loads(weights.config.model_dump_json()))
    rows = lambda name, a, b: own[name][a:b]  # noqa: E731
    assert list(gguf_files._check_weights(GGUF(path), config, names, shapes, rows))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="other bits"):
        list(gguf_files._check_weights(GGUF(path), config, names, shapes, rows))
