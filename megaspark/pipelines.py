"""A model's layers as a DeepSpeed pipeline: each process holds one stage, and micro-batches flow through them (1F1B).

Between layers pass the activations, the positions, from which every stage makes its blocks' context for itself, and the labels,
so that the head computes the loss without holding the logits.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn

from megaspark.groups import Part
from megaspark.layouts import Layout
from megaspark.models.blocks import Context, run_block
from megaspark.weights import make_model, parts

Flow = tuple[Tensor, Tensor, Tensor]  # tokens [B, S] or activations [B, S, E]; positions [B, S]; labels [B, S]


def topology(layout: Layout) -> PipeModelDataParallelTopology:
    """The layout in DeepSpeed's words; its data axis runs over samples and over the parts of a sequence."""
    return PipeModelDataParallelTopology(layout.pipeline, layout.tensor, layout.replicas)


def stage_bounds(config: Any, stages: int) -> list[int]:
    """Where each stage begins among the layers, and the last one ends: balanced by parameters, embedding and head counted."""
    model = make_model(config)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.layers()]
    return list(partition_balanced(sizes, stages))


def stage_parts(model: nn.Module, bounds: Sequence[int], stage: int, tensor_rank: int) -> dict[str, Part]:
    """What each parameter of a stage is in the whole model, by name; a table tied to the embedding counts with the embedding."""
    every, first, last = parts(model, tensor_rank), bounds[stage], bounds[stage + 1]
    names = {id(module): name for name, module in model.named_modules()}
    local = [f"{names[id(layer)]}." for layer in model.layers()[first:last]]
    held = {name: part for name, part in every.items() if name.startswith(tuple(local))}
    if model.head.weight is model.embedding.weight and stage == len(bounds) - 2 and first > 0:
        table = every["embedding.weight"]
        held["head.weight"] = Part(table.name, table.shape, table.share, counted=False)
    return held


class Pipeline(PipelineModule):
    """The stage of this process; the other layers of `model` may be without memory. documents: whether attention keeps to them."""

    def __init__(self, model: nn.Module, bounds: Sequence[int], layout: Layout, documents: bool) -> None:
        self.bounds, self.layout = list(bounds), layout
        self.tied = model.head.weight is model.embedding.weight or model.config.tie_embeddings
        contexts = _Contexts(model, documents)
        embedding, *blocks, head = model.layers()
        layers = [_First(embedding), *(_Middle(block, contexts, model.execution.recompute) for block in blocks), _Last(head)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds, topology and stages
            super().__init__(layers, topology=topology(layout), loss_fn=None)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.bounds[stage], self.bounds[stage + 1])

    def _index_tied_modules(self) -> dict[str, Any]:
        """The embedding's table and the head's, on the first and the last stage, get each other's gradients."""
        found: dict[str, Any] = {}
        if not self.tied or self.num_stages == 1:
            return found
        for data in range(self.layout.replicas):
            for tensor in range(self.layout.tensor):
                ranks = [self._topo.get_rank(pipe=stage, data=data, model=tensor) for stage in (0, self.num_stages - 1)]
                group = torch.distributed.new_group(ranks)
                if self.global_rank in ranks:
                    module = self.forward_funcs[0 if self.global_rank == ranks[0] else -1].layer
                    found["table"] = {"ranks": ranks, "group": group, "weight_attr": ["weight"], "module": module}
                    module.weight.ds_pipe_replicated = self.global_rank != ranks[0]
        return found

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """DeepSpeed asks for what to sum between stages."""
        return [(tie["module"].weight, tie["group"]) for tie in self.tied_comms.values()]


class Stopwatch:
    """Measures how long a stage computes in each step, and how long the step's passes take: what is between is the bubble.

    engine: DeepSpeed's, of a pipeline. On a GPU by events, which nobody waits for before `read`.
    """

    def __init__(self, engine: Any) -> None:
        self._on_gpu = engine.device.type == "cuda"
        self._marks: list[Any] = []
        timed = {kind: self._timed(engine._INSTRUCTION_MAP[kind]) for kind in (ForwardPass, BackwardPass)}
        engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, **timed}

    def start(self) -> None:
        """A step begins."""
        self._marks = [self._now()]

    def read(self) -> tuple[float, float]:
        """The seconds that this stage computed since `start`, and those that went by."""
        self._marks.append(self._now())
        begin, *inner, end = self._marks
        pairs = [*zip(inner[::2], inner[1::2], strict=True), (begin, end)]
        if self._on_gpu:
            torch.cuda.synchronize()
            *busy, span = (before.elapsed_time(after) / 1000 for before, after in pairs)
        else:
            *busy, span = (after - before for before, after in pairs)
        return sum(busy), span

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, instruction: Callable[..., None]) -> Callable[..., None]:
        def run(engine: Any, **arguments: Any) -> None:
            self._marks.append(self._now())
            instruction(engine, **arguments)
            self._marks.append(self._now())

        return run


class _Contexts:
    """Makes the blocks' context once a micro-batch and stage."""

    def __init__(self, model: Any, documents: bool) -> None:
        self._make, self._documents = model.context, documents
        self._positions: Tensor | None = None
        self._context: Context | None = None

    def of(self, positions_BS: Tensor, dtype: torch.dtype) -> Context:
        if positions_BS is not self._positions:
            self._positions, self._context = positions_BS, self._make(positions_BS, dtype, self._documents)
        assert self._context is not None
        return self._context


class _First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, flow: Flow) -> Flow:
        tokens_BS, positions_BS, labels_BS = flow
        return self.layer(tokens_BS), positions_BS, labels_BS


class _Middle(nn.Module):
    def __init__(self, layer: nn.Module, contexts: _Contexts, recompute: str) -> None:
        super().__init__()
        self.layer, self._contexts, self._recompute = layer, contexts, recompute

    def forward(self, flow: Flow) -> Flow:
        x_BSE, positions_BS, labels_BS = flow
        context = self._contexts.of(positions_BS, x_BSE.dtype)
        return run_block(self.layer, x_BSE, context, self._recompute), positions_BS, labels_BS


class _Last(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, flow: Flow) -> Tensor:
        x_BSE, _, labels_BS = flow
        return self.layer(x_BSE, labels_BS)
