"""`python -m megaspark.tools.bench_posttraining`: SFT with our kernels and without, side by side; JSON lines of speed and memory.

Each measurement is a process of its own, so that peak memory is its own; the two kinds take turns, so that what else the machine
does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

from megaspark.errors import UserError

# hidden, layers, ffn, vocabulary
SIZES = {"tiny": (64, 2, 128, 331), "small": (256, 4, 704, 4096), "medium": (512, 8, 1408, 8192)}


def main(argv: list[str]) -> int:
    """Measures and prints; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m megaspark.tools.bench_posttraining",
        description="Times optimizer steps of SFT on packed and padded rows, with all our kernels and with transformers' SDPA.",
        epilog="example: python -m megaspark.tools.bench_posttraining --size small --seq 256 1024",
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seq", type=int, nargs="+", default=[256])
    parser.add_argument("--batch", type=int, default=4, help="rows a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="measured, after 2 to warm up (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that the two take turns (default: %(default)s)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.batch, args.steps, args.rounds, *args.seq) < 1:
        raise UserError("--seq, --batch, --steps and --rounds start at 1")
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return 0
    for seq in args.seq:
        for packing in (True, False):
            print(json.dumps(compare(args, seq, packing)), flush=True)
    return 0


def compare(args: argparse.Namespace, seq: int, packing: bool) -> dict[str, Any]:
    """Medians of both kinds over the rounds, and their ratio: above 1, ours is faster, or takes more memory."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(args.rounds):
        for kernels in (True, False):
            what = {"size": args.size, "seq": seq, "batch": args.batch, "steps": args.steps, "packing": packing, "kernels": kernels}
            command = [sys.executable, "-m", "megaspark.tools.bench_posttraining", "--one", json.dumps(what)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kernels].append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = ({key: median(f[key] for f in found[kind]) for key in found[kind][0]} for kind in (True, False))
    return {
        "bench": "sft",
        "size": args.size,
        "seq": seq,
        "batch": args.batch,
        "packing": packing,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        "ours": ours,
        "sdpa": theirs,
        "speed_ratio": round(theirs["cpu_s_per_step"] / ours["cpu_s_per_step"], 3),
        "memory_ratio": round(ours["peak_bytes"] / theirs["peak_bytes"], 3),
    }


def measure(what: dict[str, Any]) -> dict[str, float]:
    """CPU and wall seconds a step, and the peak memory, of one kind of training in this process."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from megaspark.hf_kernels import Kernels, installed, loading

    disable_progress_bars()
    hidden, layers, ffn, vocab = SIZES[what["size"]]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128), max_position_embeddings=what["seq"],
    )  # fmt: skip
    kernels = Kernels() if what["kernels"] else None
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, installed(kernels):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config, **loading(kernels))
        steps = what["steps"] + 2
        arguments = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=what["batch"], max_length=what["seq"], packing=what["packing"],
            bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        times: list[tuple[float, float]] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append((time.process_time(), time.perf_counter()))

        rows = _rows(steps * what["batch"] * what["seq"], what["seq"], vocab)
        trainer = SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(PreTrainedTokenizerFast),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    (cpu, wall), (cpu_end, wall_end) = times[1], times[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "cpu_s_per_step": round((cpu_end - cpu) / what["steps"], 5),
        "wall_s_per_step": round((wall_end - wall) / what["steps"], 5),
        "peak_bytes": peak,
    }


def _rows(tokens: int, seq: int, vocab: int) -> list[dict[str, list[int]]]:
    """Examples of random tokens and uneven lengths, at most `seq`, a quarter of it on average; enough for so many tokens packed."""
    generator, rows, made = random.Random(0), [], 0
    while made < 2 * tokens:
        length = min(seq, 1 + int(generator.expovariate(4 / seq)))
        rows.append({"input_ids": [generator.randrange(3, vocab) for _ in range(length)]})
        made += length
    return rows


def _tokenizer(cls: Any) -> Any:
    """The least that TRL takes for a tokenizer: the examples are tokens already."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return cls(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
