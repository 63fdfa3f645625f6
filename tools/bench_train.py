"""`megaspark bench train`: one training step of a model of ours beside its peers, interleaved in one run.

Every side is a process of its own with the same threads, the same allocator settings, the same weights, batches and optimizer.
Rounds alternate between the sides, so that whatever else the machine does falls on all of them; the ratio is taken within each
round, and its median and spread are reported. With DeepSpeed as the peer it is our whole training loop that is measured,
beside a bare loop over the same engine (bench_loop.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from megaspark.allocators import keep_pages
from megaspark.errors import UserError
from megaspark.hf import hf_names
from megaspark.models import llama
from megaspark.weights import build_model

# The quickstart's model; and two small Llamas with a full-size vocabulary, tied, as small models are trained: (shape, micro
# batch, sequence).
_SMALL = {"vocab": 32000, "tie_embeddings": True}
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {
    "5m": (llama.SIZES["demo"], 4, 256),
    "15m": ({"hidden": 288, "layers": 6, "heads": 6, "kv_heads": 6, "ffn": 768, **_SMALL}, 4, 512),
    "110m": ({"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn": 2048, **_SMALL}, 2, 1024),
}
SIDES = {
    "ours": "our model, its blocks compiled",
    "ours-eager": "our model as it stands",
    "hf": "transformers' LlamaForCausalLM with SDPA",
    "hf-compile": "the same under torch.compile",
    "deepspeed": "a bare DeepSpeed loop, taking turns with our whole training loop",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Report:
    """What a side tells of one round: CPU and wall seconds a step, the last loss, its peak memory so far."""

    cpu_s: float
    wall_s: float
    loss: float
    peak_bytes: int


class Side:
    """A process that takes training steps when told to."""

    def __init__(self, name: str, size: str, precision: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "megaspark.tools.bench_train", "--worker", name, size, precision, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def steps(self, count: int) -> Report:
        """Takes `count` steps and tells of them."""
        assert self.process.stdin and self.process.stdout
        print(count, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return Report(**json.loads(line))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def worker(side: str, size: str, precision: str, threads: int) -> None:
    """Serves one side: a number of steps on each line of stdin, a Report as JSON on stdout."""
    keep_pages()
    torch.set_num_threads(threads)
    shape, batch, seq = SIZES[size]
    config = llama.Config(**shape)
    loss_of, model = build(side, config, DTYPES[precision])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    for line in sys.stdin:
        count, cpu, wall, loss = int(line), 0.0, 0.0, torch.tensor(0.0)
        for _ in range(count):
            tokens = torch.randint(0, config.vocab, (batch, seq + 1), generator=generator)
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            started = time.process_time(), time.perf_counter()
            loss = loss_of(inputs, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            cpu, wall = cpu + time.process_time() - started[0], wall + time.perf_counter() - started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = Report(cpu / count, wall / count, loss.item(), peak)
        print(json.dumps(vars(report)), flush=True)


def build(side: str, config: llama.Config, dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """A side's loss as a function of tokens and labels [B, S], and the module whose parameters it trains."""
    ours = build_model(config, seed=1)
    if side.startswith("ours"):
        ours.to(dtype)
        if side == "ours":
            for block in ours.blocks:
                block.compile()
        return lambda tokens, labels: ours(tokens, None, labels), ours
    theirs = hugging_face(ours, config).to(dtype)
    called = torch.compile(theirs) if side == "hf-compile" else theirs
    return lambda tokens, labels: called(input_ids=tokens, labels=tokens, shift_labels=labels, use_cache=False).loss, theirs


def hugging_face(ours: llama.Model, config: llama.Config) -> nn.Module:
    """transformers' model with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM._from_config(LlamaConfig(**llama.hf_config(config, 4096)), attn_implementation="sdpa")
    parameters = dict(ours.named_parameters())
    names = hf_names(llama.HF_NAMES, [*parameters])
    state = {names[name]: parameter.detach() for name, parameter in parameters.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_embeddings else set()):
        raise RuntimeError(f"weights do not fit transformers' model: {missing} {unexpected}")
    theirs.train()
    return theirs


def compare(size: str, precision: str, threads: int, sides: list[str], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Runs all sides interleaved; one dict a side, the first being the one that the ratios are taken of."""
    running = [Side(name, size, precision, threads) for name in sides]
    try:
        for side in running:  # one at a time, or they would compile at once
            side.steps(WARM_UP_STEPS)
        reports: dict[str, list[Report]] = {name: [] for name in sides}
        for _ in tqdm(range(rounds), desc=f"{size} {precision}", unit="round", file=sys.stderr):
            for side in running:
                reports[side.name].append(side.steps(steps))
    finally:
        for side in running:
            side.close()
    _, batch, seq = SIZES[size]
    return [summary(name, reports[name], reports[sides[0]], batch * seq) for name in sides]


def summary(name: str, reports: list[Report], first: list[Report], tokens: int) -> dict[str, Any]:
    """One side's medians, and how many times its CPU and wall seconds are the first side's, with the spread over rounds."""
    ratios = sorted(mine.cpu_s / other.cpu_s for mine, other in zip(reports, first, strict=True))
    return {
        "side": name,
        "tokens_per_cpu_s": round(tokens / statistics.median(report.cpu_s for report in reports)),
        "tokens_per_s": round(tokens / statistics.median(report.wall_s for report in reports)),
        "cpu_ratio": round(statistics.median(ratios), 3),
        "cpu_ratio_least": round(ratios[0], 3),
        "cpu_ratio_most": round(ratios[-1], 3),
        "wall_ratio": round(statistics.median(a.wall_s / b.wall_s for a, b in zip(reports, first, strict=True)), 3),
        "peak_bytes": reports[-1].peak_bytes,
        "memory_ratio": round(first[-1].peak_bytes / reports[-1].peak_bytes, 3),
        "loss": round(reports[-1].loss, 5),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="megaspark bench train",
        description="Measures a training step (forward, backward, AdamW) of our Llama beside its peers, on this machine.",
        epilog="example: megaspark bench train --size 15m --precision bf16 --peer hf --peer hf-compile",
    )
    sizes = "5m: 4 x 256 tokens; 15m: 4 x 512; 110m: 2 x 1,024 (default: all)"
    out.add_argument("--size", action="append", choices=SIZES, help=sizes)
    out.add_argument("--precision", action="append", choices=DTYPES, help="of weights and gradients (default: fp32 and bf16)")
    peers = [*SIDES][1:]
    out.add_argument("--peer", action="append", choices=peers, default=[], help="; ".join(f"{k}: {SIDES[k]}" for k in peers))
    out.add_argument("--processes", action="append", type=int, help="for the peer deepspeed (default: 1 and 2)")
    out.add_argument("--threads", type=int, default=2, help="of a side, over all its processes")
    out.add_argument("--rounds", type=int, default=7, help="how often the sides take turns")
    out.add_argument("--steps", type=int, default=3, help="steps in a turn")
    return out


def main(argv: list[str]) -> int:
    """Prints a JSON line for each side; a ratio is a side's seconds over ours in the same round, so above 1 we are faster.

    Beside DeepSpeed an overhead is our loop's seconds over the bare one's, less 1: what is to be at most .03.
    """
    if argv[:1] == ["--worker"]:
        worker(*argv[1:4], threads=int(argv[4]))
        return 0
    args = parser().parse_args(argv)
    processes = args.processes or [1, 2]
    if min(args.threads, args.rounds, args.steps, *processes) < 1:
        raise UserError("--threads, --rounds, --steps and --processes must be at least 1")
    for size in args.size or SIZES:
        for precision in args.precision or DTYPES:
            for line in lines(args, size, precision, processes):
                print(json.dumps({"size": size, "precision": precision, "threads": args.threads, **line}), flush=True)
    return 0


def lines(args: argparse.Namespace, size: str, precision: str, processes: list[int]) -> Iterator[dict[str, Any]]:
    """What was measured: of one model's step beside that of others, then of our loop beside a bare one."""
    peers = [peer for peer in args.peer if peer != "deepspeed"]
    if peers or not args.peer:
        yield from compare(size, precision, args.threads, ["ours", *peers], args.rounds, args.steps)
    for count in processes if "deepspeed" in args.peer else ():
        loop = import_module("megaspark.tools.bench_loop")  # brings in the whole trainer
        yield {"processes": count, **loop.compare(SIZES[size], precision, count, args.threads, args.rounds, args.steps)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
