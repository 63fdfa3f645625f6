"""Text that a Hugging Face model writes after a prompt, several times over, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: at temperature 0 the likeliest token each time, else by nucleus sampling with `top_p`."""

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    tokens: int = 256
    seed: int = 0
    batch: int = 16


def complete(
    folder: Path,
    prompts: Sequence[str],
    sampling: Sampling,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[str] | None]:
    """`sampling.samples` continuations of each prompt, up to EOS; None for a prompt that leaves no room in the model's context.

    Each prompt has its own seed, made of its place and `sampling.seed`, so that what comes before does not matter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    model.to(device).eval()
    out: list[list[str] | None] = []
    for place, prompt in enumerate(prompts):
        torch.manual_seed(sampling.seed * 1_000_003 + place)
        out.append(_complete_one(model, tokenizer, prompt, sampling))
        progress(sampling.samples)
    return out


def _complete_one(model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> list[str] | None:
    ids_1S = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    room = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20) - ids_1S.shape[1]
    if room < 1:
        return None
    chances = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    start = tokenizer.decode(ids_1S[0], skip_special_tokens=True)
    texts: list[str] = []
    while len(texts) < sampling.samples:
        found_BS = model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=min(sampling.tokens, room),
            num_return_sequences=min(sampling.batch, sampling.samples - len(texts)),
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **(chances if sampling.temperature else {"do_sample": False}),
        )
        # Decoded whole and cut: a tokenizer with a dummy prefix would drop a space at the start of a part.
        texts += [tokenizer.decode(row, skip_special_tokens=True).removeprefix(start) for row in found_BS]
    return texts
