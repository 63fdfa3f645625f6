"""`python -m megaspark.tools.bench_reading`: how fast and how small the reading side is, one JSON line a measurement."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megaspark.errors import UserError
from megaspark.manifests import idx_size_bytes
from megaspark.packing import CUTS, truncation
from megaspark.samples import Phase, Samples
from megaspark.shards import (
    Counts,
    Manifest,
    ShardInfo,
    TokenDataset,
    datasets_in,
    dtype_for,
    sha256_of,
    write_atomically,
)

SHARDS, TOKENS = 1254, 627_000_000_000  # SlimPajama-627B in shards of 500 M tokens
VOCAB, TOKENS_A_DOCUMENT, FILES_A_SHARD = 32_000, 1_064, 47
_EXAMPLE = """examples:
  python -m megaspark.tools.bench_reading
  python -m megaspark.tools.bench_reading --data data/slimpajama --seq 2048 4096"""


def main(argv: list[str]) -> int:
    """Measures and prints; returns 0."""
    parser = argparse.ArgumentParser(
        prog="megaspark bench reading",
        description="Measures opening, random reading and resuming on a dataset as large as SlimPajama-627B, whose files are "
        "sparse and take no room; with --data also reading, and how many documents are cut, on real data.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--samples", type=int, default=10_000, help="samples to read (default: %(default)s)")
    parser.add_argument("--seq", type=int, nargs="+", default=[4096])
    parser.add_argument("--data", type=Path, help="a dataset, or a folder of datasets, made by megaspark prep")
    parser.add_argument("--only", choices=["opening"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.only:
        _print(opening(arguments.data, arguments.seq[0]))
        return 0
    if min(arguments.shards, arguments.samples, *arguments.seq) < 1 or arguments.tokens < arguments.shards:
        raise UserError("--shards, --samples and --seq start at 1, and every shard holds a token")
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder) / "big", arguments.shards, arguments.tokens)
        command = [sys.executable, "-m", "megaspark.tools.bench_reading", "--only", "opening", "--data", f"{folder}/big"]
        subprocess.run([*command, "--seq", str(arguments.seq[0])], check=True)  # memory is measured in a process of its own
        dataset = TokenDataset(Path(folder) / "big")
        for seq in arguments.seq:
            _print(reading({"big": dataset}, seq, arguments.samples))
        _print(resuming(dataset, arguments.seq[0]))
    for name, path in datasets_in(arguments.data).items() if arguments.data else ():
        for line in packings(name, TokenDataset(path), arguments.seq, arguments.samples):
            _print(line)
    return 0


def write_sparse(folder: Path, shards: int, tokens: int) -> None:
    """A dataset of so many shards and tokens, all of them 0, in sparse files; its `.idx` files are of the right size only."""
    folder.mkdir(parents=True)
    write_atomically(folder / "tokenizer.model", b"none")
    dtype, infos = dtype_for(VOCAB), []
    for number in range(shards):
        size = tokens * (number + 1) // shards - tokens * number // shards
        documents = -(-size // TOKENS_A_DOCUMENT)
        first = number * FILES_A_SHARD
        inputs = tuple(f"train/chunk{first // 5915 + 1}/example_train_{first + i}.jsonl.zst" for i in range(FILES_A_SHARD))
        blank = ShardInfo(f"big-{number:05d}", "all", size, documents, size * dtype.itemsize, "0" * 64, 0, "0" * 64, inputs)
        info = replace(blank, idx_bytes=idx_size_bytes(documents))
        for end, size_bytes in (("bin", info.bin_bytes), ("idx", info.idx_bytes)):
            path = folder / f"{info.name}.{end}"
            path.touch()
            os.truncate(path, size_bytes)
        infos.append(info)
    documents = sum(info.documents for info in infos)
    counts = Counts(read=documents, kept=documents, tokens=tokens)
    Manifest(
        name="big", tokenizer="tokenizer.model", tokenizer_sha256=sha256_of(folder / "tokenizer.model"), vocab=VOCAB,
        dtype=dtype.name, eos_id=2, bos_id=None, append_eos=True, prepend_bos=False, settings_sha256="0" * 64,
        shards=tuple(infos), counts={"all": counts}, job=counts,
    ).save(folder)  # fmt: skip


def opening(folder: Path, seq: int) -> dict[str, Any]:
    """Time and memory to open a dataset, then the time of its first sample; for a process that has opened none yet."""
    before_bytes, start = _resident_bytes(), time.perf_counter()
    samples = Samples({"big": TokenDataset(folder)}, seq, seed=1)
    opened = time.perf_counter()
    grown_mb = (_resident_bytes() - before_bytes) / 1e6
    samples[0].sum()
    first_ms = (time.perf_counter() - opened) * 1e3
    shards, tokens = len(samples.datasets[0].shards), samples.datasets[0].tokens
    return {
        "bench": "opening", "shards": shards, "tokens": tokens, "seconds": round(opened - start, 4),
        "resident_mb": round(grown_mb, 1), "first_sample_ms": round(first_ms, 3),
    }  # fmt: skip


def reading(datasets: dict[str, TokenDataset], seq: int, count: int) -> dict[str, Any]:
    """Tokens a CPU second of random samples on one core: where they are, what they are, and the sum of their tokens.

    cold: every sample's pages are mapped for the first time; warm: the same samples once more; order: `locate` alone.
    """
    samples, numbers = Samples(datasets, seq, seed=1), random.Random(1)
    chosen = [numbers.randrange(samples.epoch_samples) for _ in range(count)]
    cold_s = _cpu_s(lambda: _touch(samples, chosen))
    warm_s = _cpu_s(lambda: _touch(samples, chosen))
    order_s = _cpu_s(lambda: [samples.locate(i) for i in chosen])
    return {
        "bench": "reading", "seq": seq, "samples": count, "cold_tokens_a_second": round(count * (seq + 1) / cold_s),
        "warm_tokens_a_second": round(count * (seq + 1) / warm_s), "order_us_a_sample": round(order_s / count * 1e6, 2),
    }  # fmt: skip


def resuming(dataset: TokenDataset, seq: int) -> dict[str, Any]:
    """Time to stand at sample 10^8 of a run that has been through three phases, and at sample 0, for comparison."""
    phases = [Phase(0, seq, {"a": 1, "b": 2}), Phase(10**7, seq, {"a": 3, "b": 1}), Phase(5 * 10**7, 2 * seq, None)]

    def stand_at(index: int) -> float:
        start = time.perf_counter()
        Samples({"a": dataset, "b": dataset}, phases, seed=1).locate(index)
        return (time.perf_counter() - start) * 1e3

    times_ms = {index: min(stand_at(index) for _ in range(5)) for index in (0, 10**8)}
    return {"bench": "resuming", "at_0_ms": round(times_ms[0], 3), "at_100_million_ms": round(times_ms[10**8], 3)}


def packings(name: str, dataset: TokenDataset, seqs: list[int], count: int) -> Iterator[dict[str, Any]]:
    """How many documents each way of cutting cuts, and how fast samples are read in their order, on real data."""
    for seq in seqs:
        if dataset.tokens <= seq:
            continue
        for packing, cut in ((packing, kind(dataset, seq)) for packing, kind in CUTS.items()):
            if not cut.size:
                continue
            samples = Samples({name: dataset}, [Phase(0, seq, packing=packing)], seed=1)
            spent_s = _cpu_s(lambda samples=samples: _touch(samples, range(count)))
            found = truncation(cut)
            yield {
                "bench": "packing", "dataset": name, "seq": seq, "packing": packing, "documents": found.documents,
                "cut": found.cut, "cut_share": round(found.rate, 5), "fitting": found.fitting,
                "fitting_cut": found.fitting_cut, "tokens_a_second": round(count * (seq + 1) / spent_s),
            }  # fmt: skip


def _touch(samples: Samples, numbers: Any) -> int:
    """Reads samples and every token in them."""
    return sum(int(np.asarray(samples[i]).sum(dtype=np.int64)) for i in numbers)


def _cpu_s(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
