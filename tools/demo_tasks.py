"""`megaspark demo-tasks CORPUS OUT`: two lm-eval tasks out of a corpus's held-out documents, so that they run offline.

`demo_next_line` asks which of four lines comes next in a document, `demo_text` how likely its text is, in bits per byte. What
is chosen depends on the documents alone: the same corpus gives the same files. OUT is a folder for lm-eval's --include_path.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
import zstandard

from megaspark.errors import UserError
from megaspark.manifests import write_atomically
from megaspark.output_folders import whole_folder

CONTEXT_CHARS = 320  # about 100 tokens: room in a context of 256
LINE_CHARS = (12, 100)  # of a line that can be asked for
CHOICES = 4
QUESTIONS_PER_DOCUMENT = 8
LINES_PER_DOCUMENT = 200  # among the wrong answers: no document gives most of them
TEXT_CHARS = 2000
VERSION = 1.0


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="megaspark demo-tasks",
        description="Makes a multiple-choice and a perplexity task for lm-eval from the documents of a corpus.",
        epilog="example: megaspark demo-tasks data/demo/text/validation data/demo/tasks",
    )
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="a folder of .jsonl.zst or .jsonl files, not trained on")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--examples", type=int, default=200, help="of each task, at most (default: 200)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if args.examples < 1:
        raise UserError(f"--examples {args.examples}: must be 1 or more")
    texts = read_texts(args.corpus)
    questions, passages = make_questions(texts)[: args.examples], make_passages(texts)[: args.examples]
    if not questions:
        raise UserError(f"{args.corpus}: its documents are too short or too few to ask for a line of them")
    with whole_folder(args.out, force=args.force, marker="demo_next_line.yaml", need_bytes=0) as partial:
        write_tasks(partial, args.out.resolve(), questions, passages)
    print(f"{args.out}: demo_next_line ({len(questions)} questions), demo_text ({len(passages)} passages)")
    return 0


def read_texts(corpus: Path) -> list[str]:
    """The documents of a folder, in an order that depends on their text alone; raises UserError where there is none."""
    files = sorted([*corpus.rglob("*.jsonl.zst"), *corpus.rglob("*.jsonl")])
    if not files:
        raise UserError(f"{corpus}: no .jsonl.zst or .jsonl in it; `megaspark demo-corpus` makes a corpus")
    texts = set()
    for path in files:
        raw = path.read_bytes()
        if path.suffix == ".zst":
            raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw), read_across_frames=True).read()
        for number, line in enumerate(raw.splitlines(), start=1):
            try:
                texts.add(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: not a JSON object with a text") from None
    return sorted(texts, key=_digest)


def make_questions(texts: list[str]) -> list[dict[str, Any]]:
    """Questions `{context, choices, answer}`: the line that follows, among lines of other documents nearest to it in length."""
    pools = [sorted(filter(_askable, set(text.splitlines())), key=_digest)[:LINES_PER_DOCUMENT] for text in texts]
    out = []
    for number, text in enumerate(texts):
        others = sorted({line for i, pool in enumerate(pools) if i != number for line in pool} - set(text.splitlines()))
        for context, line in _cuts(text):
            if len(others) < CHOICES - 1:
                return []
            draw = random.Random(_digest(context + line))
            alike = sorted(others, key=lambda other: (abs(len(other) - len(line)), _digest(other)))[: 8 * CHOICES]
            choices = [line, *draw.sample(alike, min(CHOICES - 1, len(alike)))]
            draw.shuffle(choices)
            out.append({"context": context, "choices": choices, "answer": choices.index(line)})
    return sorted(out, key=lambda question: _digest(question["context"]))


def _cuts(text: str) -> Iterable[tuple[str, str]]:
    """A few places of a document, evenly spread: what stands before a line, up to its start, and the line."""
    lines = text.splitlines(keepends=True)
    starts = list(accumulate(map(len, lines), initial=0))
    fit = [i for i, line in enumerate(lines) if starts[i] >= CONTEXT_CHARS // 2 and _askable(line)]
    count = min(QUESTIONS_PER_DOCUMENT, len(fit))
    for i in (fit[j * len(fit) // count] for j in range(count)):
        yield text[max(0, starts[i] - CONTEXT_CHARS) : starts[i]], lines[i].rstrip("\r\n")


def make_passages(texts: list[str]) -> list[dict[str, Any]]:
    """Passages `{text}`: the start of each document, up to the end of a line."""
    return [{"text": text[:TEXT_CHARS].rpartition("\n")[0] or text[:TEXT_CHARS]} for text in texts if text.strip()]


def write_tasks(folder: Path, home: Path, questions: list[dict[str, Any]], passages: list[dict[str, Any]]) -> None:
    """Writes both tasks, a YAML and a JSONL each, into a folder that will lie at `home`: lm-eval wants the data's full path."""
    own = {
        "demo_next_line": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
        },
        "demo_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }
    for name, rows in (("demo_next_line", questions), ("demo_text", passages)):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{name}.jsonl", data.encode())
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(home / f"{name}.jsonl")}},
            "test_split": "test",
            **own[name],
            "metadata": {"version": VERSION},
        }
        write_atomically(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False).encode())


def _askable(line: str) -> bool:
    return LINE_CHARS[0] <= len(line.strip()) <= LINE_CHARS[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
