"""One process of a run that bench_loop.py starts: `python -m megaspark.tools.bench_loop_worker FOLDER`.

The real training loop runs as users start it, with its data, records, watchdog and checks. Every few steps, in the same
processes, a bare DeepSpeed loop takes as many, on the same batches, with a model, optimizer and settings built alike.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megaspark import train
from megaspark.accelerators import settle_accelerator
from megaspark.batches import Batch
from megaspark.config import Checked, check_run, load_config
from megaspark.engine import Engine, StepResult
from megaspark.optim import adamw
from megaspark.ranks import Ranks, end_with_parent
from megaspark.recorders import Recorder
from megaspark.samples import Samples
from megaspark.weights import fill, make_model, parts


class Done(Exception):
    """All rounds were taken."""


class Stages:
    """Seconds of a start by part: each from the end of the one before."""

    def __init__(self, began: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = began

    def over(self, part: str) -> None:
        """The part ends now."""
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class Turn:
    """CPU and wall seconds a step of one turn, and its last loss."""

    cpu_s: float
    wall_s: float
    loss: float


class Clock:
    """Times a turn, of this process; all of them begin it together."""

    def __init__(self, engine: Engine) -> None:
        engine.wait_for_all()
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def turn(self, steps: int, loss: float) -> Turn:
        """The turn ends now."""
        return Turn((time.process_time() - self.cpu) / steps, (time.perf_counter() - self.wall) / steps, loss)


class Bare:
    """What one writes who has never seen our loop: deepspeed.initialize, then forward, backward and step over batches."""

    def __init__(self, checked: Checked, engine: Engine) -> None:
        import deepspeed

        config, optim = checked.config, checked.config.optim
        model = make_model(config.model, config.execution)
        dtype = torch.float32 if config.run.precision == "fp32" else torch.bfloat16
        fill(model, parts(model), config.run.seed, dtype, engine.device)
        if config.run.compile:
            for block in model.blocks:
                block.compile()
        optimizer = adamw(model, optim.lr, optim.betas, optim.eps, optim.weight_decay)
        settings = {"steps_per_print": 1 << 40, **checked.layout.deepspeed}
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)

    def steps(self, batches: Iterable[Batch]) -> torch.Tensor:
        """A step for each batch; the last one's loss."""
        loss = torch.tensor(0.0)
        for batch in batches:
            loss = self.deepspeed(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
        return loss.detach()


class TimedEngine(Engine):
    """Tells how long the parts of its making took."""

    stages: Stages

    def __init__(self, checked: Checked, ranks: Ranks) -> None:
        from megaspark import placements  # it imports DeepSpeed

        placements.place_model, place_model = self._timed(placements.place_model), placements.place_model
        try:
            super().__init__(checked, ranks)
        finally:
            placements.place_model = place_model
        self.stages.over("initialize")

    def _timed(self, place_model: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self.stages.over("join")
            model = place_model(*arguments)
            self.stages.over("model")
            return model

        return timed

    def step(self, *arguments: Any, **named: Any) -> StepResult:
        if "first_step" not in self.stages.seconds:
            self.stages.over("rest")
        return super().step(*arguments, **named)


class Turns(Recorder):
    """A run's recorder, at which the loop arrives once a step: after every turn it has the bare loop take its own."""

    stages: Stages
    spec: dict[str, Any]

    def __init__(self, checked: Checked, ranks: Ranks, engine: Engine, step: int, end: int) -> None:
        super().__init__(checked, ranks, engine, step, end)
        self.checked, self.bare = checked, None
        self.ours: list[Turn] = []
        self.theirs: list[Turn] = []
        self.progress = tqdm(total=self.spec["rounds"], unit="round", file=sys.stderr, disable=not ranks.first)

    def step(self, step: int, tokens: int, result: StepResult, lr: float) -> None:
        super().step(step, tokens, result, lr)
        if step == 1:
            self.stages.over("first_step")
        warm_up, length = self.spec["warm_up"], self.spec["steps"]
        if step == warm_up:
            self.bare = Bare(self.checked, self.engine)
            self.bare.steps(self._batches(0, step))
        elif step > warm_up and (step - warm_up) % length == 0:
            self.ours.append(self.clock.turn(length, result.loss))
            self._bare_turn(step - length, step)
            self.progress.update()
        else:
            return
        if len(self.ours) == self.spec["rounds"]:
            raise Done
        self.pause_over()
        self.clock = Clock(self.engine)

    def _bare_turn(self, first: int, end: int) -> None:
        batches = self._batches(first, end)
        traffic = self.traffic if self.log else None
        if traffic:
            traffic._counter.stop()  # our loop's, and no part of a bare one
        clock = Clock(self.engine)
        loss = self.bare.steps(batches)
        self.theirs.append(clock.turn(end - first, loss.item()))
        if traffic:
            traffic._counter.start()

    def _batches(self, first: int, end: int) -> list[Batch]:
        """This process's batches of the steps [first, end), made beforehand."""
        config, batch = self.checked.config, self.checked.config.run.global_batch
        samples = Samples(self.checked.train, config.data.phases, config.run.seed)
        reading = train._batches(self.checked, samples, self.ranks)
        made = [b for step in range(first, end) for b in reading.step(step * batch, batch)]
        return [Batch(*(None if t is None else t.to(self.engine.device) for t in b)) for b in made]

    def found(self) -> dict[str, Any]:
        """What the first process writes down: of every round the sum of all CPU seconds, the slowest's wall, the mean loss."""
        everybody = self.engine.gather({"ours": self.ours, "theirs": self.theirs})
        out = {"first_step_s": self.stages.seconds}
        for side in ("ours", "theirs"):
            rounds = zip(*(each[side] for each in everybody), strict=True)
            out[side] = [
                {"cpu_s": sum(t.cpu_s for t in r), "wall_s": max(t.wall_s for t in r), "loss": statistics.fmean(t.loss for t in r)}
                for r in rounds
            ]
        return out


def worker(folder: Path) -> None:
    """One process of a run in `folder`."""
    spec = json.loads((folder / "spec.json").read_text())
    stages = Stages(spec["began"])
    end_with_parent()
    settle_accelerator()
    import deepspeed  # noqa: F401 (so that its seconds are counted as an import's)

    stages.over("import")
    ranks = Ranks.from_environment()
    checked = check_run(*load_config(folder / "run.yaml", []), ranks.world)
    stages.over("settings")
    TimedEngine.stages = Turns.stages = stages
    Turns.spec = spec
    recorders: list[Turns] = []

    def recorder(*arguments: Any) -> Turns:
        recorders.append(Turns(*arguments))
        return recorders[0]

    train.Engine, train.Recorder = TimedEngine, recorder  # type: ignore[misc, assignment]
    start = train.agree_on_start(checked, ranks)
    stages.over("join")
    try:
        train.train(checked, ranks, start)
    except Done:
        found = recorders[0].found()
    if ranks.first:
        (folder / "result.json").write_text(json.dumps(found))
    recorders[0].engine.wait_for_all()
    sys.stderr.flush()
    os._exit(0)  # as train.main does


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
