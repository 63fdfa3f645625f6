"""Plain DeepSpeed JSON files, checked key by key and completed with the numbers that the run owns.

DeepSpeed accepts a misspelled key at its file's top level in silence, and its own defaults may disagree with the run's. Here
every key is known or refused, and what the run owns stands as "auto" or equal; a second, different value is an error that
names both places. The files stay usable by Hugging Face's Trainer and TRL as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from megaspark.errors import UserError
from megaspark.settings import find, nearest, unknown_keys

AUTO = "auto"

# What a run's own settings decide. A value here must be "auto" or the same as theirs.
OWNED = {
    "train_batch_size": "run.global_batch",
    "train_micro_batch_size_per_gpu": "run.micro_batch",
    "gradient_accumulation_steps": "run.global_batch / (run.micro_batch x data-parallel size)",
    "gradient_clipping": "optim.clip",
    "bf16.enabled": "run.precision",
}

# What DeepSpeed 0.19 reads besides, checked inside where it has a schema of its own (see `_schemas`).
PASSED_ON = frozenset(
    """activation_checkpointing aio comms_logger communication_data_type compile csv_monitor data_types disable_allgather
    disable_python_gc dump_state flops_profiler gradient_allreduce_op gradient_predivide_factor log_level memory_breakdown
    prescale_gradients seq_parallel_communication_data_type steps_per_print tensorboard timers wall_clock_breakdown
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)

# What it reads too but a run says elsewhere, or cannot use.
ELSEWHERE = {
    "optimizer": "the optim: section of the run",
    "scheduler": "the optim: section of the run (warmup_steps, lr, min_lr)",
    "fp16": "run.precision (bf16 or fp32)",
    "torch_autocast": "run.precision (bf16 or fp32)",
    "pipeline": "parallel.pipeline",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "checkpoint": "run.save_every; checkpoints are in a format of our own",
}


@dataclass(frozen=True)
class DeepSpeedFile:
    """A checked DeepSpeed file: where it lies and what it says."""

    path: Path
    values: Mapping[str, Any]

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return int(self.values.get("zero_optimization", {}).get("stage", 0))

    def resolved(self, owned: Mapping[str, Any]) -> dict[str, Any]:
        """The dict for `deepspeed.initialize`: every "auto" of an `OWNED` key replaced by the run's number.

        owned: a value for each key of OWNED. Raises UserError where the file says another number, naming both places.
        """
        out = json.loads(json.dumps(dict(self.values)))
        for key, ours in owned.items():
            section, _, name = key.rpartition(".")
            node = out.setdefault(section, {}) if section else out
            said = node.get(name, AUTO)
            if said != AUTO and said != ours:
                raise UserError(
                    f"{key} = {json.dumps(said)} in {self.path}, but {OWNED[key]} makes it {json.dumps(ours)}; "
                    'say "auto" in the file'
                )
            node[name] = ours
        # Elsewhere "auto" is Hugging Face's word for DeepSpeed's own default, which DeepSpeed takes when nothing is said.
        return _without_auto(out)


def read_deepspeed_file(name: str, beside: Path | None = None) -> DeepSpeedFile:
    """Reads and checks a DeepSpeed JSON file, found as given, beside the run's file or among the shipped ds_configs.

    Raises UserError for bad JSON, an unknown key at any level that DeepSpeed has a schema for, or a wrong value.
    """
    path = find(name, beside)
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: should be a mapping of DeepSpeed's settings")
    known = [*PASSED_ON, *(key.partition(".")[0] for key in OWNED)]
    for key in values:
        if key in ELSEWHERE:
            raise UserError(f"{key} in {path} is not DeepSpeed's to say here: it belongs to {ELSEWHERE[key]}")
        if key not in known:
            raise UserError(f"unknown key {key} ({path}){nearest(key, known)}")
    for key, schema in _schemas().items():
        if key in values:
            _check_section(key, values[key], schema, path)
    return DeepSpeedFile(path, values)


def _schemas() -> dict[str, type[BaseModel]]:
    """DeepSpeed's own schemas for the sections that have one."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}


def _check_section(key: str, section: Any, schema: type[BaseModel], path: Path) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{key} in {path} should be a section, is {section!r}")
    for name, choices in unknown_keys(section, schema, f"{key}."):
        raise UserError(f"unknown key {name} ({path}){nearest(name, choices)}")
    try:
        schema.model_validate(_without_auto(section))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([key, *(str(part) for part in first["loc"])])
        raise UserError(f"{where} = {first['input']!r} ({path}): {first['msg']}") from None


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in section.items() if v != AUTO}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise UserError(f"{key} is said twice")
        out[key] = value
    return out
