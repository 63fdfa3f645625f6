"""`megaspark prep JOB.yaml [key=value ...]`: text in, token datasets out, on one machine or on a cluster under MPI.

The work is planned from the input alone (jobs), its units are done by many processes (workers, units) and put together in the
order of the plan (outputs). Killed at any moment, the same command goes on and redoes only the units that were not finished.
"""

from __future__ import annotations

import argparse
import errno
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from functools import partial

from megaspark.data_prep.dry_run import report
from megaspark.data_prep.fast_encoders import REFERENCE, choose
from megaspark.data_prep.jobs import Job, Unit, load_job, sample_texts
from megaspark.data_prep.outputs import assemble, by_source, check_bad, claimed, summary, table, total
from megaspark.data_prep.units import BAD, STOP, Record, encode_unit, read_progress, unit_folder
from megaspark.data_prep.workers import check_launcher, core_count, run_units
from megaspark.shards import UNFINISHED, Counts

_EXAMPLE = """example:
  megaspark prep ds_configs/prep-demo.yaml shard_tokens=500000 output=data/small
on a cluster:
  mpirun -n 64 python -m mpi4py.futures -m megaspark prep ds_configs/prep-slimpajama.yaml"""


def main(argv: list[str]) -> int:
    """Runs a data-prep job; returns 0, or 1 for a failure that is not the user's. Raises UserError for one that is."""
    parser = argparse.ArgumentParser(
        prog="megaspark prep",
        description="Turns text into token datasets. Started again after any interruption, it goes on where it was.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", help="a YAML file: input, output, tokenizer, ... (see ds_configs/prep-*.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument("--dry-run", action="store_true", help="write nothing: say what the steps drop of a sample, and why")
    arguments = parser.parse_intermixed_args(argv)  # options between settings
    check_launcher("prep")
    job = load_job(arguments.job, arguments.overrides)
    if arguments.dry_run:
        print(report(job))
        return 0
    again = f"finished units are kept in {job.output}; the same command goes on with the rest"
    try:
        with claimed(job) as finished:
            if finished:
                print(f"{job.output} is finished already, and nothing changed since: nothing to do")
            else:
                _run(job)
        return 0
    except BrokenExecutor:
        print(f"megaspark prep: a worker process died (killed, or out of memory?); {again}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"megaspark prep: stopped; {again}", file=sys.stderr)
    except OSError as error:
        what = f"no space left for {job.output}" if error.errno == errno.ENOSPC else str(error)
        print(f"megaspark prep: {what}; {again}", file=sys.stderr)
    return 1


def _run(job: Job) -> None:
    check_bad(job)
    records = {unit.number: Record.load(unit_folder(job, unit)) for unit in job.units}
    todo = [unit for unit in job.units if records[unit.number] is None]
    n_files = sum(len(unit.files) for unit in job.units)
    print(f"{n_files:,} files in {len(job.units):,} units -> {job.output}", flush=True)
    if len(todo) < len(job.units):
        print(f"going on: {len(job.units) - len(todo):,} of {len(job.units):,} units were finished before, {len(todo):,} to do")
    if todo:
        _encode(job, todo)
    done = [record for unit in job.units if (record := Record.load(unit_folder(job, unit)))]
    assemble(job, done)
    _tell(job, done)


def _encode(job: Job, todo: Sequence[Unit]) -> None:
    """Does the units that are left, by the fastest tokenizer that gives the right ids."""
    options = job.settings
    choice = choose(options.encoder, options.tokenizer, sample_texts(job) if options.encoder != REFERENCE else [])
    print(f"tokenizer: {choice.words}", flush=True)
    # A unit knows its own files; all 59,166 sent along with each of them would keep the first rank busy.
    work = partial(encode_unit, replace(job, units=(), encoder_name=choice.name))
    with _Progress(job, todo):
        for _ in run_units(work, todo, options.workers or core_count(), (job.output / UNFINISHED / STOP).touch):
            pass


def _tell(job: Job, records: Sequence[Record]) -> None:
    """Prints where every document went."""
    rows = [*by_source(records).items(), *((f"{name} (holdout)", c) for name, c in by_source(records, held=True).items())]
    print(table([_HEAD, *(_row(*row) for row in rows), _row("all", total(records))]))
    print(summary(total(records)))
    if total(records).bad:
        print(f"bad lines, with file, line number and reason: {job.output / BAD}")


_HEAD = ("source", "documents", "tokens", "text bytes", "bytes/token", "dropped", "bad")


def _row(name: str, counts: Counts) -> tuple[str, ...]:
    figures = (counts.kept, counts.tokens, counts.text_bytes)
    ratio = f"{counts.text_bytes / counts.tokens:.3f}" if counts.tokens else "-"
    return (name, *(f"{n:,}" for n in figures), ratio, f"{sum(counts.dropped.values()):,}", f"{counts.bad:,}")


class _Progress:
    """A line on stderr about how far the units are: each second on a terminal, every half minute in a log."""

    def __init__(self, job: Job, units: Sequence[Unit]):
        self.job, self.units = job, units
        self.total_bytes = sum(file.size_bytes for unit in units for file in unit.files)
        self.start_s = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        if self.units:
            self._print("\n")

    def _watch(self) -> None:
        terminal = sys.stderr.isatty()
        while not self.ended.wait(1.0 if terminal else 30.0):
            self._print("\r" if terminal else "\n")

    def _print(self, end: str) -> None:
        reports = [read_progress(self.job, unit) for unit in self.units]
        files, done_bytes, text_bytes, tokens = (
            sum(report.get(key, 0) for report in reports) for key in ("files", "input_bytes", "text_bytes", "tokens")
        )
        spent_s = max(time.monotonic() - self.start_s, 1e-9)
        left_s = spent_s * (self.total_bytes - done_bytes) / done_bytes if done_bytes else None
        left = "?" if left_s is None else f"{int(left_s) // 3600}:{int(left_s) // 60 % 60:02d}:{int(left_s) % 60:02d}"
        rate = f"{text_bytes / spent_s / 1e6:.1f} MB text/s, {tokens / spent_s / 1e6:.2f} M tokens/s"
        share = 100 * done_bytes / self.total_bytes if self.total_bytes else 100
        print(f"prep: {files:,} files, {share:.1f} %, {rate}, {left} left", end=end, file=sys.stderr, flush=True)
