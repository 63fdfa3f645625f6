"""The reading side at the size of SlimPajama-627B: 1,254 sparse shards of 500 M tokens, opened, read at random and resumed."""

import json
import time
from collections.abc import Callable

import pytest

from conftest import Finished, random_documents, write_tokens
from megaspark.errors import UserError
from megaspark.overlaps import overlap
from megaspark.samples import WINDOW, Samples
from megaspark.shards import TokenDataset
from megaspark.tools.bench_reading import SHARDS, TOKENS, main, resuming, write_sparse


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> TokenDataset:
    """The dataset of 627 B zeros, which take a few MB of disk."""
    folder = tmp_path_factory.mktemp("sparse") / "big"
    write_sparse(folder, SHARDS, TOKENS)
    assert sum(file.stat().st_blocks * 512 for file in folder.iterdir()) < 64 << 20
    return TokenDataset(folder)


def lines(text: str) -> dict[str, dict[str, float]]:
    """What was printed, by the name of the measurement."""
    return {line["bench"]: line for line in map(json.loads, text.splitlines())}


def test_opening(big, run_python: Callable[..., Finished]):
    """A header read in every shard, a shuffled index, a manifest parsed twice: seconds and gigabytes in every process."""
    text = "import sys; from megaspark.tools.bench_reading import main; main(['--only', 'opening', '--data', sys.argv[1]])"
    found = lines(run_python(text, str(big.folder)).checked().stdout)["opening"]
    assert (found["shards"], found["tokens"]) == (SHARDS, TOKENS)
    assert found["seconds"] < 1 and found["resident_mb"] < 150 and found["first_sample_ms"] < 50


def test_reading_keeps_up_with_many_gpus(big):
    """An order that costs more than the tokens it finds. Measured warm: what a disk does to it is the disk's."""
    samples = Samples({"big": big}, 4096, seed=1)
    for _ in range(2):
        start = time.process_time()
        tokens = sum(len(samples[i]) + int(samples[i][-1]) for i in range(10**8, 10**8 + 400))
        seconds = time.process_time() - start
    assert tokens == 400 * 4097 and tokens / seconds > 20e6


def test_resuming_takes_no_longer_later(big):
    """Samples counted through from the start: a minute of waiting at every restart late in a run."""
    found = resuming(big, 4096)
    assert found["at_100_million_ms"] < 5 + 2 * found["at_0_ms"]


def test_overlap_is_cheap_enough_for_every_start(big):
    """Paths asked of the disk, or compared each with each: 59,166 input files would take minutes."""
    start = time.process_time()
    found = overlap({"big": big}, {"other": big})
    assert found is not None and time.process_time() - start < 1


def test_blend_of_large_datasets(big):
    """Counts beyond 2^32, and a window far into the run."""
    samples = Samples({"a": big, "b": big}, 4096, seed=1, blend={"a": 0.522, "b": 0.478})
    first = WINDOW * 10**7
    taken = [samples.locate(i)[0] for i in range(first, first + 1000)]
    assert abs(taken.count(0) - 522) <= 1


def test_command(tmp_path, capfd):
    """The lines that reports are made of: all there, numbers sane, also on real documents."""
    write_tokens(tmp_path / "x", "x", [random_documents(k, 300) for k in range(2)])
    arguments = ["--shards", "3", "--tokens", "30000000", "--samples", "20", "--seq", "16", "--data", str(tmp_path / "x")]
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    found = lines(printed)
    assert set(found) == {"opening", "reading", "resuming", "packing"} and found["opening"]["shards"] == 3
    assert found["reading"]["warm_tokens_a_second"] > 0
    plain, packed = (line for line in map(json.loads, printed.splitlines()) if line["bench"] == "packing")
    assert (plain["packing"], packed["packing"]) == ("plain", "best_fit")
    assert plain["documents"] == packed["documents"] == 600 and packed["cut"] < plain["cut"]


def test_command_refuses_nonsense(tmp_path):
    """A typing slip should cost one line, not a traceback from inside numpy."""
    with pytest.raises(UserError, match="start at 1"):
        main(["--samples", "0"])
