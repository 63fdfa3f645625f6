"""Counts the bytes that this process really sends through DeepSpeed, call by call, at the price of a dictionary entry each.

DeepSpeed's own comms_logger would do too, but waits for the device after every call; this changes nothing about the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megaspark.volumes import ring

# DeepSpeed's name -> (the operation, which positional argument is the payload: the reduced, the gathered or the exchanged tensor).
_CALLS = {
    "all_reduce": ("all_reduce", 0),
    "inference_all_reduce": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "reduce": ("reduce", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "all_gather": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_coalesced": ("all_gather", 0),
    "all_to_all_single": ("all_to_all", 1),
    "all_to_all": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    "send": ("send", 0),
    "isend": ("send", 0),
}
Traffic = Counter[tuple[str, int]]


class CommCounter:
    """Stands before DeepSpeed's communication backend from `start` to `stop` and adds up what goes through.

    `sent`: bytes sent by (operation, size of the group), reckoned as rings send them (see `volumes.ring`); a broadcast or a reduce
    counts a rank's share of the whole. Everything is counted: scalars too, and what is done between steps.
    """

    def __init__(self) -> None:
        self.sent: Traffic = Counter()
        self._plain: dict[str, Callable[..., Any]] = {}

    def start(self) -> CommCounter:
        """Begins to count; DeepSpeed's process group must exist."""
        backend = _backend()
        for name in _CALLS:
            self._plain[name] = getattr(backend, name)
            setattr(backend, name, self._counting(name, self._plain[name]))
        return self

    def stop(self) -> None:
        """Leaves the backend as it was."""
        for name in self._plain:
            delattr(_backend(), name)  # the class's own method shows again
        self._plain.clear()

    def take(self) -> Traffic:
        """What was sent since the last time, and begins anew."""
        taken, self.sent = self.sent, Counter()
        return taken

    def _counting(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        op, position = _CALLS[name]
        payload_names = ("input_tensor", "input", "input_list", "input_tensor_list") if position else ("tensor", "tensors", "output_tensor")

        def counted(*arguments: Any, **named: Any) -> Any:
            payload = arguments[position] if len(arguments) > position else next((named[n] for n in payload_names if n in named), ())
            group = named.get("group")
            if group is None:
                group = next((a for a in arguments if isinstance(a, torch.distributed.ProcessGroup)), None)
            size = torch.distributed.get_world_size(group)
            count = _bytes(payload) if op == "send" else ring(op, _bytes(payload), size)
            self.sent[op, 2 if op == "send" else size] += count
            return plain(*arguments, **named)

        return counted


def _backend() -> Any:
    from deepspeed.comm import comm  # after the accelerator was settled

    return comm.cdb


def _bytes(payload: Tensor | Iterable[Tensor]) -> int:
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(map(_bytes, payload))
