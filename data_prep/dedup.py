"""`megaspark dedup JOB.yaml [key=value ...]`: finds near-duplicates (MinHash-LSH) or equal texts, and says which to drop.

Stages, each done by many processes under the same runner as `megaspark prep`: keys of every document (sketches), pairs and
connected components (clusters), line numbers (here). Killed at any moment, the same command goes on where it was; the output
is the same, byte for byte, for any number of workers and any `memory_mb`. `megaspark prep` applies it with
`steps: [{drop_duplicates: {path: OUTPUT}}]`.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from megaspark import settings
from megaspark.data_prep.clusters import Clustering, find_drops
from megaspark.data_prep.dedup_jobs import DedupJob, claimed, load_job
from megaspark.data_prep.duplicates import FOLDER, LINE, DuplicateSet, FileRecord
from megaspark.data_prep.minhash import match_probability
from megaspark.data_prep.sketches import sketch
from megaspark.data_prep.stages import Result, run_stage
from megaspark.data_prep.workers import check_launcher, core_count
from megaspark.manifests import UNFINISHED, fsync_folder, sha256_of

_EXAMPLE = """example:
  megaspark dedup ds_configs/dedup-slimpajama.yaml input='[data/demo/text/train/**/*.zst]' output=data/demo/duplicates
  megaspark prep ds_configs/prep-demo.yaml steps='[{drop_duplicates: {path: data/demo/duplicates}}]'
on a cluster:
  mpirun -n 64 python -m mpi4py.futures -m megaspark dedup ds_configs/dedup-slimpajama.yaml"""


def find_duplicates(job: DedupJob) -> DuplicateSet:
    """Runs or goes on with a job whose output is claimed; returns what it wrote."""
    work, workers, reader = job.output / UNFINISHED, job.settings.workers or core_count(), job.reader()
    units = run_stage(work, "keys", partial(sketch, reader), job.units, workers)
    bases = tuple(accumulate((unit["ids"] for unit in units), initial=0))
    plan = Clustering(work / "keys", reader.keys.words, bases, reader.memory_bytes, bool(reader.score))
    drops, clusters = find_drops(plan, work, workers)
    (job.output / FOLDER).mkdir(exist_ok=True)
    files = [(number, [FileRecord(**record) for record in unit["files"]]) for number, unit in enumerate(units)]
    written = run_stage(work, "lines", partial(write_lines, plan, drops, job.output / FOLDER), files, workers)
    records = tuple(FileRecord(**record) for unit in written for record in unit["files"])
    dropped = sum(record.dropped for record in records)
    documents, bad = sum(record.documents for record in records), sum(record.bad for record in records)
    identity = job.identity()["settings"]
    found = DuplicateSet(
        settings=identity, settings_sha256=settings.digest(identity),
        reason="exact_duplicate" if job.settings.method.exact else "near_duplicate",
        read=documents + bad, kept=documents - dropped, dropped=dropped, bad=bad,
        without_score=sum(record.without_score for record in records) if reader.score else 0,
        clusters=sum(part["clusters"] for part in clusters),
        largest_cluster=max(part["largest"] for part in clusters) if dropped else 0,
        files=records, bins={unit["bin"]: unit["sha256"] for unit in written},
    )  # fmt: skip
    found.save(job.output)
    shutil.rmtree(work)
    return found


def write_lines(plan: Clustering, drops: Path, folder: Path, part: Path, unit: tuple[int, Sequence[FileRecord]]) -> Result:
    """Writes FOLDER/NUMBER.bin: the line numbers to drop of the files of unit (number, files)."""
    number, records = unit
    name, base = f"{number:05d}.bin", plan.bases[number]
    starts = np.array([*accumulate((record.lines + 1 for record in records), initial=base)], np.uint64)
    dropped = np.zeros(len(records), np.int64)
    with open(part / name, "wb") as out:
        for low in range(base, plan.bases[number + 1], plan.range_ids):
            high = min(low + plan.range_ids, plan.bases[number + 1])
            ids = np.sort(np.concatenate([np.empty(0, np.uint64), *(b[0] for b in plan.read(drops, "drops", 1, low, high))]))
            owner = np.searchsorted(starts, ids, "right") - 1
            dropped += np.bincount(owner, minlength=len(dropped))
            out.write((ids - starts[owner]).astype(LINE).data)
        out.flush()
        os.fsync(out.fileno())
    sha256 = sha256_of(part / name)
    os.replace(part / name, folder / name)
    fsync_folder(folder)
    firsts = [int(n) for n in np.cumsum(dropped) - dropped]
    files = [
        {**asdict(record), "dropped": int(n), "bin": name, "first": first}
        for record, n, first in zip(records, dropped, firsts, strict=True)
    ]
    return {"files": files, "bin": name, "sha256": sha256}


def main(argv: list[str]) -> int:
    """Runs a dedup job; returns 0, or 1 for a failure that is not the user's. Raises UserError for one that is."""
    parser = argparse.ArgumentParser(
        prog="megaspark dedup",
        description="Finds near or exact duplicates. Started again after any interruption, it goes on where it was.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help="a YAML file: input, output, method, keep ... (see ds_configs/dedup-*.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments = parser.parse_args(argv)
    check_launcher("dedup")
    job = load_job(arguments.job, arguments.overrides)
    again = f"finished parts are kept in {job.output}; the same command goes on with the rest"
    try:
        with claimed(job) as finished:
            if finished:
                print(f"{job.output} is finished already, and nothing changed since")
            _tell(job, DuplicateSet.load(job.output) if finished else find_duplicates(job))
        return 0
    except BrokenExecutor:
        print(f"megaspark dedup: a worker process died (killed, or out of memory?); {again}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"megaspark dedup: stopped; {again}", file=sys.stderr)
    except OSError as error:
        what = f"no space left for {job.output}" if error.errno == errno.ENOSPC else str(error)
        print(f"megaspark dedup: {what}; {again}", file=sys.stderr)
    return 1


def _tell(job: DedupJob, found: DuplicateSet) -> None:
    """Prints where every document went."""
    near = job.settings.method.minhash
    if near:
        bands, rows = near.shape
        odds = ", ".join(f"{s:.2f}: {match_probability(s, bands, rows):.3f}" for s in np.arange(0.5, 1, 0.1))
        print(f"{bands} bands of {rows} rows find a pair of similarity {odds}")
    dropped = f"{found.dropped:,} dropped ({found.reason})"
    print(f"{found.read:,} documents read = {found.kept:,} kept + {dropped} + {found.bad:,} bad")
    print(f"{found.clusters:,} clusters, the largest of {found.largest_cluster:,}")
    if found.without_score:
        print(f"{found.without_score:,} documents have no number in {job.reader().score_field}: any other is kept before them")
