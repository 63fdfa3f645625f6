"""What a run tells while it goes, from rank 0 for all: a line a step in metrics.jsonl, TensorBoard, progress.txt and on stdout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megaspark.config import Checked
from megaspark.energy import EnergyMeter
from megaspark.engine import Engine, StepResult
from megaspark.flops import parameters, peak_flops, per_token
from megaspark.meters import MetricsLog, Pauses, StepMeter, TimeLeft, evaluation_line, terminal_line
from megaspark.ranks import Ranks
from megaspark.terminals import SEPARATOR, Terminal
from megaspark.traffic_reports import TrafficReport
from megaspark.validations import Validation

EVALUATION, SAVE = "evaluation", "save"


class Recorder:
    """Times the steps of a run and writes what they tell. Every process calls it alike; only the first one speaks.

    The first process of each host reads the host's energy; what is recorded is the sum, or null where any host has none.
    """

    def __init__(self, checked: Checked, ranks: Ranks, engine: Engine, step: int, end: int) -> None:
        config, layout = checked.config, checked.layout
        self.ranks, self.engine, self.end = ranks, engine, end
        self.energy = EnergyMeter() if ranks.local_rank == 0 else None
        self.step_tokens = config.run.global_batch * config.data.seq
        self.log: MetricsLog | None = None
        if not ranks.first:
            return
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
        peak = peak_flops(name, config.run.precision)
        flops = per_token(config.model.shape, config.data.seq)
        self.meter = StepMeter(flops, None if peak is None else peak * ranks.world, self.step_tokens)
        self.config = config
        self.log = MetricsLog(config.folder)
        self.terminal = Terminal(config.folder)
        at_end = end == config.run.steps and bool(config.run.eval_every)
        evaluations = Pauses(config.run.eval_every, at_end) if checked.validation else Pauses(0, False)
        self.time_left = TimeLeft(end, {EVALUATION: evaluations, SAVE: Pauses(config.run.save_every, at_end=True)})
        dropped = self.log.keep_until(step)
        source = self.energy.source if self.energy else None
        self.terminal.say(
            f"{config.run.name}: {parameters(config.model.shape, config.model.tie_embeddings):,} parameters, "
            f"{ranks.world} x {name}, {config.run.precision}, {layout.words()}, accumulation {layout.accumulation}, "
            f"{self.step_tokens:,} tokens a step, steps {step} to {end}; energy: {source or 'not measured'}"
        )
        self.traffic = TrafficReport(config, layout) if ranks.world > 1 else None
        if self.traffic:
            self.terminal.say(self.traffic.opening())
        if dropped:
            self.terminal.say(f"{dropped} lines of metrics after step {step} are computed again")
        self.pause_over()

    def step(self, step: int, tokens: int, result: StepResult, lr: float) -> None:
        """Records one optimizer step, taken or refused: the run's steps and tokens so far, the step's result and its rate."""
        joules = self._joules()
        if self.log:
            figures = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "joules": joules}
            line = self.meter.line(step=step, tokens=tokens, **figures)
            if result.refused:
                line["skipped"] = result.refused
            line["sent_bytes"] = self.traffic.step(result.idle) if self.traffic else 0
            if result.idle is not None:
                line["idle"] = result.idle
            self.log.write(line)
            self.time_left.stepped(line["step_s"])
            self.terminal.show(terminal_line(line, self.end, self.time_left.told(step)))

    def roll_back(self, step: int) -> None:
        """Tells that the steps after `step` are taken anew, on other data: what was recorded of them is dropped."""
        if self.log:
            self.terminal.say(f"{self.log.keep_until(step)} lines of metrics after step {step} are dropped; these steps come again")
        self.pause_over()

    def use_seq(self, seq: int) -> None:
        """Tells of how many tokens a sample of the next step is: the work of a token grows with it."""
        if self.log and self.meter.tokens != self.config.run.global_batch * seq:
            self.meter.flops = per_token(self.config.model.shape, seq)
            self.meter.tokens = self.config.run.global_batch * seq
            self.time_left.steps_change()

    def evaluating(self, step: int, number: int, count: int) -> None:
        """Tells how far the evaluation after `step` is: at this process's micro-batch `number` of `count`."""
        if self.log:
            self.terminal.show_for_now(f"step {step:,}{SEPARATOR}validation, micro-batch {number:,} of {count:,}")

    def evaluation(self, step: int, tokens: int, validation: Validation, losses: Sequence[float]) -> None:
        """Records one evaluation, a line for each source and one for all, from the losses of all its micro-batches."""
        if self.log:
            lines = validation.figures(losses)
            for split, figures in lines.items():
                self.log.write({"step": step, "tokens": tokens, "split": split, **figures})
            self.terminal.say(evaluation_line(step, lines, self.meter.since_s))
        self.pause_over(EVALUATION)

    def pause_over(self, kind: str | None = None) -> None:
        """Leaves what was done since the last step, an EVALUATION or a SAVE, out of the next one's time and energy."""
        if self.log:
            pause_s = self.meter.restart()
            if self.traffic:
                self.traffic.skip()
            if kind:
                self.time_left.paused(kind, pause_s)
        if self.energy:
            self.energy.read()

    def close(self) -> None:
        """Closes the files and the energy counters."""
        if self.log:
            if self.traffic and (said := self.traffic.closing()):
                self.terminal.say(said)
            if self.traffic:
                self.traffic.close()
            self.log.close()
            self.terminal.close()
        if self.energy:
            self.energy.close()

    def _joules(self) -> float | None:
        here = self.energy.read() if self.energy else 0.0
        if self.ranks.world == self.ranks.local_world:
            return here
        total = self.engine.total(math.nan if here is None else here)
        return None if math.isnan(total) else total
