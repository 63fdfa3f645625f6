"""`megaspark generate HF_DIR --prompt TEXT`: greedy text from a Hugging Face folder, by plain transformers alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from megaspark.errors import UserError


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="megaspark generate",
        description="Continues prompts with the likeliest tokens of a model, loaded by transformers alone.",
        epilog="example: megaspark generate demo-hf --prompt 'def main():' --tokens 64",
    )
    parser.add_argument("folder", type=Path, metavar="HF_DIR", help="a folder that `megaspark to-hf` wrote")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, at most (default: 64)")
    args = parser.parse_args(argv)
    if not (args.folder / "config.json").is_file():
        raise UserError(f"{args.folder} is no Hugging Face folder: it has no config.json")
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be 1 or more")
    for prompt, text in zip(args.prompt, generate(args.folder, args.prompt, args.tokens), strict=True):
        print(f"prompt       {prompt!r}\ncontinuation {text!r}\n")
    return 0


def generate(folder: Path, prompts: list[str], tokens: int) -> list[str]:
    """The greedy continuation of each prompt, up to EOS or `tokens` tokens; in fp32 on a CPU, as stored on a GPU.

    Raises UserError for a prompt that leaves no room in the model's context, or that is empty where there is no BOS.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if on_gpu else torch.float32)
    model.to("cuda" if on_gpu else "cpu").eval()
    limit = model.config.max_position_embeddings
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
        length = ids.shape[1]
        if length == 0:
            raise UserError(f"the prompt {prompt!r} has no tokens to continue")
        if length >= limit:
            raise UserError(f"a prompt of {length:,} tokens leaves no room in a context of {limit:,}")
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(tokens, limit - length),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )[0]
        # Decoded as a whole and cut: a tokenizer with a dummy prefix would drop a space at the start of a part.
        whole = tokenizer.decode(found, skip_special_tokens=True)
        texts.append(whole.removeprefix(tokenizer.decode(ids[0], skip_special_tokens=True)))
    return texts
