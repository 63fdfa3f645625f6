"""`megaspark train-tokenizer INPUT... --out FILE`: a SentencePiece BPE tokenizer with Llama's ids, fit for prose and code.

Text goes through it unchanged: no normalization, no dummy prefix, bytes where a character is unknown. So decoding gives back
what was encoded, and Hugging Face's `tokenizers` can be made equal to it. Runs of spaces may be pieces; digits stand alone.
"""

from __future__ import annotations

import argparse
import glob
import io
import sys
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from megaspark.data_prep.documents import SUFFIXES, BadInput, read_documents
from megaspark.errors import UserError
from megaspark.manifests import write_atomically

MEGABYTE = 1_000_000
HELD_OUT_EVERY = 50  # documents
# All of ASCII are pieces even where rare. Everything else is said, for SentencePiece's defaults change text.
OPTIONS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "required_chars": "\n\t" + "".join(map(chr, range(33, 127))),
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "max_sentence_length": 1 << 30,  # whole documents are given, so that newlines are learnt as text
    "num_threads": 1,  # the same bytes every time
    "minloglevel": 2,
}


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="megaspark train-tokenizer",
        description="Trains a SentencePiece BPE tokenizer (byte fallback, identity normalization, Llama's ids).",
        epilog="example: megaspark train-tokenizer data/demo/corpus/train --vocab 4096 --out data/demo/tokenizer.model",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=f"files ({', '.join(SUFFIXES)}), folders of them, or globs")
    parser.add_argument("--vocab", type=int, default=4096, help="number of pieces (default: 4096)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .model to write; a finished one is reused")
    parser.add_argument("--megabytes", type=float, default=12, help="text to learn from, at most, evenly by file (default: 12)")
    parser.add_argument("--text-field", default="text", help="the JSON key of the text (default: text)")
    parser.add_argument("--force", action="store_true", help="train anew even if FILE is there")
    args = parser.parse_args(argv)
    if args.out.suffix != ".model":
        raise UserError(f"--out {args.out}: the file's name should end in .model")
    if args.megabytes <= 0:
        raise UserError(f"--megabytes {args.megabytes:g}: must be above 0")
    if not args.force and is_finished(args.out, args.vocab):
        print(f"{args.out} is finished already; reused (--force trains it anew)")
        return 0
    texts, held_out = read_sample(find_files(args.inputs), args.text_field, round(args.megabytes * MEGABYTE))
    model = train(texts, args.vocab)
    report = measure(model, held_out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, model)
    print(f"{args.out}: {args.vocab:,} pieces, {report}")
    return 0


def is_finished(out: Path, vocab: int) -> bool:
    """Whether `out` is a tokenizer of `vocab` pieces; raises UserError if it is something else."""
    if not out.exists():
        return False
    try:
        found = sentencepiece.SentencePieceProcessor(model_file=str(out)).vocab_size()
    except (RuntimeError, OSError):
        raise UserError(f"{out} exists and is no tokenizer; --force replaces it") from None
    if found != vocab:
        raise UserError(f"{out} is a tokenizer of {found:,} pieces, not {vocab:,}; --force replaces it")
    return True


def find_files(inputs: list[str]) -> list[Path]:
    """The files that `inputs` (files, folders, globs) name, sorted; raises UserError for one that names none."""
    files: set[Path] = set()
    for name in inputs:
        if Path(name).is_dir():
            found = [p for p in Path(name).rglob("*") if p.name.endswith(SUFFIXES)]
        else:
            found = [Path(p) for p in glob.glob(name, recursive=True)]
        if not found:
            raise UserError(f"no text in {name}: no file ending in {', '.join(SUFFIXES)}")
        files.update(found)
    return sorted(files)


def read_sample(files: list[Path], text_field: str, limit_bytes: int) -> tuple[list[str], list[str]]:
    """(texts to learn from, held-out texts): the first documents of each file up to its even share of `limit_bytes`.

    Every 50th document is held out. Bad lines are counted on stderr. Raises UserError if there is too little of either.
    """
    texts: list[str] = []
    held_out: list[str] = []
    bad = 0
    for path in tqdm(files, desc="reading", unit=" files", disable=None):
        room = limit_bytes // len(files)
        for item in read_documents(str(path), text_field, "meta.redpajama_set_name"):
            if isinstance(item, BadInput):
                bad += 1
                continue
            room -= len(item.text.encode())
            if room < 0:
                break
            (texts if (len(texts) + len(held_out) + 1) % HELD_OUT_EVERY else held_out).append(item.text)
    if bad:
        print(f"{bad:,} bad lines left out (megaspark prep names each)", file=sys.stderr)
    if not held_out:
        raise UserError(f"only {len(texts)} documents to learn from; {HELD_OUT_EVERY} are the least")
    return texts, held_out


def train(texts: list[str], vocab: int) -> bytes:
    """Trains on whole documents; returns the `.model` file's content. Raises UserError for an impossible vocabulary."""
    size = sum(len(text.encode()) for text in texts)
    print(
        f"training on {len(texts):,} documents, {size / MEGABYTE:.1f} MB ...",
        flush=True,
    )
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=content, vocab_size=vocab, **OPTIONS
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition(")")[2].strip() or str(error)
        raise UserError(f"SentencePiece cannot train {vocab:,} pieces on this text: {reason}") from None
    return content.getvalue()


def measure(model: bytes, texts: list[str]) -> str:
    """Encodes held-out texts and says how well; raises RuntimeError if decoding does not give one of them back."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = 0
    for text in texts:
        ids = processor.encode(text)
        tokens += len(ids)
        if processor.decode(ids) != text.replace("\u2581", " "):  # the one character that SentencePiece takes for a space
            raise RuntimeError(f"the tokenizer does not give back a text: {text[:80]!r} ...")
    size = sum(len(text.encode()) for text in texts)
    return f"{size / tokens:.2f} bytes a token on {len(texts):,} held-out documents ({size / MEGABYTE:.2f} MB)"
