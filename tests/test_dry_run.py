"""The dry run: what it says is what the job then does, and it leaves no trace."""

import itertools
import json
from pathlib import Path

import pytest
import zstandard

from conftest import snapshot
from megaspark.data_prep.dry_run import report, spread
from megaspark.data_prep.jobs import Job, load_job
from megaspark.data_prep.run import main
from megaspark.data_prep.sources import InputFile
from megaspark.errors import UserError
from megaspark.shards import Manifest

STEPS = ["nfc", {"length": {"min_chars": 20}}, "fineweb"]
GOOD = "A line of well over thirty characters that ends in a full stop, number"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([GOOD] * 9), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def job(tmp_path, tokenizer) -> tuple[str, Job]:
    """Nine files of ten lines each: good, decomposed, short, empty, of spaces, without punctuation, and one that is no JSON."""
    (tmp_path / "text").mkdir()
    for k in range(9):
        texts = [
            f"{GOOD} {k}.",
            f"{GOOD} e\u0301 {k}.",
            "short\x1b",
            "",
            " " * 30,
            f"{GOOD} {k}",
            f"{GOOD} 1 {k}.",
            f"{GOOD} 2 {k}.",
        ]
        lines = [json.dumps({"text": text}) for text in texts]
        lines[6:6] = ["{not JSON", json.dumps({"text": 1})]
        (tmp_path / "text" / f"{k}.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    settings = {"input": str(tmp_path / "text" / "*.zst"), "output": str(tmp_path / "out"), "tokenizer": str(tokenizer)}
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({**settings, "steps": STEPS, "workers": 1}))
    return str(path), load_job(str(path), [])


def test_a_full_sample_says_what_the_job_does(tmp_path, job):
    """A dry run with a logic of its own would promise one thing and the job do another."""
    path, checked = job
    before = snapshot(tmp_path)
    found = report(checked, 90)
    assert snapshot(tmp_path) == before, "a dry run wrote something"
    assert main([path]) == 0
    counts = Manifest.load(tmp_path / "out").job
    assert (found.counts.read, found.counts.kept, found.counts.bad) == (counts.read, counts.kept, counts.bad) == (90, 36, 18)
    assert found.counts.dropped == counts.dropped
    assert found.rewritten == 9


def test_examples_name_file_line_and_text(job, tmp_path):
    """An example that cannot be found again is worth nothing; control characters must not reach the terminal."""
    _, checked = job
    found = report(checked, 90)
    first = tmp_path / "text" / "0.jsonl.zst"
    assert next(str(example) for example in found.examples["length: too short"]) == f"{first}:3: 'short\\x1b'"
    assert [(e.line, e.says) for e in found.examples["bad"]][:2] == [
        (7, found.examples["bad"][0].says),
        (8, "text is no string"),
    ]
    assert all(len(examples) == 3 for examples in found.examples.values())
    lines = str(found).splitlines()
    assert lines[0] == "90 documents from 9 of 9 files; nothing was written"
    assert [line.split() for line in lines[2:4]] == [["reason", "documents", "share"], ["kept", "36", "40.00", "%"]]
    assert ["length:", "too", "short", "9", "10.00", "%"] in [line.split() for line in lines]
    assert "\x1b" not in str(found)
    long = next(example for example in found.examples["fineweb: too few lines end in punctuation"])
    assert len(long.says) < 120 or len(str(long)) < len(long.file) + 140


@pytest.mark.parametrize(("documents", "files"), [(1, 1), (4, 4), (9, 9), (50, 9), (1000, 9)])
def test_the_sample_is_as_large_as_asked_and_from_many_files(job, documents, files):
    """The first file alone tells of one source; a sample too large must not run into the end."""
    found = report(job[1], documents)
    assert (found.counts.read, found.files, found.all_files) == (min(documents, 90), files, 9)


def test_files_are_spread_over_the_whole_input():
    """Of 59,166 files in order, the first 32 are all of one folder."""
    files = [InputFile(str(i), 1, str(i)) for i in range(59_166)]
    chosen = [int(file.path) for file in spread(files, 32)]
    steps = [b - a for a, b in itertools.pairwise(chosen)]
    assert len(chosen) == 32 and chosen[0] < 1000 and chosen[-1] > 58_000 and max(steps) - min(steps) <= 1
    assert [spread(files[:n], 5) for n in (0, 3)] == [[], files[:3]]


def test_bad_input_does_not_end_a_dry_run(job):
    """With on_bad_input: fail the dry run is the way to see what is bad."""
    path, _ = job
    assert report(load_job(path, ["on_bad_input=fail"]), 90).counts.bad == 18


def test_a_misspelled_step_is_refused(job):
    """Before any file is read."""
    with pytest.raises(UserError, match="did you mean fineweb"):
        load_job(job[0], ["steps=[finewep]"])
