"""The demo corpus: laid out as SlimPajama is, the same bytes every time, and no validation document in train."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megaspark.errors import UserError
from megaspark.tools.demo_corpus import Item, main, split, unique

ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path) -> list[dict]:
    """The records of every file below a folder."""
    lines = []
    for path in sorted(folder.rglob("*.jsonl.zst")):
        lines += zstandard.ZstdDecompressor().decompress(path.read_bytes()).decode().splitlines(keepends=True)
    return [json.loads(line) for line in "".join(lines).split("\n") if line]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus of one megabyte."""
    out = tmp_path_factory.mktemp("demo") / "corpus"
    assert main([str(out), "--megabytes", "1"]) == 0
    return out


def test_layout_is_slimpajamas(corpus):
    """A data-prep job written for SlimPajama must run on it unchanged."""
    files = sorted(p.relative_to(corpus).as_posix() for p in corpus.rglob("*.zst"))
    assert files == [f"train/chunk1/example_train_{i}.jsonl.zst" for i in range(4)] + [
        "validation/chunk1/example_holdout_0.jsonl.zst"
    ]
    records = read(corpus)
    assert {r["meta"]["redpajama_set_name"] for r in records} == {"PythonSource", "PythonDocstrings", "PythonTopics"}
    assert all(set(r) == {"text", "meta"} and len(r["text"]) >= 200 for r in records)
    assert 0.7e6 < sum(len(r["text"].encode()) for r in records) <= 1e6


def test_same_bytes_whatever_the_hash_seed_and_the_place(corpus, tmp_path):
    """Sets, dicts and folder order differ between processes; the corpus must not, or no result on it can be repeated."""
    code = "import sys; from megaspark.tools.demo_corpus import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "other"), "--megabytes", "1"]
    subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True)
    for path in sorted(p for p in corpus.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "other" / path.relative_to(corpus)).read_bytes(), path


def test_validation_is_not_in_train(corpus):
    """A validation text seen in training measures memory; a docstring of a validation file counts as that file."""
    train, validation = read(corpus / "train"), read(corpus / "validation")
    assert validation and not {r["text"] for r in train} & {r["text"] for r in validation}
    whole = "\n".join(r["text"] for r in train if r["meta"]["redpajama_set_name"] == "PythonSource")
    for record in validation:
        longest = max((line.strip() for line in record["text"].split("\n")), key=len)
        if len(longest) > 75:  # a line of its own, not a licence or a common import
            assert whole.count(longest) <= 1


def test_split_takes_whole_origins_and_about_its_share():
    """Documents of one module share text: one of them on each side would leak."""
    items = [Item(f"text {i} " * 40, "S", f"module{i // 3}") for i in range(900)]
    train, validation = split(items)
    assert not {i.origin for i in train} & {i.origin for i in validation}
    assert len(train) + len(validation) == 900 and 9 <= len(validation) <= 18


def test_duplicates_and_short_documents_are_counted():
    """What is left out without a number is lost silently."""
    a, short = Item("a" * 300, "S", "x"), Item("b", "S", "x")
    items, dropped = unique([a, short, Item("a" * 300, "S", "y"), Item("c\ud800" * 300, "S", "z")])
    assert items == [a]
    assert dropped == Counter({"exact duplicate": 1, "under 200 characters": 1, "not Unicode (lone surrogate)": 1})


def test_finished_corpus_is_reused_and_a_broken_one_redone(corpus, capsys):
    """A second start must cost nothing; a file lost since must come back."""
    target = corpus / "train/chunk1/example_train_2.jsonl.zst"
    content, made = target.read_bytes(), target.stat().st_mtime_ns
    assert main([str(corpus), "--megabytes", "1"]) == 0
    assert "reused" in capsys.readouterr().out and target.stat().st_mtime_ns == made
    target.unlink()
    assert main([str(corpus), "--megabytes", "1"]) == 0
    assert target.read_bytes() == content
    assert not list(corpus.parent.glob(".*partial"))


def test_interrupted_run_leaves_no_corpus(tmp_path, monkeypatch):
    """A half corpus under the final name would be trained on."""
    import megaspark.tools.demo_corpus as module

    real, calls = module._write, []

    def fails_at_the_third(path, items):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path, items)

    monkeypatch.setattr(module, "_write", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path / "out"), "--megabytes", "0.2"])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main([str(tmp_path / "out"), "--megabytes", "0.2"]) == 0
    assert len(read(tmp_path / "out")) > 10


def test_mistakes_are_told_before_anything_is_removed(corpus, tmp_path):
    """A wrong OUT must not cost the user a folder."""
    (tmp_path / "thesis.txt").write_text("years of work")
    for arguments in ([str(tmp_path)], [str(tmp_path), "--force"], [str(tmp_path / "thesis.txt")]):
        with pytest.raises(UserError, match="holds no demo corpus"):
            main(arguments)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="1 megabytes, not 2"):
        main([str(corpus), "--megabytes", "2"])
    with pytest.raises(UserError, match="above 0"):
        main([str(tmp_path / "new"), "--megabytes", "0"])
