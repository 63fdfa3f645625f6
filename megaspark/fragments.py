"""Which part of which parameter's fp32 master and moments this process holds, as views into DeepSpeed's own buffers.

Every ZeRO stage stores the optimizer's state in a shape of its own: whole parameters (stage 0), flat partitions with a map
from parameters (1, 2), flat partitions of partitioned parameters (3), of all layers or of a stage's, of whole parameters or of
shares of them (`groups.Part`, which each parameter bears). `fragments` shows all of them alike, so that one
checkpoint format serves every layout. Reads private attributes of DeepSpeed 0.19; setup pins the version, tests hold the bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaspark.groups import Part

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("master", *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """A run of elements of one parameter: [start, start + length) of its flattened form, or of that of some of its columns.

    shape: of the whole parameter. columns: the first one and their number; None: all. tensors: "master", "exp_avg" and
    "exp_avg_sq", each a 1-D fp32 view [length] into the engine's memory. counted: whether this process's copy is the one to save.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    tensors: dict[str, Tensor]
    columns: tuple[int, int] | None = None
    counted: bool = True


def prepare(engine: Any) -> None:
    """Makes the moments exist, as zeros at step 0, without taking an optimizer step; existing ones stay as they are."""
    optimizer = engine.optimizer
    base = _base(optimizer)
    for flat in _flats(optimizer):
        state = base.state[flat]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
        # A tensor of its own for each: torch counts the steps in it, and a shared one would count every group's.
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=flat.device))
    _relink(optimizer)


def discard_build_step(engine: Any) -> None:
    """Undoes the optimizer step that ZeRO stage 0 with bf16 takes while it is built (it moves the master, step and moments)."""
    optimizer = engine.optimizer
    if _unfused(optimizer):
        optimizer.refresh_fp32_params()
        optimizer.optimizer.state.clear()


def fragments(engine: Any) -> Iterator[Fragment]:
    """Every piece of fp32 state that this process holds; `prepare` first."""
    optimizer = engine.optimizer
    base = _base(optimizer)
    _relink(optimizer)
    masters = {}
    if _unfused(optimizer):
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {id(model): master for models, fp32 in pairs for model, master in zip(models, fp32, strict=True)}
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_id"):
            yield _stage3(parameter, optimizer, base)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:  # None: all of it lies on other processes
                tensors = {"master": mapping.hp_fragment.data, **{key: mapping.optim_fragment[key] for key in MOMENTS}}
                address = mapping.lp_fragment_address
                yield _fragment(parameter.part, address.start, address.numel, tensors)
        else:
            master = masters.get(id(parameter), parameter)
            tensors = {"master": master.data.view(-1), **{key: base.state[master][key].view(-1) for key in MOMENTS}}
            yield _fragment(parameter.part, 0, parameter.numel(), tensors)


def set_step(engine: Any, step: int) -> None:
    """Tells the optimizer that `step` steps were taken (Adam's bias correction)."""
    for state in _base(engine.optimizer).state.values():
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=state["step"].device)


@torch.no_grad()
def push(engine: Any) -> None:
    """Copies the fp32 masters into the weights that the model computes with."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        persistent = optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
            optimizer._unflatten_partitioned_parameters(i)
        if persistent:
            persistent[0].all_gather(persistent)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif _unfused(optimizer):
        for models, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for model, master in zip(models, masters, strict=True):
                model.data.copy_(master.data)


def whole(engine: Any) -> bool:
    """Whether every process holds every parameter's state whole (stage 0), so that one of them speaks for all."""
    optimizer = engine.optimizer
    return not hasattr(optimizer, "fp32_partitioned_groups_flat") and not hasattr(optimizer, "update_lp_params")


def _fragment(part: Part, start: int, length: int, tensors: dict[str, Tensor]) -> Fragment:
    """From the place in this process's part of the parameter."""
    return Fragment(part.name, part.shape, part.offset + start, length, tensors, part.columns, part.counted)


def _stage3(parameter: Any, optimizer: Any, base: Any) -> Fragment:
    group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * partition
    length = max(0, min(partition, parameter.ds_numel - start))  # the last partition is padded
    flat = optimizer.fp32_partitioned_groups_flat[group]
    tensors = {"master": flat.data, **{key: base.state[flat][key] for key in MOMENTS}}
    views = {key: tensor.narrow(0, offset, length) for key, tensor in tensors.items()}
    return _fragment(parameter.part, start, length, views)


def _base(optimizer: Any) -> Any:
    """The torch optimizer inside DeepSpeed's wrapper (fp32 at stage 0 has none)."""
    return getattr(optimizer, "optimizer", optimizer)


def _flats(optimizer: Any) -> list[Tensor]:
    """The tensors that the torch optimizer steps over."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in _base(optimizer).param_groups for parameter in group["params"]]


def _unfused(optimizer: Any) -> bool:
    """Whether this is the wrapper that stage 0 uses for bf16: whole masters beside whole weights."""
    return hasattr(optimizer, "fp16_groups") and hasattr(optimizer, "fp32_groups")


def _relink(optimizer: Any) -> None:
    # Linked lazily and once; with two parameter groups only the first would be.
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
