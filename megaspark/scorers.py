"""Opens a model to be evaluated: a checkpoint of ours, from its fp32 masters, or a Hugging Face folder, by transformers.

Both become the same thing, a function from tokens and positions to logits, with what there is to know of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaspark import checkpoint, hf_tokenizers
from megaspark.checkpoint import Checkpoint
from megaspark.errors import UserError
from megaspark.evaluations import Logits
from megaspark.manifests import sha256_of
from megaspark.models import architecture
from megaspark.settings import digest
from megaspark.shards import TokenDataset

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_CONTEXT = 4096  # of models that can read more than is usually wanted
TOKENIZER_TEXTS = 1000


@dataclass
class Scorer:
    """A model that gives logits. `seq` is the length that it was trained with, or its context up to DEFAULT_CONTEXT.

    `documents`: trained with attention inside documents (None: not known); `tokenizers`: the sha256 of its tokenizer's files.
    """

    logits: Logits
    vocab: int
    seq: int
    context: int
    documents: bool | None
    tokenizers: tuple[str, ...]
    folder: Path | None = None

    def check_data(self, datasets: Mapping[str, TokenDataset]) -> None:
        """Raises UserError for a dataset whose tokens mean something else to this model."""
        for name, dataset in datasets.items():
            manifest = dataset.manifest
            if manifest.vocab > self.vocab:
                raise UserError(f"dataset {name} has a vocabulary of {manifest.vocab}, the model one of {self.vocab} only")
            if manifest.tokenizer_sha256 not in self.tokenizers and not self._encodes_as(dataset):
                raise UserError(
                    f"dataset {name} was made with another tokenizer ({manifest.tokenizer}, sha256 "
                    f"{manifest.tokenizer_sha256[:12]}...) than the model's ({', '.join(t[:12] for t in self.tokenizers)}...); "
                    "prepare the data with the model's"
                )

    def _encodes_as(self, dataset: TokenDataset) -> bool:
        """Whether the folder's tokenizer, though another file, gives the ids of the dataset's: asked of adversarial texts."""
        source = dataset.folder / dataset.manifest.tokenizer
        if self.folder is None or not source.is_file():
            return False
        try:
            return not hf_tokenizers.check_tokenizer(source, self.folder, hf_tokenizers.adversarial_texts(TOKENIZER_TEXTS))
        except Exception:  # a file of another kind, or none: whatever it is, it is not the same
            return False


def is_hf(path: Path) -> bool:
    """Whether a path is a Hugging Face folder; raises UserError if it is neither that nor a run or step folder."""
    if not path.exists():
        raise UserError(f"no such model: {path}")
    if (path / "config.json").is_file():
        return True
    if (path / checkpoint.INDEX).is_file() or (path / "checkpoints").is_dir() or path.name.startswith("step_"):
        return False
    raise UserError(f"{path} is no model: it has neither config.json (a Hugging Face folder) nor checkpoints (a run)")


def model_facts(path: Path) -> dict[str, Any]:
    """What a model is, the same wherever it lies: its kind, name and the sha256 of its weights and config."""
    if is_hf(path):
        weights = {file.name: sha256_of(file) for file in sorted(path.glob("*.safetensors"))}
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return {"kind": "hugging face", "name": path.resolve().name, "sha256": digest(weights), "config_sha256": digest(config)}
    source = checkpoint.newest(path)
    return {
        "kind": "checkpoint",
        "name": source.state["config"]["run"]["name"],
        "sha256": digest(source.files),
        "config_sha256": source.state["config_sha256"],
        "step": source.step,
        "trained_tokens": source.state["tokens"],
    }


def open_scorer(path: Path, dtype: torch.dtype, device: str) -> Scorer:
    """Loads a Hugging Face folder, a run (its latest checkpoint) or a step folder; raises UserError for a damaged one."""
    return _open_hf(path, dtype, device) if is_hf(path) else _open_checkpoint(checkpoint.newest(path), dtype, device)


def _open_checkpoint(source: Checkpoint, dtype: torch.dtype, device: str) -> Scorer:
    if problem := source.problem():
        raise UserError(problem)
    config = source.state["config"]
    module = architecture(config["model"]["arch"])
    model_config = module.Config(**config["model"])
    model = module.Model(model_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.tensor(name))
    model.to(device=device, dtype=dtype).eval()

    @torch.no_grad()
    def logits(tokens_BS: Tensor, positions_BS: Tensor | None) -> Tensor:
        return model(tokens_BS.to(device), None if positions_BS is None else positions_BS.to(device))

    seq = int(config["data"]["seq"])
    documents = config["data"].get("document_mask")
    return Scorer(logits, model_config.vocab, seq, seq, documents, (source.state["tokenizer"]["sha256"],))


def _open_hf(folder: Path, dtype: torch.dtype, device: str) -> Scorer:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # whatever transformers finds wrong with a folder
        raise UserError(f"{folder}: transformers cannot load it ({str(error).strip().splitlines()[0][:200]})") from None
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:  # transformers would go on with random values
        raise UserError(f"{folder}: its tensors are not those of its config.json: {json.dumps(wrong, default=str)[:300]}")
    model.to(device).eval()

    @torch.no_grad()
    def logits(tokens_BS: Tensor, positions_BS: Tensor | None) -> Tensor:
        # Restarting positions tell transformers of documents, as long as nothing is cached.
        positions = None if positions_BS is None else positions_BS.to(device)
        return model(tokens_BS.to(device), position_ids=positions, use_cache=False).logits

    files = (folder / name for name in ("tokenizer.model", "tokenizer.json"))
    tokenizers = tuple(sha256_of(path) for path in files if path.is_file())
    text = model.config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    return Scorer(logits, text.vocab_size, min(context, DEFAULT_CONTEXT), context, None, tokenizers, folder)
