"""What a run does about steps that were refused: it names their samples, and after too many in a row goes back, or ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaspark.bad_steps import Judge, by_dataset, by_micro_batch, decode_command
from megaspark.batches import Batches
from megaspark.config import Checked
from megaspark.engine import Engine, StepResult
from megaspark.guards import Guard
from megaspark.recorders import Recorder
from megaspark.samples import Samples
from megaspark.savers import Saver
from megaspark.starts import Position, agree_on_roll_back, restore


class Refusals:
    """Keeps the judge of a run up to date and carries out what it comes to; every process calls it alike.

    Whatever it does follows from the checkpoint that the run went on from, so a run that is killed and started again does it
    again, and ends up with the same bits.
    """

    def __init__(self, checked: Checked, engine: Engine, guard: Guard, saver: Saver, state: Mapping[str, Any]) -> None:
        self.checked, self.engine, self.guard, self.saver, self.ranks = checked, engine, guard, saver, guard.ranks
        self.judge = Judge.of(checked.config.bad_steps, state)
        self.gave_up = False

    def settle(self, at: Position, result: StepResult, batches: Batches, samples: Samples, recorder: Recorder) -> Position:
        """Takes note of the step that ends `at`; returns where the run goes on: there, unless it had to roll back.

        Sets `gave_up` where it must not go on at all.
        """
        if result.refused is None:
            self.judge.took(result.loss, result.grad_norm)
            return at
        self.judge.left(at.samples - self.checked.config.run.global_batch, at.samples)
        self._name_samples(at, result, batches, samples)
        if not self.judge.gives_up():
            return at
        back = self._roll_back(at)
        if back is None:
            self.gave_up = True
            return at
        recorder.roll_back(back.step)
        return back

    def summary(self) -> str:
        """What is to be said at the end of the run; empty where nothing was refused."""
        times = f", {self.judge.roll_backs:,} times it rolled back" if self.judge.roll_backs else ""
        return f"; {self.judge.skipped:,} bad steps were skipped{times}" if self.judge.skipped else ""

    def _name_samples(self, at: Position, result: StepResult, batches: Batches, samples: Samples) -> None:
        """On the terminal the whole step's samples, in each rank's log its own with their losses."""
        batch = self.checked.config.run.global_batch
        first, command = at.samples - batch, decode_command(self.checked.config.folder, at.samples - batch, at.samples)
        said = f"step {at.step} skipped: {result.refused}"
        self._say(f"{said}; its samples, {by_dataset(samples, first, at.samples)}: {command}")
        own = by_micro_batch(samples, batches.indices(first, batch), result.own_losses)
        self.guard.log.say(f"{said}; {command}\n{own}")

    def _roll_back(self, at: Position) -> Position | None:
        """Loads the newest good checkpoint, and goes on with the samples after `at`; None where that cannot be, with the reason."""
        limits, judge = self.checked.config.bad_steps, self.judge
        many = f"{judge.in_a_row} bad steps in a row (bad_steps.in_a_row)"
        back = None
        if judge.may_roll_back():
            self.guard.at(f"the roll-back after step {at.step}", slow=True)
            self.saver.finish()  # one that is being written may be the one to go back to
            back = agree_on_roll_back(self.checked, self.ranks)
            why = "there is no checkpoint to roll back to"
        elif limits.then == "roll_back":
            why = f"the run rolled back {judge.roll_backs} times already (bad_steps.roll_backs)"
        else:
            why = "look at the samples; bad_steps.then=roll_back goes on without them"
        if back is None:
            advice = "stopped without a save: lower optim.lr, or mend the data"
            self._say(f"{self.checked.config.folder}: {many}, {why}; {advice}", log=True)
            return None
        restore(self.engine, back)
        judge.rolled_back(back.state, at.samples)
        before = Position.of(back)
        skipped = f"samples {before.samples:,} to {at.samples - 1:,} are left out"
        self._say(f"{many}: rolled back to {back.folder}; {skipped} ({judge.roll_backs} of {limits.roll_backs})", log=True)
        return Position(before.step, at.samples, before.updates)

    def _say(self, text: str, log: bool = False) -> None:
        if self.ranks.first:
            print(text, flush=True)
        if log:
            self.guard.log.say(text)
