"""The token format: what is written comes back, and no damaged file is ever believed."""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.errors import UserError
from megaspark.shards import (
    Counts,
    Manifest,
    Shard,
    ShardInfo,
    ShardWriter,
    TokenDataset,
    datasets_in,
    dtype_for,
    sha256_of,
    verify,
)

LIMITS = {"uint16": 1 << 16, "int32": 1 << 31}


def write_shard(folder: Path, name: str, documents: list[list[int]], dtype: str = "uint16") -> ShardInfo:
    with ShardWriter(folder, name, np.dtype(dtype), "C4", ["in.jsonl"]) as writer:
        for document in documents:
            writer.add(document)
    return writer.info


def write_dataset(folder: Path, shards: list[list[list[int]]], vocab: int = 1000) -> Manifest:
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"a tokenizer")
    infos = [write_shard(folder, f"x-{k:05d}", documents, dtype_for(vocab).name) for k, documents in enumerate(shards)]
    manifest = Manifest(
        name="x", tokenizer="tokenizer.model", vocab=vocab, dtype=dtype_for(vocab).name, eos_id=2, bos_id=None,
        tokenizer_sha256=sha256_of(folder / "tokenizer.model"), append_eos=True, prepend_bos=False, settings_sha256="0" * 64,
        shards=tuple(infos), counts={"C4": Counts(read=3, kept=2, dropped={"empty": 1})}, job=Counts(read=3),
    )  # fmt: skip
    manifest.save(folder)
    return manifest


@given(st.sampled_from(sorted(LIMITS)), st.data())
@settings(max_examples=60, deadline=None)
def test_documents_come_back(tmp_path_factory, dtype, data):
    """Any documents, empty ones and the extreme ids included, could come back shifted, wrapped or joined."""
    documents = data.draw(st.lists(st.lists(st.integers(0, LIMITS[dtype] - 1), max_size=40), max_size=20))
    folder = tmp_path_factory.mktemp("shards")
    info = write_shard(folder, "a", documents, dtype)
    for shard in (Shard(folder, "a"), Shard(folder, info), Shard(folder, info, np.dtype(dtype))):
        assert [shard.document(i).tolist() for i in range(shard.documents)] == documents
        assert shard.tokens.tolist() == [token for document in documents for token in document]
        assert shard.lengths.tolist() == [len(document) for document in documents]
    assert (info.tokens, info.documents) == (len(shard), len(documents))


def test_bytes_are_megatrons(tmp_path):
    """A writer and a reader that share one mistake would still agree: here is the format spelled out by hand."""
    write_shard(tmp_path, "a", [[1, 2, 3], [], [65535]])
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i3q4q", 3, 0, 1, 0, 6, 6, 0, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == idx
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65535)


@pytest.mark.parametrize("wrong", [[70000], [-1], [1.5], [[1, 2]]])
def test_writer_refuses_what_does_not_fit(tmp_path, wrong):
    """An id past uint16 would wrap to another token, and a shard cut off by the error would look complete."""
    with pytest.raises(ValueError, match="a: "), ShardWriter(tmp_path, "a", np.dtype("uint16")) as writer:
        writer.add([1])
        writer.add(np.array(wrong))
    assert list(tmp_path.iterdir()) == []


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_truncated_or_grown_files_are_refused(tmp_path_factory, data):
    """A file cut at any byte, or with bytes added, must be one clear error with a manifest and without."""
    folder = tmp_path_factory.mktemp("shards")
    info = write_shard(folder, "a", [[1, 2, 3], [4], [], [5, 6]])
    path = folder / data.draw(st.sampled_from(["a.bin", "a.idx"]))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) + 9).filter(lambda n: n != len(whole)))
    path.write_bytes((whole + bytes(9))[:cut])
    with pytest.raises(UserError, match=r"a\.(bin|idx)"):
        Shard(folder, info)
    # A byte more for each of the four documents makes an index of Megatron's with modes: legal without a manifest.
    if (path.suffix, cut) != (".idx", len(whole) + 4):
        with pytest.raises(UserError, match=r"a\.(bin|idx)"):
            Shard(folder, "a").document(0)


@given(st.integers(0, 34 + 12 * 4 + 8 * 5 - 1), st.integers(1, 255))
@settings(max_examples=120, deadline=None)
def test_no_flipped_byte_of_the_index_is_believed(tmp_path_factory, position, flip):
    """A changed byte anywhere in the .idx (magic, version, code, counts, lengths, offsets, index) must not move a document."""
    folder = tmp_path_factory.mktemp("shards")
    info = write_shard(folder, "a", [[1, 2, 3], [4], [], [5, 6]])
    content = bytearray((folder / "a.idx").read_bytes())
    content[position] ^= flip
    (folder / "a.idx").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.idx"):
        Shard(folder, info).document(0)
    if position < 34 + 12 * 4:  # behind that lies the document index, of which without a manifest any rising one may be meant
        with pytest.raises(UserError, match=r"a\.idx"):
            Shard(folder, "a").document(0)


def test_each_damage_has_its_name(tmp_path):
    """A foreign index, a wrong version and a wrong dtype must be told apart, or the user mends the wrong thing."""
    info = write_shard(tmp_path, "a", [[1, 2], [3]])
    good = (tmp_path / "a.idx").read_bytes()
    for changed, message in [
        (b"TNTIDX\0\0\0" + good[9:], "not a Megatron index"),
        (good[:9] + b"\2" + good[10:], "version 2"),
        (good[:17] + b"\7" + good[18:], "dtype code 7"),
        (good[:17] + b"\4" + good[18:], "holds int32"),
    ]:
        (tmp_path / "a.idx").write_bytes(changed)
        with pytest.raises(UserError, match=message):
            Shard(tmp_path, info, np.dtype("uint16")).document(0)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(UserError, match=r"a\.idx: the file is missing"):
        Shard(tmp_path, info)


@given(st.lists(st.lists(st.lists(st.integers(0, 999), max_size=5), max_size=4), max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_dataset_reads_across_shards(tmp_path_factory, shards, data):
    """A read over one, several or empty shards could lose or repeat the tokens at a seam."""
    folder = tmp_path_factory.mktemp("dataset") / "x"
    write_dataset(folder, shards)
    dataset = TokenDataset(folder)
    stream = [token for shard in shards for document in shard for token in document]
    assert dataset.tokens == len(stream)
    start = data.draw(st.integers(0, len(stream)))
    length = data.draw(st.integers(0, len(stream) - start))
    got = dataset.read(start, length)
    assert (got.tolist(), got.dtype) == (stream[start : start + length], dataset.dtype)
    documents = [document for shard in shards for document in shard]
    assert [dataset.document(i).tolist() for i in range(dataset.documents)] == documents
    for beyond in ((-1, 1), (start, len(stream) - start + 1), (0, -1)):
        with pytest.raises(IndexError):
            dataset.read(*beyond)
    assert verify(folder) == []


def test_read_within_a_shard_copies_nothing(tmp_path):
    """A copy on each read would double the memory traffic of every training step."""
    write_dataset(tmp_path / "x", [[[1, 2, 3, 4]], [[5, 6]]])
    dataset = TokenDataset(tmp_path / "x")
    assert np.shares_memory(dataset.read(1, 2), dataset.shards[0].tokens)
    assert not np.shares_memory(dataset.read(3, 2), dataset.shards[0].tokens)


def test_changed_file_is_refused_at_open_and_found_by_verify(tmp_path):
    """Training on a truncated shard, or on one with flipped bits, would go unnoticed for weeks."""
    write_dataset(tmp_path / "x", [[[1, 2, 3, 4]], [[5, 6]]])
    path = tmp_path / "x" / "x-00001.bin"
    good = path.read_bytes()
    path.write_bytes(b"\xff" + good[1:])
    assert [line for line in verify(tmp_path / "x") if "sha256" in line and "x-00001.bin" in line]
    path.write_bytes(good[:-2])
    with pytest.raises(UserError, match=r"x-00001\.bin: cut short"):
        TokenDataset(tmp_path / "x")
    path.write_bytes(good)
    (tmp_path / "x" / "x-00002.bin").write_bytes(good)
    (tmp_path / "x" / "tokenizer.model").write_bytes(b"another")
    assert [line.rpartition(": ")[2] for line in verify(tmp_path / "x")] == [
        "missing, or not the tokenizer that manifest.json names",
        "not in manifest.json",
    ]


def test_verify_finds_ids_outside_of_the_vocabulary(tmp_path):
    """Such an id passes every checksum and then reads beyond the embedding table on the GPU."""
    write_dataset(tmp_path / "x", [[[1, 1000]]], vocab=1000)
    assert len(found := verify(tmp_path / "x")) == 1 and "outside of the vocabulary" in found[0]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest)])
@pytest.mark.parametrize("wrong", ["missing", None, -1, 1.5, True, "?", [1], {"a": 1}])
def test_every_manifest_field_is_checked(tmp_path, field, wrong):
    """A manifest edited by hand must fail by the name of its file and field, not by a TypeError an hour later."""
    write_dataset(tmp_path / "x", [[[1, 2]]])
    path = tmp_path / "x" / "manifest.json"
    values = json.loads(path.read_text())
    if wrong == "missing":
        del values[field]
    else:
        values[field] = wrong
    path.write_text(json.dumps(values))
    harmless = {str: ("name", "tokenizer", "tokenizer_sha256", "settings_sha256"), bool: ("append_eos", "prepend_bos")}
    if (field in harmless.get(type(wrong), ()) and wrong != "missing") or (field, wrong) == ("bos_id", None):
        Manifest.load(tmp_path / "x")
    else:
        with pytest.raises(UserError, match=r"manifest\.json"):
            Manifest.load(tmp_path / "x")


def test_missing_and_unfinished_datasets_name_the_command(tmp_path):
    """A folder of which only some datasets are written must not be taken for the whole corpus."""
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "nowhere", tmp_path / "empty"):
        for opened in (TokenDataset, datasets_in):
            with pytest.raises(UserError, match=r"megaspark prep JOB\.yaml"):
                opened(place)
    write_dataset(tmp_path / "all" / "b", [[[1]]])
    write_dataset(tmp_path / "all" / "a", [[[1]]])
    assert list(datasets_in(tmp_path / "all").items()) == [(n, tmp_path / "all" / n) for n in "ab"]
    assert datasets_in(tmp_path / "all" / "b") == {"x": tmp_path / "all" / "b"}
    (tmp_path / "all" / ".work").mkdir()
    with pytest.raises(UserError, match="not finished"):
        datasets_in(tmp_path / "all")


WRITE_FOR_EVER = """
import sys, itertools, numpy as np
from megaspark.shards import ShardWriter
for k in itertools.count():
    with ShardWriter(sys.argv[1], f"a-{k:05d}", np.dtype("uint16")) as writer:
        for i in range(50):
            writer.add(np.arange(3000, dtype=np.uint16))
    print(k, flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.011])
def test_killed_writer_leaves_only_complete_files(tmp_path, delay_s):
    """A job killed with SIGKILL at any moment must leave nothing under a final name that is not whole."""
    child = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
    for _ in range(3):
        child.stdout.readline()
    time.sleep(delay_s)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    whole = {b.stem for b in tmp_path.glob("a-*.idx")}
    assert len(whole) >= 3
    for name in whole:
        assert Shard(tmp_path, name).lengths.tolist() == [3000] * 50
    for path in tmp_path.glob("a-*.bin"):  # the one renamed just before the kill may lack its .idx
        assert path.stat().st_size == 2 * 50 * 3000


def test_a_thousand_shards_open_in_a_blink(tmp_path):
    """The start-up of SlimPajama's 1,254 shards must stay far below a second, and map nothing."""
    manifest = write_dataset(tmp_path / "x", [[[1, 2]]])
    infos = [manifest.shards[0]]
    for k in range(1, 1254):
        for end in ("bin", "idx"):
            os.link(tmp_path / "x" / f"x-00000.{end}", tmp_path / "x" / f"x-{k:05d}.{end}")
        infos.append(dataclasses.replace(infos[0], name=f"x-{k:05d}", inputs=tuple(f"chunk1/{i}.jsonl.zst" for i in range(47))))
    dataclasses.replace(manifest, shards=tuple(infos)).save(tmp_path / "x")
    start = time.process_time()
    dataset = TokenDataset(tmp_path / "x")
    assert dataset.tokens == 2 * 1254
    assert time.process_time() - start < 1.0
