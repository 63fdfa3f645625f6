"""This process's part of a run's model: its stage's layers, its shares of heads and features, at ZeRO-3 its partition of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from torch import nn

from megaspark.groups import Group, Groups
from megaspark.layouts import Layout, Place
from megaspark.pipelines import Pipeline, stage_bounds, stage_parts, topology
from megaspark.weights import fill, make_model, parts


def make_grid(layout: Layout) -> Any:
    """What DeepSpeed asks who shares what with whom: its own grid for tensor groups; None where it has, or needs, no other."""
    return PipelineParallelGrid(topology(layout)) if layout.pipeline == 1 and layout.tensor > 1 else None


def place_model(config: Any, layout: Layout, place: Place, device: torch.device, settings: dict[str, Any], grid: Any) -> nn.Module:
    """The part of the run's model that belongs to a place, with its first weights.

    settings: those for `deepspeed.initialize`. The parameters bear their `groups.Part`.
    """
    dtype = torch.float32 if config.run.precision == "fp32" else torch.bfloat16
    model = make_model(config.model, replace(config.execution, groups=make_groups(layout, place)))
    pipeline = layout.pipeline > 1
    bounds = stage_bounds(config.model, layout.pipeline)
    held = stage_parts(model, bounds, place.pipeline, place.tensor) if pipeline else parts(model, place.tensor)
    fill(model, held, config.run.seed, dtype, device, Partition(settings, dtype, grid) if layout.stage == 3 else None)
    if config.run.compile:
        for block in model.blocks:
            block.compile()
    placed = Pipeline(model, bounds, layout, config.data.document_mask) if pipeline else model
    if pipeline or layout.tensor > 1:
        for parameter in placed.parameters():  # DeepSpeed asks whether the norm of the gradient counts this copy
            parameter.model_parallel = parameter.part.counted  # type: ignore[attr-defined]
    return placed


class Partition:
    """Spreads parameters over the data-parallel processes, each as soon as it is filled: nobody ever holds two of them whole."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype, grid: Any) -> None:
        self.settings, self.dtype, self.grid = settings, dtype, grid
        self.partitioner: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        import deepspeed

        if self.partitioner is None:
            group = self.grid.get_data_parallel_group() if self.grid else None
            self.partitioner = deepspeed.zero.Init(
                nn.Module(), config_dict_or_path=self.settings, dtype=self.dtype, mpu=self.grid, data_parallel_group=group
            )
        self.partitioner._convert_to_zero_parameters([parameter])


def make_groups(layout: Layout, place: Place) -> Groups:
    """The process groups that this process shares samples with; every process makes all of them, in the same order."""
    found = {"tensor": Group(), "sequence": Group()}
    for kind in found:
        size = getattr(layout, kind)
        if size == 1:
            continue
        for rank in range(layout.world):
            first = layout.place(rank)
            if getattr(first, kind) == 0:
                ranks = [layout.rank(replace(first, **{kind: number})) for number in range(size)]
                handle = torch.distributed.new_group(ranks)
                if layout.rank(place) in ranks:
                    found[kind] = Group(getattr(place, kind), size, handle)
    return Groups(**found)
