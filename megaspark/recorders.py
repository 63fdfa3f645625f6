"""What a run tells while it goes: a line a step on the terminal, in metrics.jsonl and in TensorBoard, from rank 0 for all."""

from __future__ import annotations

import math

import torch

from megaspark.config import Checked
from megaspark.energy import EnergyMeter
from megaspark.engine import Engine, StepResult
from megaspark.flops import parameters, peak_flops, per_token
from megaspark.meters import MetricsLog, StepMeter, terminal_line
from megaspark.ranks import Ranks


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
        dropped = self.log.keep_until(step)
        source = self.energy.source if self.energy else None
        print(
            f"{config.run.name}: {parameters(config.model.shape, config.model.tie_embeddings):,} parameters, "
            f"{ranks.world} x {name}, {config.run.precision}, ZeRO {layout.stage}, accumulation {layout.accumulation}, "
            f"{self.step_tokens:,} tokens a step, steps {step} to {end}; energy: {source or 'not measured'}"
        )
        if dropped:
            print(f"{dropped} lines of metrics after step {step} are computed again")
        self.pause_over()

    def step(self, step: int, tokens: int, result: StepResult, lr: float) -> None:
        """Records one optimizer step, taken or refused: the run's steps and tokens so far, the step's result and its rate."""
        joules = self._joules()
        if self.log:
            figures = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": lr, "joules": joules}
            line = self.meter.line(step=step, tokens=tokens, **figures)
            if result.refused:
                line["skipped"] = result.refused
            self.log.write(line)
            print(terminal_line(line, self.end), flush=True)

    def roll_back(self, step: int) -> None:
        """Tells that the steps after `step` are taken anew, on other data: what was recorded of them is dropped."""
        if self.log:
            print(f"{self.log.keep_until(step)} lines of metrics after step {step} are dropped; these steps come again", flush=True)
        self.pause_over()

    def use_seq(self, seq: int) -> None:
        """Tells of how many tokens a sample of the next step is: the work of a token grows with it."""
        if self.log:
            self.meter.flops = per_token(self.config.model.shape, seq)
            self.meter.tokens = self.config.run.global_batch * seq

    def evaluation(self, step: int, tokens: int, loss: float) -> None:
        """Records one evaluation on the validation data."""
        if self.log:
            self.log.write({"step": step, "tokens": tokens, "split": "validation", "loss": loss})
            print(f"step {step:,} | validation loss {loss:.4f}", flush=True)
        self.pause_over()

    def pause_over(self) -> None:
        """Leaves what was done since the last step, such as a checkpoint, out of the next one's time and energy."""
        if self.log:
            self.meter.restart()
        if self.energy:
            self.energy.read()

    def close(self) -> None:
        """Closes the files and the energy counters."""
        if self.log:
            self.log.close()
        if self.energy:
            self.energy.close()

    def _joules(self) -> float | None:
        here = self.energy.read() if self.energy else 0.0
        if self.ranks.world == self.ranks.local_world:
            return here
        total = self.engine.total(math.nan if here is None else here)
        return None if math.isnan(total) else total
