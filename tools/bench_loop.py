"""The part of `megaspark bench train` with DeepSpeed as the peer: what our loop costs over a bare one, and a run's first step.

Both take turns in the same processes (bench_loop_worker.py), so that whatever else the machine does falls on both; their losses,
which are equal, show that they do the same work.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megaspark.launchers import free_port
from megaspark.shards import Counts, Manifest, ShardWriter, dtype_for, sha256_of

WARM_UP_STEPS = 3
DATA_TOKENS, DOCUMENT_TOKENS, EOS = 1 << 20, 300, 2
RESULT = "result.json"


def write_data(folder: Path, vocab: int) -> Path:
    """A dataset of random documents."""
    data = folder / "data"
    data.mkdir()
    (data / "tokenizer.model").write_bytes(b"none")
    generator = np.random.default_rng(0)
    with ShardWriter(data, "bench-00000", dtype_for(vocab), source="bench") as writer:
        for _ in range(DATA_TOKENS // DOCUMENT_TOKENS):
            length = int(generator.integers(DOCUMENT_TOKENS // 2, 2 * DOCUMENT_TOKENS))
            writer.add(np.append(generator.integers(EOS + 1, vocab, length), EOS))
    count = DATA_TOKENS // DOCUMENT_TOKENS
    counts = Counts(read=count, kept=count, tokens=writer.info.tokens)
    Manifest(
        name="bench", tokenizer="tokenizer.model", tokenizer_sha256=sha256_of(data / "tokenizer.model"), vocab=vocab,
        dtype=dtype_for(vocab).name, eos_id=EOS, bos_id=None, append_eos=True, prepend_bos=False, settings_sha256="0" * 64,
        shards=(writer.info,), counts={"bench": counts}, job=counts,
    ).save(data)  # fmt: skip
    return data


def compare(
    size: tuple[dict[str, Any], int, int], precision: str, processes: int, threads: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Launches a run of a model (shape, micro batch, sequence) and returns the line of its figures."""
    shape, batch, seq = size
    with tempfile.TemporaryDirectory(prefix="bench-loop-") as temporary:
        folder = Path(temporary)
        run = {
            "model": {"arch": "llama", **shape},
            "data": {"train": str(write_data(folder, shape["vocab"])), "seq": seq},
            "optim": {"lr": 1e-3, "min_lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.01},
            "run": {
                "name": "loop", "dir": str(folder / "runs"), "steps": WARM_UP_STEPS + rounds * steps + 1, "precision": precision,
                "global_batch": batch * processes, "micro_batch": batch, "eval_every": 0,
            },
            "deepspeed": "zero1.json",
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        spec = {"rounds": rounds, "steps": steps, "warm_up": WARM_UP_STEPS, "began": time.time()}
        (folder / "spec.json").write_text(json.dumps(spec))
        launch(folder, processes, threads)
        found = json.loads((folder / RESULT).read_text())
    return summary(found, batch * processes * seq)


def launch(folder: Path, processes: int, threads: int) -> None:
    """Runs `worker` in so many processes and waits for them; raises RuntimeError with what they said if one fails."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(max(1, threads // processes))}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "megaspark.tools.bench_loop_worker", str(folder)]
    with (folder / "output").open("w") as output:
        running = [
            subprocess.Popen(
                command, stdout=output, stderr=None if rank == 0 else output, stdin=subprocess.DEVNULL,
                env={**os.environ, **place, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]  # fmt: skip
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.1)
        for process in running:
            process.kill()
    if any(process.wait() for process in running) or not (folder / RESULT).exists():
        said = (folder / "output").read_text()[-3000:]
        raise RuntimeError(f"processes ended with status {[process.returncode for process in running]}\n{said}")


def summary(found: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Medians of the rounds, and our loop's seconds over the bare one's, with the least and the most."""
    out: dict[str, Any] = {"side": "deepspeed", "rounds": len(found["ours"])}
    for side in ("ours", "theirs"):
        middle = statistics.median(turn["wall_s"] for turn in found[side])
        out |= {f"{side}_tokens_per_s": round(tokens / middle), f"{side}_loss": found[side][-1]["loss"]}
    for kind in ("wall", "cpu"):
        ratios = [a[f"{kind}_s"] / b[f"{kind}_s"] for a, b in zip(found["ours"], found["theirs"], strict=True)]
        out |= {f"overhead_{kind}": round(statistics.median(ratios) - 1, 4), f"overhead_{kind}_range": _range(ratios)}
        differences = [a[f"{kind}_s"] - b[f"{kind}_s"] for a, b in zip(found["ours"], found["theirs"], strict=True)]
        out[f"overhead_{kind}_s"] = round(statistics.median(differences), 5)
    parts_s = {part: round(seconds, 2) for part, seconds in found["first_step_s"].items()}
    return {**out, "first_step_s": round(sum(found["first_step_s"].values()), 2), "first_step_parts_s": parts_s}


def _range(ratios: Sequence[float]) -> list[float]:
    """Least, lower and upper quartile, most; of ratios, less 1."""
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return [round(value - 1, 4) for value in (min(ratios), quartiles[0], quartiles[2], max(ratios))]
