"""Evaluations of a run, by source: what is read of each, what their losses come to, and that `megaspark eval` says the same."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eval import TEXT, write_dataset
from test_eval import VOCAB as TEXT_VOCAB
from test_train import alone

from conftest import EOS, VOCAB, random_documents, write_tokens
from megaspark.batches import Batch
from megaspark.evaluations import Reading, evaluate
from megaspark.models import llama
from megaspark.shards import TokenDataset
from megaspark.tools import eval as eval_tool
from megaspark.tools import to_hf
from megaspark.validations import IGNORED, Validation
from megaspark.weights import build_model

SEQ = 24


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenDataset]:
    """Three sources, of some 50, 6 and 2 samples; none is a whole number of samples."""
    folder = tmp_path_factory.mktemp("data")
    documents = {"large": [random_documents(seed, 15) for seed in range(3)], "small": [random_documents(7, 5)]}
    documents["tiny"] = [[[*range(3, 40), EOS]]]
    return {name: TokenDataset(write_tokens(folder / name, name, shards)) for name, shards in documents.items()}


def bigram_losses(batches: Sequence[Batch], table: torch.Tensor) -> list[float]:
    """The mean loss of each micro-batch by a table of logits, as `linear_cross_entropy` counts: 0 where no label counts."""
    out = []
    for batch in batches:
        summed = F.cross_entropy(table[batch.tokens_BS].flatten(0, 1), batch.labels_BS.flatten(), reduction="sum")
        out.append(float(summed / (batch.labels_BS != IGNORED).sum().clamp(min=1)))
    return out


def everybody(datasets: dict[str, TokenDataset], reading: Reading, world: int) -> tuple[Validation, list[Batch]]:
    """The micro-batches of all processes, in the order in which the engine tells of their losses."""
    each = [Validation(datasets, reading, rank, world) for rank in range(world)]
    shares = [list(one.batches()) for one in each]
    assert {len(share) for share in shares} == {each[0].count}
    return each[0], [batch for row in zip(*shares, strict=True) for batch in row]


@settings(deadline=None, max_examples=40)
@given(micro_batch=st.integers(1, 7), world=st.integers(1, 5), count=st.integers(1, 70), documents=st.booleans())
def test_figures_are_those_of_megaspark_eval(
    datasets: dict[str, TokenDataset], micro_batch: int, world: int, count: int, documents: bool
) -> None:
    """A sample dropped, repeated, read at another place or weighed otherwise, a filled-up one counted, in any layout."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reading = Reading(SEQ, SEQ, micro_batch, documents, count)
    validation, batches = everybody(datasets, reading, world)
    assert {batch.tokens_BS.shape for batch in batches} == {(micro_batch, SEQ)}
    assert all((batch.positions_BS is not None) == documents for batch in batches)
    figures = validation.figures(bigram_losses(batches, table))
    assert list(figures) == ["validation/large", "validation/small", "validation/tiny", "validation"]
    nats = tokens = 0
    for name, dataset in datasets.items():
        expected = evaluate(dataset, lambda tokens, _: table[tokens], reading)
        found = figures[f"validation/{name}"]
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)  # evaluate's losses are fp32
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["samples"] == min(count, math.ceil(dataset.tokens / SEQ))
        nats, tokens = nats + expected.nats, tokens + expected.tokens
    assert figures["validation"]["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert figures["validation"]["samples"] == sum(figures[f"validation/{name}"]["samples"] for name in datasets)


def test_the_layout_changes_no_bit(datasets: dict[str, TokenDataset]) -> None:
    """Of a real model: the loss of a row depends, by rounding, on the rows that it is computed with, so these must be the same."""
    config = llama.Config(hidden=32, layers=2, heads=4, kv_heads=2, ffn=40, vocab=VOCAB, init_std=0.3)
    model = build_model(config, seed=1)
    model.eval().requires_grad_(False)
    found = []
    for world in (1, 2, 3, 8):
        validation, batches = everybody(datasets, Reading(SEQ, SEQ, 4, True, 10), world)
        losses = [model(batch.tokens_BS, batch.positions_BS, batch.labels_BS).item() for batch in batches]
        real = sum(math.ceil(len(chosen) / 4) for chosen in validation.chosen.values())
        assert losses[real:] == [0.0] * (-real % world)  # those that count for nothing
        found.append(validation.figures(losses))
    assert found == found[:1] * 4


def test_what_is_read_is_told(datasets: dict[str, TokenDataset]) -> None:
    """A source cut to its first samples, or one without bits per byte, must be said, not found out."""
    read, unknown = Validation(datasets, Reading(SEQ, SEQ, 4, True, 12), 0, 1).described()
    every = {name: math.ceil(dataset.tokens / SEQ) for name, dataset in datasets.items()}
    assert every["small"] <= 12 < every["large"]
    assert f"large 12 of {every['large']} samples" in read and f"small all {every['small']} samples" in read
    assert "no bits per byte of large, small, tiny" in unknown


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on texts, evaluated after the last one on two sources; its config lies beside `runs`."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = folder / "tokenizer.model"
    with tokenizer.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, vocab_size=TEXT_VOCAB, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    write_dataset(folder / "train", tokenizer, TEXT[:200])
    write_dataset(folder / "validation" / "code", tokenizer, [text * (1 + i % 3) for i, text in enumerate(TEXT[200:260])])
    write_dataset(folder / "validation" / "odd", tokenizer, ["x", "", "東京 and more", *TEXT[300:312]])
    (folder / "run.yaml").write_text(
        f"""\
model: {{arch: llama, hidden: 48, layers: 2, heads: 4, kv_heads: 2, ffn: 72, vocab: {TEXT_VOCAB}, init_std: 0.2}}
data: {{train: {folder / "train"}, validation: {folder / "validation"}, seq: 48, document_mask: true}}
optim: {{lr: 1.0e-2}}
run: {{name: texts, dir: {folder / "runs"}, steps: 3, global_batch: 6, micro_batch: 3, precision: fp32, eval_every: 3,
  eval_batches: 2}}
deepspeed: zero1.json
"""
    )
    alone("pretrain", "--config", str(folder / "run.yaml")).checked()
    assert to_hf.main([str(folder / "runs/texts"), str(folder / "hf"), "--dtype", "fp32"]) == 0
    return folder


@pytest.mark.parametrize("model", ["runs/texts", "hf"])
def test_a_run_and_eval_say_the_same(trained: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two definitions of one name: bits per byte of training could not be set beside those of the exported model."""
    capsys.readouterr()
    arguments = ["--data", trained / "validation", "--seq", 48, "--windows", 12, "--batch", 3, "--document-mask", "--json"]
    assert eval_tool.main([str(trained / model), *map(str, arguments)]) == 0
    told = json.loads(capsys.readouterr().out)["perplexity"]
    text = (trained / "runs/texts/metrics.jsonl").read_text()
    lines = {line["split"]: line for line in map(json.loads, text.splitlines()) if "split" in line}
    assert [(line["step"], line["tokens"]) for line in lines.values()] == [(3, 3 * 6 * 48)] * 3
    expected = {"validation": told["all"], **{f"validation/{name}": row for name, row in told["sources"].items()}}
    assert lines.keys() == expected.keys()
    assert lines["validation/odd"]["samples"] < lines["validation/code"]["samples"] == 12
    for split, line in lines.items():
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert line[key] == pytest.approx(expected[split][key], rel=1e-6), (split, key)


def test_what_a_terminal_shows(trained: Path) -> None:
    """A line that says which figure is of what, kept in progress.txt for who closed the terminal."""
    lines = (trained / "runs/texts/progress.txt").read_text().splitlines()
    assert sum(" step 2/3 | loss " in line for line in lines) == 1
    (line,) = (line for line in lines if "validation loss" in line)
    assert "bits/byte | code " in line and ", odd " in line and " samples in " in line
