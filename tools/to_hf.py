"""`megaspark to-hf`: a checkpoint of any layout becomes a Hugging Face folder that has proven itself before it exists.

The weights are rounded from the fp32 masters, streamed one output file at a time; no GPU and no DeepSpeed process is needed.
Before the folder gets its name, transformers loads it and must compute our logits to < 1e-5 in fp32, with the trained weights
and with probe weights whose scale exposes every mistake in RoPE, eps or head order that trained ones would hide; and its
tokenizer must encode an adversarial set exactly as training did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from megaspark import __version__, checkpoint, hf, hf_tokenizers
from megaspark.checkpoint import Checkpoint
from megaspark.errors import UserError
from megaspark.flops import parameters
from megaspark.manifests import sha256_of
from megaspark.models import architecture

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 1e-5  # of logits in fp32
PROBE_STD = 0.2  # at the usual .02 a wrong RoPE layout moves logits by 2e-2 only; at .2 by 13
PROBE_LAYERS = 2


def main(argv: list[str]) -> int:
    """Converts, proves and names the folder; returns the exit status."""
    args = _parser().parse_args(argv)
    source = checkpoint.newest(Path(args.checkpoint))
    problem = source.problem()
    if problem:
        raise UserError(problem)
    out = Path(args.out)
    if out.exists() and not args.force:
        raise UserError(f"{out} exists; choose another folder, or --force to replace it")
    module = architecture(source.state["config"]["model"]["arch"])
    config = module.Config(**source.state["config"]["model"])
    tokenizer = _tokenizer(source, args.tokenizer)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(source, module, config, tokenizer, partial, DTYPES[args.dtype], _bytes(args.max_shard))
        proof = _prove(source, module, config, tokenizer, partial, DTYPES[args.dtype])
        (partial / "README.md").write_text(_card(source, config, args.dtype, proof))
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print("\n".join([*proof, f"{out}: step {source.step} of {source.folder.parent.parent}, {args.dtype}, done"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaspark to-hf",
        description="Converts a checkpoint to a Hugging Face folder and proves that transformers computes the same with it.",
        epilog="example: megaspark to-hf runs/demo demo-hf",
    )
    parser.add_argument("checkpoint", help="a step folder, or a run folder (its latest checkpoint)")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    parser.add_argument("--max-shard", default="5GB", help="largest file, such as 500MB or 5GB (default: 5GB)")
    parser.add_argument("--tokenizer", help="the tokenizer file, if it no longer lies where the run found it")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdigit() or int(number) < 1:
        raise UserError(f"--max-shard {text!r} is not a size such as 500MB or 5GB")
    return int(number) * units[unit]


def _tokenizer(source: Checkpoint, given: str | None) -> Path:
    recorded = source.state["tokenizer"]
    path = Path(given or recorded["path"])
    if not path.is_file():
        raise UserError(f"the tokenizer {path} is not there; name it with --tokenizer FILE")
    if sha256_of(path) != recorded["sha256"]:
        raise UserError(f"{path} is not the tokenizer of this run (its sha256 should be {recorded['sha256'][:12]}...)")
    return path


def _write(
    source: Checkpoint, module: Any, config: Any, tokenizer: Path, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Weights, config, generation config and tokenizer files into `folder`."""
    names = hf.hf_names(module.HF_NAMES, list(source.shapes))
    ours = {theirs: name for name, theirs in names.items()}
    shapes = {theirs: source.shapes[name] for theirs, name in ours.items()}
    written = hf.write_safetensors(folder, shapes, lambda name: source.tensor(ours[name]), dtype, max_shard_bytes)
    for _ in tqdm(written, total=len(shapes), desc="tensors", file=sys.stderr, disable=not sys.stderr.isatty()):
        pass
    max_length = int(source.state["config"]["data"]["seq"])
    hf_tokenizers.write_tokenizer(tokenizer, folder, max_length=max_length, add_bos=source.state["tokenizer"]["prepend_bos"])
    ids = json.loads((folder / "tokenizer_config.json").read_text())
    special = _special_ids(folder, ids)
    card = module.hf_config(config, max_length) | special | {"dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, **special}, indent=2) + "\n")


def _special_ids(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id, as far as the exported tokenizer names them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = {kind: tokenizer_config.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    found = {f"{kind}_token_id": tokenizer.token_to_id(token) for kind, token in named.items() if token}
    return {key: number for key, number in found.items() if number is not None}


def _prove(source: Checkpoint, module: Any, config: Any, tokenizer: Path, folder: Path, dtype: torch.dtype) -> list[str]:
    """Loads the folder with transformers and holds it against ours; returns what was shown, raises RuntimeError if it fails."""
    fits = 2.5 * 4 * parameters(config.shape, config.tie_embeddings) < _available_bytes()
    layers = config.layers if fits else min(config.layers, PROBE_LAYERS)
    shallow = config.model_copy(update={"layers": layers})
    ours = module.Model(shallow)
    theirs = _load(folder, layers, config.layers)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(source.tensor(name).to(dtype))
    trained = _difference(ours, theirs, config.vocab)
    _probe(ours, theirs, module)
    probed = _difference(ours, theirs, config.vocab)
    depth = "" if fits else f" of the first {layers} of {config.layers} layers (all do not fit in memory)"
    for what, difference in (("trained", trained), ("probe", probed)):
        if not difference < TOLERANCE:
            raise RuntimeError(f"transformers computes other logits than we do with {what} weights: off by {difference:.2e}")
    texts = hf_tokenizers.adversarial_texts(5000, seed=0)
    wrong = hf_tokenizers.check_tokenizer(tokenizer, folder, texts)
    if wrong:
        raise RuntimeError(f"the exported tokenizer differs on {len(wrong)} of {len(texts)} texts, first {wrong[0][:60]!r}")
    return [
        f"logits{depth} equal transformers' to {trained:.1e} (trained weights) and {probed:.1e} (probe weights), fp32",
        f"{len(texts):,} adversarial texts tokenize as in training",
    ]


def _load(folder: Path, layers: int, all_layers: int) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, num_hidden_layers=layers, output_loading_info=True, local_files_only=True
    )
    wrong = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if layers < all_layers:
        wrong.pop("unexpected_keys", None)  # the layers left out
    if wrong:
        raise RuntimeError(f"transformers does not find its tensors in {folder}: {wrong}")
    return model.eval()


def _probe(ours: nn.Module, theirs: nn.Module, module: Any) -> None:
    """Gives both models the same probe weights: std .2, norm weights uniform in [.5, 1.5]."""
    generator = torch.Generator().manual_seed(0)
    own = dict(ours.named_parameters())
    names = hf.hf_names(module.HF_NAMES, list(own))
    hf_parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            fill = torch.empty(parameter.shape)
            if parameter.ndim == 1:
                fill.uniform_(0.5, 1.5, generator=generator)
            else:
                fill.normal_(0.0, PROBE_STD, generator=generator)
            parameter.copy_(fill)
            hf_parameters[names[name]].copy_(fill)


@torch.no_grad()
def _difference(ours: nn.Module, theirs: nn.Module, vocab: int) -> float:
    """The largest difference of two models' fp32 logits over random tokens [2, 64]."""
    tokens_BS = torch.randint(vocab, (2, 64), generator=torch.Generator().manual_seed(1))
    return (ours(tokens_BS) - theirs(tokens_BS).logits).abs().max().item()


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _card(source: Checkpoint, config: Any, dtype: str, proof: list[str]) -> str:
    """The model card: what this is and what it was made from."""
    state = source.state
    shape = ", ".join(f"{key} {value}" for key, value in config.model_dump().items() if value is not None)
    rows = {
        "architecture": shape,
        "parameters": f"{parameters(config.shape, config.tie_embeddings):,}",
        "weights": f"{dtype}, rounded from the fp32 masters",
        "step": f"{state['step']:,}",
        "tokens seen": f"{state['tokens']:,}",
        "training data": f"sha256 {state['identity']['training data sha256']}",
        "tokenizer": f"sha256 {state['tokenizer']['sha256']}",
        "config": f"sha256 {state['config_sha256']}",
        "checkpoint by": state["written_by"],
        "converted by": f"megaspark {__version__}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    proven = "\n".join(f"- {line}" for line in proof)
    return f"# {state['config']['run']['name']}\n\n| | |\n|---|---|\n{table}\n\nShown when it was made:\n{proven}\n"
