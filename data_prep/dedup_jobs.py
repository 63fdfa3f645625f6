"""What a dedup job is: its settings, its input files cut into units, and the output folder that it owns.

OUTPUT/.work/job.json        what the job is; while .work is there, the output is not finished
OUTPUT/.work/STAGE/          the work in progress
OUTPUT/manifest.json         written last, when OUTPUT/duplicates is whole
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megaspark import settings
from megaspark.data_prep.duplicates import DuplicateSet
from megaspark.data_prep.minhash import MinHasher, best_bands
from megaspark.data_prep.sketches import BandKeys, ExactKeys, Keys, Reader
from megaspark.data_prep.sources import InputFile, Inputs, find_inputs
from megaspark.data_prep.workers import LOCK, locked
from megaspark.errors import UserError
from megaspark.manifests import MANIFEST, UNFINISHED, write_atomically

_JOB = "job.json"
_FREE = {"input", "output", "workers", "memory_mb"}  # settings that decide no byte of the output


class MinHash(settings.Section):
    """Documents of Jaccard similarity over about `jaccard`; `bands` and `rows` follow from it if they are not given."""

    ngram: int = Field(default=13, gt=0, le=1000)
    of: Literal["char", "word"] = "char"
    normalize: Literal["lower", "bare"] = "lower"
    permutations: int = Field(default=128, gt=0, le=4096)
    jaccard: float = Field(default=0.8, gt=0, lt=1)
    bands: int | None = Field(default=None, gt=0)
    rows: int | None = Field(default=None, gt=0)
    seed: int = Field(default=1, ge=0, lt=1 << 64)

    @model_validator(mode="after")
    def _whole(self) -> MinHash:
        if (self.bands is None) != (self.rows is None):
            raise ValueError("bands and rows are given together, or follow from jaccard")
        if self.bands and self.rows and self.bands * self.rows > self.permutations:
            raise ValueError(f"{self.bands} bands of {self.rows} rows take {self.bands * self.rows} permutations")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Bands and rows."""
        return (self.bands, self.rows) if self.bands and self.rows else best_bands(self.jaccard, self.permutations)

    def keys(self) -> Keys:
        """How documents are compared; numbers of the signature that no band uses are not computed."""
        bands, rows = self.shape
        return BandKeys(MinHasher(self.ngram, self.of, bands * rows, self.seed, self.normalize), bands, rows)


class Exact(settings.Section):
    """Documents of the very same text."""


class Method(settings.Section):
    """One way to compare documents."""

    minhash: MinHash | None = None
    exact: Exact | None = None

    @model_validator(mode="after")
    def _one(self) -> Method:
        if (self.minhash is None) == (self.exact is None):
            raise ValueError("give one of minhash and exact, such as method: {exact: {}}")
        return self


class Score(settings.Section):
    """Keeps the document with the highest (or lowest) number in a field, which may be dotted."""

    score: str
    highest: bool = True


class DedupSettings(settings.Section):
    """A dedup job as its YAML file says it; of equally good documents the first in the sorted input is kept.

    `memory_mb` is what one process may fill besides Python, its libraries and a batch of documents, about 150 MB together; a
    document longer than 256 K characters takes up to 70 bytes a character more.
    """

    input: Inputs
    output: str
    method: Method
    keep: Literal["first", "longest"] | Score = "first"
    text_field: str = "text"
    unit_mb: float = Field(default=1024, gt=0)
    memory_mb: int = Field(default=1024, ge=8)
    workers: int | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class DedupJob:
    """A checked job: its settings and its input, cut into units of consecutive files."""

    settings: DedupSettings
    units: tuple[tuple[InputFile, ...], ...]

    @property
    def output(self) -> Path:
        """The folder that the job fills."""
        return Path(self.settings.output)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output, as JSON."""
        inputs = [[file.path, file.size_bytes, file.version] for unit in self.units for file in unit]
        return {"settings": self.settings.model_dump(mode="json", exclude=_FREE), "inputs": inputs}

    def reader(self) -> Reader:
        """What the first stage must know."""
        chosen = self.settings
        keys = chosen.method.minhash.keys() if chosen.method.minhash else ExactKeys()
        by_field = chosen.keep if isinstance(chosen.keep, Score) else Score(score="")
        score = "field" if by_field.score else str(chosen.keep).removeprefix("first")
        memory_bytes = chosen.memory_mb << 20
        return Reader(keys, chosen.text_field, score, by_field.score, by_field.highest, memory_bytes)


def load_job(path: str, overrides: Sequence[str]) -> DedupJob:
    """Reads and checks a job file and finds its input; raises UserError, nothing is written yet."""
    chosen, _ = settings.load(path, overrides, DedupSettings)
    return DedupJob(chosen, tuple(_units(find_inputs(chosen.input), int(chosen.unit_mb * (1 << 20)))))


def _units(files: Sequence[InputFile], most_bytes: int) -> Iterator[tuple[InputFile, ...]]:
    group: list[InputFile] = []
    for file in files:
        if group and sum(f.size_bytes for f in group) + file.size_bytes > most_bytes:
            yield tuple(group)
            group = []
        group.append(file)
    yield tuple(group)


@contextmanager
def claimed(job: DedupJob) -> Iterator[bool]:
    """Takes the output for this job alone; yields whether it was finished before. Raises UserError if it is another's."""
    _check_owner(job)
    job.output.mkdir(parents=True, exist_ok=True)
    with locked(job.output):
        finished = _check_owner(job)  # again, for it may have finished in between
        work = job.output / UNFINISHED
        if finished:
            shutil.rmtree(work, ignore_errors=True)  # killed between the two last steps
        else:
            work.mkdir(exist_ok=True)
            write_atomically(work / _JOB, json.dumps(job.identity()).encode())
        yield finished


def _check_owner(job: DedupJob) -> bool:
    """Whether the output holds this very job, finished."""
    output, now = job.output, job.identity()
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {output} is a file")
    finished = (output / MANIFEST).exists()
    if finished:
        done = DuplicateSet.load(output)
        before = {"settings": done.settings, "inputs": [[f.path, f.size_bytes, f.version] for f in done.files]}
    elif (output / UNFINISHED / _JOB).exists():
        before = json.loads((output / UNFINISHED / _JOB).read_bytes())
    else:
        others = [p.name for p in output.iterdir() if p.name not in (LOCK, UNFINISHED)] if output.exists() else []
        if others:
            raise UserError(f"output: {output} holds other files ({min(others)}); give an empty or a new folder")
        return False
    if before != now:
        changed = [key for key in now["settings"] if before["settings"].get(key) != now["settings"][key]]
        what = ", ".join(changed) if changed else "input files"
        raise UserError(f"{output} was begun otherwise: changed since: {what}; give another output, or remove this one")
    return finished
