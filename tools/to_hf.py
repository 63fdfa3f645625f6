"""`megaspark to-hf`: a checkpoint of any layout becomes a Hugging Face folder that has proven itself before it exists.

The weights are rounded from the fp32 masters and streamed; no GPU and no DeepSpeed process is needed. Before the folder gets
its name, transformers, made by the folder's own config, must compute our logits in fp32, block by block, with the written
weights and with probe weights whose scale exposes every mistake in RoPE, eps or head order that trained ones would hide; and
its tokenizer must encode an adversarial set exactly as training did.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megaspark import __version__, checkpoint, gguf_files, hf, hf_tokenizers, proofs
from megaspark.checkpoint import Checkpoint
from megaspark.errors import UserError
from megaspark.flops import parameters
from megaspark.manifests import sha256_of
from megaspark.model_cards import UNKNOWN, model_card, training_facts
from megaspark.models import architecture
from megaspark.output_folders import whole_folder
from megaspark.weights import parameter_shapes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GGUF_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
TEXTS = 5000


def main(argv: list[str]) -> int:
    """Converts, proves and names the folder; returns the exit status."""
    args = _parser().parse_args(argv)
    max_shard_bytes = _bytes(args.max_shard)
    source = checkpoint.newest(Path(args.checkpoint))
    if problem := source.problem():
        raise UserError(problem)
    module = architecture(source.state["config"]["model"]["arch"])
    config = module.Config(**source.state["config"]["model"])
    _check_parameters(source, config)
    tokenizer = _tokenizer(source, args.tokenizer)
    special = _special_tokens(args.special_token)
    template = _chat_template(args.chat_template)
    dtype, gguf_dtype = DTYPES[args.dtype], GGUF_DTYPES.get(args.gguf)
    if gguf_dtype is not None:
        gguf_files.check_possible(config)
    count = parameters(config.shape, config.tie_embeddings)
    need = count * (dtype.itemsize + (gguf_dtype.itemsize if gguf_dtype else 0))
    out = Path(args.out)
    with whole_folder(out, force=args.force, marker=hf.CONFIG, need_bytes=need) as partial:
        names = _write_weights(source, module, partial, dtype, max_shard_bytes)
        _write_tokenizer(source, tokenizer, partial, _positions(source, config))
        hf_tokenizers.customize(partial, config.vocab, template, special)
        _write_configs(source, module, config, partial, dtype, special)
        shown = [_prove_weights(source, module, config, names, partial, dtype), *_prove_tokenizer(tokenizer, partial)]
        if gguf_dtype is not None:
            path = partial / f"model-{args.gguf}.gguf"
            shown += gguf_files.export(path, partial, config, source.shapes, _rounded(source, gguf_dtype), gguf_dtype)
        (partial / "README.md").write_text(_card(source, config, args.dtype, shown))
    print("\n".join([*shown, f"{out}: step {source.step} of {source.folder}, {args.dtype}, done"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaspark to-hf",
        description="Converts a checkpoint to a Hugging Face folder and proves that transformers computes the same with it.",
        epilog="example: megaspark to-hf runs/demo demo-hf --chat-template chatml --gguf bf16",
    )
    parser.add_argument("checkpoint", help="a step folder, or a run folder (its latest checkpoint)")
    parser.add_argument("out", help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    parser.add_argument("--max-shard", default="5GB", help="largest file, such as 500MB or 5GB (default: 5GB)")
    parser.add_argument("--tokenizer", help="the tokenizer file, if it no longer lies where the run found it")
    parser.add_argument("--chat-template", metavar="FILE|chatml", help="a Jinja chat template to put beside the tokenizer")
    parser.add_argument(
        "--special-token", action="append", default=[], metavar="ROLE=TEXT",
        help="such as pad=<pad> or eos=<|im_end|>; bos, eos, pad, unk, or extra for one without a role; may be repeated",
    )  # fmt: skip
    parser.add_argument("--gguf", choices=GGUF_DTYPES, help="also write a GGUF file of that dtype (needs megaspark[gguf])")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a converted model")
    return parser


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.strip().isdigit() or int(number) < 1:
        raise UserError(f"--max-shard {text!r} is not a size such as 500MB or 5GB")
    return int(number) * units[unit]


def _special_tokens(given: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in given:
        role, equals, token = text.partition("=")
        if role not in (*hf_tokenizers.ROLES, "extra") or not equals or not token:
            raise UserError(f"--special-token {text!r} is not ROLE=TEXT with a role of {', '.join(hf_tokenizers.ROLES)}, extra")
        pairs.append((role, token))
    return pairs


def _chat_template(given: str | None) -> str | None:
    if given is None or given == "chatml":
        return hf_tokenizers.CHATML if given else None
    if not Path(given).is_file():
        raise UserError(f"--chat-template {given}: no such file (and not chatml)")
    return Path(given).read_text(encoding="utf-8")


def _check_parameters(source: Checkpoint, config: Any) -> None:
    """Refuses a checkpoint whose parameters are not those of its own model."""
    expected = parameter_shapes(config)
    for name in [*expected, *source.shapes]:
        if expected.get(name) != source.shapes.get(name):
            found, asked = source.shapes.get(name, "absent"), expected.get(name, "no parameter of that model")
            raise UserError(f"{source.folder}: its {name} is {found}, but by its own config it should be {asked}")


def _tokenizer(source: Checkpoint, given: str | None) -> Path | None:
    """The tokenizer of the run; None for a converted model, which carries its own, or has none."""
    recorded = source.state["tokenizer"]
    if recorded is None:
        if given:
            raise UserError(f"--tokenizer: {source.folder} is a converted model and carries its own")
        for name, sha256 in source.state["source"]["files"].items():
            path = source.folder / "source" / name
            if not path.is_file() or sha256_of(path) != sha256:
                raise UserError(f"{path} is missing or has changed")
        return None
    path = Path(given or recorded["path"])
    if not path.is_file():
        raise UserError(f"the tokenizer {path} is not there; name it with --tokenizer FILE")
    if sha256_of(path) != recorded["sha256"]:
        raise UserError(f"{path} is not the tokenizer of this run (its sha256 should be {recorded['sha256'][:12]}...)")
    return path


def _positions(source: Checkpoint, config: Any) -> int:
    """The context to state: what the model says, else the length that it was trained with."""
    return int(getattr(config, "max_positions", None) or source.state["config"]["data"]["seq"])


def _rounded(source: Checkpoint, dtype: torch.dtype) -> Any:
    return lambda name, first, last: source.rows(name, first, last).to(dtype)


def _write_weights(source: Checkpoint, module: Any, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, str]:
    """The safetensors; returns our name of each Hugging Face name."""
    ours = {theirs: name for name, theirs in hf.hf_names(module.HF_NAMES, source.shapes).items()}
    shapes = {theirs: source.shapes[name] for theirs, name in ours.items()}
    total = dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        rows = lambda name, first, last: source.rows(ours[name], first, last)  # noqa: E731
        hf.write_safetensors(folder, shapes, rows, dtype, max_shard_bytes, bar.update)
    return ours


def _write_tokenizer(source: Checkpoint, tokenizer: Path | None, folder: Path, positions: int) -> None:
    if tokenizer is not None:
        hf_tokenizers.write_tokenizer(tokenizer, folder, max_length=positions, add_bos=source.state["tokenizer"]["prepend_bos"])
        return
    for name in source.state["source"]["files"]:
        if name != hf.CONFIG:
            shutil.copyfile(source.folder / "source" / name, folder / name)


def _write_configs(
    source: Checkpoint, module: Any, config: Any, folder: Path, dtype: torch.dtype, chosen: list[tuple[str, str]]
) -> None:
    """config.json and generation_config.json, with the ids of the special tokens; `chosen` ones win over the source's."""
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # transformers would take 1 and 2 for what is unsaid
    if (source.folder / "source" / hf.CONFIG).is_file():
        said = hf.read_config(source.folder / "source")
        special |= {key: said[key] for key in (*special, "pad_token_id") if key in said}
    found, wins = hf_tokenizers.special_ids(folder), {f"{role}_token_id" for role, _ in chosen}
    special |= {key: number for key, number in found.items() if special.get(key) is None or key in wins}
    described = module.hf_config(config, _positions(source, config)) | special
    text = json.dumps(described | {"dtype": str(dtype).removeprefix("torch.")}, indent=2)
    (folder / hf.CONFIG).write_text(text + "\n")
    generation = folder / "generation_config.json"
    known = json.loads(generation.read_text()) if generation.is_file() else {"do_sample": False}
    known |= {key: number for key, number in special.items() if number is not None and (key not in known or key in wins)}
    generation.write_text(json.dumps(known, indent=2) + "\n")


def _prove_weights(
    source: Checkpoint, module: Any, config: Any, ours: dict[str, str], folder: Path, dtype: torch.dtype
) -> str:
    weights = hf.Weights(folder)
    proofs.check_names(folder, {name: source.shapes[ours[name]] for name in weights.shapes})
    return proofs.prove_logits(module, config, folder, _rounded(source, dtype), weights.rows)


def _prove_tokenizer(tokenizer: Path | None, folder: Path) -> list[str]:
    if tokenizer is None:
        carried = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
        return [f"{' and '.join(carried)} as the source had them" if carried else "no tokenizer: the source had none"]
    texts = hf_tokenizers.adversarial_texts(TEXTS, seed=0, symbols=hf_tokenizers.symbols_of(folder))
    wrong = hf_tokenizers.check_tokenizer(tokenizer, folder, texts)
    if wrong:
        raise RuntimeError(f"the exported tokenizer differs on {len(wrong)} of {len(texts)} texts, first {wrong[0][:60]!r}")
    return [f"{len(texts):,} adversarial texts tokenize as in training"]


def _card(source: Checkpoint, config: Any, dtype: str, shown: list[str]) -> str:
    """The model card: what this is and what it was made from."""
    state = source.state
    run = source.folder.parent.parent if source.folder.parent.name == "checkpoints" else None
    origin = state.get("source")
    before = state["config"]["run"].get("init_from")
    unseen = f"{UNKNOWN}: converted from {Path(origin['folder']).name}" if origin else None
    rows = {
        "architecture": ", ".join(f"{key} {value}" for key, value in config.model_dump().items() if value is not None),
        "parameters": f"{parameters(config.shape, config.tie_embeddings):,}",
        "weights": f"{dtype}, rounded from the fp32 masters",
        "step": f"{state['step']:,}",
        "tokens seen": unseen or f"{state['tokens']:,}" + (f", after those of {before}" if before else ""),
        "training data": unseen or f"sha256 {state['identity']['training data sha256']} (of its manifests' checksums)",
        "tokenizer": f"sha256 {state['tokenizer']['sha256']}" if state["tokenizer"] else "the source's own",
        "config": f"sha256 {state['config_sha256']}",
        **training_facts(run, source.step),
        "checkpoint by": state["written_by"],
        "converted by": f"megaspark {__version__}",
    }
    return model_card(state["config"]["run"]["name"], rows, shown)
