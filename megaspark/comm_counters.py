"""Counts the bytes that this process really sends, DeepSpeed's calls and ours, at the price of a dictionary entry each.

DeepSpeed's own comms_logger would do too, but waits for the device after every call; this changes nothing about the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaspark.volumes import ring

# What torch.distributed and DeepSpeed's backend call it -> (the operation, the position of its payload: what is reduced, what was
# gathered, what is exchanged).
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
_PAYLOADS = (  # what that argument is called, by its position
    ("tensor", "tensors", "output_tensor", "output_tensors", "tensor_list"),
    ("input_tensor", "input", "input_list", "input_tensor_list"),
)
Traffic = Counter[tuple[str, int]]


class CommCounter:
    """Stands before torch.distributed and DeepSpeed's backend, which keeps references of its own to some of it.

    `sent`: bytes sent by (operation, size of the group), reckoned as rings send them (see `volumes.ring`); a broadcast or a reduce
    counts a rank's share of the whole. Everything is counted: scalars too, and what is done between steps.
    """

    def __init__(self) -> None:
        self.sent: Traffic = Counter()
        self._undo: list[Callable[[], None]] = []
        self._inside = False

    def start(self) -> CommCounter:
        """Begins to count; DeepSpeed's process group must exist."""
        from deepspeed.comm import comm  # after the accelerator was settled

        for owner in (torch.distributed, comm.cdb):
            for name in _CALLS:
                plain = getattr(owner, name, None)
                if plain is None:
                    continue
                # An instance's own attribute is taken away again; a module's is put back.
                undo = partial(delattr, owner, name) if owner is comm.cdb else partial(setattr, owner, name, plain)
                self._undo.append(undo)
                setattr(owner, name, self._counting(name, plain))
        return self

    def stop(self) -> None:
        """Leaves everything as it was."""
        while self._undo:
            self._undo.pop()()

    def take(self) -> Traffic:
        """What was sent since the last time, and begins anew."""
        taken, self.sent = self.sent, Counter()
        return taken

    def _counting(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if self._inside:  # DeepSpeed's call, which has been counted, arrives at torch's
                return plain(*arguments, **named)
            self._count(name, arguments, named)
            self._inside = True
            try:
                return plain(*arguments, **named)
            finally:
                self._inside = False

        return counted

    def _count(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        op, position = _CALLS[name]
        if len(arguments) > position:
            payload = arguments[position]
        else:
            payload = next((named[key] for key in _PAYLOADS[position] if key in named), ())
        group = named.get("group")
        if group is None:
            group = next((a for a in arguments if isinstance(a, torch.distributed.ProcessGroup)), None)
        size = 2 if op == "send" else torch.distributed.get_world_size(group)
        self.sent[op, size] += _bytes(payload) if op == "send" else ring(op, _bytes(payload), size)


def _bytes(payload: Tensor | Iterable[Tensor]) -> int:
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(map(_bytes, payload))
