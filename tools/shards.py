"""`megaspark shards show|verify|decode PATH`: looks at token datasets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megaspark.data_prep.encode import Encoder, load_tokenizer
from megaspark.data_prep.outputs import table
from megaspark.errors import UserError
from megaspark.shards import Manifest, TokenDataset, datasets_in, sha256_of, verify

_EXAMPLE = """examples:
  megaspark shards show data/slimpajama
  megaspark shards verify data/slimpajama
  megaspark shards decode data/slimpajama/RedPajamaC4 0
  megaspark shards decode runs/llama-3b --samples 81920:81936"""


def main(argv: list[str]) -> int:
    """Runs one of the three; returns 0, or 1 if `verify` found something wrong."""
    parser = argparse.ArgumentParser(
        prog="megaspark shards",
        description="Shows what token datasets hold, checks every byte of them, prints a document or a run's training samples.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["show", "verify", "decode"])
    parser.add_argument("path", type=Path, help="a dataset, or a folder of datasets; with --samples: a run")
    parser.add_argument("document", type=int, nargs="?", help="decode: the number of the document, from 0")
    parser.add_argument("--samples", metavar="A:B", help="decode: samples A to B - 1 of a run, in the order of its training")
    arguments = parser.parse_args(argv)
    asked = (arguments.document is not None) + (arguments.samples is not None)
    if asked != (arguments.action == "decode"):
        parser.error("decode PATH DOCUMENT or decode RUN --samples A:B says what to decode; show PATH and verify PATH do not")
    if arguments.samples is not None:
        for text in decode_samples(arguments.path, arguments.samples):
            print(text)
        return 0
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
    return _tokenizer(dataset).decode(dataset.document(number))


def decode_samples(run: Path, asked: str) -> Iterator[str]:
    """For each of samples "A:B" of a run, a line that says where it is from, and its text: all that the model is shown.

    Reads the run's config.yaml; a relative data.train in it counts from here, as it does for `megaspark pretrain`.
    """
    from megaspark.config import load_config, open_datasets  # they bring torch along
    from megaspark.samples import Samples

    first, colon, end = asked.partition(":")
    if not (first.isdigit() and colon and end.isdigit() and int(first) < int(end)):
        raise UserError(f"--samples {asked} is not of the form A:B with A below B, such as 64:72")
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run: it has no config.yaml")
    config, _ = load_config(run / "config.yaml", [])
    datasets = open_datasets(config.data.train)
    samples = Samples(datasets, config.data.phases, config.run.seed)
    tokenizer = _tokenizer(next(iter(datasets.values())))
    for index in range(int(first), int(end)):
        dataset, number = samples.locate(index)
        yield f"== sample {index}: {samples.names[dataset]} {number}\n{tokenizer.decode(samples[index])}"


def _tokenizer(dataset: TokenDataset) -> Encoder:
    """The tokenizer that a dataset carries; raises UserError if it is not the one that made it."""
    path = dataset.folder / dataset.manifest.tokenizer
    if not path.is_file() or sha256_of(path) != dataset.manifest.tokenizer_sha256:
        raise UserError(f"{path}: missing, or not the tokenizer that the dataset was made with")
    return load_tokenizer(path)


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
