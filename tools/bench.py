"""`megaspark bench NAME`: measures this machine's speed at one part of the work and prints JSON lines."""

from __future__ import annotations

from importlib import import_module

from megaspark.errors import UserError
from megaspark.settings import nearest

BENCHES = {
    "checkpoint": ("megaspark.tools.bench_checkpoint", "saving, in the background too, and loading, beside dd on the same disk"),
    "data": ("megaspark.tools.bench_data", "data preparation and reading: MB of text a CPU second, scaling, memory"),
    "kernels": ("megaspark.tools.bench_kernels", "kernels: bytes, FLOPs and clocks against what an H200 could do"),
    "liger": ("megaspark.tools.bench_liger", "our kernels beside Liger's: errors, registers, bytes"),
    "train": ("megaspark.tools.bench_train", "a training step: our Llama beside its peers, interleaved, tokens a CPU second"),
}


def main(argv: list[str]) -> int:
    """Hands over to the bench that is named; raises UserError for one that does not exist."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megaspark bench NAME ... (megaspark bench NAME --help)\n")
        print("\n".join(f"  {name:10} {about}" for name, (_, about) in BENCHES.items()))
        return 0
    if argv[0] not in BENCHES:
        raise UserError(f"no bench {argv[0]!r}{nearest(argv[0], [*BENCHES])}")
    return import_module(BENCHES[argv[0]][0]).main(argv[1:])
