"""Measures MinHash signatures per CPU second, ours and datasketch's, on the same texts in one run; prints a JSON line each.

    python -m megaspark.tools.bench_dedup --input 'corpus/**/*.jsonl.zst' --mb 4

Single thread each, the two in turns, the best of the rounds. A library that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

from megaspark.data_prep.documents import Document, read_documents
from megaspark.data_prep.minhash import MinHasher
from megaspark.data_prep.sources import find_inputs
from megaspark.errors import UserError

SETTINGS = {"slimpajama": ("char", 13, 128), "stack": ("word", 5, 250)}


def main(argv: list[str]) -> int:
    """Prints a JSON line for each setting and library, and the ratio; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m megaspark.tools.bench_dedup", description=__doc__.split("\n")[0])
    parser.add_argument("--input", required=True, help="a file or glob of documents")
    parser.add_argument("--mb", type=float, default=2.0, help="millions of characters to use (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the best counts (default: 3)")
    arguments = parser.parse_args(argv)
    texts = read_texts(arguments.input, int(arguments.mb * 1e6))
    for line in measure(texts, arguments.rounds):
        print(json.dumps(line), flush=True)
    return 0


def read_texts(pattern: str, most_chars: int) -> list[str]:
    """The first texts of the input, about `most_chars` characters together; raises UserError if there is none."""
    texts: list[str] = []
    chars = 0
    for file in find_inputs([pattern]):
        for item in read_documents(file.path, "text", ""):
            if chars >= most_chars:
                return texts
            if isinstance(item, Document):
                texts.append(item.text)
                chars += len(item.text)
    if not texts:
        raise UserError(f"{pattern}: no document in it")
    return texts


def measure(texts: Sequence[str], rounds: int = 3) -> Iterator[dict[str, object]]:
    """Yields a line for each setting: signatures and characters a CPU second of both, and how many times faster ours are."""
    chars = sum(map(len, texts))
    for name, (of, n, permutations) in SETTINGS.items():
        runs = {"megaspark": _ours(texts, of, n, permutations)}
        if find_spec("datasketch"):
            runs["datasketch"] = _datasketch(texts, of, n, permutations)
        seconds = {library: min(times) for library, times in _in_turns(runs, rounds).items()}
        line: dict[str, object] = {"bench": "minhash", "setting": name, "documents": len(texts), "chars": chars}
        for library, cpu_s in seconds.items():
            line[f"{library}_signatures_per_s"] = round(len(texts) / cpu_s, 1)
            line[f"{library}_mchars_per_s"] = round(chars / cpu_s / 1e6, 2)
        if "datasketch" in seconds:
            yield {**line, "ratio": round(seconds["datasketch"] / seconds["megaspark"], 1)}
        else:
            yield {**line, "left_out": "datasketch is not installed"}


def _in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {library: [] for library in runs}
    for _ in range(rounds):
        for library, run in runs.items():
            start_s = time.process_time()
            run()
            times[library].append(time.process_time() - start_s)
    return times


def _ours(texts: Sequence[str], of: str, n: int, permutations: int) -> Callable[[], None]:
    hasher = MinHasher(n, of, permutations)
    hasher.signatures(["a first text, to build the tables"])

    def run() -> None:
        for begin in range(0, len(texts), 32):
            hasher.signatures(texts[begin : begin + 32])

    return run


def _datasketch(texts: Sequence[str], of: str, n: int, permutations: int) -> Callable[[], None]:
    """The fastest way that datasketch offers: sets of n-grams as bytes, in bulk, permutations made once."""
    import re

    import datasketch

    word = re.compile(r"\w+")

    def grams(text: str) -> set[bytes]:
        text = text.strip().lower()
        if of == "char":
            return {text[i : i + n].encode() for i in range(max(1, len(text) - n + 1))}
        words = word.findall(text)
        return {" ".join(words[i : i + n]).encode() for i in range(max(1, len(words) - n + 1))}

    def run() -> None:
        for _ in datasketch.MinHash.generator(map(grams, texts), num_perm=permutations):
            pass

    return run


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
