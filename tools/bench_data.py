"""`megaspark bench data`: how fast data is prepared and read here, a JSON object a line.

A section is a function of Bench that yields mappings; SECTIONS names the module and function of each. Speeds are megabytes
(1e6) of UTF-8 text a CPU second of the workers, from compressed files to durable shards, without the time to load libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megaspark.data_prep.documents import Document, read_documents
from megaspark.data_prep.jobs import Job, PrepSettings, Unit, load_job
from megaspark.data_prep.outputs import claimed
from megaspark.data_prep.sources import InputFile, find_inputs
from megaspark.data_prep.units import encode_unit
from megaspark.errors import UserError

# A section's name: the module that has it, the function there.
SECTIONS = {
    "encoders": ("megaspark.tools.bench_data", "encoders"),
    "scaling": ("megaspark.tools.bench_data", "scaling"),
    "megatron": ("megaspark.tools.bench_data", "megatron"),
    "minhash": ("megaspark.tools.bench_data", "minhash"),
    "reading": ("megaspark.tools.bench_data", "reading"),
}

Line = dict[str, Any]

_EXAMPLE = """examples:
  megaspark bench data --corpus slimpajama/train --tokenizer tokenizer.model --megabytes 400 --ranks 1 2
  megaspark bench data encoders --megabytes 40
  megaspark bench data megatron --megatron ~/Megatron-LM/tools/preprocess_data.py --megabytes 40"""
_REFERENCE_MEGABYTES = 40  # of the slow reference; its speed does not depend on how much there is
_MINHASH_CHARS = 2_000_000
_UNITS = 8


@dataclass(frozen=True)
class Bench:
    """What all sections share: the copies of the corpus, `megabytes` of text, and a folder for what is made of it."""

    files: tuple[InputFile, ...]
    tokenizer: str
    megabytes: float
    ranks: tuple[int, ...]
    folder: Path
    megatron: Path | None = None


@dataclass(frozen=True)
class UnitTime:
    """What a unit cost its worker, and the worker's peak memory."""

    text_bytes: int
    cpu_s: float
    start_s: float
    end_s: float
    peak_bytes: int


def main(argv: list[str]) -> int:
    """Prints a JSON line for each figure; returns 0."""
    parser = argparse.ArgumentParser(
        prog="megaspark bench data",
        description="Measures data preparation on this machine; prints a JSON object a line.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", help=f"which to run, of {', '.join(SECTIONS)} (all)")
    parser.add_argument("--corpus", default="data/demo/text/train", help="a folder of text files (%(default)s)")
    parser.add_argument("--tokenizer", default="data/demo/tokenizer.model", help="%(default)s")
    parser.add_argument("--megabytes", type=float, default=400, help="text to work on: the corpus, repeated (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of workers (1 2)")
    parser.add_argument("--megatron", type=Path, help="a preprocess_data.py of Megatron-LM's, to compare with")
    arguments = parser.parse_args(argv)
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"no section {name}; there are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory(prefix="megaspark-bench-") as folder:
        files, megabytes = repeat_corpus(arguments.corpus, arguments.megabytes, Path(folder) / "text")
        bench = Bench(files, arguments.tokenizer, megabytes, tuple(arguments.ranks), Path(folder), arguments.megatron)
        for name in arguments.sections or SECTIONS:
            module, function = SECTIONS[name]
            for line in getattr(import_module(module), function)(bench):
                print(json.dumps({"bench": f"data.{name}", **line}), flush=True)
    return 0


def repeat_corpus(corpus: str, megabytes: float, folder: Path) -> tuple[tuple[InputFile, ...], float]:
    """Copies the files of a corpus until they hold `megabytes` of text; returns the copies, and the text in them."""
    kinds = ("jsonl", "jsonl.zst", "jsonl.gz", "parquet")
    patterns = [f"{corpus}/**/*.{kind}" for kind in kinds if any(Path(corpus).glob(f"**/*.{kind}"))]
    if not patterns:
        raise UserError(f"--corpus {corpus}: no {', '.join(kinds)} in this folder; `megaspark demo-corpus` makes one")
    originals = find_inputs(patterns)
    texts = [_text_bytes(file.path) for file in originals]
    if not sum(texts):
        raise UserError(f"--corpus {corpus}: no document with a text in it")
    total_bytes = 0
    for number in count():
        original, text_bytes = originals[number % len(originals)], texts[number % len(originals)]
        if number and total_bytes + text_bytes > megabytes * 1e6:
            break
        target = folder / f"{number:05d}-{Path(original.path).name}"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(original.path, target)
        total_bytes += text_bytes
    return tuple(find_inputs([f"{folder}/*"])), total_bytes / 1e6


def _text_bytes(path: str) -> int:
    return sum(len(text.encode()) for text in _texts(path))


def _texts(path: str) -> Iterator[str]:
    found = read_documents(path, "text", PrepSettings.model_fields["source_field"].default)
    return (item.text for item in found if isinstance(item, Document))


# ---- sections


def encoders(bench: Bench) -> Iterator[Line]:
    """The whole way by each tokenizer library, on one core, and how much faster than the reference it is."""
    reference = 0.0
    for name in ("reference", "gigatoken", "kitoken"):
        if name != "reference" and find_spec(name) is None:
            yield {"encoder": name, "skipped": "not installed: pip install 'megaspark[data]'"}
            continue
        share = min(1.0, _REFERENCE_MEGABYTES / bench.megabytes) if name == "reference" else 1.0
        times = _run(bench, name, 1, share)
        speed = sum(t.text_bytes for t in times) / sum(t.cpu_s for t in times) / 1e6
        reference = reference or speed
        yield {
            "encoder": name,
            "text_mb": round(sum(t.text_bytes for t in times) / 1e6, 1),
            "text_mb_per_cpu_s": round(speed, 2),
            "times_reference": round(speed / reference, 2),
            "peak_rss_mb": _peak_mb(times),
        }


def scaling(bench: Bench) -> Iterator[Line]:
    """The same work by one worker and by more: text a second of the clock, which a busy machine (its load is told) spoils."""
    name = next((name for name in ("gigatoken", "kitoken") if find_spec(name)), "reference")
    first = 0.0
    for workers in bench.ranks:
        times = _run(bench, name, workers)
        wall_s = max(t.end_s for t in times) - min(t.start_s for t in times)
        speed = sum(t.text_bytes for t in times) / wall_s / 1e6
        first = first or speed
        yield {
            "encoder": name,
            "workers": workers,
            "text_mb_per_s": round(speed, 2),
            f"times_{bench.ranks[0]}_workers": round(speed / first, 3),
            "text_mb_per_cpu_s": round(sum(t.text_bytes for t in times) / sum(t.cpu_s for t in times) / 1e6, 2),
            "load_average": round(os.getloadavg()[0], 1),
            "peak_rss_mb_a_worker": _peak_mb(times),
        }


def megatron(bench: Bench) -> Iterator[Line]:
    """The CPU time of Megatron-LM's preprocess_data.py on the same text, without what its imports take, over ours."""
    if bench.megatron is None:
        yield {"skipped": "no --megatron PATH given"}
        return
    if not bench.megatron.is_file():
        raise UserError(f"--megatron {bench.megatron}: no such file; it is tools/preprocess_data.py of Megatron-LM")
    plain = bench.folder / "megatron.jsonl"
    with open(plain, "w", encoding="utf-8") as file:
        for source in bench.files:
            file.writelines(json.dumps({"text": text}) + "\n" for text in _texts(source.path))
    command = [sys.executable, str(bench.megatron)]
    work = [
        "--input", str(plain), "--output-prefix", str(bench.folder / "megatron"), "--tokenizer-type", "SentencePieceTokenizer",
        "--tokenizer-model", bench.tokenizer, "--append-eod", "--workers", "1",
    ]  # fmt: skip
    cpu_s = _cpu_s([*command, *work]) - _cpu_s([*command, "--help"])
    yield {"encoder": "megatron preprocess_data.py", "text_mb_per_cpu_s": round(bench.megabytes / cpu_s, 2)}
    name = next((name for name in ("gigatoken", "kitoken") if find_spec(name)), "reference")
    ours_s = sum(t.cpu_s for t in _run(bench, name, 1))
    yield {"encoder": name, "text_mb_per_cpu_s": round(bench.megabytes / ours_s, 2), "times_less_cpu": round(cpu_s / ours_s, 2)}


def minhash(bench: Bench) -> Iterator[Line]:
    """Signatures a CPU second, ours and datasketch's."""
    tool = import_module("megaspark.tools.bench_dedup")
    yield from tool.measure(tool.read_texts(f"{bench.folder}/text/*", _MINHASH_CHARS))


def reading(_: Bench) -> Iterator[Line]:
    """Opening and reading a dataset as large as SlimPajama-627B, in a process of its own, for its memory counts."""
    command = [sys.executable, "-m", "megaspark.tools.bench_reading"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    yield from map(json.loads, done.stdout.splitlines())


# ---- measuring


def _run(bench: Bench, encoder: str, workers: int, share: float = 1.0) -> list[UnitTime]:
    """Does a whole data-prep job's units with so many fresh processes, on a share of the files."""
    output = bench.folder / "out"
    files = bench.files[: max(1, round(len(bench.files) * share))]
    settings = bench.folder / "job.yaml"
    values = {"input": [file.path for file in files], "output": str(output), "tokenizer": bench.tokenizer, "split_by": "source"}
    settings.write_text(json.dumps(values))
    job = replace(load_job(str(settings), []), units=tuple(_units(files)), encoder_name=encoder)
    with claimed(job), ProcessPoolExecutor(workers, get_context("spawn")) as executor:
        times = list(executor.map(partial(_timed, replace(job, units=())), job.units))
    shutil.rmtree(output)
    return times


def _units(files: Sequence[InputFile]) -> Iterator[Unit]:
    """The files in a few units of the same number of files."""
    for number in range(min(_UNITS, len(files))):
        yield Unit(number, tuple(files[number::_UNITS]))


def _timed(job: Job, unit: Unit) -> UnitTime:
    job.batch_encoder()  # loads what it needs
    cpu_s, start_s = time.process_time(), time.monotonic()
    record = encode_unit(job, unit)
    text_bytes = sum(counts.text_bytes for counts in record.counts.values())
    cpu_s, end_s = time.process_time() - cpu_s, time.monotonic()
    return UnitTime(text_bytes, cpu_s, start_s, end_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


def _peak_mb(times: Sequence[UnitTime]) -> int:
    return round(max(t.peak_bytes for t in times) / 1e6)


def _cpu_s(command: Sequence[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} failed: {' '.join(done.stderr.split())[-300:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
