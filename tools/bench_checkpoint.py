"""`megaspark bench checkpoint`: saving and loading a state of given size, beside what `dd` gets from the same disk.

Every round does all of it in turn, so that whatever else the machine does falls on all; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megaspark.checkpoint import Checkpoint, load, newest
from megaspark.errors import UserError
from megaspark.fragments import STATE, Fragment
from megaspark.savers import Saver

FRAGMENTS = 24  # so many parameters, of sizes as unlike as a model's are
DD_BLOCK = "8M"


def state_of(megabytes: float, seed: int = 0) -> list[Fragment]:
    """Parameters of random numbers whose masters and moments take so many MB in all."""
    generator = torch.Generator().manual_seed(seed)
    weights = [1 + 7 * (number % 4) for number in range(FRAGMENTS)]
    elements = [max(1, int(megabytes * 1e6 / 12 * weight / sum(weights))) for weight in weights]
    return [
        Fragment(f"w{number}", (count,), 0, count, {kind: torch.randn(count, generator=generator) for kind in STATE})
        for number, count in enumerate(elements)
    ]


def timed(action: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of wall time that it takes."""
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def dd(*arguments: str) -> None:
    """Runs dd, quietly."""
    subprocess.run(["dd", f"bs={DD_BLOCK}", *arguments], check=True, stderr=subprocess.DEVNULL)


def forget(paths: list[Path]) -> None:
    """Has the kernel drop what it holds of files in memory; what is not on the disk yet it cannot drop."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Work:
    """Stands for the training that a save disturbs: matrix products of a millisecond or so, on this process's threads."""

    def __init__(self) -> None:
        self.x = torch.randn(512, 512)

    def rate(self, go_on: Callable[[int], bool]) -> float:
        """Products a second for as long as it is told to go on, given how many were made."""
        count, started = 0, time.perf_counter()
        while go_on(count):
            self.x @ self.x
            count += 1
        return count / (time.perf_counter() - started)


def saved(saver: Saver, step: int, held: list[Fragment], wait: bool, work: Work) -> dict[str, float]:
    """Saves once; returns the seconds that the loop stood still, those of the whole save, and the work's rate meanwhile."""
    started = time.perf_counter()
    saver.save({"step": step}, held, wait)
    stall_s = time.perf_counter() - started
    rate = 0.0
    if not wait:
        rate = work.rate(lambda count: saver.pending()[0] > 0)
        stall_s += timed(saver.heard, [0.0])
        saver.finish()
    return {"stall_s": stall_s, "whole_s": time.perf_counter() - started, "rate": rate}


def measure(folder: Path, held: list[Fragment], rounds: int) -> list[dict[str, float]]:
    """One dict of seconds a round, `megabytes` besides."""
    size = sum(tensor.nbytes for fragment in held for tensor in fragment.tensors.values())
    target = [Fragment(f.name, f.shape, 0, f.length, {kind: torch.zeros(f.length) for kind in STATE}) for f in held]
    saver = Saver(folder, 0, lambda value: [value], (0, 0), held)
    plain, work, out = folder / "dd", Work(), []
    for number in tqdm(range(rounds), desc=f"{size / 1e6:,.0f} MB", unit="round", file=sys.stderr):
        plain.unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        os.sync()
        wrote_s = timed(dd, "if=/dev/zero", f"of={plain}", f"count={size}B", "conv=fsync")
        found = {"megabytes": size / 1e6, "dd_write_s": wrote_s}
        found["save_s"] = saved(saver, 2 * number, held, True, work)["whole_s"]
        quiet = work.rate(lambda count: count < 200)
        behind = saved(saver, 2 * number + 1, held, False, work)
        found |= {"stall_s": behind["stall_s"], "background_s": behind["whole_s"], "slowed": 1 - behind["rate"] / quiet}
        checkpoint = newest(folder)
        files = [checkpoint.folder / name for name in checkpoint.files]
        forget([*files, plain])
        found["verify_s"] = timed(_must_be_whole, checkpoint)
        found["load_s"] = found["verify_s"] + timed(load, checkpoint, target)
        forget(files)
        found["dd_read_s"] = sum(timed(dd, f"if={file}", "of=/dev/null") for file in files)
        out.append(found)
    return out


def _must_be_whole(checkpoint: Checkpoint) -> None:
    if problem := checkpoint.problem():
        raise UserError(problem)


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, MB a second, and ratios with their least and most."""
    middle = {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
    rates = {key: round(middle["megabytes"] / middle[f"{key}_s"]) for key in ("save", "dd_write", "load", "dd_read")}
    ratios = {"save_of_dd": ("dd_write_s", "save_s"), "load_of_dd": ("dd_read_s", "load_s"), "stall_of_save": ("stall_s", "save_s")}
    out: dict[str, Any] = {"megabytes": round(middle["megabytes"]), **{f"{key}_mb_per_s": rate for key, rate in rates.items()}}
    for name, (upper, lower) in ratios.items():
        values = sorted(found[upper] / found[lower] for found in rounds)
        out |= {name: round(statistics.median(values), 3), f"{name}_range": [round(values[0], 3), round(values[-1], 3)]}
    seconds = {key: round(middle[key], 3) for key in ("save_s", "stall_s", "background_s", "verify_s", "load_s")}
    return {**out, **seconds, "work_slowed_meanwhile": round(middle["slowed"], 3)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="megaspark bench checkpoint",
        description="Measures saving, waiting for it and in the background, and loading with verification from a cold cache.",
        epilog="example: megaspark bench checkpoint --mb 400 --dir /shared/scratch",
    )
    out.add_argument("--mb", type=float, default=400, help="of masters and moments; three times this is taken in memory")
    out.add_argument("--dir", type=Path, default=Path(), help="on the disk that is measured (default: here); three times --mb")
    out.add_argument("--rounds", type=int, default=5)
    out.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of this process (default: all cores)")
    return out


def main(argv: list[str]) -> int:
    """Prints one JSON line; a ratio of dd above 1 means faster than dd."""
    args = parser().parse_args(argv)
    if args.mb <= 0 or args.rounds < 1 or args.threads < 1:
        raise UserError("--mb, --rounds and --threads must be above 0")
    if not args.dir.is_dir() or shutil.disk_usage(args.dir).free < 3.2e6 * args.mb:
        raise UserError(f"--dir {args.dir}: no folder with {3.2 * args.mb:,.0f} MB free; choose another, or a smaller --mb")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.dir) as folder, redirect_stdout(sys.stderr):
        rounds = measure(Path(folder), state_of(args.mb), args.rounds)
    print(json.dumps({"threads": args.threads, "rounds": args.rounds, **summary(rounds)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
