"""CPU or GPU: what DeepSpeed is told before its first import, and how this process joins the others."""

from __future__ import annotations

import os

import torch

from megaspark import launchers
from megaspark.allocators import keep_pages
from megaspark.ranks import Ranks, threads_per_process


def settle_accelerator() -> None:
    """Tells DeepSpeed, before its first import, to compute on the CPU where there is no CUDA device."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def join(ranks: Ranks) -> torch.device:
    """Joins the process group (NCCL on CUDA, gloo on CPU), if it has not yet, and returns this process's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_pages()
        torch.set_num_threads(threads_per_process(ranks))
    launchers.complete_environment(ranks)
    import deepspeed.ops

    # Its first use would compile C++ for minutes, and a build killed half-way leaves a lock that hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device
