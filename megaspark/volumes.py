"""The bytes that a rank sends in a step, by kind: what a layout costs on the wires.

Collectives are counted as rings send them: of n bytes in a group of g, an all-reduce sends 2 (g - 1) / g n a rank, an all-gather
or a reduce-scatter (g - 1) / g n (Patarasuk and Yuan 2009). Which calls DeepSpeed 0.19 makes, with how much, was counted on real
engines; tests/test_volumes.py does so again. Scalars (norms, losses) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megaspark.footprints import kept_at_turn, persistent_weights
from megaspark.workloads import Workload


@dataclass(frozen=True)
class Volume:
    """One kind of traffic: bytes a rank sends in a step, by which operation, in a group of how many.

    neighbours: how many of the group lie in one node; exposed: whether computing waits for it.
    """

    kind: str
    op: str
    sent_bytes: int
    group: int
    neighbours: int
    exposed: bool

    @property
    def crosses(self) -> bool:
        """Whether the group is larger than a node."""
        return self.neighbours < self.group


def volumes(work: Workload) -> list[Volume]:
    """What a rank sends in one step: of the pipeline stage that sends most."""
    return max((of_stage(work, stage) for stage in range(work.pipeline)), key=lambda found: sum(v.sent_bytes for v in found))


def of_stage(work: Workload, stage: int) -> list[Volume]:
    """What a rank of one pipeline stage sends in one step, by kind."""
    held, blocks = work.stage_weights(stage), work.stage_blocks(stage)
    found = [
        *_data_parallel(work, held), *_tensor(work, blocks, has_head=stage == work.pipeline - 1), *_sequence(work, blocks),
        *_pipeline(work, stage), *_offload(work, held),
    ]  # fmt: skip
    return [volume for volume in found if volume.sent_bytes]


def ring(op: str, payload_bytes: int, group: int) -> int:
    """What a rank of a ring sends for one call: payload is the tensor reduced, or the one gathered, or what is exchanged."""
    return payload_bytes * (group - 1) // group * (2 if op == "all_reduce" else 1)


def _data_parallel(work: Workload, held: int) -> list[Volume]:
    zero, element, group = work.zero, work.element_bytes, work.sharers
    near = min(group, max(1, work.per_node // work.tensor))

    def volume(kind: str, op: str, elements: float, exposed: bool, each: float = element) -> Volume:
        return Volume(kind, op, ring(op, int(elements * each), group), group, near, exposed)

    if zero.stage < 3:
        # Stage 2 keeps only its share of the gradients, so it reduces every micro-batch; 0 and 1 the sum of all.
        times = work.accumulation if zero.stage == 2 else 1
        whole = zero.stage == 0 or not zero.reduce_scatter or zero.use_multi_rank_bucket_allreduce
        op = "all_reduce" if whole else "reduce"
        overlapped = zero.overlaps and zero.stage > 0 and work.pipeline == 1
        gradients = volume("gradients", op, times * held, not overlapped)
        return [gradients, volume("weights", "all_gather", held, True)] if zero.stage else [gradients]
    op = "reduce_scatter" if zero.reduce_scatter else "all_reduce"
    return [
        volume("gradients", op, work.accumulation * held, False, 0.5 if zero.zero_quantized_gradients else element),
        *_gathered(work, held, near),
    ]


def _gathered(work: Workload, held: int, near: int) -> list[Volume]:
    """What ZeRO-3 gathers: every weight in the forward pass and again in the backward pass, but for those within reuse.

    Persistent parameters, the small ones, are gathered once, after the optimizer stepped.
    """
    zero, group = work.zero, work.sharers
    persistent = persistent_weights(work)
    each = 1 if zero.zero_quantized_weights else work.element_bytes
    fetched = work.accumulation * (held - persistent)
    again = work.accumulation * max(0, held - persistent - kept_at_turn(work))
    out = [Volume("weights", "all_gather", ring("all_gather", fetched * each, group), group, near, False)]
    if zero.zero_hpz_partition_size > 1:  # the backward pass gathers from a second copy inside the node
        inner = zero.zero_hpz_partition_size
        out.append(Volume("weights in the node", "all_gather", ring("all_gather", again * each, inner), inner, inner, False))
    else:
        out.append(Volume("weights again", "all_gather", ring("all_gather", again * each, group), group, near, False))
    stepped = ring("all_gather", persistent * work.element_bytes, group)
    return [*out, Volume("small weights", "all_gather", stepped, group, near, True)]


def _tensor(work: Workload, blocks: int, has_head: bool) -> list[Volume]:
    """Two sums a block and pass (Shoeybi et al. 2019, arXiv 1909.08053); of the head, the table's gradient and that of its input.

    Where the backward pass computes a block again, it sums attention's result again, but stops before the feed-forward's. Key and
    value weights that every rank holds whole have their gradients summed too.
    """
    group, shape, element = work.tensor, work.shape, work.element_bytes
    if group == 1:
        return []
    near = min(group, work.per_node)
    sums = 4 + (work.recompute != "none")
    activations = work.accumulation * blocks * sums * work.rank_tokens * shape.hidden * element
    whole = 2 * work.kv_weights * blocks if shape.kv_heads < group else 0
    table = work.accumulation * (has_head * shape.vocab * shape.hidden + whole) * element
    rows = has_head * work.accumulation * work.rank_tokens * shape.hidden * element
    return [
        Volume("tensor", "all_reduce", ring("all_reduce", activations, group), group, near, True),
        Volume("tensor's whole weights", "all_reduce", ring("all_reduce", table, group), group, near, True),
        Volume("tensor's head", "all_gather", ring("all_gather", rows, group), group, near, True),
    ]


def _sequence(work: Workload, blocks: int) -> list[Volume]:
    """Ulysses exchanges q, k, v before attention and its result after (Jacobs et al. 2023, arXiv 2309.14509), and back again."""
    group, shape = work.sequence, work.shape
    if group == 1:
        return []
    a_token = 2 * shape.head_dim * (shape.heads // work.tensor + max(work.kv_heads, group)) * work.element_bytes
    passes = 2 if work.recompute == "none" else 3
    payload = work.accumulation * passes * blocks * work.rank_tokens * a_token
    near = min(group, max(1, work.per_node // work.tensor))
    return [Volume("sequence", "all_to_all", ring("all_to_all", payload, group), group, near, True)]


def _pipeline(work: Workload, stage: int) -> list[Volume]:
    """A stage sends each micro-batch's activations, positions and labels on, and the activations' gradient back; one at an end
    does only one of the two. A tied table's gradient is summed over its two stages.
    """
    if work.pipeline == 1:
        return []
    shape, element = work.shape, work.element_bytes
    near = 2 if work.world // work.pipeline < work.per_node else 1
    activations = work.rank_tokens * shape.hidden * element
    numbers = 8 * (work.micro_batch * work.seq + work.rank_tokens)
    first, last = stage == 0, stage == work.pipeline - 1
    payload = work.accumulation * ((not last) * (activations + numbers) + (not first) * activations)
    table = ring("all_reduce", shape.vocab * shape.hidden * element, 2) if work.tied and (first or last) else 0
    return [
        Volume("pipeline", "send", payload, 2, near, False),
        Volume("tied table", "all_reduce", table, 2, 1 if work.world > work.per_node else 2, True),
    ]


def _offload(work: Workload, held: int) -> list[Volume]:
    """Gradients to the host and weights back."""
    if not work.zero.offload_optimizer:
        return []
    both = 2 * -(-held // work.sharers) * work.element_bytes
    return [Volume("host", "copy", both, 1, 1, True)]
