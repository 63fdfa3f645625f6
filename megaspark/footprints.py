"""The memory of a rank by part, in bytes, under every ZeRO stage: what a plan promises and a GPU must hold.

What a stage holds was read in DeepSpeed 0.19's sources (runtime/zero/stage_1_and_2.py, stage3.py, fp16/unfused_optimizer.py) and
is held against real engines by tests/test_footprints.py. What a block keeps for its backward pass is that of our Triton kernels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from megaspark.workloads import Workload

LOGITS_BYTES = 256 << 20  # of a chunk in kernels/linear_cross_entropy.py on a GPU; a test compares
ALLREDUCE_BUCKET = 500_000_000  # elements that stage 0 reduces at once (MEMORY_OPT_ALLREDUCE_SIZE of DeepSpeed's engine)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, by part.

    weights, optimizer (fp32 master and moments): always there. gathered: of ZeRO-3's weights, what is whole at the turn from
    forward to backward. gradients: at their most. activations: kept for backward, all micro-batches in flight, and what one block's
    backward pass makes. logits: the chunk, and the gradients that the head makes early. buckets: of communication. stepping:
    gradients and their copies while the optimizer steps. resting: all that is left between two steps. host: bytes on the CPU's
    side, under offload.
    """

    weights: int
    optimizer: int
    gathered: int
    gradients: int
    activations: int
    logits: int
    buckets: int
    stepping: int
    resting: int
    host: int

    @property
    def peak(self) -> int:
        """The most that is there at once: at the turn from forward to backward, or while the optimizer steps."""
        working = self.gathered + self.gradients + self.activations + self.logits + self.buckets
        return self.weights + self.optimizer + max(working, self.stepping)

    def parts(self) -> dict[str, int]:
        """Every part by name."""
        return asdict(self)


def footprint(work: Workload) -> Footprint:
    """The largest rank's memory: every pipeline stage is looked at, and the one with the highest peak returned."""
    return max((of_stage(work, stage) for stage in range(work.pipeline)), key=lambda found: found.peak)


def of_stage(work: Workload, stage: int) -> Footprint:
    """The memory of a rank of one pipeline stage."""
    held, element = work.stage_weights(stage), work.element_bytes
    states = _states(work, held)
    last, first = stage == work.pipeline - 1, stage == 0
    flying = min(work.accumulation, work.pipeline - stage)
    activations = flying * work.stage_blocks(stage) * block_bytes(work) + _backward_bytes(work)
    if work.pipeline > 1:  # what was received or sent stays until its gradient came
        activations += flying * work.rank_tokens * work.shape.hidden * element * ((not first) + (not last))
    return Footprint(
        activations=activations, logits=_logits(work) if last else 0, buckets=sum(_buckets(work, held)), **states,
    )  # fmt: skip


def block_bytes(work: Workload) -> int:
    """What one block keeps for its backward pass, a micro-batch on a rank, as run.recompute says.

    none: the inputs of both norms and what these give to linears (4 E, whole on every tensor rank); rotated q, k, v and
    attention's result (2 H D + 2 K D); gate, up and their product (3 F); in fp32 a number a norm and a head. selective: the block's
    input, and the results of all matrix products and of attention. full: the block's input.
    """
    shape, element, split = work.shape, work.element_bytes, work.tensor
    heads, wide = shape.heads // split, shape.ffn // split
    traded = max(work.kv_heads, work.sequence)  # key/value heads are repeated until every sequence rank has one
    a_token = {
        "none": element * (4 * shape.hidden + 2 * shape.head_dim * (heads + traded) + 3 * wide) + 4 * (heads + 2),
        "selective": element * (3 * shape.hidden + 2 * shape.head_dim * (heads + work.kv_heads) + 2 * wide) + 4 * heads,
        "full": element * shape.hidden,
    }
    return work.rank_tokens * a_token[work.recompute]


def _backward_bytes(work: Workload) -> int:
    """What one block's backward pass makes: gradients, three as wide as its feed-forward and two as wide as the model; and what is
    computed again: both norms' results and the second one's input, rotated q and k, gate times up; or everything.
    """
    shape, element, split = work.shape, work.element_bytes, work.tensor
    wide = shape.ffn // split
    made = work.rank_tokens * element * (3 * wide + 2 * shape.hidden)
    if work.recompute == "full":
        made += block_bytes(replace(work, recompute="none")) - block_bytes(work)
    elif work.recompute == "selective":
        rotated = shape.head_dim * (shape.heads // split + max(work.kv_heads, work.sequence))
        made += work.rank_tokens * element * (3 * shape.hidden + rotated + wide)
    return made


def _logits(work: Workload) -> int:
    """A chunk of logits, and the gradients that linear_cross_entropy makes in its forward pass: of x, and of the weights, which
    are summed in fp32 where there is more than one chunk. A tensor rank does its share of the tokens against the whole table.
    """
    shape, element = work.shape, work.element_bytes
    tokens = work.rank_tokens // work.tensor
    everything = tokens * shape.vocab * element
    summed = element if everything <= LOGITS_BYTES else 4
    hidden = (2 * work.rank_tokens + tokens) * shape.hidden * element  # x, its norm, the gradient
    return min(everything, LOGITS_BYTES) + shape.vocab * shape.hidden * summed + hidden


def _states(work: Workload, held: int) -> dict[str, int]:
    """What ZeRO decides about, of a rank with `held` elements of the model, of which `share` are this rank's to step."""
    element, zero, share = work.element_bytes, work.zero, -(-held // work.sharers)
    gathered = host = 0
    if zero.stage == 0 and not (work.pipeline > 1 and element == 2):
        wrapped = element == 2  # in fp32 the optimizer steps the weights themselves
        weights, gradients, optimizer = held * element, held * element, (12 if wrapped else 8) * held
        stepping = held * element + (4 * held if wrapped else 0)  # the gradients, and their fp32 copies
        resting = weights + optimizer
    elif zero.stage < 3:  # a bf16 pipeline at stage 0 has DeepSpeed's BF16_Optimizer, which shares its state like stage 1
        # Stage 1 keeps gradients whole until they are reduced; 2 only this rank's.
        weights, gradients, optimizer = held * element, (share if zero.stage == 2 else held) * element, 12 * share
        stepping = share * (element + 4)  # this rank's gradients, and the fp32 copy that the optimizer reads
        resting = weights + optimizer
    else:
        weights, gradients, optimizer = share * element, share * element, 12 * share
        gathered = _gathered(work, held) * element
        kept = gradients + _buckets(work, held)[0]
        stepping = kept + 4 * min(share, zero.sub_group_size)
        resting = weights + optimizer + kept + element * persistent_weights(work)
        if zero.zero_hpz_partition_size > 1:
            gathered += -(-held // zero.zero_hpz_partition_size) * element
    if zero.offload_optimizer:  # master, moments, the fp32 gradient, and 16 bits of each weight and gradient on their way
        host = optimizer + (4 + 2 * element) * share
        gradients, stepping, resting = (0 if zero.stage > 1 else gradients), 0, resting - optimizer
        optimizer = 0
    if zero.offload_param:
        host, weights, resting = host + weights, 0, resting - weights
    return {
        "weights": weights, "optimizer": optimizer, "gathered": gathered, "gradients": gradients, "stepping": stepping,
        "resting": resting, "host": host,
    }  # fmt: skip


def persistent_weights(work: Workload) -> int:
    """Elements that ZeRO-3 leaves whole everywhere: of parameters smaller than its threshold."""
    shape, threshold = work.shape, work.zero.stage3_param_persistence_threshold
    q, k = shape.hidden * shape.head_dim * shape.heads // work.tensor, work.kv_weights
    wide = shape.hidden * shape.ffn // work.tensor
    block = sum(count for count in (q, k, k, q, wide, wide, wide, shape.hidden, shape.hidden) if count < threshold)
    tables = (shape.vocab * shape.hidden,) * (1 if work.tied else 2)
    return shape.layers * block + sum(count for count in (*tables, shape.hidden) if count < threshold)


def kept_at_turn(work: Workload) -> int:
    """Elements that ZeRO-3 gathered last in the forward pass and does not give back, for the backward pass begins with them.

    The reuse distance counts every weight on the way there and back; what the prefetcher has seen coming stays too.
    """
    return work.zero.stage3_max_reuse_distance // 2 + work.zero.stage3_prefetch_bucket_size


def _gathered(work: Workload, held: int) -> int:
    """Elements of ZeRO-3's weights that are whole at the turn from forward to backward: kept, persistent, and the largest layer."""
    return min(held, kept_at_turn(work) + persistent_weights(work) + max(work.layer_weights))


def _buckets(work: Workload, held: int) -> tuple[int, int]:
    """Communication buffers: DeepSpeed makes them at their full size, however small the model, and copies a bucket to send it."""
    zero, element = work.zero, work.element_bytes
    if zero.stage == 0:
        return 0, min(held, ALLREDUCE_BUCKET) * element if work.sharers > 1 else 0
    made = zero.reduce_bucket_size * element if zero.contiguous_gradients else 0
    doubled = zero.overlaps and zero.stage < 3 and work.pipeline == 1
    return made * (2 if doubled else 1), min(held, zero.reduce_bucket_size) * element
