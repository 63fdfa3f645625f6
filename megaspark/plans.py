"""A run's config as a plan: what it costs on a cluster, in figures and in words, and which other layouts cost less.

Needs neither the data nor the GPUs. The words are those of the comments in ds_configs/, which a test holds against these figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megaspark.config import RunConfig
from megaspark.costs import Costs, costs
from megaspark.deepspeed_files import DeepSpeedFile, read_deepspeed_file
from megaspark.devices import Device
from megaspark.errors import UserError
from megaspark.layouts import Layout, layout
from megaspark.settings import Tree
from megaspark.workloads import Workload, Zero

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """One layout of a run on one kind of device; overrides: what to say for it, where it is not the config's own."""

    work: Workload
    costs: Costs
    overrides: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is enough."""
        return self.costs.fits


def make_plan(config: RunConfig[Any], tree: Tree, device: Device, gpus: int) -> Plan:
    """The plan of a config as it stands; raises UserError where the layout is illegal, naming the nearest that is."""
    place = tree.place("deepspeed").rpartition(":")[0]
    file = read_deepspeed_file(config.deepspeed, Path(place).parent if Path(place).is_file() else None)
    work = workload(config, layout(config, file, gpus), device.per_node)
    return Plan(work, costs(work, device))


def workload(config: RunConfig[Any], found: Layout, per_node: int = 8) -> Workload:
    """The numbers of a config under a checked layout, at its longest samples."""
    run = config.run
    return Workload(
        shape=config.model.shape, tied=config.model.tie_embeddings, world=found.world,
        seq=max(phase.seq for phase in config.data.phases), micro_batch=run.micro_batch, accumulation=found.accumulation,
        precision=run.precision, pipeline=found.pipeline, tensor=found.tensor, sequence=found.sequence,
        recompute=run.recompute, zero=Zero.read(found.deepspeed), per_node=per_node,
    )  # fmt: skip


def nearby(config: RunConfig[Any], device: Device, gpus: int) -> list[Plan]:
    """Every legal layout of the run on so many GPUs that fits, the soonest done first; of equals the least split one.

    Over powers of two, plain DeepSpeed files and all that changes no result: global batch and sequence stay as they are.
    """
    found = []
    for changes, changed, legal in _layouts(config, gpus, device.per_node):
        work = workload(changed, legal, device.per_node)
        priced = costs(work, device)
        if priced.fits:
            found.append(Plan(work, priced, changes))
    return sorted(found, key=lambda plan: (plan.costs.bound_s, plan.work.world // plan.work.data, plan.work.zero.stage))


def _layouts(config: RunConfig[Any], gpus: int, per_node: int) -> Iterator[tuple[tuple[str, ...], RunConfig[Any], Layout]]:
    """Legal layouts, asked of the same rules as a run: what to say for them, the config that says it, what follows."""
    powers = [1 << i for i in range(8)]
    stages = range(4) if gpus > 1 else (0,)
    kinds = product(powers[:5], powers[:4], powers[:4], powers, stages, RECOMPUTE)
    for pipeline, tensor, sequence, micro_batch, stage, recompute in kinds:
        if tensor * sequence > per_node or micro_batch > config.run.global_batch:
            continue
        parallel = {"pipeline": pipeline, "tensor": tensor, "sequence": sequence}
        run = {"micro_batch": micro_batch, "recompute": recompute}
        sections = {"parallel": config.parallel.model_copy(update=parallel), "run": config.run.model_copy(update=run)}
        changed = config.model_copy(update=sections)
        file = DeepSpeedFile(Path(f"zero{stage}.json"), {"zero_optimization": {"stage": stage}})
        with contextlib.suppress(UserError):
            legal = layout(changed, file, gpus)
            said = {
                f"{name}.{key}": value
                for name, section in sections.items()
                for key, value in section
                if value != getattr(getattr(config, name), key)
            }
            if str(file.path) != config.deepspeed:
                said["deepspeed"] = file.path
            yield tuple(f"{key}={value}" for key, value in said.items()), changed, legal


# ---- in words


def lines(plan: Plan, device: Device) -> list[str]:
    """What a plan comes to, in four lines for people: a rank's memory, what it sends, how a step goes, the least time."""
    work, found, memory = plan.work, plan.costs, plan.costs.memory
    shown = ("weights", "optimizer", "gathered", "gradients", "activations", "logits", "buckets")
    parts = ", ".join(f"{name} {gigabytes(value)}" for name in shown if (value := getattr(memory, name)))
    host = f"; host {gigabytes(memory.host)}" if memory.host else ""
    sent = ", ".join(f"{volume.kind} {gigabytes(volume.sent_bytes)}" for volume in found.sent) or "nothing"
    split = "".join(f"{kind} {size} x " for kind in ("pipeline", "tensor", "sequence") if (size := getattr(work, kind)) > 1)
    return [
        f"a rank, in GB: {parts}; peak {gigabytes(memory.peak)} of {gigabytes(device.memory_bytes)}{host}",
        f"it sends a step, in GB: {sent}",
        f"a step: {work.step_tokens:,} tokens on {split}data {work.data}, ZeRO {work.zero.stage}, {work.accumulation} x "
        f"{work.micro_batch} samples a rank, bubble {work.bubble:.1%}",
        f"at least {found.bound_s:.3g} s: {found.compute_s:.3g} s computing at the peak, {found.overlapped_s:.3g} s communication "
        f"beside it, {found.exposed_s:.3g} s between",
    ]


def gigabytes(count: int) -> str:
    """A number of bytes in GB (10^9), to three digits."""
    value = count / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
