"""Tasks made from a corpus: the same every time, answerable, and none of it a giveaway."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
import zstandard

from conftest import snapshot
from megaspark.errors import UserError
from megaspark.tools.demo_tasks import CHOICES, CONTEXT_CHARS, main, make_questions, read_texts


def write_corpus(folder: Path, documents: int = 12, order: int = 1) -> Path:
    """Documents of 40 distinct lines each, over two files; `order` -1: the same documents from last to first."""
    lines = [f"    line {i:02} of {d:02}: {'y' * ((i * 37 + d * 11) % 60)}\n" for d in range(documents) for i in range(40)]
    texts = ["".join(lines[40 * d : 40 * d + 40]) for d in range(documents)][::order]
    (folder / "chunk").mkdir(parents=True)
    for name, part in (("a", texts[: documents // 2]), ("b", texts[documents // 2 :])):
        raw = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in part).encode()
        out = io.BytesIO()
        with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
            writer.write(raw)
        (folder / "chunk" / f"{name}.jsonl.zst").write_bytes(out.getvalue())
    return folder


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results can be compared only if the questions are; the order of files and documents must not matter."""
    for name, order in (("one", 1), ("two", -1)):
        corpus = write_corpus(tmp_path / name / "corpus", order=order)
        assert main([str(corpus), str(tmp_path / name / "tasks")]) == 0
    for file in ("demo_next_line.jsonl", "demo_text.jsonl"):
        one, two = ((tmp_path / name / "tasks" / file).read_bytes() for name in ("one", "two"))
        assert one == two and one.count(b"\n") > 10
    assert "questions" in capsys.readouterr().out


def test_questions_have_one_right_answer_among_like_ones(tmp_path: Path) -> None:
    """The answer follows the context in a document, the wrong ones stand nowhere in it, and its place tells nothing."""
    texts = read_texts(write_corpus(tmp_path / "corpus"))
    questions = make_questions(texts)
    assert len(questions) > 50
    for question in questions:
        context, choices, answer = question["context"], question["choices"], question["answer"]
        home = [text for text in texts if context + choices[answer] in text]
        assert len(home) == 1 and len(context) <= CONTEXT_CHARS and context.endswith("\n")
        assert len(set(choices)) == CHOICES
        assert not any(choice in home[0].splitlines() for i, choice in enumerate(choices) if i != answer)
    places = Counter(question["answer"] for question in questions)
    assert max(places.values()) < len(questions) * 0.4  # of 25 % expected; 96 questions: three standard errors are 13 %


def test_tasks_name_their_data_wherever_the_harness_is_started(tmp_path: Path) -> None:
    """lm-eval takes a relative path from its own working directory."""
    out = tmp_path / "tasks"
    assert main([str(write_corpus(tmp_path / "corpus")), str(out), "--examples", "7"]) == 0
    for name in ("demo_next_line", "demo_text"):
        task = yaml.safe_load((out / f"{name}.yaml").read_text())
        path = Path(task["dataset_kwargs"]["data_files"]["test"])
        assert task["task"] == name and path == out.resolve() / f"{name}.jsonl"
        assert len(path.read_text().splitlines()) == 7


def test_mistakes_leave_everything_as_it_was(tmp_path: Path) -> None:
    """An OUT that exists, a corpus that is none, or too small to ask anything of."""
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    main([str(corpus), str(out)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.jsonl").write_text('{"text": "one line\\n"}\n')
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "a.jsonl").write_text('{"text": "x"}\n{"no text": 1}\n')
    before = snapshot(tmp_path)
    for arguments, reason in (
        ([corpus, out], "exists"),
        ([tmp_path / "empty", tmp_path / "new"], "no .jsonl.zst"),
        ([tmp_path / "short", tmp_path / "new"], "too short or too few"),
        ([tmp_path / "wrong", tmp_path / "new"], "a.jsonl:2"),
        ([corpus, tmp_path / "new", "--examples", "0"], "--examples"),
    ):
        with pytest.raises(UserError, match=reason):
            main([str(argument) for argument in arguments])
    assert snapshot(tmp_path) == before
    assert main([str(corpus), str(out), "--force", "--examples", "3"]) == 0
