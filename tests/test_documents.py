"""Reading: no bad line costs a good one, whatever the source, and what cannot be read says where and why."""

import gzip
import hashlib
import json
import sys
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.data_prep import streams
from megaspark.data_prep.documents import BadInput, Document, read_documents
from megaspark.data_prep.jobs import PrepSettings, plan_units
from megaspark.data_prep.sources import find_inputs
from megaspark.errors import UserError

FIELDS = ("text", "meta.redpajama_set_name")


def line(text, source="RedPajamaC4") -> bytes:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": source}}).encode()


def read(path: Path) -> list[Document | BadInput]:
    return list(read_documents(str(path), "text", "meta.redpajama_set_name"))


def texts(items) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def bad(items) -> list[BadInput]:
    return [item for item in items if isinstance(item, BadInput)]


# ---- lines


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_bad_line_costs_a_good_one(tmp_path_factory, data):
    """Frames that cut lines anywhere, bad lines between good ones, CRLF: each could lose or join documents."""
    good = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    wrong = st.sampled_from([b"{", b"\xff\xfe", b'{"text": 1}', b"[]", b'{"text": "\\ud800"}', b"{}", b'{"text": "\x00"}'])
    items = data.draw(st.lists(good | wrong, min_size=1, max_size=12))
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    stream = end.join(item if isinstance(item, bytes) else line(item) for item in items) + b" " * 100
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    kind, pack = data.draw(st.sampled_from([("", bytes), (".zst", zstandard.compress), (".gz", gzip.compress)]))
    path = tmp_path_factory.mktemp("text") / f"a.jsonl{kind}"
    path.write_bytes(b"".join(map(pack, parts)) + (b"\0" * 7 if kind == ".gz" else b""))
    found = read(path)
    if path.stat().st_size >= 100 or texts(found):
        assert texts(found) == [item for item in items if isinstance(item, str)]
    if path.stat().st_size >= 100:
        assert [b.line for b in bad(found)] == [n for n, item in enumerate(items, 1) if isinstance(item, bytes)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\xef\xbb\xbf{"text": "bom"}', "bom"),
        (b'{"text": "x", "score": NaN}', "x"),
        (b'{"text": "x", "other": "\\udfff"}', "x"),
        (b'{"text": "nul \\u0000 escaped"}', "nul \0 escaped"),
        ('{"text": "one\u2028two\x85three"}'.encode(), "one\u2028two\x85three"),
        (b'{"text": ""}', ""),
        (b'{"text": "x", "deep": ' + b"[" * 5000 + b"]" * 5000 + b"}", BadInput),
        (b'{"text": null, "meta": {"redpajama_set_name": "s"}}', BadInput),
        (b'{"text": "raw \x00 nul"}', BadInput),
        (b'{"text": "surrogate \\ud800"}', BadInput),
        (b'{"text": "cut', BadInput),
        (b'{"text": "\xc3("}', BadInput),
        (b'{"meta": 1}', BadInput),
    ],
)
def test_what_orjson_refuses_is_decided_exactly(tmp_path, content, expected):
    """A text lost to a NaN beside it, or half a character kept, would go unnoticed among billions."""
    (tmp_path / "a.jsonl").write_bytes(line("before " * 20) + b"\n" + content + b"\n" + line("after"))
    before, item, after = read(tmp_path / "a.jsonl")
    assert (before.text, after.text) == ("before " * 20, "after")
    if expected is BadInput:
        assert (type(item), item.line) == (BadInput, 2) and item.reason
    else:
        assert (item.text, item.source, item.file, item.line) == (expected, "unknown", str(tmp_path / "a.jsonl"), 2)


@pytest.mark.parametrize("pack", [zstandard.ZstdCompressor(write_checksum=True).compress, gzip.compress])
def test_cut_frame_keeps_the_lines_before_and_the_frames_behind(tmp_path, pack):
    """zstd and zlib tell nothing of a frame that ends too early: its lines, and those of the next frames, could vanish."""
    kind = ".gz" if pack is gzip.compress else ".zst"
    first = [line(f"{i} {hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() * 40}") for i in range(400)]
    frame, second = pack(b"\n".join(first) + b"\n"), pack(b"\n".join([line("second 0"), line("second 1")]))
    cut = len(frame) * 2 // 3
    for content, follows in [(frame[:cut], []), (frame[:cut] + second, ["second 0", "second 1"])]:
        path = tmp_path / f"a.jsonl{kind}"
        path.write_bytes(content)
        found = texts(read(path))
        kept = len(found) - len(follows)
        assert found == [json.loads(text)["text"] for text in first[:kept]] + follows
        assert 0 < kept < len(first)
        assert len(bad(read(path))) >= 1
        assert kind == ".gz" or len(bad(read(path))) == 1
    flipped = bytearray(frame + second)
    flipped[cut : cut + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(flipped)
    assert texts(read(path))[-2:] == ["second 0", "second 1"] and len(bad(read(path))) >= 1


@pytest.mark.parametrize("read_bytes", [1 << 14, 5])
def test_cut_member_is_not_read_on_into_the_next(tmp_path, monkeypatch, read_bytes):
    """Deflate takes the next member's bytes for its own, for many time stamps without any error: a line that nobody wrote."""
    monkeypatch.setattr(streams, "_READ_BYTES", read_bytes)
    first = [line(f"{i} {hashlib.sha256(bytes([i])).hexdigest() * 40}") for i in range(40)]
    frame, second = gzip.compress(b"\n".join(first) + b"\n"), [line("second 0"), line("second 1")]
    path = tmp_path / "a.jsonl.gz"
    for seconds in range(40):
        path.write_bytes(frame[: len(frame) * 2 // 3 + seconds % 4] + gzip.compress(b"\n".join(second), mtime=seconds * 7919))
        found = texts(read(path))
        assert found == [json.loads(text)["text"] for text in [*first[: len(found) - 2], *second]] and 20 < len(found) < 42
        assert len(bad(read(path))) >= 1


@pytest.mark.parametrize("read_bytes", [1 << 14, 5])
def test_what_only_looks_like_a_member_is_read(tmp_path, monkeypatch, read_bytes):
    """The bytes that a member begins with, within one: once in 16 MB by chance, and here in its name."""
    monkeypatch.setattr(streams, "_READ_BYTES", read_bytes)
    with (tmp_path / "a.jsonl.gz").open("wb") as file:
        for name in ("\x1f\x8b\x08\x01", "\x1f\x8b\x1f\x8b\x08\x10", "\x1f\x8b\x08"):
            with gzip.GzipFile(name, "wb", fileobj=file) as member:
                member.write(line("x" * 300) + b"\n")
    assert texts(read(tmp_path / "a.jsonl.gz")) == ["x" * 300] * 3 and not bad(read(tmp_path / "a.jsonl.gz"))


def test_long_window_is_read(tmp_path):
    """`zstd --long=31` files are refused by zstandard's default limit."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size: the window stays
    content = stream.compress(line("x" * 200) + b"\n") + stream.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content + zstandard.compress(line("y" * 50) * 3))
    assert zstandard.get_frame_parameters(content).window_size == 1 << 28
    assert texts(read(tmp_path / "a.jsonl.zst")) == ["x" * 200]


@pytest.mark.parametrize("content", [b"", b"404: Not Found\n", b"\n\n"])
def test_failed_download_is_one_bad_file(tmp_path, content):
    """SlimPajama's failed downloads are of 15 bytes; an empty file must not pass for a file without documents."""
    for kind in ("jsonl", "jsonl.zst", "jsonl.gz"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(content)
        assert [(item.line, "broken download" in item.reason) for item in read(path)] == [(None, True)]


def test_flipped_bits_cost_only_what_lies_in_their_frame(tmp_path):
    """A bit flipped anywhere must never pass for good text where a checksum tells, lose another frame, or raise."""
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    middle = pack(b"\n".join(line(hashlib.sha256(bytes([i])).hexdigest()) for i in range(40)) + b"\n")
    before, after = pack(line("before " * 30) + b"\n"), pack(line("after") + b"\n")
    path = tmp_path / "a.jsonl.zst"
    for bit in range(0, 8 * len(middle), 61):
        flipped = bytearray(middle)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(before + flipped + after)
        found = read(path)
        assert texts(found)[0] == "before " * 30 and texts(found)[-1] == "after"
        assert bad(found) and all(b.line and b.reason for b in bad(found))


def test_lines_of_five_megabytes_and_one_too_long(tmp_path, monkeypatch):
    """A book on one line is a document; one that no rank could hold is a bad line, and the next is read."""
    book = "a book " * 750_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"\n".join([line(book), line("next"), line(book)])))
    assert texts(read(tmp_path / "a.jsonl.zst")) == [book, "next", book]
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1 << 20)
    found = read(tmp_path / "a.jsonl.zst")
    assert texts(found) == ["next"]
    assert [(b.line, "a line of 5,250," in b.reason) for b in bad(found)] == [(1, True), (3, True)]


# ---- sources


def write_parquet(path: Path, values: list, kind=None) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    meta = pyarrow.array([{"redpajama_set_name": "s"}] * len(values))
    table = pyarrow.table({"text": pyarrow.array(values, kind or pyarrow.string()), "meta": meta})
    parquet.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    return path


def test_one_input_by_many_ways_gives_the_same_documents(tmp_path):
    """A store or a format that drops, reorders or changes documents would make another dataset of the same text."""
    pytest.importorskip("pyarrow")
    wanted = [f"text {i}\u2028\0 {'x' * i}" for i in range(25)]
    content = b"\n".join(map(line, wanted))
    memory = fsspec.filesystem("memory")
    memory.pipe("/in/a.jsonl", content)
    memory.pipe("/in/b.jsonl.zst", zstandard.compress(content))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    write_parquet(tmp_path / "b.parquet", wanted)
    files = find_inputs(["memory://in/*", f"file://{tmp_path}/*.gz", f"{tmp_path}/*.parquet"])
    ends = ["in/a.jsonl", "in/b.jsonl.zst", "a.jsonl.gz", "b.parquet"]
    assert sorted(file.path.rpartition("/in/")[2].split("/")[-1] for file in files) == sorted(e.split("/")[-1] for e in ends)
    assert all(texts(list(read_documents(file.path, *FIELDS))) == wanted for file in files)
    assert files == find_inputs([f"{tmp_path}/b.parquet", f"{tmp_path}/a.jsonl.gz", "memory://in/b.jsonl.zst", "memory://in/*"])
    memory.pipe("/in/a.jsonl", content + b"\n" + line("more"))
    changed = [file.path for file in files if not _is_unchanged(file)]
    assert changed == ["memory:///in/a.jsonl"]


def _is_unchanged(file) -> bool:
    try:
        file.check_unchanged()
    except UserError:
        return False
    return True


def test_damaged_parquet_costs_its_row_group(tmp_path):
    """A page with flipped bits must not cost the other row groups; a null, bytes or bad UTF-8 costs its row."""
    pyarrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(30)])
    content = bytearray(path.read_bytes())
    at = content.index(b"text 10")
    content[at - 4 : at] = b"\xff" * 4  # the length of that value
    path.write_bytes(content)
    found = read(path)
    assert texts(found) == [f"text {i}" for i in [*range(10), *range(20, 30)]]
    assert ["damaged row group 1" in b.reason and "10 of its rows" in b.reason for b in bad(found)] == [True]
    binary = pyarrow.array([b"good", b"\xff", b"also good", None], pyarrow.binary()).view(pyarrow.string())
    found = read(write_parquet(tmp_path / "b.parquet", binary))
    assert texts(found) == ["good", "also good"]
    assert [(b.line, b.reason) for b in bad(found)] == [(2, "not UTF-8 (byte 0)"), (4, "no text")]
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + bytes(200))
    assert ["no parquet file" in b.reason for b in read(tmp_path / "c.parquet")] == [True]


def test_dataset_is_streamed_shard_by_shard(tmp_path):
    """A dataset must be cut into the same units each time, every row once, and a changed file must show."""
    pytest.importorskip("datasets")
    for k in range(3):
        (tmp_path / f"{k}.jsonl").write_bytes(b"\n".join(line(f"{k} {i}", f"set{k}") for i in range(4)))
    options = PrepSettings(input={"datasets": str(tmp_path), "split": "train"}, output="o", tokenizer="t")
    assert options.input == [f"datasets:{tmp_path}?split=train"]
    files = find_inputs(options.input)
    assert files == find_inputs(options.input) and len(files) == 3
    assert [len(unit.files) for unit in plan_units(files, 10**9)] == [1, 1, 1]  # of unknown size: each a unit
    found = [item for file in files for item in read_documents(file.path, *FIELDS)]
    assert [(item.text, item.source) for item in found] == [(f"{k} {i}", f"set{k}") for k in range(3) for i in range(4)]
    (tmp_path / "1.jsonl").write_bytes(line("other"))
    assert find_inputs(options.input) != files


def test_text_and_source_fields_are_configurable(tmp_path):
    """Another corpus calls its columns otherwise; a dotted name may be a path or a name that has the dot itself."""
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "x", "a": {"b": "s"}}\n{"content": "y", "a.b": "t"}\n' + b" " * 99)
    found = list(read_documents(str(tmp_path / "a.jsonl"), "content", "a.b"))
    assert [(item.text, item.source) for item in found] == [("x", "s"), ("y", "t")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s3://bucket/*.jsonl", "pip install s3fs"),
        ("sftp://host/a.jsonl", "pip install paramiko"),
        ("warp://host/a.jsonl", "warp"),
        ("memory://nothing/*.jsonl", "no file matches 'memory://nothing"),
        ("datasets:here?spilt=train", "unknown option spilt.*split"),
        ("{folder}/a.parquet", r"needs the library pyarrow: pip install 'megaspark\[data\]'"),
        ("datasets:{folder}", r"needs the library datasets: pip install 'megaspark\[data\]'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, pattern, message):
    """A traceback out of a store's library says nothing of what to install."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for library in ("s3fs", "paramiko", "pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=message) as raised:
        find_inputs([pattern.format(folder=tmp_path)])
    assert "\n" not in str(raised.value)
