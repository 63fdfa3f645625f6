"""`megaspark from-hf`: a Hugging Face folder becomes a checkpoint that a run of any layout starts from.

The architecture is read from the folder's own config.json. The checkpoint holds fp32 masters (exact, whatever the folder's
dtype), no moments, and the folder's tokenizer and configs as they were, for `to-hf` to give back. Before it gets its name,
transformers, with the folder's weights, must compute our logits with the checkpoint's.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from tqdm import tqdm

from megaspark import __version__, checkpoint, checkpoint_writers, hf, proofs, rope_scalings
from megaspark.checkpoint import Checkpoint
from megaspark.config import load_config
from megaspark.errors import UserError
from megaspark.kernels.rope import rope_frequencies
from megaspark.manifests import sha256_of
from megaspark.models import architecture_of_hf, differing
from megaspark.output_folders import whole_folder
from megaspark.settings import digest
from megaspark.weights import parameter_shapes

MODEL = "model.yaml"
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Converts, proves and names the checkpoint; returns the exit status."""
    args = _parser().parse_args(argv)
    folder, out = Path(args.hf_dir), Path(args.out)
    described = hf.read_config(folder)
    module, config = read_architecture(folder, described)
    if args.config:
        _check_agrees(folder, config, args.config)
    weights = hf.Weights(folder)
    shapes = parameter_shapes(config)
    names = hf.hf_names(module.HF_NAMES, shapes)
    _check_frequencies(folder, weights, config)
    tied = {module.HF_NAMES["head.weight"]: module.HF_NAMES["embedding.weight"]} if config.tie_embeddings else {}
    weights.check({names[name]: shape for name, shape in shapes.items()}, tied)
    size_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
    with whole_folder(out, force=args.force, marker=checkpoint.INDEX, need_bytes=size_bytes) as partial:
        state = _state(folder, weights, config, _carry(folder, partial / "source"))
        with tqdm(total=size_bytes, unit="B", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
            checkpoint_writers.write_masters(partial, state, shapes, lambda name, a, b: weights.rows(names[name], a, b), bar.update)
        try:
            shown = proofs.prove_logits(module, config, folder, Checkpoint(partial).rows, weights.rows)
        except proofs.Unequal as error:
            raise UserError(f"{folder}: {error}; it uses something that is not built here") from None
        said = {key: value for key, value in config.model_dump(mode="json").items() if value is not None}
        (partial / MODEL).write_text(f"# read from {folder}\n{yaml.safe_dump({'model': said}, sort_keys=False)}")
    print(f"{shown}\n{out}: {size_bytes // 4:,} parameters of {folder}")
    print(f"a run starts from it by `base: {out / MODEL}` and run.init_from={out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaspark from-hf",
        description="Converts a Hugging Face folder to a checkpoint that pre-training goes on from, in any layout.",
        epilog="example: megaspark from-hf Llama-3.2-1B ours/llama-1b; then pretrain with run.init_from=ours/llama-1b",
    )
    parser.add_argument("hf_dir", help="a folder with config.json and safetensors")
    parser.add_argument("out", help="the checkpoint folder to make")
    parser.add_argument("--config", metavar="RUN.yaml", help="a run that will start from it: its model must agree")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a checkpoint")
    return parser


def read_architecture(folder: Path, described: dict[str, Any]) -> tuple[ModuleType, Any]:
    """The module and the Config of a config.json; raises UserError, naming the file, for what is not built or contradicts."""
    path = folder / hf.CONFIG
    if not isinstance(described.get("model_type"), str):
        raise UserError(f"{path} has no model_type")
    try:
        module = architecture_of_hf(described["model_type"])
        return module, module.config_from_hf(described)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def _check_agrees(folder: Path, config: Any, path: str) -> None:
    """Refuses a folder that computes something else than the model of a run's YAML, naming the first difference."""
    run, tree = load_config(path, [])
    if difference := differing(config, run.model):
        key, theirs, ours = difference
        place = tree.place(f"model.{key}")
        raise UserError(f"model.{key} is {theirs} in {folder / hf.CONFIG}, but {ours} in {path} ({place}); make them agree")


def _check_frequencies(folder: Path, weights: hf.Weights, config: Any) -> None:
    """Refuses rotary buffers that another theta than config.json's made."""
    computed_C = rope_scalings.scaled(rope_frequencies(config.dim, config.rope_theta), getattr(config, "rope_scaling", None))
    for name, stored_C in weights.frequencies().items():
        if stored_C.shape != computed_C.shape or not torch.allclose(stored_C, computed_C, rtol=2**-7, atol=1e-7):  # bf16's steps
            theta = f"rope_theta = {config.rope_theta:g} of {hf.CONFIG}"
            raise UserError(f"{weights.files[name]}: {name} contradicts {theta}, which does not give these frequencies")


def _carry(folder: Path, target: Path) -> dict[str, str]:
    """Copies the folder's tokenizer and configs; returns their sha256 by name."""
    target.mkdir()
    present = [name for name in CARRIED if (folder / name).is_file()]
    for name in present:
        shutil.copyfile(folder / name, target / name)
    return {name: sha256_of(target / name) for name in present}


def _state(folder: Path, weights: hf.Weights, config: Any, carried: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint says of itself, as far as a converted model knows it."""
    model = {"model": config.model_dump(mode="json")}
    dtypes = sorted({str(weights.dtypes[name]).removeprefix("torch.") for name in weights.shapes})
    return {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "identity": {},
        "config": {**model, "run": {"name": folder.resolve().name}},
        "config_sha256": digest(model),
        "tokenizer": None,
        "source": {"folder": str(folder.resolve()), "dtype": " and ".join(dtypes), "files": carried},
        "written_by": f"megaspark {__version__} from-hf",
    }
