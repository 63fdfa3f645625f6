"""What a job would drop, and why, told from a sample of its input; nothing is written.

The sample is the first documents of several files spread over the input: a shuffled corpus such as SlimPajama is well told by
it, one that is sorted within its files is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from megaspark.data_prep.documents import BadInput, Document, read_documents
from megaspark.data_prep.jobs import InputFile, Job
from megaspark.data_prep.outputs import table
from megaspark.data_prep.steps import Step, apply_steps, load_steps
from megaspark.shards import Counts

SAMPLE_DOCUMENTS = 10_000
_MAX_FILES = 32
_EXAMPLES = 3
_EXAMPLE_CHARS = 120


@dataclass(frozen=True)
class Example:
    """A document that was dropped, or a bad line; `line` is None for a whole file, `says` its text or what is wrong with it."""

    file: str
    line: int | None
    says: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.says[:_EXAMPLE_CHARS]!r}"


@dataclass
class Report:
    """What became of a sample; `examples` has up to three of each reason, `rewritten` is how many kept texts a step changed."""

    files: int
    all_files: int
    counts: Counts = field(default_factory=Counts)
    rewritten: int = 0
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def __str__(self) -> str:
        """The table of reasons with counts and shares, and the examples."""
        head = f"{self.counts.read:,} documents from {self.files:,} of {self.all_files:,} files; nothing was written"
        sections = (
            f"{reason}\n" + "\n".join(f"  {example}" for example in self.examples[reason]) for reason in self._reasons()
        )
        return "\n\n".join([head, table(list(self._rows())), *sections])

    def _reasons(self) -> list[str]:
        """The reasons that have examples, as they come in the table."""
        dropped = sorted(self.counts.dropped, key=lambda reason: (-self.counts.dropped[reason], reason))
        return [*dropped, "bad"] if self.counts.bad else dropped

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        numbers = {"kept": self.counts.kept, **self.counts.dropped, "bad": self.counts.bad}
        yield "reason", "documents", "share"
        for name in ("kept", *self._reasons()):
            yield name, f"{numbers[name]:,}", f"{100 * numbers[name] / max(self.counts.read, 1):.2f} %"
        if self.rewritten:
            yield "(kept, rewritten)", f"{self.rewritten:,}", f"{100 * self.rewritten / self.counts.read:.2f} %"


def report(job: Job, sample_documents: int = SAMPLE_DOCUMENTS) -> Report:
    """Runs the steps of a job on about `sample_documents` documents, at most 32 files' worth; reads only, and little.

    Bad lines count as documents read, whatever `on_bad_input` says. Raises OSError for a file that cannot be read.
    """
    files, steps = list(job.files), load_steps(job.settings.steps)
    chosen = [file.path for file in spread(files, min(_MAX_FILES, sample_documents))]
    result = Report(len(chosen), len(files))
    for k, path in enumerate(chosen):
        left = sample_documents - result.counts.read
        items = read_documents(path, job.settings.text_field, job.settings.source_field)
        for item in islice(items, -(-left // (len(chosen) - k))):  # what a short file lacks, the next ones give
            _count(job, item, steps, result)
    return result


def spread(files: Sequence[InputFile], count: int) -> list[InputFile]:
    """At most `count` of the files, evenly spread: the middle of each of so many equal stretches."""
    count = min(count, len(files))
    return [files[(2 * k + 1) * len(files) // (2 * count)] for k in range(count)]


def _count(job: Job, item: Document | BadInput, steps: list[Step], result: Report) -> None:
    """Enters one document or bad line into the report."""
    counts = result.counts
    counts.read += 1
    if isinstance(item, BadInput):
        counts.bad += 1
        _show(result, "bad", Example(item.file, item.line, item.reason))
        return
    done = apply_steps(item, steps)
    if isinstance(done, Document) and not done.text.strip() and not len(job.encoder().encode_batch([done.text])[0]):
        done = "empty"  # a tokenizer may make nothing of a text of spaces
    if isinstance(done, str):
        counts.drop(done)
        _show(result, done, Example(item.file, item.line, item.text))
    else:
        counts.kept += 1
        result.rewritten += done is not item


def _show(result: Report, reason: str, example: Example) -> None:
    shown = result.examples.setdefault(reason, [])
    if len(shown) < _EXAMPLES:
        shown.append(example)
