"""The output folder of a data-prep job: whose it is, where its work stands, and how finished units become datasets.

OUTPUT/.work/job.json        what the job is; while .work is there, the output is not finished
OUTPUT/.work/unit-00000/     a unit's shards, and done.json, written last
OUTPUT/NAME/NAME-00000.bin   the datasets, or OUTPUT/NAME-00000.bin where there is one; manifest.json is written last
OUTPUT/holdout/...           the same, of the texts that are held out
OUTPUT/bad.jsonl             every line that was no document, if there was any
OUTPUT/.done/job.json        .work, renamed when everything is in place
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megaspark.data_prep.jobs import Job, Unit, changes
from megaspark.data_prep.units import BAD, HOLDOUT, STOP, Record, describe, unit_folder
from megaspark.data_prep.workers import LOCK, locked
from megaspark.errors import UserError
from megaspark.shards import UNFINISHED, Counts, Manifest, ShardInfo, TokenDataset, dtype_for, fsync_folder, write_atomically

_JOB = "job.json"
_DONE = ".done"
_DATASETS = "datasets.json"


@contextmanager
def claimed(job: Job) -> Iterator[bool]:
    """Takes the output for this job alone, for as long as the context lasts; yields whether the job was finished before.

    Raises UserError if the folder holds something else, if the job there was begun with other settings, tokenizer or input,
    or if another process is at work on it.
    """
    _check_owner(job)
    job.output.mkdir(parents=True, exist_ok=True)
    with locked(job.output):
        finished = _check_owner(job)  # again, for it may have finished in between
        if not finished:
            work = job.output / UNFINISHED
            work.mkdir(exist_ok=True)
            (work / STOP).unlink(missing_ok=True)
            if not (work / _JOB).exists():
                write_atomically(work / _JOB, json.dumps(job.identity()).encode())
                for folder in (job.output, job.output.parent):  # else a power cut could take the whole output
                    fsync_folder(folder)
        yield finished


def _check_owner(job: Job) -> bool:
    """Whether the output holds this very job, finished."""
    output = job.output
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file")
    for folder in (output / _DONE, output / UNFINISHED):
        if (folder / _JOB).exists():
            changed = changes(json.loads((folder / _JOB).read_bytes()), job.identity())
            if changed:
                raise UserError(f"{output} was begun otherwise: {'; '.join(changed)}; give another output, or remove this one")
            if folder.name == _DONE:
                _check_whole(output)
                return True
            return False
    others = [p.name for p in output.iterdir() if p.name not in (LOCK, UNFINISHED)] if output.exists() else []
    if others:
        raise UserError(f"output: {output} holds other files ({min(others)}); give an empty or a new folder")
    return False


def _check_whole(output: Path) -> None:
    for name in json.loads((output / _DONE / _DATASETS).read_bytes()):
        try:
            TokenDataset(output / name)
        except UserError as error:
            raise UserError(f"{error}; it was finished once: remove {output} to make it again") from None


def check_bad(job: Job) -> None:
    """Raises UserError if a job that is to fail on bad input has units, finished under `skip`, that left some out."""
    if job.settings.on_bad_input == "fail":
        for unit in job.units:
            path = unit_folder(job, unit) / BAD
            if Record.load(path.parent) and path.stat().st_size:
                with open(path, encoding="utf-8") as file:
                    raise UserError(f"{describe(json.loads(file.readline()))}; left out before, but on_bad_input is fail now")


def assemble(job: Job, records: Sequence[Record]) -> None:
    """Moves the units' shards into their datasets, in the order of the plan, and writes what each dataset says of itself.

    Every move can be found done already: a job killed in here goes on from where it was.
    """
    if not any(record.shards for record in records):
        raise UserError(f"no document was kept: {summary(total(records))}; nothing to train on")
    manifests = _move_all(job, job.output, [(unit_folder(job, unit), r.shards) for unit, r in _pairs(job, records)], records)
    if any(record.holdout_shards for record in records):
        held = [(unit_folder(job, unit) / HOLDOUT, r.holdout_shards) for unit, r in _pairs(job, records)]
        manifests |= _move_all(job, job.output / HOLDOUT, held, records)
    _gather_bad(job)
    for folder, manifest in manifests.items():
        tokenizer = Path(job.settings.tokenizer).read_bytes()
        write_atomically(folder / manifest.tokenizer, tokenizer)
        manifest.save(folder)
        fsync_folder(folder.parent)
    _finish(job, [str(folder.relative_to(job.output)) for folder in manifests])


def _pairs(job: Job, records: Sequence[Record]) -> Iterator[tuple[Unit, Record]]:
    return zip(job.units, records, strict=True)


def _move_all(
    job: Job, root: Path, units: Sequence[tuple[Path, Sequence[ShardInfo]]], records: Sequence[Record]
) -> dict[Path, Manifest]:
    """Moves the shards of all units, each given with the folder where they wait, to their datasets; returns the manifests."""
    staged: dict[str, list[tuple[Path, ShardInfo]]] = {}
    for where, shards in units:
        for info in shards:
            staged.setdefault(info.name, []).append((where, info))
    manifests = {}
    for name, parts in sorted(staged.items()):
        folder = root / name if job.settings.split_by else root
        folder.mkdir(parents=True, exist_ok=True)
        counts = by_source(records) if root == job.output else by_source(records, held=True)
        manifests[folder] = _move(job, folder, parts, counts, total(records))
    return manifests


def _move(
    job: Job, folder: Path, parts: Sequence[tuple[Path, ShardInfo]], counts: dict[str, Counts], all_counts: Counts
) -> Manifest:
    """Gives the shards of one dataset their names; returns its manifest."""
    name = folder.resolve().name
    shards = []
    for k, (where, info) in enumerate(parts):
        final = replace(info, name=f"{name}-{k:05d}", source=info.source or name)
        for end in ("bin", "idx"):
            source, target = where / f"{info.name}.{end}", folder / f"{final.name}.{end}"
            if source.exists():
                os.replace(source, target)
            elif not target.exists():
                raise UserError(f"{target}: was finished, and has vanished since; remove {job.output} and start again")
        shards.append(final)
    fsync_folder(folder)
    encoder, options = job.encoder(), job.settings
    source = parts[0][1].source
    return Manifest(
        name=source or name, tokenizer=encoder.name, tokenizer_sha256=encoder.sha256, vocab=encoder.vocab,
        dtype=dtype_for(encoder.vocab).name, eos_id=encoder.eos_id, bos_id=encoder.bos_id, append_eos=options.append_eos,
        prepend_bos=options.prepend_bos, settings_sha256=job.settings_sha256(), shards=tuple(shards),
        counts={source: counts[source]} if options.split_by else counts, job=all_counts,
    )  # fmt: skip


def _gather_bad(job: Job) -> None:
    """Joins what the units wrote of bad lines, in the order of the plan."""
    parts = [unit_folder(job, unit) / BAD for unit in job.units]
    if any(part.stat().st_size for part in parts):
        temporary = job.output / UNFINISHED / BAD
        with open(temporary, "wb") as out:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, job.output / BAD)


def _finish(job: Job, datasets: list[str]) -> None:
    work, done = job.output / UNFINISHED, job.output / _DONE
    write_atomically(work / _DATASETS, json.dumps(datasets).encode())
    os.replace(work, done)
    fsync_folder(job.output)
    for unit in job.units:  # only now: should this be cut short, nothing needs them
        shutil.rmtree(done / unit.name, ignore_errors=True)
        (done / f"{unit.name}.progress").unlink(missing_ok=True)


# ---- what became of the documents


def by_source(records: Sequence[Record], held: bool = False) -> dict[str, Counts]:
    """The counts of all units together, or of the holdout, by source, sorted by name."""
    out: dict[str, Counts] = {}
    for record in records:
        for source, counts in (record.holdout_counts if held else record.counts).items():
            out.setdefault(source, Counts()).add(counts)
    return dict(sorted(out.items()))


def total(records: Sequence[Record]) -> Counts:
    """The counts of all units and sources together."""
    out = Counts()
    for counts in by_source(records).values():
        out.add(counts)
    return out


def summary(counts: Counts) -> str:
    """One line: read = kept + held out + dropped by each reason + bad."""
    words = {reason: "held out" if reason == HOLDOUT else f"dropped ({reason})" for reason in counts.dropped}
    dropped = "".join(f" + {n:,} {words[reason]}" for reason, n in sorted(counts.dropped.items()))
    return f"{counts.read:,} documents read = {counts.kept:,} kept{dropped} + {counts.bad:,} bad"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table: the first column to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)
    return "\n".join(lines)
