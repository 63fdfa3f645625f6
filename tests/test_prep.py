"""Data preparation: every document is accounted for, and the bytes depend on nothing but the input."""

import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.data_prep import jobs
from megaspark.data_prep.documents import BadInput, Document, read_documents
from megaspark.data_prep.run import main
from megaspark.data_prep.steps import load_steps
from megaspark.data_prep.units import folder_name
from megaspark.errors import UserError
from megaspark.shards import Manifest, TokenDataset, datasets_in, verify

SOURCES = ["RedPajamaC4", "RedPajamaGithub", "odd/name"]


def line(text, source="RedPajamaC4") -> bytes:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": source}}).encode()


def read(path: Path) -> list[Document | BadInput]:
    return list(read_documents(str(path), "text", "meta.redpajama_set_name"))


def texts(items) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def bad(items) -> list[BadInput]:
    return [item for item in items if isinstance(item, BadInput)]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a document, number 1234567890"] * 9), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Six files in two folders with the same names: 240 documents, three sources, some of them empty."""
    for k in range(6):
        folder = tmp_path / "text" / f"chunk{k % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [line(f"document {k} {i} " * (i % 7), SOURCES[(i + k) % 3]) for i in range(40)]
        (folder / f"example_{k // 2}.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))
    return tmp_path / "text"


@pytest.fixture
def job(tmp_path, corpus, tokenizer):
    """Writes a job file for the corpus; returns its path."""

    def write(name: str = "out", **changed) -> str:
        values = {"input": [f"{corpus}/**/*.jsonl.zst"], "output": str(tmp_path / name), "tokenizer": str(tokenizer)}
        values |= {"split_by": "source", "shard_tokens": 300, "workers": 1, **changed}
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))
        return str(path)

    return write


def sums(folder: Path) -> dict[str, str]:
    """The sha256 of every visible file below `folder`."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.suffix != ".yaml"}
    visible = {name: path for name, path in sorted(files.items()) if "/." not in f"/{name}"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in visible.items()}


# ---- reading documents


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
        assert (item.text, item.source) == (expected, "unknown")


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


# ---- the plan


def test_every_file_is_in_the_plan_once(tmp_path, corpus):
    """Files of the same name in two folders are two files; one file found by two globs and by a link is one."""
    (tmp_path / "link").symlink_to(corpus)
    patterns = [f"{corpus}/**/*.jsonl.zst", f"{tmp_path}/link/chunk0/*.zst", f"{corpus}/chunk0/../chunk1/example_0.jsonl.zst"]
    files = jobs.find_inputs(patterns)
    assert sorted(os.path.realpath(file.path) for file in files) == sorted(map(str, corpus.rglob("*.zst")))
    for shard_tokens in (1, 300, 10**9):
        units = list(jobs.plan_units(files, shard_tokens))
        assert [file for unit in units for file in unit.files] == files
        assert [unit.number for unit in units] == list(range(len(units)))
    assert len(units) == 1


def test_source_names_make_distinct_folders():
    """Two sources in one folder would be mixed; one named `../x` would leave the output."""
    names = ["a/b", "a_b", "a%2Fb", "..", ".work", "bad.jsonl", "é", "A b"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in name and not name.startswith(".") and name != "bad.jsonl" for name in folders)
    assert folder_name("RedPajamaC4") == "RedPajamaC4"


# ---- whole jobs


def test_every_document_is_accounted_for(tmp_path, corpus, job, capsys):
    """read = kept + dropped + bad must hold by source, and the tokens must decode to the very texts that were kept."""
    extra = corpus / "chunk0" / "broken.jsonl"
    extra.write_bytes(b"\n".join([b"not json", line("kept " * 40), b'{"text": 3, "meta": {"redpajama_set_name": "odd/name"}}']))
    path = job(input=[f"{corpus}/**/*.jsonl*"], steps=[{"length": {"min_chars": 20}}], workers=2)
    assert main([path]) == 0
    manifests = {name: Manifest.load(folder) for name, folder in datasets_in(tmp_path / "out").items()}
    assert list(manifests) == ["RedPajamaC4", "RedPajamaGithub", "odd%2Fname"]
    for manifest in manifests.values():
        for counts in [*manifest.counts.values(), manifest.job]:
            assert counts.read == counts.kept + sum(counts.dropped.values()) + counts.bad
        assert (manifest.job.read, manifest.job.bad) == (243, 2)
        assert manifest.documents == sum(counts.kept for counts in manifest.counts.values())
    odd = manifests["odd%2Fname"]
    assert (odd.name, odd.counts["odd/name"].bad) == ("odd/name", 1)
    assert set(odd.job.dropped) == {"empty", "length: too short"}
    lines = [json.loads(text) for text in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(b["file"], b["line"]) for b in lines] == [(str(extra), 1), (str(extra), 3)]
    assert "243 documents read = " in capsys.readouterr().out
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "odd%2Fname" / "tokenizer.model"))
    dataset = TokenDataset(tmp_path / "out" / "odd%2Fname")
    expected = [
        [*reference.encode(item.text), reference.eos_id()]
        for file in sorted(corpus.rglob("*.zst"))
        for item in read(file)
        if item.source == "odd/name" and len(item.text) >= 20
    ]
    assert [dataset.document(i).tolist() for i in range(dataset.documents)] == expected
    assert all(verify(folder) == [] for folder in datasets_in(tmp_path / "out").values())


@pytest.mark.parametrize("split_by", ["source", None])
def test_same_bytes_for_any_number_of_workers(tmp_path, job, split_by):
    """Units finish in any order; the shards and the manifests must not show it."""
    for name, workers in (("one/out", 1), ("three/out", 3)):
        assert main([job(name, split_by=split_by, workers=workers)]) == 0
    assert sums(tmp_path / "one") == sums(tmp_path / "three")
    assert len(list((tmp_path / "one").rglob("*.bin"))) > 3
    if split_by is None:
        assert list(datasets_in(tmp_path / "one" / "out")) == ["out"]


@pytest.mark.launch
@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun on the PATH")
def test_same_bytes_under_mpi(tmp_path, job):
    """Ranks take units in an order of their own, and a mistake must end them all instead of hanging."""
    assert main([job("one/out")]) == 0
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    ranks = ["mpirun", "-n", "3", sys.executable]
    command = [*ranks, "-m", "mpi4py.futures", "-m", "megaspark", "prep", job("ranks/out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sums(tmp_path / "ranks") == sums(tmp_path / "one")
    other = subprocess.run([*command, "shard_tokens=301"], env=environment, capture_output=True, text=True, timeout=120)
    assert other.returncode != 0 and "shard_tokens was 300, is 301" in other.stderr
    apart = [*ranks, "-m", "megaspark", "prep", job("apart/out")]
    alone = subprocess.run(apart, env=environment, capture_output=True, text=True, timeout=120)
    assert alone.returncode != 0 and "python -m mpi4py.futures -m megaspark prep" in alone.stderr


def test_killed_at_every_step_and_gone_on(tmp_path, corpus, job):
    """SIGKILL before each single rename and fsync: the next start must complete the same bytes, and redo no finished unit."""
    path = job("whole/out", input=[f"{corpus}/chunk0/*"], on_bad_input="fail")
    assert main([path]) == 0
    expected, steps = sums(tmp_path / "whole"), 0
    while True:
        steps += 1
        output = tmp_path / f"killed{steps}" / "out"
        arguments = [path, f"output={output}"]
        if _killed_after(steps, arguments) == 0:
            break
        done = {p: p.stat().st_mtime_ns for p in output.glob(".work/unit-*/done.json")}
        if not (output / ".done").exists():
            with pytest.raises(UserError):
                datasets_in(output)
        assert main(arguments) == 0
        assert all(p.stat().st_mtime_ns == done[p] for p in output.glob(".work/unit-*/done.json") if p in done)
        assert sums(tmp_path / f"killed{steps}") == expected
    assert steps > 40


def _killed_after(steps: int, arguments: list[str]) -> int:
    """Runs a job in a child that kills itself at the given os.replace or os.fsync; returns its status, 0 if it ended first."""
    child = os.fork()
    if child == 0:
        left = [steps]

        def deadly(function):
            def call(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments)

            return call

        os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    return os.waitpid(child, 0)[1]


@pytest.fixture
def busy_job(tmp_path, corpus, job):
    """A job of two processes that has just begun to work, and lasts."""
    slow = zstandard.compress(b"\n".join([line("a long text " * 3000)] * 60))
    for k in range(4):
        (corpus / f"slow{k}.jsonl.zst").write_bytes(slow)
    command = [sys.executable, "-m", "megaspark", "prep", job(workers=2)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".work/*/.*.bin.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_killed_parent_leaves_no_worker_behind(tmp_path, busy_job):
    """Orphans would go on eating cores, and write into the folder of the job that follows."""
    children = Path(f"/proc/{busy_job.pid}/task/{busy_job.pid}/children").read_text().split()
    busy_job.kill()
    busy_job.wait()
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in children if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) >= 2 and not alive
    with pytest.raises(UserError, match="not finished"):
        datasets_in(tmp_path / "out")


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_killed_worker_is_one_clear_line(tmp_path, busy_job):
    """A worker killed for want of memory must end the job with a word on what to do, not with a traceback or a hang."""
    temporary = next((tmp_path / "out").glob(".work/*/.*.bin.tmp"))
    os.kill(int(temporary.name.split(".")[-3]), signal.SIGKILL)  # its name bears its writer's process id
    _, errors = busy_job.communicate(timeout=60)
    assert busy_job.returncode == 1
    assert "a worker process died" in errors.splitlines()[-1] and "Traceback" not in errors


def test_finished_job_does_nothing_again(tmp_path, job, capsys):
    """Started again by a careless script, a finished job must neither work nor touch a file."""
    path = job()
    assert main([path]) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.bin")}
    assert main([path, "workers=2"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.bin")} == before
    next(iter(before)).unlink()
    with pytest.raises(UserError, match="missing; it was finished once"):
        main([path])


@pytest.mark.parametrize("unfinished", [False, True])
def test_another_job_is_refused_by_what_changed(tmp_path, corpus, job, tokenizer, unfinished):
    """Going on with other settings, tokenizer or files would mix two datasets in one folder."""
    path = job()
    assert main([path]) == 0
    if unfinished:
        (tmp_path / "out" / ".done").rename(tmp_path / "out" / ".work")
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b"\xa2\x06\x00")  # an unknown, empty protobuf field: the same model
    before = sums(tmp_path / "out")
    for override, message in [
        ("shard_tokens=301", "shard_tokens was 300, is 301"),
        ("prepend_bos=true", "prepend_bos was False"),
        (f"input={corpus}/chunk0/*.zst", "3 input files are gone"),
        (f"tokenizer={other}", "the tokenizer is another"),
    ]:
        with pytest.raises(UserError, match=message):
            main([path, override])
    file = next(corpus.rglob("*.zst"))
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(UserError, match=f"1 input files are changed .*{file.name}"):
        main([path])
    assert sums(tmp_path / "out") == before


def test_fail_stops_at_the_first_bad_line_and_skip_goes_on(tmp_path, corpus, job):
    """A job that is to fail must name file and line, keep its finished units, and not be talked out of it by a restart."""
    (corpus / "chunk1" / "z.jsonl").write_bytes(line("x" * 200) + b"\n{broken\n")
    path = job(input=[f"{corpus}/**/*.jsonl*"], workers=2)
    with pytest.raises(UserError, match=r"z\.jsonl:2: not JSON .*on_bad_input: skip"):
        main([path, "on_bad_input=fail"])
    assert main([path, "on_bad_input=skip"]) == 0
    assert Manifest.load(tmp_path / "out" / "RedPajamaC4").job.bad == 1


def test_mistakes_are_told_before_anything_is_written(tmp_path, corpus, job):
    """Each of these was once a traceback, or an output folder that a second start refused."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    for override, message in [
        ("input=[nowhere/*.zst]", "no file matches 'nowhere/"),
        (f"input=[{corpus}]", "it is a folder, its files are"),
        (f"input=[{tmp_path}/out.yaml]", r"input files end in \.jsonl"),
        ("input=[]", "names no file"),
        ("tokenizer=nowhere.model", "no such tokenizer: nowhere.model"),
        (f"tokenizer={tmp_path}/out.yaml", "out.yaml"),
        ("shard_tokens=0", "greater than 0"),
        ("shard_token=5", "did you mean shard_tokens"),
        ("split_by=sourse", "'source'"),
        ("on_bad_input=ignore", "'skip' or 'fail'"),
        ("steps=[{lenght: {min_chars: 1}}]", "did you mean length"),
        ("steps=[{length: {min_char: 1}}]", "did you mean steps.length.min_chars"),
        ("steps=[{length: {min_chars: many}}]", "steps.length.min_chars = 'many'"),
        (f"output={tmp_path}/used", "holds other files"),
        (f"output={tmp_path}/out.yaml", "is a file"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            main([job(), override])
        assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.yaml", "text", "used"]
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_nothing_kept_is_an_error(tmp_path, job):
    """A wrong text_field or too strict a filter must not end in an empty dataset and status 0."""
    with pytest.raises(UserError, match=r"no document was kept: 240 documents read = 0 kept \+ 36 dropped"):
        main([job(), "steps=[{length: {min_chars: 1000000}}]"])
    with pytest.raises(UserError, match="240 bad"):
        main([job("other"), "text_field=content"])


def test_two_jobs_on_one_output(tmp_path, job):
    """The second would throw away the first's unfinished units."""
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another job is writing here"):
            main([job()])
    assert main([job()]) == 0


def test_refused_write_is_one_line_and_the_job_goes_on_later(tmp_path, job, capsys):
    """A full disk (here: a limit on file size) must leave no half shard, one line, and finished units to go on from."""
    path = job(split_by=None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert main([path]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.bin")) and not list((tmp_path / "out").rglob("*.bin.tmp"))
    assert main([path]) == 0
    assert verify(tmp_path / "out") == []


def test_length_filter_counts_characters():
    """Bytes for characters would drop three times as much Chinese as English."""
    (step,) = load_steps([{"length": {"min_chars": 3, "max_chars": 4}}])
    said = [step.reason_to_drop(Document(text, "s")) for text in ("日本", "日本語", "日本語文", "日本語の文")]
    assert said == ["length: too short", None, None, "length: too long"]
    assert load_steps(["length"])[0].reason_to_drop(Document("", "s")) is None
