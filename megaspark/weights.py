"""The first weights: a model is made without memory, then each parameter that this process holds gets its first values.

So nobody ever holds more than its own layers, its own share of each, and one whole parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from megaspark.groups import Part
from megaspark.models import architecture
from megaspark.models.blocks import Execution, Linear, first_values

FREE = Execution()


def make_model(config: Any, execution: Execution = FREE) -> nn.Module:
    """The architecture's model without memory (on the meta device), with the shares of parameters that this process holds."""
    with torch.device("meta"):
        return architecture(config.arch).Model(config, execution)


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every whole parameter's shape by name, without making any of them."""
    return {name: tuple(parameter.shape) for name, parameter in make_model(config).named_parameters()}


def build_model(config: Any, seed: int, execution: Execution = FREE) -> nn.Module:
    """The whole model in fp32 on the CPU, every weight filled from (seed, its name)."""
    model = make_model(config, execution)
    fill(model, parts(model), seed, torch.float32)
    return model


def parts(model: nn.Module, tensor_rank: int = 0) -> dict[str, Part]:
    """What each of a model's parameters is in the whole, by name; of those held by every process of a tensor group one counts."""
    shares = {f"{name}.weight": module.share for name, module in model.named_modules() if isinstance(module, Linear)}
    whole = parameter_shapes(model.config)
    return {
        name: Part(name, whole[name], shares.get(name), counted=tensor_rank == 0 or shares.get(name) is not None)
        for name, _ in model.named_parameters()
    }


def fill(
    model: nn.Module,
    wanted: Mapping[str, Part],
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    spread: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Gives the parameters named in `wanted` memory and first values; those that others are tied to stay tied.

    spread: called with each of these parameters when it is filled, to copy what it wants of it and give the rest back. Every one
    bears its Part as `part`.
    """
    # All drawn in one place: the holes of many would be taken by what is kept of each, and the next one not fit any more.
    room = torch.empty(max((math.prod(part.shape) for part in wanted.values()), default=0)) if spread else None
    tied: dict[nn.Parameter, nn.Parameter] = {}
    modules = {id(module): name for name, module in model.named_modules()}
    for layer in model.layers():
        for module in layer.modules():
            for leaf, hollow in list(module._parameters.items()):
                name = f"{modules[id(module)]}.{leaf}"
                if hollow is not None and hollow in tied:
                    setattr(module, leaf, tied[hollow])
                elif hollow is not None and name in wanted:
                    part = wanted[name]
                    whole = first_values(part.name, part.shape, seed, model.std(part.name), room)
                    filled = nn.Parameter(part.of(whole).to(device, dtype))
                    filled.part = part  # type: ignore[attr-defined]
                    setattr(module, leaf, filled)
                    tied[hollow] = filled
                    if spread:
                        spread(filled)
