"""Steps that are not taken: a loss or a gradient that is not finite, or is far above those before it.

The engine asks before any weight changes, and asks with numbers that all processes have agreed on, so all decide alike. What is
remembered from step to step is a few numbers, kept in the checkpoint: a resumed run, or one that plays a step again, decides as
the first time. No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megaspark.samples import Samples
from megaspark.settings import Section

GAVE_UP = 3  # the exit status of a run that ended because of bad steps
NAMED = 8  # samples of one dataset that a line on the terminal names; the logs name all

Refuse = Callable[[float, float], str | None]  # (loss, gradient norm) -> why the step is not to be taken, or None


class BadSteps(Section):
    """What becomes of a step with a bad loss or gradient: no weight, moment or count of it changes, its samples are named.

    What is not finite is always refused. Spikes are not unless asked for: clipping bounds what one of them can do, what counts
    as one depends on batch and data, and a false alarm leaves good data out.
    """

    loss_factor: float = Field(0.0, ge=0, description="a loss above so many times its running mean is bad, such as 2; 0 = none is")
    norm_factor: float = Field(0.0, ge=0, description="the same of the gradient's norm before clipping, such as 10; 0 = none is")
    window: int = Field(100, gt=0, description="good steps that the means look back on; the first so many of a phase pass unjudged")
    in_a_row: int = Field(10, gt=0, description="so many bad steps one after the other are no accident: then")
    then: Literal["stop", "roll_back"] = Field(
        "stop", description="roll_back: to the newest checkpoint's weights, past the data read since; stop: exit status 3, no save"
    )
    roll_backs: int = Field(3, ge=0, description="how often a run may roll back; then it stops")


def not_finite(loss: float, norm: float) -> str | None:
    """Refuses a step whose loss or gradient norm is infinite or NaN."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    # DeepSpeed says inf for NaN too, and steps over such a gradient by itself.
    return None if math.isfinite(norm) else "the gradient is not finite"


@dataclass
class Judge:
    """Refuses bad steps, and remembers what it needs for that and what became of the run's data.

    good, loss, norm: the good steps of this phase, and the running means over the last `window` of them (all of them while they
    are fewer, exponential afterwards). left_out: ranges [first, end) of samples that the weights have not learned from.
    """

    limits: BadSteps
    phase: int = 0
    good: int = 0
    loss: float = 0.0
    norm: float = 0.0
    in_a_row: int = 0
    skipped: int = 0
    roll_backs: int = 0
    left_out: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, limits: BadSteps, state: Mapping[str, Any]) -> Judge:
        """As it was when a checkpoint's state was written; a new one where there is none."""
        return cls(limits, **deepcopy(state.get("bad_steps", {})))

    def recorded(self) -> dict[str, Any]:
        """Itself, but for the limits, as plain data for a checkpoint's state, which is written while the next steps are taken."""
        return deepcopy({key: value for key, value in vars(self).items() if key != "limits"})

    def enter(self, phase: int) -> None:
        """Tells in which phase (its first sample) the next step is: other data have another loss, so the means begin anew."""
        if phase != self.phase:
            self.phase, self.good, self.loss, self.norm = phase, 0, 0.0, 0.0

    def refuse(self, loss: float, norm: float) -> str | None:
        """Why a step with this loss and gradient norm is not to be taken, or None; remembers nothing of it."""
        bad = not_finite(loss, norm)
        if bad is None and self.good >= self.limits.window:
            bad = _spike("the loss", loss, self.loss, self.limits.loss_factor)
            bad = bad or _spike("the gradient's norm", norm, self.norm, self.limits.norm_factor)
        return bad

    def took(self, loss: float, norm: float) -> None:
        """Remembers a step that was taken."""
        self.in_a_row = 0
        self.good += 1
        share = 1 / min(self.good, self.limits.window)
        self.loss += share * (loss - self.loss)
        self.norm += share * (norm - self.norm)

    def left(self, first: int, end: int) -> None:
        """Remembers a step over samples [first, end) that was not taken."""
        self.in_a_row += 1
        self.skipped += 1
        self._leave_out(first, end)

    def gives_up(self) -> bool:
        """Whether so many steps in a row were bad that the run must not go on like this."""
        return self.in_a_row >= self.limits.in_a_row

    def may_roll_back(self) -> bool:
        """Whether the limits allow to go back to a checkpoint, once more."""
        return self.limits.then == "roll_back" and self.roll_backs < self.limits.roll_backs

    def rolled_back(self, state: Mapping[str, Any], taken: int) -> None:
        """Remembers that the weights are those of a checkpoint's `state` again, and that samples go on from number `taken`."""
        then = Judge.of(self.limits, state)
        self.phase, self.good, self.loss, self.norm = then.phase, then.good, then.loss, then.norm
        self.in_a_row = 0
        self.roll_backs += 1
        self._leave_out(int(state["samples"]), taken)

    def _leave_out(self, first: int, end: int) -> None:
        """Adds a range that ends last of all, joined with those that it touches."""
        while self.left_out and self.left_out[-1][1] >= first:
            first = min(first, self.left_out.pop()[0])
        self.left_out.append([first, end])


def _spike(what: str, value: float, mean: float, factor: float) -> str | None:
    if factor and value > factor * mean:
        return f"{what} {value:.4g} is {value / mean if mean else math.inf:.3g} times its mean {mean:.4g}"
    return None


def decode_command(run: Path, first: int, end: int) -> str:
    """What to type to read samples [first, end) of a run."""
    return f"megaspark shards decode {run} --samples {first}:{end}"


def by_dataset(samples: Samples, first: int, end: int) -> str:
    """Samples [first, end) by dataset, with their numbers in it: "a 17, 4; b 311"; of many of one only the first are named."""
    numbers: dict[str, list[int]] = {}
    for index in range(first, end):
        dataset, number = samples.locate(index)
        numbers.setdefault(samples.names[dataset], []).append(number)
    return "; ".join(f"{name} {_listed(found)}" for name, found in sorted(numbers.items()))


def _listed(numbers: Sequence[int]) -> str:
    more = f", ... ({len(numbers):,} in all)" if len(numbers) > NAMED else ""
    return ", ".join(map(str, numbers[:NAMED])) + more


def by_micro_batch(samples: Samples, indices: Sequence[Sequence[int]], losses: Sequence[float]) -> str:
    """A line a micro-batch of this process: its loss, and each of its samples as "number (dataset, number in it)".

    losses: as many, or none where this process computes none; then no lines.
    """
    lines = []
    for numbers, loss in zip(indices, losses, strict=bool(losses)):
        places = [samples.locate(number) for number in numbers]
        named = [f"{number} ({samples.names[d]} {n})" for number, (d, n) in zip(numbers, places, strict=True)]
        lines.append(f"  loss {loss:.4g}: sample {', '.join(named)}")
    return "\n".join(lines)
