"""How a run's processes share the work: which layouts are legal, and what follows from one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from megaspark.deepspeed_files import DeepSpeedFile
from megaspark.errors import UserError
from megaspark.settings import Section


class Parallel(Section):
    """How many processes share one copy of the model, by kind; the others are data-parallel."""

    pipeline: int = Field(1, gt=0, description="stages, each with some of the layers")
    tensor: int = Field(1, gt=0, description="parts of each layer: heads and features of the feed-forward")
    sequence: int = Field(1, gt=0, description="parts of each sample: tokens, but heads within attention")

    @property
    def size(self) -> int:
        """Processes that share one copy of the model or one sample."""
        return self.pipeline * self.tensor * self.sequence


@dataclass(frozen=True)
class Place:
    """Which part of the work a process has, by kind."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """What follows from a config and a number of processes. deepspeed: the dict for `deepspeed.initialize`."""

    world: int
    data_parallel: int
    accumulation: int
    deepspeed: dict[str, Any]
    stage: int
    pipeline: int = 1
    tensor: int = 1
    sequence: int = 1

    @property
    def replicas(self) -> int:
        """Processes over which DeepSpeed averages gradients, and ZeRO spreads what it spreads."""
        return self.data_parallel * self.sequence

    def place(self, rank: int) -> Place:
        """The place of a process: neighbours are of one tensor group, then of one sequence group; stages are far apart.

        So the kinds that send most keep within a host.
        """
        rank, tensor = divmod(rank, self.tensor)
        rank, sequence = divmod(rank, self.sequence)
        pipeline, data = divmod(rank, self.data_parallel)
        return Place(pipeline, data, sequence, tensor)

    def rank(self, place: Place) -> int:
        """The process at a place."""
        rank = place.pipeline * self.data_parallel + place.data
        return (rank * self.sequence + place.sequence) * self.tensor + place.tensor

    def words(self) -> str:
        """In a few words, for people."""
        kinds = {"pipeline": self.pipeline, "tensor": self.tensor, "sequence": self.sequence}
        split = "".join(f"{kind} {size} x " for kind, size in kinds.items() if size > 1)
        return f"{split}data {self.data_parallel}, ZeRO {self.stage}"


def layout(config: Any, file: DeepSpeedFile, world: int) -> Layout:
    """The layout of a run's config on `world` processes; raises UserError where it is none, naming the nearest that is."""
    parallel, run = config.parallel, config.run
    _check_zero(parallel, file)
    if run.precision != "fp32" and file.stage == 0 and parallel.tensor > 1 and parallel.pipeline == 1:
        raise UserError(
            f"parallel.tensor = {parallel.tensor} with run.precision = {run.precision} needs ZeRO ({file.path} has stage 0, whose "
            "wrapper for bf16 measures the gradient of one process only); set deepspeed=zero1.json"
        )
    _check_model(config)
    if world % parallel.size:
        below = world // parallel.size * parallel.size
        raise UserError(
            f"parallel.pipeline x tensor x sequence = {parallel.size} does not divide {world} processes; nearest: "
            f"{f'{below} or ' if below else ''}{below + parallel.size} processes"
        )
    data_parallel = world // parallel.size
    per_pass = run.micro_batch * data_parallel
    if run.global_batch % per_pass:
        legal = [d for d in range(data_parallel, 0, -1) if run.global_batch % (run.micro_batch * d) == 0]
        near = max(1, (run.global_batch + per_pass // 2) // per_pass) * per_pass
        other = f" or {legal[0] * parallel.size} processes" if legal else ""
        what = "processes" if parallel.size == 1 else f"data-parallel groups of {parallel.size} processes"
        raise UserError(
            f"run.global_batch = {run.global_batch} does not divide into run.micro_batch = {run.micro_batch} x "
            f"{data_parallel} {what}; nearest: run.global_batch={near}{other}"
        )
    accumulation = run.global_batch // per_pass
    owned = {
        # To DeepSpeed the parts of a sequence are samples of their own: it averages the gradient over them all.
        "train_batch_size": run.global_batch * parallel.sequence,
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16.enabled": run.precision != "fp32",
    }
    settings = file.resolved(owned)
    if "offload_optimizer" in file.values.get("zero_optimization", {}):
        # Our AdamW, torch's, steps on the CPU as well; DeepSpeed's own would be compiled first, and rounds otherwise.
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    if parallel.pipeline > 1:  # whole activations pass between stages, from each process of a tensor group to its like
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    sizes = {"pipeline": parallel.pipeline, "tensor": parallel.tensor, "sequence": parallel.sequence}
    return Layout(world, data_parallel, accumulation, settings, file.stage, **sizes)


def _check_zero(parallel: Parallel, file: DeepSpeedFile) -> None:
    zero = file.values.get("zero_optimization", {})
    if parallel.pipeline > 1 and file.stage > 1:
        raise UserError(
            f"parallel.pipeline = {parallel.pipeline} cannot go with ZeRO stage {file.stage} ({file.path}): "
            "a pipeline needs its gradients whole; set deepspeed=zero1.json"
        )
    for key, least in {"offload_optimizer": 1, "offload_param": 3}.items():
        said = (zero.get(key) or {}).get("device", "none") != "none"
        if said and file.stage < least:
            raise UserError(f"{key} ({file.path}) needs ZeRO stage {least}, this is stage {file.stage}; set the stage to {least}")
        if said and parallel.pipeline > 1:
            raise UserError(f"{key} ({file.path}) cannot go with parallel.pipeline = {parallel.pipeline}; set deepspeed=zero1.json")
    if parallel.pipeline > 1 and zero.get("overlap_comm") is True:
        raise UserError(
            f"overlap_comm = true ({file.path}) has no effect under parallel.pipeline = {parallel.pipeline}; say false, or "
            "set deepspeed=zero1.json"
        )


def _check_model(config: Any) -> None:
    """Whether the model divides into that many parts."""
    parallel, model, run = config.parallel, config.model, config.run
    pipeline, tensor, sequence = parallel.pipeline, parallel.tensor, parallel.sequence
    if pipeline > model.layers:
        raise UserError(f"parallel.pipeline = {pipeline} is more than model.layers = {model.layers}; nearest: {model.layers}")
    if words := _untensorable(model, tensor):
        near = next(t for t in range(tensor, 0, -1) if not _untensorable(model, t))
        raise UserError(f"parallel.tensor = {tensor} {words}; nearest: {near}")
    heads, kv_heads = model.heads // tensor, max(1, model.kv_heads // tensor)
    if heads % sequence or (kv_heads % sequence and sequence % kv_heads):
        near = next(s for s in range(sequence, 0, -1) if not (heads % s or (kv_heads % s and s % kv_heads)))
        raise UserError(
            f"parallel.sequence = {sequence} does not share out the {heads} heads and {kv_heads} key/value heads that "
            f"parallel.tensor = {tensor} leaves of model.heads and kv_heads; nearest: {near}"
        )
    for seq in {phase.seq for phase in config.data.phases}:
        if seq % sequence:
            raise UserError(f"parallel.sequence = {sequence} does not divide data.seq = {seq}; nearest: {_divisor(seq, sequence)}")
        if run.micro_batch * seq // sequence % tensor:
            raise UserError(
                f"parallel.tensor = {tensor} does not divide the run.micro_batch x data.seq / parallel.sequence = "
                f"{run.micro_batch * seq // sequence} tokens of a pass; nearest: run.micro_batch={tensor}"
            )


def _untensorable(model: Any, tensor: int) -> str | None:
    """Why a model's layers do not split into that many parts, if they do not."""
    for name, count in {"model.heads": model.heads, "model.ffn": model.ffn}.items():
        if count % tensor:
            return f"does not divide {name} = {count}"
    if model.kv_heads % tensor and tensor % model.kv_heads:
        return f"neither divides model.kv_heads = {model.kv_heads} nor is a multiple of it"
    return None


def _divisor(number: int, size: int) -> int:
    """The largest divisor of `number` that is at most `size`."""
    return next(s for s in range(size, 0, -1) if number % s == 0)
