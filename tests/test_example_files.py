"""Files of examples: every kind gives the same rows, and a row that is not of the form is named before anything starts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megaspark.errors import UserError
from megaspark.example_files import read_examples
from megaspark.manifests import sha256_of

PAIRS = ("prompt", "completion")
FORMS = [PAIRS, ("messages",), ("input_ids",), ("text",)]
TABLE: list[dict[str, Any]] = [{"prompt": f"é {i}?", "completion": f" {i + 1}\n"} for i in range(25)]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def lines(table: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table).encode()


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    """In the same order, with globs in the order of names, and each file's sha256 and rows for the record."""
    (tmp_path / "a.jsonl").write_bytes(lines(TABLE))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(TABLE)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TABLE)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "part-0.jsonl").write_bytes(lines(TABLE[:10]))
    (tmp_path / "part-1.jsonl").write_bytes(lines(TABLE[10:]).replace(b"\n", b"\n\n", 1))
    for name in ("a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.parquet", "part-*.jsonl"):
        examples = read_examples([str(tmp_path / name)], FORMS, "here")
        assert examples.rows == TABLE and examples.columns == PAIRS and not examples.conversational, name
        assert [f["sha256"] for f in examples.files] == [sha256_of(Path(f["file"])) for f in examples.files]
        assert sum(f["rows"] for f in examples.files) == 25


@pytest.mark.parametrize(
    ("row", "columns", "conversational"),
    [
        ({"text": "x"}, ("text",), False),
        ({"messages": CHAT}, ("messages",), True),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, PAIRS, True),
        ({"input_ids": [1, 2]}, ("input_ids",), False),
        ({"text": "x", "prompt": "y", "completion": "z"}, PAIRS, False),
    ],
)  # fmt: skip
def test_forms(tmp_path: Path, row: dict[str, Any], columns: tuple[str, ...], conversational: bool) -> None:
    """What the rows are decides what is learned of them: a prompt that is taken for text is learned too."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([row]))
    found = read_examples([str(path)], FORMS, "here")
    assert (found.columns, found.conversational) == (columns, conversational)


def test_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    """A label that somebody meant to matter must not vanish in silence."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{**TABLE[0], "weight": 2}, TABLE[1], {**TABLE[2], "weight": 3, "note": "n"}]))
    assert read_examples([str(path)], FORMS, "here").left_out == {"weight": 2, "note": 1}


def test_labels_belong_to_tokens_only(tmp_path: Path) -> None:
    """TRL takes a column of that name for the tokens' own, whatever it was meant for beside a text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"input_ids": [5, 6], "labels": [-100, 6]}]))
    assert read_examples([str(path)], FORMS, "here").rows == [{"input_ids": [5, 6], "labels": [-100, 6]}]
    path.write_bytes(lines([{"text": "good", "labels": [1]}]))
    assert read_examples([str(path)], FORMS, "here").left_out == {"labels": 1}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"prompt": "a"}', "no column completion, which"),
        ('{"prompt": "a", "completion": 3}', "completion should be text"),
        ('{"prompt": "a", "completion": [{"role": "user"}]}', "completion should be text"),
        ('{"prompt": "a", ', "not JSON"),
        ("[1]", "should be an object"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, line: str, word: str) -> None:
    """File and number of the row: among millions nobody finds it otherwise."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TABLE) + line.encode() + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:26") as caught:
        read_examples([str(path)], FORMS, "here")
    assert word in str(caught.value)


def test_a_missing_column_is_told_with_the_likely_one(tmp_path: Path) -> None:
    """The columns of other people's sets have other names."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"prompt": "a", "completions": "b"}]))
    with pytest.raises(UserError, match=r"no column completion; .* is it called completions"):
        read_examples([str(path)], FORMS, "here")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl", b"", "no example in it"),
        ("a.csv", b"prompt,completion", "no kind that is read"),
        ("a.jsonl.zst", zstandard.compress(lines(TABLE))[:-9], "cut off"),
        ("a.jsonl.gz", gzip.compress(lines(TABLE))[:-20], "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.jsonl", b"\xff\xfe", "not JSON"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    """Cut off by a full disk or a broken download: half a set would be trained on in silence."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=word):
        read_examples([str(tmp_path / name)], FORMS, "here")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """The nearest one in its folder is named."""
    (tmp_path / "train.jsonl").write_bytes(lines(TABLE))
    with pytest.raises(UserError, match=r"no such file: .*did you mean .*train\.jsonl"):
        read_examples([str(tmp_path / "trian.jsonl")], FORMS, "run.yaml:3")
