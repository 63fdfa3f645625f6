"""What one training step asks of every rank: the layout as plain numbers, and what each rank holds of the model under it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from megaspark.flops import Shape, per_token

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's zero_optimization decides about memory and traffic; the defaults are DeepSpeed 0.19's.

    Sizes are in elements. overlap: None means, as there, only at stage 3.
    """

    stage: int = 0
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    zero_hpz_partition_size: int = 1
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced while the backward pass goes on."""
        return self.stage == 3 if self.overlap_comm is None else self.overlap_comm

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Zero:
        """The same from a DeepSpeed file's values; "auto" is the default, an offload to "none" is none."""
        said = values.get("zero_optimization", {})
        kept = {k: v for k, v in said.items() if k in cls.__dataclass_fields__ and v != "auto"}
        for name, value in kept.items():
            if name.startswith("offload_"):
                kept[name] = (value or {}).get("device", "none") != "none"
            elif isinstance(value, float):  # 5e8, as DeepSpeed takes it too
                kept[name] = int(value)
        return cls(**kept)


@dataclass(frozen=True)
class Workload:
    """One step of a run: the model's shape, how many ranks share it in which way, and how much each works on at a time.

    accumulation: micro-batches a step and data-parallel rank. per_node: ranks that NVLink joins; they are numbered with tensor
    neighbours closest, then sequence, data and pipeline, as DeepSpeed's meshes are.
    """

    shape: Shape
    tied: bool
    world: int
    seq: int
    micro_batch: int
    accumulation: int
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    pipeline: int = 1
    tensor: int = 1
    sequence: int = 1
    recompute: Recompute = "none"
    zero: Zero = field(default_factory=Zero)
    per_node: int = 8

    @property
    def data(self) -> int:
        """How many copies of the model there are."""
        return self.world // (self.pipeline * self.tensor * self.sequence)

    @property
    def sharers(self) -> int:
        """Ranks over which ZeRO spreads: DeepSpeed takes data and sequence together."""
        return self.data * self.sequence

    @property
    def element_bytes(self) -> int:
        """Of weights, gradients and activations; the 8-bit copies of fp8 live as long as one product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def step_tokens(self) -> int:
        """Tokens that all ranks together train on in one step."""
        return self.data * self.accumulation * self.micro_batch * self.seq

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch that one rank computes on between attentions."""
        return self.micro_batch * self.seq // self.sequence

    @property
    def kv_heads(self) -> int:
        """Key and value heads that a tensor rank computes; where there are more ranks than heads, each one's own."""
        return max(1, self.shape.kv_heads // self.tensor)

    @property
    def kv_weights(self) -> int:
        """Elements of a block's key weights on a rank, and of its value weights: whole where ranks outnumber heads."""
        heads = self.kv_heads if self.shape.kv_heads >= self.tensor else self.shape.kv_heads
        return self.shape.hidden * self.shape.head_dim * heads

    @cached_property
    def block_weights(self) -> int:
        """Elements of one block on a rank: heads and feed-forward split over tensor ranks, norms whole."""
        shape = self.shape
        split = 2 * shape.hidden * shape.head_dim * shape.heads + 3 * shape.hidden * shape.ffn
        return split // self.tensor + 2 * self.kv_weights + 2 * shape.hidden

    @cached_property
    def layer_weights(self) -> tuple[int, ...]:
        """Elements of embedding, blocks, and head with its norm, in order; a tied head is a copy where it is in another stage."""
        table = self.shape.vocab * self.shape.hidden
        head = self.shape.hidden + (0 if self.tied and self.pipeline == 1 else table)
        return (table, *(self.block_weights,) * self.shape.layers, head)

    @cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """[first, end) of each pipeline stage's layers: the largest stage as small as it can be."""
        return split_evenly(self.layer_weights, self.pipeline)

    def stage_weights(self, stage: int) -> int:
        """Elements of one pipeline stage on a rank, nothing shared by ZeRO yet."""
        first, end = self.stages[stage]
        return sum(self.layer_weights[first:end])

    def stage_blocks(self, stage: int) -> int:
        """How many blocks a stage has."""
        first, end = self.stages[stage]
        return end - first - (first == 0) - (end == len(self.layer_weights))

    @property
    def bubble(self) -> float:
        """The share of a step in which a stage waits under 1F1B: (p - 1) / (m + p - 1) (Narayanan 2021, arXiv 2104.04473)."""
        return (self.pipeline - 1) / (self.accumulation + self.pipeline - 1)

    @property
    def step_flops(self) -> int:
        """FLOPs of one step, causal count, nothing recomputed."""
        return per_token(self.shape, self.seq).causal * self.step_tokens

    @property
    def recomputed_flops(self) -> int:
        """FLOPs of one step that are done again where whole blocks are: every block's forward pass, a third of its work."""
        if self.recompute != "full":
            return 0
        head = 6 * self.shape.vocab * self.shape.hidden
        return (per_token(self.shape, self.seq).causal - head) * self.step_tokens // 3


def split_evenly(weights: tuple[int, ...], parts: int) -> tuple[tuple[int, int], ...]:
    """[first, end) of contiguous parts, none empty, whose largest sum is the least possible (linear partition).

    Raises ValueError where there are more parts than weights.
    """
    if parts > len(weights):
        raise ValueError(f"{len(weights)} layers do not make {parts} stages")
    low, high = max(max(weights), -(-sum(weights) // parts)), sum(weights)
    while low < high:  # the least largest sum for which packing greedily needs no more than `parts`
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(weights, middle)) <= parts else (middle + 1, high)
    cut = _greedy(weights, low)
    while len(cut) < parts:  # fewer were enough: split the one with most layers
        first, end = max(cut, key=lambda part: part[1] - part[0])
        at = cut.index((first, end))
        cut[at : at + 1] = [(first, (first + end) // 2), ((first + end) // 2, end)]
    return tuple(cut)


def _greedy(weights: tuple[int, ...], most: int) -> list[tuple[int, int]]:
    parts, first, total = [], 0, 0
    for i, weight in enumerate(weights):
        if total + weight > most:
            parts.append((first, i))
            first, total = i, 0
        total += weight
    return [*parts, (first, len(weights))]
