"""Data preparation: every document is accounted for, and the bytes depend on nothing but the input."""

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark.data_prep import fast_encoders, jobs
from megaspark.data_prep.documents import Document, read_documents
from megaspark.data_prep.encode import joined
from megaspark.data_prep.run import main
from megaspark.data_prep.steps import load_steps
from megaspark.data_prep.units import folder_name, in_holdout, with_ends
from megaspark.errors import UserError
from megaspark.shards import Manifest, ShardWriter, TokenDataset, datasets_in, dtype_for, verify

SOURCES = ["RedPajamaC4", "RedPajamaGithub", "odd/name"]


def line(text, source="RedPajamaC4") -> bytes:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": source}}).encode()


def train_tokenizer(path: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a document, number 1234567890"] * 9), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


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


@given(st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=5), min_size=1, max_size=9), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_documents_written_together_are_those_written_one_by_one(tmp_path_factory, documents, bos, eos):
    """An end put in the wrong place, or one length off, would shift every document behind it."""
    before, after = [1] * bos, [2] * eos
    ids = with_ends(joined(documents), before, after)
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "many", dtype_for(300)) as many, ShardWriter(folder, "one", dtype_for(300)) as one:
        many.add_many(ids.flat, ids.lengths)
        for document in documents:
            one.add([*before, *document, *after])
    for end in ("bin", "idx"):
        assert (folder / f"many.{end}").read_bytes() == (folder / f"one.{end}").read_bytes()
    with ShardWriter(folder, "bad", dtype_for(300)) as writer:
        for flat, lengths in (([1, 2], [1]), ([1], [2, -1]), ([70_000], [1]), ([[1]], [1]), ([1.5], [1])):
            with pytest.raises(ValueError, match=r"^bad: "):
                writer.add_many(np.array(flat), lengths)


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
        for item in read_documents(str(file), "text", "meta.redpajama_set_name")
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


def mpi_environment() -> dict[str, str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **root, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


@pytest.mark.launch
@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun on the PATH")
def test_same_bytes_under_mpi(tmp_path, job):
    """Ranks take units in an order of their own, and a mistake must end them all instead of hanging."""
    assert main([job("one/out")]) == 0
    environment = mpi_environment()
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
    deadline = time.monotonic() + 20
    while not (found := [*(tmp_path / "out").glob(".work/*/.*.bin.tmp")]):  # none between a worker's units
        assert busy_job.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    temporary = found[0]
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


def test_dry_run_writes_nothing(tmp_path, job, capsys):
    """Whoever tries a filter must see what it drops without spoiling the output of the real job."""
    assert main([job(), "--dry-run", "steps=[{length: {min_chars: 50}}]"]) == 0
    assert "length: too short" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.yaml", "text"]


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


# ---- the holdout


@pytest.mark.parametrize("split_by", ["source", None])
def test_holdout_and_training_share_no_text(tmp_path, corpus, job, tokenizer, split_by, capsys):
    """A text on both sides makes the validation loss a lie; one on neither is lost. Copies of texts lie in other files."""
    copies = zstandard.decompress((corpus / "chunk0" / "example_0.jsonl.zst").read_bytes())
    (corpus / "copies.jsonl.zst").write_bytes(zstandard.compress((copies + b"\n") * 2))
    assert main([job("out", holdout=0.3, split_by=split_by)]) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    sides = [
        [_decoded(model, TokenDataset(folder)) for folder in datasets_in(path).values()]
        for path in (tmp_path / "out", tmp_path / "out" / "holdout")
    ]
    train, held = ({text for texts in side for text in texts} for side in sides)
    assert not train & held
    files = [item for file in corpus.rglob("*.zst") for item in read_documents(str(file), "text", "meta.redpajama_set_name")]
    assert train | held == {model.decode(model.encode(item.text)) for item in files if item.text}
    assert 0.1 < len(held) / len(train | held) < 0.5
    manifests = [Manifest.load(folder) for folder in datasets_in(tmp_path / "out" / "holdout").values()]
    job_counts = manifests[0].job
    assert job_counts.dropped["holdout"] == sum(manifest.documents for manifest in manifests)
    assert job_counts.read == job_counts.kept + sum(job_counts.dropped.values()) + job_counts.bad == 240 + 80
    assert f"{job_counts.dropped['holdout']} held out" in capsys.readouterr().out
    assert all(verify(folder) == [] for folder in datasets_in(tmp_path / "out" / "holdout").values())


def _decoded(model, dataset: TokenDataset) -> list[str]:
    return [model.decode(dataset.document(i).tolist()[:-1]) for i in range(dataset.documents)]


def test_holdout_fraction_is_met():
    """A fraction ten times too large costs training data, one too small makes a noisy validation."""
    held = sum(in_holdout(f"text {i}", 0.0017) for i in range(200_000))
    assert abs(held - 340) < 5 * 340**0.5
    assert not in_holdout("text", 0.0)
    everything = [text for text in map(str, range(2000)) if in_holdout(text, 0.2)]
    assert all(in_holdout(text, 0.3) for text in everything)  # a larger holdout contains the smaller


# ---- whichever tokenizer runs


def test_bytes_are_the_same_whatever_encoder_runs(tmp_path, corpus, job, capsys):
    """The choice of a library must show in nothing but the time; a job begun by one goes on by another."""
    big = [line(f"number {i} of a document, </s> 日本 {i * i} " * 40) for i in range(900)]
    (corpus / "big.jsonl").write_bytes(b"\n".join(big))
    model = str(train_tokenizer(tmp_path / "llama.model", normalization_rule_name="identity", remove_extra_whitespaces=False))
    names = ["reference", *(name for name in ("gigatoken", "kitoken") if find_spec(name)), "auto"]
    for name in names:
        assert main([job(f"{name}/out", encoder=name, tokenizer=model, input=[f"{corpus}/**/*.jsonl*"])]) == 0
        said = capsys.readouterr().out
        assert f"by {name}: the same ids" in said or name in ("reference", "auto")
        assert sums(tmp_path / name) == sums(tmp_path / "reference")
    assert main([str(tmp_path / "reference" / "out.yaml"), "encoder=kitoken"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_unequal_ids_in_mid_job_cost_only_time(tmp_path, job, monkeypatch, capsys):
    """Whatever a proof could not foresee is found by watching; the unit is done again by the reference."""
    assert main([job("right/out")]) == 0

    def broken(self, texts):
        raise fast_encoders.UnequalIds("it gives other ids")

    monkeypatch.setattr(fast_encoders.Watched, "encode", broken)
    monkeypatch.setattr("megaspark.data_prep.run.choose", lambda *_: fast_encoders.Choice("kitoken", "by kitoken"))
    pytest.importorskip("kitoken")
    assert main([job("redone/out")]) == 0
    assert "is done again by the reference" in capsys.readouterr().err
    assert sums(tmp_path / "right") == sums(tmp_path / "redone")


def test_input_from_a_store_makes_the_same_bytes(tmp_path, corpus, job):
    """Workers open URLs themselves; what they read must be what a local path gives."""
    for name, pattern in (("local/out", f"{corpus}/chunk0/*.zst"), ("store/out", f"local://{corpus}/chunk0/*.zst")):
        assert main([job(name, input=pattern, workers=2)]) == 0
    assert sums(tmp_path / "local") == sums(tmp_path / "store")


# ---- faults of the machine


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_full_disk_is_one_line_and_the_job_goes_on_later(tmp_path, corpus, job, capsys):
    """No space left in mid-shard: nothing half-written may pass for whole, and after making room the bytes are the same."""
    path, disk = job(split_by=None), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        assert main([path, f"output={disk}/out"]) == 1
        assert "no space left" in capsys.readouterr().err
        assert not list((disk / "out").glob("*.bin"))
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        assert main([path, f"output={disk}/out"]) == 0
        assert re.search(r"going on: \d+ of \d+ units were finished before, \d+ to do", capsys.readouterr().out)
        assert main([path]) == 0
        assert sums(disk) == sums_under(tmp_path / "out", "out")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def sums_under(folder: Path, name: str) -> dict[str, str]:
    """As `sums`, of paths that begin with `name`."""
    return {f"{name}/{path}": digest for path, digest in sums(folder).items()}


@pytest.mark.launch
@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun on the PATH")
@pytest.mark.parametrize("victim", ["mpirun", "rank"])
def test_killed_mpi_job_goes_on(tmp_path, corpus, job, victim):
    """kill -9 of mpirun or of a rank: every process must end, and the next start makes the same bytes and says what is left."""
    for k in range(4):
        slow = zstandard.compress(b"\n".join([line(f"a long text {k} " * 3000)] * 60))
        (corpus / f"slow{k}.jsonl.zst").write_bytes(slow)
    command = ["mpirun", "-n", "3", sys.executable, "-m", "mpi4py.futures", "-m", "megaspark", "prep", job("ranks/out")]
    process = subprocess.Popen(command, env=mpi_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "ranks" / "out" / ".work"
    deadline = time.monotonic() + 60
    ranks, finished = [], 0
    while not (ranks and finished) and time.monotonic() < deadline:  # one look serves both: a second would find other files
        time.sleep(0.02)
        ranks = [int(path.name.split(".")[-3]) for path in work.glob("*/.*.bin.tmp")]
        finished = len(list(work.glob("*/done.json")))
    assert ranks and finished
    os.kill(process.pid if victim == "mpirun" else ranks[0], signal.SIGKILL)
    process.wait(timeout=60)
    while any(_alive(str(pid)) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(str(pid)) for pid in ranks)
    done = subprocess.run(command, env=mpi_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept = re.search(r"going on: (\d+) of \d+ units were finished before", done.stdout)
    assert kept and int(kept[1]) >= finished
    assert main([job("one/out")]) == 0
    assert sums(tmp_path / "ranks") == sums(tmp_path / "one")
