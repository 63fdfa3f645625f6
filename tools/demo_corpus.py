"""`megaspark demo-corpus OUT`: a small corpus out of the text that every Python installation has, in SlimPajama's layout.

Three sets: PythonSource (the standard library's files), PythonDocstrings (its documented classes and functions, each with its
signatures) and PythonTopics (the language reference that `help()` shows). Files are read, never imported. The same Python
version gives the same documents in the same order, wherever and however often it runs.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import zstandard
from tqdm import tqdm

from megaspark.errors import UserError
from megaspark.manifests import fsync_folder

MARK = "corpus.json"
MEGABYTE = 1_000_000
MIN_CHARS = 200  # as in SlimPajama
VALIDATION_SHARE = 0.015  # of the documents
TRAIN_FILES = 4
LEVEL = 10  # of zstd
# Not the library's own text, or not the same on every machine: installed packages, tests (often split off), build settings.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "__phello__")


@dataclass(frozen=True, slots=True)
class Item:
    """A document, its set, and its origin: documents of one origin share text and go to the same side of the split."""

    text: str
    source: str
    origin: str

    @property
    def digest(self) -> bytes:
        """sha256 of the text: by it duplicates are known and the documents shuffled."""
        return hashlib.sha256(self.text.encode()).digest()


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="megaspark demo-corpus",
        description="Writes a corpus of this Python's own source, docstrings and reference, laid out as SlimPajama is.",
        epilog="example: megaspark demo-corpus data/demo/corpus",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; a finished corpus there is reused")
    parser.add_argument("--megabytes", type=float, default=12, help="text to write, at most (default: 12)")
    parser.add_argument("--force", action="store_true", help="write anew even if a finished corpus is there")
    args = parser.parse_args(argv)
    if args.megabytes <= 0:
        raise UserError(f"--megabytes {args.megabytes:g}: must be above 0")
    if not args.force and is_finished(args.out, args.megabytes):
        print(f"{args.out} is finished already; reused (--force writes it anew)")
        return 0
    write_corpus(args.out, args.megabytes)
    return 0


def is_finished(out: Path, megabytes: float) -> bool:
    """Whether `out` holds this corpus, whole; raises UserError if it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        mark = json.loads((out / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{out} exists and holds no demo corpus: name another folder, or remove it") from None
    if mark["megabytes"] != megabytes:
        raise UserError(f"{out} holds a demo corpus of {mark['megabytes']:g} megabytes, not {megabytes:g}: --force replaces it")
    whole = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in mark["file_bytes"].items())
    if not whole:
        print(f"{out} is damaged (a file is missing or of another size); written anew", file=sys.stderr)
    return whole


def write_corpus(out: Path, megabytes: float) -> None:
    """Writes the corpus beside `out` and moves it there once it is whole; prints what went in and what was left out."""
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no demo corpus: name another folder, or remove it")
    items, dropped = unique(collect(Path(sysconfig.get_path("stdlib"))))
    items, dropped["above --megabytes"] = take(items, round(megabytes * MEGABYTE))
    train, validation = split(items)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    file_bytes = {}
    for i in range(TRAIN_FILES):
        name = f"train/chunk1/example_train_{i}.jsonl.zst"
        file_bytes[name] = _write(partial / name, train[len(train) * i // TRAIN_FILES : len(train) * (i + 1) // TRAIN_FILES])
    name = "validation/chunk1/example_holdout_0.jsonl.zst"
    file_bytes[name] = _write(partial / name, validation)
    mark = {"python": platform.python_version(), "megabytes": megabytes, "dropped": dropped, "file_bytes": file_bytes}
    (partial / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    fsync_folder(out.parent)
    _print_table({"train": train, "validation": validation}, dropped, out)


def collect(stdlib: Path) -> Iterator[Item]:
    """Every document of the three sets, in a fixed order; `stdlib` is the folder of the standard library."""
    for name in sorted(topics):
        yield Item(topics[name].strip() + "\n", "PythonTopics", f"topic {name}")
    files = sorted((p.relative_to(stdlib).as_posix(), p) for p in stdlib.rglob("*.py") if not _skipped(p.relative_to(stdlib)))
    for name, path in tqdm(files, desc="reading the standard library", unit=" files", disable=None):
        try:
            with tokenize.open(path) as file:  # in the encoding that the file declares
                text = file.read()
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            tqdm.write(f"{path}: left out ({error})", file=sys.stderr)
            continue
        yield Item(text, "PythonSource", name)
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield Item(f"{module}.{describe(node)}", "PythonDocstrings", name)


def describe(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A class or function as `help()` would show it: its signature and docstring, and those of its documented methods."""
    if isinstance(node, ast.ClassDef):
        signature = f"{node.name}({', '.join(map(ast.unparse, node.bases))})"
    else:
        signature = f"{node.name}({ast.unparse(node.args)})"
    lines = [signature, "", *_indented(ast.get_docstring(node))]
    for inner in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(inner):
            lines += ["", f"    {inner.name}({ast.unparse(inner.args)})"]
            lines += _indented("\n".join(_indented(ast.get_docstring(inner))))
    return "\n".join(lines).rstrip() + "\n"


def unique(items: Iterable[Item]) -> tuple[list[Item], Counter[str]]:
    """The documents in shuffled order (that of their digests), without short ones and exact duplicates, which are counted."""
    found: dict[bytes, Item] = {}
    dropped: Counter[str] = Counter()
    for item in items:
        if any("\ud800" <= c <= "\udfff" for c in item.text):
            dropped["not Unicode (lone surrogate)"] += 1
        elif len(item.text) < MIN_CHARS:
            dropped[f"under {MIN_CHARS} characters"] += 1
        elif item.digest in found:
            dropped["exact duplicate"] += 1
        else:
            found[item.digest] = item
    return [found[digest] for digest in sorted(found)], dropped


def split(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """(train, validation): whole origins, in the order of their hashes, go to validation until it has its share."""
    sizes = Counter(item.origin for item in items)
    chosen: set[str] = set()
    count = 0
    for origin in sorted(sizes, key=lambda origin: hashlib.sha256(origin.encode()).digest()):
        if count >= VALIDATION_SHARE * len(items):
            break
        if count + sizes[origin] <= 2 * max(1, VALIDATION_SHARE * len(items)):  # no single big file is all of it
            chosen.add(origin)
            count += sizes[origin]
    return [i for i in items if i.origin not in chosen], [i for i in items if i.origin in chosen]


def take(items: list[Item], limit_bytes: int) -> tuple[list[Item], int]:
    """The first documents that fit into `limit_bytes` of text, and how many were left."""
    total, taken = 0, []
    for item in items:
        total += len(item.text.encode())
        if total > limit_bytes and taken:
            break
        taken.append(item)
    return taken, len(items) - len(taken)


def _skipped(path: Path) -> bool:
    return bool(SKIPPED_FOLDERS & set(path.parts)) or path.name.startswith(SKIPPED_FILES) or path.parts[0].startswith("config-")


def _indented(docstring: str | None) -> list[str]:
    return [f"    {line}".rstrip() for line in (docstring or "").split("\n")]


def _write(path: Path, items: list[Item]) -> int:
    """Writes one jsonl.zst file to the disk; returns its bytes."""
    lines = [
        json.dumps({"text": item.text, "meta": {"redpajama_set_name": item.source}}, ensure_ascii=False) + "\n"
        for item in items
    ]
    data = zstandard.ZstdCompressor(level=LEVEL).compress("".join(lines).encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(path.parent)
    return len(data)


def _print_table(parts: dict[str, list[Item]], dropped: Counter[str], out: Path) -> None:
    print(f"{'':12}{'set':20}{'documents':>10}{'MB':>8}")
    for part, items in parts.items():
        for source in [*sorted({item.source for item in items}), "all"]:
            own = [item for item in items if source in (item.source, "all")]
            print(f"{part:12}{source:20}{len(own):10,}{sum(len(i.text.encode()) for i in own) / MEGABYTE:8.2f}")
    print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    print(f"written: {out}")
