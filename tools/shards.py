"""`megaspark shards show|verify|decode PATH`: looks at token datasets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megaspark.data_prep.encode import load_tokenizer
from megaspark.data_prep.outputs import table
from megaspark.errors import UserError
from megaspark.shards import Manifest, TokenDataset, datasets_in, sha256_of, verify

_EXAMPLE = """examples:
  megaspark shards show data/slimpajama
  megaspark shards verify data/slimpajama
  megaspark shards decode data/slimpajama/RedPajamaC4 0"""


def main(argv: list[str]) -> int:
    """Runs one of the three; returns 0, or 1 if `verify` found something wrong."""
    parser = argparse.ArgumentParser(
        prog="megaspark shards",
        description="Shows what token datasets hold, checks every byte of them, or prints one document.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["show", "verify", "decode"])
    parser.add_argument("path", type=Path, help="a dataset, or a folder of datasets")
    parser.add_argument("document", type=int, nargs="?", help="decode: the number of the document, from 0")
    arguments = parser.parse_args(argv)
    if (arguments.document is None) == (arguments.action == "decode"):
        parser.error("decode PATH DOCUMENT takes the number of a document; show PATH and verify PATH do not")
    datasets = datasets_in(arguments.path)
    if arguments.action == "verify":
        return _verify(datasets)
    print(show(datasets) if arguments.action == "show" else decode(arguments.path, datasets, arguments.document))
    return 0


def show(datasets: dict[str, Path]) -> str:
    """A table of the datasets: a row for each source that went into them, then the tokenizers."""
    manifests = {name: TokenDataset(folder).manifest for name, folder in datasets.items()}
    all_tokens = sum(manifest.tokens for manifest in manifests.values())
    rows = [("dataset", "source", "documents", "tokens", "share", "bytes/token", "shards")]
    for name, manifest in manifests.items():
        for source, counts in manifest.counts.items():
            share = f"{100 * counts.tokens / all_tokens:.1f} %" if all_tokens else "-"
            ratio = f"{counts.text_bytes / counts.tokens:.3f}" if counts.tokens else "-"
            rows.append((name, source, f"{counts.kept:,}", f"{counts.tokens:,}", share, ratio, f"{len(manifest.shards):,}"))
    documents = sum(manifest.documents for manifest in manifests.values())
    n_shards = sum(len(manifest.shards) for manifest in manifests.values())
    rows.append(("all", "", f"{documents:,}", f"{all_tokens:,}", "100.0 %", "", f"{n_shards:,}"))
    tokenizers = sorted({_tokenizer_line(manifest) for manifest in manifests.values()})
    return "\n".join([table(rows), *tokenizers])


def decode(path: Path, datasets: dict[str, Path], number: int) -> str:
    """The text of a document, by the tokenizer that lies in the dataset's folder."""
    if len(datasets) > 1:
        raise UserError(f"{path} holds {len(datasets)} datasets; name one: {path / next(iter(datasets))}")
    dataset = TokenDataset(next(iter(datasets.values())))
    if not 0 <= number < dataset.documents:
        raise UserError(f"{path} has documents 0 to {dataset.documents - 1:,}, not {number:,}")
    tokenizer = dataset.folder / dataset.manifest.tokenizer
    if not tokenizer.is_file() or sha256_of(tokenizer) != dataset.manifest.tokenizer_sha256:
        raise UserError(f"{tokenizer}: missing, or not the tokenizer that the dataset was made with")
    return load_tokenizer(tokenizer).decode(dataset.document(number))


def _verify(datasets: dict[str, Path]) -> int:
    manifests = [Manifest.load(folder) for folder in datasets.values()]
    total_bytes = sum(shard.bin_bytes + shard.idx_bytes for manifest in manifests for shard in manifest.shards)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="verify", file=sys.stderr) as bar:
        problems = [line for folder in datasets.values() for line in verify(folder, bar.update)]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{len(problems)} problems" if problems else f"{len(datasets)} datasets, {total_bytes:,} bytes: all as written")
    return 1 if problems else 0


def _tokenizer_line(manifest: Manifest) -> str:
    return (
        f"tokenizer {manifest.tokenizer}, sha256 {manifest.tokenizer_sha256[:16]}..., {manifest.vocab:,} ids, "
        f"{manifest.dtype}, eos {manifest.eos_id}, bos {'none' if manifest.bos_id is None else manifest.bos_id}"
    )
