"""Interchange with Megatron: its reader reads our shards, ours reads its, and for the same documents the bytes are the same.

Runs Megatron's own code (PyPI `megatron-core`, 0.16) in the interpreter that MEGASPARK_MEGATRON_PYTHON names, or in this one if
it has it: `python3 -m venv V && V/bin/pip install megatron-core numpy torch==2.13.0`, MEGASPARK_MEGATRON_PYTHON=V/bin/python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megaspark.data_prep.run import main
from megaspark.errors import UserError
from megaspark.shards import Shard, ShardWriter, TokenDataset, dtype_for

PYTHON = os.environ.get("MEGASPARK_MEGATRON_PYTHON") or (sys.executable if importlib.util.find_spec("megatron") else None)
WHY_NOT = "no megatron-core here, and MEGASPARK_MEGATRON_PYTHON names no interpreter that has it"
pytestmark = pytest.mark.skipif(PYTHON is None, reason=WHY_NOT)

# As Megatron-LM's tools/preprocess_data.py does (the package does not ship it): the dtype by the size of the vocabulary, a
# call of add_document for each document, its sentences' lengths beside it; a text without tokens is a document of no sentence.
WRITE = """
import json, sys
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
for prefix, vocab, multimodal, documents in json.load(open(sys.argv[1])):
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(vocab), multimodal=multimodal)
    for sentences in documents:
        modes = [i % 2 for i in range(len(sentences))] if multimodal else None
        builder.add_document([i for s in sentences for i in s], [len(s) for s in sentences], modes)
    builder.finalize(prefix + ".idx")
"""
READ = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
out = {}
for prefix in json.load(open(sys.argv[1])):
    for mmap in (True, False):
        data = IndexedDataset(prefix, mmap=mmap)
        tokens = [data[i].tolist() for i in range(len(data))]
        out[f"{prefix} {mmap}"] = [data.index.dtype.__name__, data.document_indices.tolist(), tokens]
json.dump(out, sys.stdout)
"""


@pytest.fixture
def megatron(tmp_path) -> Callable[[str, Any], str]:
    """Runs a script in Megatron's interpreter, with a value given as JSON; returns what it prints."""

    def run(script: str, value: Any) -> str:
        path = tmp_path / "value.json"
        path.write_text(json.dumps(value))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(PYTHON), "-W", "ignore", "-c", script, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def write_ours(folder: Path, name: str, vocab: int, documents: Sequence[Sequence[int]]) -> Path:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, name, dtype_for(vocab)) as writer:
        for document in documents:
            writer.add(document)
    return folder / name


def some_documents(vocab: int) -> list[list[int]]:
    generator = np.random.default_rng(vocab)
    return [[*generator.integers(0, vocab, n).tolist(), vocab - 1] for n in (1, 7, 4096, 2, 100)]


def same(ours: Path, theirs: Path) -> list[bool]:
    return [ours.with_suffix(end).read_bytes() == theirs.with_suffix(end).read_bytes() for end in (".bin", ".idx")]


def test_same_documents_give_the_same_bytes(tmp_path, megatron):
    """Both sides choose uint16 or int32 by the vocabulary; where they choose differently, no byte is the same.

    They do for 65,500 to 65,536 ids, which fit into uint16 but for which Megatron takes int32: each reads the other's even so.
    """
    documents = {vocab: some_documents(vocab) for vocab in (32_000, 65_499, 65_537, 128_256)}
    megatron(WRITE, [[str(tmp_path / str(vocab)), vocab, False, [[d] for d in told]] for vocab, told in documents.items()])
    for vocab, told in documents.items():
        ours = write_ours(tmp_path / "ours", str(vocab), vocab, told)
        assert (vocab, same(ours, tmp_path / str(vocab))) == (vocab, [True, True])


def test_megatron_reads_ours(tmp_path, megatron):
    """Every token, every boundary, in both of its readers; also of a shard without a document."""
    prefixes = {}
    for name, vocab, documents in (("a", 32_000, some_documents(32_000)), ("b", 10**6, some_documents(10**6)), ("c", 9, [[8]])):
        prefixes[str(write_ours(tmp_path / "ours", name, vocab, documents))] = (dtype_for(vocab).name, documents)
    read = json.loads(megatron(READ, list(prefixes)))
    assert len(read) == 6
    for key, (dtype, bounds, documents) in read.items():
        expected_dtype, expected = prefixes[key.rsplit(" ", 1)[0]]
        assert (dtype, documents) == (expected_dtype, expected)
        assert bounds == list(range(len(expected) + 1))


def test_a_whole_job_is_megatrons(tmp_path, megatron):
    """What `megaspark prep` writes, shard by shard, is what preprocess_data.py with --append-eod makes of the same texts."""
    texts = [f"the text of document {i}, " * (i % 9 + 1) + ("é日" if i % 5 else "</s>") for i in range(120)]
    lines = [json.dumps({"text": text}) for text in texts]
    for k in range(3):
        (tmp_path / f"{k}.jsonl").write_text("\n".join(lines[40 * k : 40 * k + 40]))
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=prefix, vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    job = {"input": str(tmp_path / "*.jsonl"), "output": str(tmp_path / "out"), "tokenizer": f"{prefix}.model", "workers": 1}
    (tmp_path / "job.yaml").write_text(json.dumps({**job, "shard_tokens": 1}))
    assert main([str(tmp_path / "job.yaml")]) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    shards = TokenDataset(tmp_path / "out").manifest.shards
    ids = [[[*model.encode(text), model.eos_id()]] for text in texts]
    theirs = [tmp_path / str(k) for k in range(3)]
    megatron(WRITE, [[str(path), model.vocab_size(), False, ids[40 * k : 40 * k + 40]] for k, path in enumerate(theirs)])
    assert [same(tmp_path / "out" / info.name, path) for info, path in zip(shards, theirs, strict=True)] == [[True, True]] * 3


SENTENCES = [[[1, 2], [3]], [[4]], [], [[5], [6, 7], [31_999]], []]


def test_ours_reads_megatrons(tmp_path, megatron):
    """Documents of several sentences, texts without a token, and a mode for each sentence behind the index."""
    kinds = [(vocab, multimodal) for vocab in (32_000, 128_256) for multimodal in (False, True)]
    megatron(WRITE, [[str(tmp_path / f"{vocab}{multimodal}"), vocab, multimodal, SENTENCES] for vocab, multimodal in kinds])
    for vocab, multimodal in kinds:
        shard = Shard(tmp_path, f"{vocab}{multimodal}")
        assert (shard.documents, shard.dtype) == (5, dtype_for(vocab))
        assert [shard.document(i).tolist() for i in range(5)] == [[1, 2, 3], [4], [], [5, 6, 7, 31_999], []]
        assert shard.lengths.tolist() == [3, 1, 0, 4, 0]
        assert shard.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 31_999]


def test_a_wrong_document_index_is_refused(tmp_path, megatron):
    """Documents that do not begin at 0, go back, or leave a sequence over would give away wrong texts."""
    megatron(WRITE, [[str(tmp_path / "theirs"), 32_000, False, SENTENCES]])
    whole = (tmp_path / "theirs.idx").read_bytes()
    for bound, value in [(0, 1), (1, 9), (2, 1), (2, -1), (5, 5), (5, 7)]:  # they are 0 2 3 3 6 6
        start = len(whole) - 8 * (6 - bound)
        (tmp_path / "theirs.idx").write_bytes(whole[:start] + value.to_bytes(8, "little", signed=True) + whole[start + 8 :])
        with pytest.raises(UserError, match="document index"):
            Shard(tmp_path, "theirs").document(0)
    (tmp_path / "theirs.idx").write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="too long or changed"):
        Shard(tmp_path, "theirs")
