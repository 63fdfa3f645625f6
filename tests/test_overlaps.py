"""Overlaps: validation data that was trained on is found, and what is not is let through."""

import dataclasses
import re
from pathlib import Path

import pytest

from conftest import random_documents, write_tokens
from megaspark.overlaps import overlap, shared_documents
from megaspark.shards import TokenDataset


def dataset(folder: Path, shards: list[list[list[int]]], inputs: list[str], job: str = "1") -> TokenDataset:
    """A dataset of documents by shard, all made from the files `inputs` by the prep job `job`."""
    write_tokens(folder, "x", shards)
    manifest = TokenDataset(folder).manifest
    infos = tuple(dataclasses.replace(info, inputs=tuple(inputs)) for info in manifest.shards)
    dataclasses.replace(manifest, shards=infos, settings_sha256=job * 64).save(folder)
    return TokenDataset(folder)


DOCUMENTS = [random_documents(seed, 30) for seed in range(4)]


@pytest.mark.parametrize(
    "inputs, job, shards, said",
    [
        (["v/1.jsonl"], "2", [DOCUMENTS[3]], None),
        (["v/1.jsonl", "t/2.jsonl"], "2", [DOCUMENTS[3]], "both made from .*t/2.jsonl"),
        (["./t/../t/2.jsonl"], "2", [DOCUMENTS[3]], "both made from .*t/2.jsonl"),
        (["t/1.jsonl", "t/2.jsonl"], "2", [DOCUMENTS[3]], "both made from .*t/1.jsonl and 1 more"),
        (["t/1.jsonl", "t/2.jsonl"], "1", [DOCUMENTS[3]], None),  # the holdout of the same job
        (["v/1.jsonl"], "2", [DOCUMENTS[3], DOCUMENTS[1]], "validation shard .*x-00001 holds the same .* shard .*x-00001"),
        (["t/1.jsonl"], "1", [DOCUMENTS[0]], "validation shard .*x-00000 holds the same"),
        (["v/1.jsonl"], "2", [DOCUMENTS[3], []], None),  # empty shards are all alike
    ],
)
def test_overlap(tmp_path, inputs, job, shards, said):
    """A validation loss on training data says nothing, and a holdout that is refused is of no use."""
    train = dataset(tmp_path / "train", [DOCUMENTS[0], DOCUMENTS[1], []], ["t/1.jsonl", "t/2.jsonl"])
    found = overlap({"x": train}, {"x": dataset(tmp_path / "validation", shards, inputs, job)})
    if said is None:
        assert found is None
    else:
        assert found is not None and re.search(said, found), found


def test_data_are_not_their_own_validation(tmp_path):
    """The simplest slip: data.validation set to data.train."""
    train = dataset(tmp_path / "train", [DOCUMENTS[0]], ["t/1.jsonl"])
    assert overlap({"x": train}, {"x": train}) and not overlap({"x": train}, {})


def test_shared_documents_are_found_exactly(tmp_path):
    """A document told by its length or its hash alone, or numbered from its shard's start."""
    common = [DOCUMENTS[0][7], DOCUMENTS[2][3]]
    reordered = [[*reversed(DOCUMENTS[1][5][:-1]), DOCUMENTS[1][5][-1]]]
    train = dataset(tmp_path / "train", [DOCUMENTS[0], [], DOCUMENTS[1], [[], *DOCUMENTS[2]]], ["a"])
    held = dataset(tmp_path / "held", [[], [[], *DOCUMENTS[3], common[0]], [*reordered, common[1]]], ["b"])
    told: list[int] = []
    pairs = shared_documents({"t": train}, {"v": held}, told.append)
    expected = {(i, j) for i in range(train.documents) for j in range(held.documents)
                if train.document(i).tolist() == held.document(j).tolist() != []}  # fmt: skip
    assert {(i, j) for _, i, _, j in pairs} <= expected and {i for _, i, _, _ in pairs} == {i for i, _ in expected}
    assert {("t", 7, "v", 31), ("t", 64, "v", 33)} <= set(pairs)
    assert sum(told) == train.tokens
