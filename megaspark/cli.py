"""The `megaspark` command: one verb a line, each handing over to a module."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from importlib import import_module

from megaspark import __version__
from megaspark.errors import UserError
from megaspark.ranks import Ranks, end_with_parent
from megaspark.settings import nearest

VERBS = {
    "demo-corpus": ("megaspark.tools.demo_corpus", "write a corpus from text that every Python machine has"),
    "train-tokenizer": ("megaspark.tools.train_tokenizer", "train a SentencePiece BPE tokenizer"),
    "prep": ("megaspark.data_prep.run", "tokenize a corpus into memory-mapped shards"),
    "dedup": ("megaspark.data_prep.dedup", "find near or exact duplicates in a corpus, for prep to drop"),
    "shards": ("megaspark.tools.shards", "show, verify or decode shards"),
    "pretrain": ("megaspark.train", "train a model; under `deepspeed megaspark/pretrain.py`: on many processes"),
    "plan": ("megaspark.tools.plan", "what a run needs and takes on a cluster, before paying for it"),
    "to-hf": ("megaspark.tools.to_hf", "convert a checkpoint to a Hugging Face folder, proven equal"),
    "from-hf": ("megaspark.tools.from_hf", "convert a Hugging Face folder to a checkpoint that pre-training goes on from"),
    "demo-instructions": ("megaspark.tools.demo_instructions", "questions, answers and preference pairs out of the demo corpus"),
    "demo-tasks": ("megaspark.tools.demo_tasks", "lm-eval tasks out of the demo corpus"),
    "sft": ("megaspark.tools.sft", "fine-tune a Hugging Face folder on instructions (TRL's SFTTrainer)"),
    "dpo": ("megaspark.tools.dpo", "align a Hugging Face folder with preference pairs (TRL's DPOTrainer)"),
    "eval": ("megaspark.tools.eval", "perplexity, multiple-choice and code tasks of a model"),
    "generate": ("megaspark.tools.generate", "greedy text from a Hugging Face folder"),
    "plot": ("megaspark.tools.plot", "draw the loss curves of runs"),
    "compile-kernels": ("megaspark.tools.compile_kernels", "compile every kernel for a GPU without having one, and judge it"),
    "bench": ("megaspark.tools.bench", "measure this machine, beside its peers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0, 2 for a mistake of the user's (one line on stderr), 1 for anything else."""
    argv = list(sys.argv[1:] if argv is None else argv)
    ranks = Ranks.from_environment()
    if ranks.world > 1:
        end_with_parent()
    try:
        return _run(argv)
    except UserError as error:
        if ranks.first:
            print(f"megaspark: {error}", file=sys.stderr, flush=True)
        elif ranks.world > 1:
            time.sleep(3)  # a launcher ends all processes with the first that fails: let the first rank speak
        return 2
    except KeyboardInterrupt:
        print("megaspark: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(f"megaspark {__version__}: text in, a trained Llama out\n\nusage: megaspark VERB ... (megaspark VERB --help)\n")
        print("\n".join(f"  {verb:{width}}  {about}" for verb, (_, about) in VERBS.items()))
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in VERBS:
        raise UserError(f"{argv[0]!r} is no verb of megaspark{nearest(argv[0], [*VERBS])}")
    return import_module(VERBS[argv[0]][0]).main(argv[1:])
