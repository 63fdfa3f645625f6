"""The example's data: questions whose answers are what the docstrings say, and pairs that differ in what they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zstandard

from conftest import snapshot
from megaspark.errors import UserError
from megaspark.tools import demo_instructions
from megaspark.tools.demo_instructions import Entry, main, parse

CLASS = """\
chunk.Chunk(object)

    Reads one chunk of a file.

    A note (see below).

    read(self, size=-1)
        Read at most size bytes from the chunk.
        If size is omitted or negative, read until the end of the chunk, e.g. all.

    close(self)
        Close it.
"""


def test_a_class_and_its_methods_are_entries() -> None:
    """Its own docstring, with its paragraphs, and each method under its full name without self."""
    assert list(parse(CLASS)) == [
        Entry("chunk.Chunk", "object", ("Reads one chunk of a file.", "A note (see below).")),
        Entry("chunk.Chunk.read", "size=-1", (
            "Read at most size bytes from the chunk. If size is omitted or negative, read until the end of the chunk, e.g. all.",
        )),
        Entry("chunk.Chunk.close", "", ("Close it.",)),
    ]  # fmt: skip


def test_answers_and_digressions() -> None:
    """The first sentence, whole; as many words from behind it; and nothing where there is no sentence or nothing behind it."""
    read = list(parse(CLASS))[1]
    assert read.prompt == "Question: What does chunk.Chunk.read(size=-1) do?\nAnswer:"
    assert read.answer == "Read at most size bytes from the chunk."
    assert read.digression == "If size is omitted or negative, read until"
    assert Entry("a", "", ("no capital, no sentence here.",)).answer is None
    assert Entry("a", "", ("Just one sentence, and nothing behind it.",)).digression is None


def corpus(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    rows = [{"text": text, "meta": {"redpajama_set_name": "PythonDocstrings"}} for text in texts]
    rows.append({"text": CLASS.replace("chunk", "other"), "meta": {"redpajama_set_name": "PythonSource"}})
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


def test_validation_shares_no_module_and_no_answer_with_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is held out must not be learned under another name; other sets of the corpus are not read; twice, the same bytes."""
    texts = [CLASS.replace("chunk", f"m{i}").replace("Read at most", f"Read at most {i % 37}") for i in range(60)]
    source = corpus(tmp_path / "text", texts)
    assert main([str(source), str(tmp_path / "a")]) == 0 and main([str(source), str(tmp_path / "b")]) == 0
    found = {}
    for path in sorted((tmp_path / "a").rglob("*.jsonl")):
        name = path.relative_to(tmp_path / "a")
        assert path.read_bytes() == (tmp_path / "b" / name).read_bytes()
        found[str(name)] = [json.loads(line) for line in path.read_text().splitlines()]
    train, held = found["instructions/train.jsonl"], found["instructions/validation.jsonl"]
    assert train and held and not {row["completion"] for row in train} & {row["completion"] for row in held}
    modules = [{row["prompt"].split()[3].split(".")[0] for row in part} for part in (train, held)]
    assert not modules[0] & modules[1] and "other" not in modules[0] | modules[1]
    for row in found["preferences/train.jsonl"]:
        assert len(row["chosen"].split()) >= len(row["rejected"].split()) and row["chosen"] != row["rejected"]
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="exists"):
        main([str(source), str(tmp_path / "a")])
    assert snapshot(tmp_path) == before


def test_a_corpus_without_docstrings_is_refused(tmp_path: Path) -> None:
    """An empty set of examples would fail later, and elsewhere."""
    with pytest.raises(UserError, match="demo-corpus"):
        main([str(tmp_path), str(tmp_path / "out")])
    assert demo_instructions.SET and not (tmp_path / "out").exists()
