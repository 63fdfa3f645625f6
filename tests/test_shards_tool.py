"""`megaspark shards`: what it prints and finds is what lies on the disk."""

import json

import pytest
import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers, trainers

from megaspark.config import load_config, open_datasets
from megaspark.data_prep.run import main as prep
from megaspark.errors import UserError
from megaspark.samples import Samples
from megaspark.tools.shards import main


@pytest.fixture
def datasets(tmp_path):
    """Two datasets by source, made with a byte-level tokenizer.json."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]))
    model.save(str(tmp_path / "tokenizer.json"))
    texts = [("C4", "first of C4"), ("Github", "def f():\n\treturn '<|endoftext|>'"), ("C4", "second — of C4")]
    lines = [json.dumps({"text": text, "set": source}).encode() for source, text in texts]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))
    job = {"input": f"{tmp_path}/a.jsonl.zst", "output": f"{tmp_path}/out", "tokenizer": f"{tmp_path}/tokenizer.json"}
    (tmp_path / "job.yaml").write_text(json.dumps({**job, "split_by": "source", "source_field": "set", "prepend_bos": True}))
    assert prep([str(tmp_path / "job.yaml")]) == 0
    (tmp_path / "tokenizer.json").unlink()  # a dataset carries its own
    return tmp_path / "out"


def test_show_counts_each_source(datasets, capsys):
    """A share or a count from the wrong dataset would set a wrong blend."""
    assert main(["show", str(datasets)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row[0] == "C4"] == [["C4", "C4", "2", "31", "47.7", "%", "0.871", "1"]]
    assert [row[1:3] for row in rows if row[0] == "all"] == [["3", "65"]]
    assert ["tokenizer", "tokenizer.json,"] in [row[:2] for row in rows]


def test_decode_prints_the_text_itself(datasets, capsys):
    """A special token in the text, a dash or a tab could come back as something else."""
    assert main(["decode", str(datasets / "Github"), "0"]) == 0
    assert capsys.readouterr().out == "def f():\n\treturn '<|endoftext|>'\n"
    assert main(["decode", str(datasets / "C4"), "1"]) == 0
    assert capsys.readouterr().out == "second — of C4\n"


def test_decode_refuses_what_it_cannot_answer(datasets):
    """A number outside, two datasets at once, or a swapped tokenizer must not print some other text."""
    for arguments, message in [
        ([str(datasets), "0"], "holds 2 datasets; name one"),
        ([str(datasets / "C4"), "2"], "documents 0 to 1, not 2"),
        ([str(datasets / "nothing"), "0"], "no such dataset"),
    ]:
        with pytest.raises(UserError, match=message):
            main(["decode", *arguments])
    (datasets / "C4" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not the tokenizer that the dataset was made with"):
        main(["decode", str(datasets / "C4"), "0"])
    with pytest.raises(SystemExit):
        main(["decode", str(datasets / "C4")])


def test_samples_of_a_run_are_shown_whole_and_by_number(datasets, tmp_path, capsys):
    """What a run's log names must be what is printed: the samples of its seed, its blend and its changes of length."""
    config = {
        "model": {"arch": "llama", "size": "demo", "vocab": 258}, "optim": {"lr": 1},
        "data": {"train": str(datasets), "seq": 12, "changes": [{"sample": 2, "seq": 6}]},
        "run": {"name": "r", "steps": 1, "global_batch": 1, "micro_batch": 1, "seed": 7},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    samples = Samples(open_datasets(str(datasets)), load_config(tmp_path / "config.yaml", [])[0].data.phases, 7)
    assert main(["decode", str(tmp_path), "--samples", "1:4"]) == 0
    shown = capsys.readouterr().out.split("== ")[1:]
    letters = {i: t for t, i in tokenizers.Tokenizer.from_file(str(datasets / "C4" / "tokenizer.json")).get_vocab().items()}
    for index, text in zip((1, 2, 3), shown, strict=True):
        dataset, number = samples.locate(index)
        head, _, body = text.partition("\n")
        assert head == f"sample {index}: {samples.names[dataset]} {number}"
        ascii_only = [letters[i] for i in samples[index].tolist() if len(letters[i]) == 1 and letters[i].isalnum()]
        assert [c for c in body if c.isascii() and c.isalnum()] == [c for c in ascii_only if c.isascii()]
    for arguments, message in [
        ([str(tmp_path), "--samples", "3:3"], "not of the form A:B"),
        ([str(tmp_path), "--samples", "3"], "not of the form A:B"),
        ([str(datasets), "--samples", "0:1"], "is no run"),
    ]:
        with pytest.raises(UserError, match=message):
            main(["decode", *arguments])
    with pytest.raises(SystemExit):
        main(["decode", str(tmp_path), "0", "--samples", "0:1"])


def test_verify_names_the_changed_file(datasets, capsys):
    """A flipped bit that keeps the size is invisible to everything else."""
    assert main(["verify", str(datasets)]) == 0
    path = datasets / "C4" / "C4-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert main(["verify", str(datasets)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"{path}: its sha256 is not the manifest's" in out and out[-1] != "0 problems"
