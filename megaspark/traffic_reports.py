"""What a run really sends and how idle its stages are, beside what theory says: at its start, a step, at its end."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megaspark.comm_counters import CommCounter, Traffic
from megaspark.plans import workload
from megaspark.volumes import of_stage


class TrafficReport:
    """Counts one process's traffic from its making to `close`, without what lies between steps; the engine must exist.

    stage: this process's of the pipeline.
    """

    def __init__(self, config: Any, layout: Any, stage: int = 0) -> None:
        self.work = workload(config, layout)
        self.theory: Counter[str] = Counter()
        self.volumes = of_stage(self.work, stage)
        for volume in self.volumes:
            self.theory[volume.op] += volume.sent_bytes
        self.steps, self.sent, self.idle = 0, Counter[str](), 0.0
        self._first = True
        self._counter = CommCounter().start()

    def opening(self) -> str:
        """Theory in a line: bytes a rank sends in a step by kind, and the bubble."""
        kinds = ", ".join(f"{volume.kind} {amount(volume.sent_bytes)} ({volume.op})" for volume in self.volumes)
        bubble = f"; bubble {self.work.bubble:.1%}" if self.work.pipeline > 1 else ""
        return f"a rank sends in a step, by theory: {kinds or 'nothing'}{bubble}"

    def step(self, idle: float | None = None) -> int:
        """Takes note of a step that ended just now; returns the bytes that this process sent in it.

        idle: the share of its passes in which the stages of a pipeline did not compute.
        """
        sent = by_op(self._counter.take())
        if not self._first:  # in its first step ZeRO-3 learns the order of modules, and gathers otherwise
            self.steps += 1
            self.sent += sent
            self.idle += idle or 0.0
        self._first = False
        return sent.total()

    def skip(self) -> None:
        """Forgets what was sent since the last step: by an evaluation, a checkpoint."""
        self._counter.take()

    def closing(self) -> str | None:
        """Measured beside theory in a line, means over the steps but the first; None if there were none."""
        if not self.steps:
            return None
        parts = []
        for op in sorted({*self.theory, *self.sent}, key=lambda op: -self.theory[op]):
            measured, expected = self.sent[op] / self.steps, self.theory[op]
            if expected or measured > 1000:  # scalars: norms and losses
                beside = f"theory {amount(expected)}" + (f", {measured / expected - 1:+.2%}" if expected else "")
                parts.append(f"{op} {amount(measured)} ({beside})")
        told = f"a rank sent in a step, over {self.steps:,} steps: {', '.join(parts) or 'nothing'}"
        if self.work.pipeline > 1:
            told += f"; its stages stood idle {self.idle / self.steps:.1%} of the passes (bubble by theory {self.work.bubble:.1%})"
        return told

    def close(self) -> None:
        """Ends the counting."""
        self._counter.stop()


def by_op(traffic: Traffic) -> Counter[str]:
    """Bytes by operation, whatever the group."""
    out: Counter[str] = Counter()
    for (op, _), sent in traffic.items():
        out[op] += sent
    return out


def amount(count: float) -> str:
    """Bytes for people, to three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
