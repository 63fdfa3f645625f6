"""Dedup jobs: what is found, what is kept, and that nothing but the input decides it."""

import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megaspark.data_prep.dedup import main
from megaspark.data_prep.documents import Document, read_documents
from megaspark.data_prep.duplicates import DuplicateSet
from megaspark.data_prep.filters.drop_duplicates import fingerprint, reason_to_drop
from megaspark.data_prep.minhash import MinHasher, band_keys, match_probability
from megaspark.data_prep.sketches import rank
from megaspark.errors import UserError


def text(seed: object, chars: int = 900) -> str:
    return "".join(random.Random(str(seed)).choices(string.ascii_lowercase + "  ", k=chars))


def near(seed: object) -> str:
    """A text of similarity 0.98 to text(seed)."""
    return f"{text(seed)} the end"


CORPUS = [  # (file, texts): copies within a file, across files of one unit and of two
    ("a/0.jsonl.zst", [text(0), text(1), near(0), text(2)]),
    ("a/1.jsonl.zst", [text(3), near(2), text(0), text(4)]),
    ("b/0.jsonl", [text(5), near(1), near(1) + " really", text(6)]),
    ("b/1.jsonl", [text(7), text(6), text(8), near(0) + "!"]),
]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """The files of CORPUS with a bad and a blank line in each, and a field `stars` that grows from file to file."""
    for name, texts in CORPUS:
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": t, "meta": {"stars": len(name) + i}}) for i, t in enumerate(texts)]
        content = "\n".join(["", "no json", *lines]).encode()
        path.write_bytes(zstandard.compress(content) if name.endswith(".zst") else content)
    return tmp_path / "text"


@pytest.fixture
def job(tmp_path, corpus):
    """Writes a job file; returns its path. Each file is a unit."""

    def write(name: str = "out", **changed) -> str:
        values = {"input": [f"{corpus}/**/*.jsonl*"], "output": str(tmp_path / name), "method": {"minhash": {}}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**values, "unit_mb": 0.0001, "workers": 1, **changed}))
        return str(path)

    return write


def dropped(output: Path) -> dict[str, list[int]]:
    """The lines to drop by file, as the manifest and the .bin files say."""
    found = DuplicateSet.load(output)
    return {"/".join(Path(f.path).parts[-2:]): found.lines_to_drop(output, f.path).tolist() for f in found.files}


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


# ---- what is dropped


def test_near_duplicates_are_dropped_but_for_the_first(tmp_path, job):
    """The lines of each file must be those of the copies: one line off, and prep would drop the wrong documents."""
    assert main([job()]) == 0
    expected = {"a/0.jsonl.zst": [5], "a/1.jsonl.zst": [4, 5], "b/0.jsonl": [4, 5], "b/1.jsonl": [4, 6]}
    assert dropped(tmp_path / "out") == expected
    found = DuplicateSet.load(tmp_path / "out")
    assert (found.read, found.kept, found.dropped, found.bad, found.reason) == (20, 9, 7, 4, "near_duplicate")
    assert (found.clusters, found.largest_cluster) == (4, 4)
    assert not (tmp_path / "out" / ".work").exists()


def test_exact_duplicates(tmp_path, job):
    """A text that differs by one character is none; a text equal in all but case or space is none either."""
    assert main([job(method={"exact": {}})]) == 0
    assert dropped(tmp_path / "out") == {"a/0.jsonl.zst": [], "a/1.jsonl.zst": [5], "b/0.jsonl": [], "b/1.jsonl": [4]}
    assert DuplicateSet.load(tmp_path / "out").reason == "exact_duplicate"


def test_the_longest_or_best_is_kept(tmp_path, job):
    """A rule that looks at the cluster's first, or at a score of another document, would keep the wrong copy."""
    assert main([job("longest", keep="longest")]) == 0
    expected = {"a/0.jsonl.zst": [3, 4, 5, 6], "a/1.jsonl.zst": [5], "b/0.jsonl": [4], "b/1.jsonl": [4]}
    assert dropped(tmp_path / "longest") == expected
    assert main([job("lowest", keep={"score": "meta.stars", "highest": False})]) == 0
    expected = {"a/0.jsonl.zst": [3, 4, 5, 6], "a/1.jsonl.zst": [5], "b/0.jsonl": [5, 6], "b/1.jsonl": []}
    assert dropped(tmp_path / "lowest") == expected
    assert main([job("none", keep={"score": "meta.nothing"})]) == 0
    assert main([job("first")]) == 0
    assert dropped(tmp_path / "none") == dropped(tmp_path / "first")
    assert DuplicateSet.load(tmp_path / "none").without_score == 16


def test_ranks_are_in_the_order_of_scores():
    """Floats sorted by their bits: negative numbers, infinities and the two zeros are where it goes wrong."""
    scores = np.array([-np.inf, -1e300, -1.5, -1e-300, 0.0, 1e-300, 2.0, 1e300, np.inf])
    ranks = rank(scores)
    assert (np.diff(ranks.astype(object)) > 0).all() and ranks[0] > 0
    assert rank(np.array([-0.0])) == rank(np.array([0.0]))
    assert rank(np.array([np.nan])) == 0


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.9])
def test_recall_is_that_of_the_s_curve(tmp_path, similarity):
    """The whole job on planted pairs: pairs lost between stages, or made by chance keys, would not show in signatures alone."""
    from test_minhash import grams, jaccard, planted_pair, tails

    generator = random.Random(similarity)
    pairs = [planted_pair(generator, "char", 13, similarity) for _ in range(200)]
    texts = [a for a, _ in pairs] + [b for _, b in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "job.yaml").write_text(json.dumps({"input": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "out"),
                                                   "method": {"minhash": {}}, "workers": 1}))  # fmt: skip
    assert main([str(tmp_path / "job.yaml")]) == 0
    lines = DuplicateSet.load(tmp_path / "out").lines_to_drop(tmp_path / "out", str(tmp_path / "a.jsonl"))
    assert (lines > len(pairs)).all()  # no copy among the texts that are nobody's copy
    exact = np.array([jaccard(grams(a, "char", 13), grams(b, "char", 13)) for a, b in pairs])
    assert tails(len(lines), len(pairs), float(match_probability(exact, 9, 13).mean())) > 1e-4


@pytest.mark.parametrize(("of", "n", "bands", "rows"), [("char", 13, 9, 13), ("word", 5, 25, 10)])
def test_the_pairs_are_datasketchs(of, n, bands, rows):
    """Another MinHash finds the same certain pairs and none of the impossible ones; between, as many as the S-curve says."""
    datasketch = pytest.importorskip("datasketch", reason="datasketch is not installed")
    from test_minhash import grams, jaccard

    generator = random.Random(3)
    texts = [text(k, 400) for k in range(25)]
    texts += [_edited(generator, texts[k % 25], edits) for k, edits in enumerate([0, 1, 1, 2, 3, 4, 5, 6, 8] * 8)]
    sets = [grams(" ".join(t.split()) if of == "word" else t.strip(), of, n) for t in texts]
    chance = {
        (i, j): float(match_probability(jaccard(sets[i], sets[j]), bands, rows)) for j in range(len(texts)) for i in range(j)
    }
    peer = _datasketch_pairs(datasketch, sets, bands, rows)
    signatures, _ = MinHasher(n, of, bands * rows).signatures(texts)
    keys = band_keys(signatures, bands, rows)
    ours = {(i, j) for i, j in chance if (keys[i] == keys[j]).any()}
    certain = {pair for pair, p in chance.items() if p > 1 - 1e-6}
    for found in (ours, peer):
        assert certain <= found
        assert all(chance[pair] > 1e-7 for pair in found)
    assert len(certain) > 5 and len(ours - certain) > 5
    spread = 6 * np.sqrt(sum(p * (1 - p) for p in chance.values()) * 3)  # texts of one family are found or missed together
    for found in (ours, peer):
        assert abs(len(found) - sum(chance.values())) < spread


def _edited(generator: random.Random, words: str, edits: int) -> str:
    out = list(words)
    for _ in range(edits):
        out[generator.randrange(len(out))] = generator.choice("0123456789")
    return "".join(out)


def _datasketch_pairs(datasketch, sets, bands: int, rows: int) -> set[tuple[int, int]]:
    lsh = datasketch.MinHashLSH(params=(bands, rows), num_perm=bands * rows)
    found = set()
    for j, shingles in enumerate(sets):
        signature = datasketch.MinHash(num_perm=bands * rows)
        signature.update_batch(["\0".join(gram).encode() for gram in shingles])
        found |= {(i, j) for i in lsh.query(signature)}
        lsh.insert(j, signature)
    return found


# ---- nothing but the input decides


@pytest.mark.parametrize("changed", [{"workers": 3}, {"memory_mb": 8}, {"unit_mb": 1}])
def test_same_lines_however_the_work_is_divided(tmp_path, job, changed):
    """Workers, memory and units are about speed: the lines to drop must be the same."""
    assert main([job("one", keep="longest")]) == 0
    assert main([job("other", keep="longest", **changed)]) == 0
    assert dropped(tmp_path / "one") == dropped(tmp_path / "other")
    if "unit_mb" not in changed:
        assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun on the PATH")
def test_same_bytes_under_mpi(tmp_path, job):
    """One stage after the other on the same ranks: the runner is asked several times in one job."""
    assert main([job("one")]) == 0
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    ranks = ["mpirun", "-n", "3", sys.executable, "-m", "mpi4py.futures", "-m", "megaspark", "dedup"]
    done = subprocess.run([*ranks, job("ranks")], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "ranks")


KILLED = """
import os, signal, sys
from megaspark.data_prep import dedup

calls, limit = 0, int(sys.argv[1])

def counted(function):
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls >= limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

os.fsync, os.replace = counted(os.fsync), counted(os.replace)
sys.exit(dedup.main(sys.argv[2:]))
"""


def test_killed_at_any_step_and_gone_on(tmp_path, job, run_python):
    """SIGKILL before renames and fsyncs all along the job: the next start must end with the same bytes."""
    assert main([job("whole")]) == 0
    path = job("killed")
    steps = 0
    for limit in (1, 3, 8, 21, 34, 55, 80, 9999):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        steps += run_python(KILLED, str(limit), path).returncode == -signal.SIGKILL
        assert main([path]) == 0
        assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert steps >= 6
    # one that never gets far ends too, for what is finished stays finished
    shutil.rmtree(tmp_path / "killed")
    codes = [run_python(KILLED, "40", path).returncode]
    while codes[-1] != 0:
        assert codes[-1] == -signal.SIGKILL and len(codes) < 12
        codes.append(run_python(KILLED, "40", path).returncode)
    assert len(codes) > 1 and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_with_its_workers(tmp_path, job, capsys):
    """kill -9 of the command while its processes work: they end, and the next start goes on."""
    assert main([job("whole")]) == 0
    path = job("killed", workers=2)
    command = [sys.executable, "-m", "megaspark", "dedup", path]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not [*(tmp_path / "killed").glob(".work/keys/part-*/done.json")] and child.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)
    child.kill()
    child.wait()
    time.sleep(0.5)
    assert main([path]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_another_job_is_refused(tmp_path, job, corpus, capsys):
    """An output of other settings or another input must not pass for this one's; the same job again does nothing."""
    assert main([job()]) == 0
    before = contents(tmp_path / "out")
    assert main([job()]) == 0 and "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="changed since: keep"):
        main([job(keep="longest")])
    with pytest.raises(UserError, match=r"did you mean method\.minhash\.permutations"):
        main([job("typo", method={"minhash": {"permutation": 3}})])
    with pytest.raises(UserError, match="one of minhash and exact"):
        main([job("both", method={"minhash": {}, "exact": {}})])
    with pytest.raises(UserError, match="bands"):
        main([job("many", method={"minhash": {"bands": 20, "rows": 20}})])
    assert not any((tmp_path / name).exists() for name in ("typo", "both", "many"))
    (corpus / "b/1.jsonl").write_text(json.dumps({"text": "another " * 30}))
    with pytest.raises(UserError, match="changed since: input files"):
        main([job()])
    assert contents(tmp_path / "out") == before


# ---- the step of prep


def test_prep_drops_just_these(tmp_path, job, corpus):
    """Line numbers must mean the same to both jobs, over bad and blank lines."""
    assert main([job()]) == 0
    lines = dropped(tmp_path / "out")
    for name, _ in CORPUS:
        path = str(corpus / name)
        for item in read_documents(path, "text", "source"):
            if isinstance(item, Document):
                reason = reason_to_drop(item, str(tmp_path / "out"))
                assert reason == ("near_duplicate" if item.line in lines[name] else None)


def test_another_input_is_refused(tmp_path, job, corpus):
    """Lines of a file that has changed, or was not read, name other documents; a mere copy of the file does not."""
    assert main([job("one")]) == 0 and main([job("two")]) == 0 and main([job("long", keep="longest")]) == 0
    assert fingerprint(str(tmp_path / "one")) == fingerprint(str(tmp_path / "two")) != fingerprint(str(tmp_path / "long"))
    path = corpus / "b/0.jsonl"
    document = next(item for item in read_documents(str(path), "text", "source") if isinstance(item, Document))
    os.utime(path, (1, 1))
    assert reason_to_drop(document, str(tmp_path / "one")) is None  # another time, the same content
    path.write_bytes(path.read_bytes().replace(b"no json", b"no JSON"))
    with pytest.raises(UserError, match="content is another"):
        reason_to_drop(document, str(tmp_path / "two"))
    path.write_bytes(path.read_bytes() + b"\n")
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    with pytest.raises(UserError, match="bytes, not"):
        reason_to_drop(document, str(tmp_path / "three"))
    document.file = str(corpus / "other.jsonl")
    with pytest.raises(UserError, match="not among the 4 input files"):
        reason_to_drop(document, str(tmp_path / "three"))
    with pytest.raises(UserError, match="megaspark dedup"):
        fingerprint(str(tmp_path / "nothing"))
