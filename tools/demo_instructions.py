"""`megaspark demo-instructions CORPUS OUT`: questions, answers and preference pairs out of the demo corpus, for SFT and DPO.

Every documented class, function and method of the standard library becomes a question ("What does textwrap.dedent(text) do?") and
its answer, the first sentence of its docstring. A preference pair has that sentence as chosen and, as rejected, just as many words
from further on in the same docstring: text of the same style about the same thing, which does not answer the question. Whole
modules are held out for validation, by the hash of their names, and answers that training has too are left out of it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
import zstandard

from megaspark.errors import UserError
from megaspark.manifests import fsync_folder, write_atomically

SET = "PythonDocstrings"
VALIDATION_SHARE = 0.1  # of the modules
HEADER = re.compile(r"(?P<indent> {0,4})(?P<name>[\w.]+)\((?P<arguments>.*)\)")
ANSWER_CHARS = (20, 240)
QUESTION_CHARS = 200
REJECTED_WORDS = 4  # at least


@dataclass(frozen=True)
class Entry:
    """A documented thing: its full name, its arguments and its docstring in one line a paragraph."""

    name: str
    arguments: str
    paragraphs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The question, up to where the answer begins."""
        return f"Question: What does {self.name}({self.arguments}) do?\nAnswer:"

    @property
    def answer(self) -> str | None:
        """The first sentence of the docstring, if it is one."""
        sentence = re.split(r"(?<=[a-z)\d]\.)\s", self.paragraphs[0], maxsplit=1)[0]
        fits = ANSWER_CHARS[0] <= len(sentence) <= ANSWER_CHARS[1]
        return sentence if fits and sentence[0].isupper() and sentence.endswith(".") else None

    @property
    def digression(self) -> str | None:
        """As many words as the answer has, from behind it; None if there are hardly any."""
        answer = self.answer or ""
        words = " ".join(self.paragraphs).removeprefix(answer).split()[: len(answer.split())]
        return " ".join(words) if len(words) >= REJECTED_WORDS else None


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="megaspark demo-instructions",
        description="Makes instructions (prompt, completion) and preferences (prompt, chosen, rejected) out of the demo corpus.",
        epilog="example: megaspark demo-instructions data/demo/text data/demo/instructions",
    )
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="a folder that `megaspark demo-corpus` wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} exists; choose another folder, or --force to replace it")
    entries = sorted({entry.prompt: entry for text in documents(args.corpus) for entry in parse(text)}.items())
    if not entries:
        raise UserError(f"{args.corpus} holds no {SET}; `megaspark demo-corpus {args.corpus}` writes them")
    write([entry for _, entry in entries], args.out)
    return 0


def documents(corpus: Path) -> Iterator[str]:
    """The texts of the docstring set in a folder of .jsonl.zst files, in the order of the files' names."""
    for path in sorted(corpus.rglob("*.jsonl.zst")):
        with zstandard.open(path, "rb") as file:
            for line in io.BufferedReader(file):
                document = orjson.loads(line)
                if document.get("meta", {}).get("redpajama_set_name") == SET:
                    yield document["text"]


def parse(text: str) -> Iterator[Entry]:
    """The class or function of one document, and its methods, as `megaspark demo-corpus` lays them out."""
    lines = text.split("\n")
    headers = [i for i, line in enumerate(lines) if i == 0 or (not lines[i - 1] and _is_method(lines, i))]
    owner = lines[0].partition("(")[0]
    for start, end in zip(headers, [*headers[1:], len(lines)], strict=True):
        match = HEADER.fullmatch(lines[start])
        paragraphs = [" ".join(part.split()) for part in "\n".join(lines[start + 1 : end]).split("\n\n")]
        paragraphs = [part for part in paragraphs if part]
        if match and paragraphs:
            name = match["name"] if start == 0 else f"{owner}.{match['name']}"
            yield Entry(name, re.sub(r"^(self|cls)(, )?", "", match["arguments"]), tuple(paragraphs))


def _is_method(lines: list[str], i: int) -> bool:
    match = HEADER.fullmatch(lines[i])
    return bool(match) and match["indent"] == " " * 4 and i + 1 < len(lines) and lines[i + 1].startswith(" " * 8)


def held_out(entry: Entry) -> bool:
    """Whether its module is one of validation."""
    module = ".".join(entry.name.split(".")[:2])
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4]) < VALIDATION_SHARE * 2**32


def write(entries: list[Entry], out: Path) -> None:
    """Writes OUT/instructions and OUT/preferences, {train, validation}.jsonl each, whole or not at all; prints the counts."""
    usable = [e for e in entries if e.answer and len(e.prompt) <= QUESTION_CHARS]
    tables = {
        "instructions": [(e, {"prompt": e.prompt, "completion": f" {e.answer}"}) for e in usable],
        "preferences": [
            (e, {"prompt": e.prompt, "chosen": f" {e.answer}", "rejected": f" {e.digression}"}) for e in usable if e.digression
        ],
    }
    learned = {e.answer for e in usable if not held_out(e)}
    known = sum(held_out(e) and e.answer in learned for e in usable)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    for name, rows in tables.items():
        (partial / name).mkdir(parents=True)
        for part, wanted in (("train", False), ("validation", True)):
            chosen = (row for e, row in rows if held_out(e) == wanted and not (wanted and e.answer in learned))
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen]
            write_atomically(partial / name / f"{part}.jsonl", "".join(lines).encode())
            print(f"{name:14}{part:12}{len(lines):8,}")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    fsync_folder(out.parent)
    print(f"left out: {len(entries) - len(usable):,} of {len(entries):,}, whose docstring begins with no sentence of fit length,")
    print(f"          and {known:,} of validation, whose answer training has too")
    print(f"written: {out}")
