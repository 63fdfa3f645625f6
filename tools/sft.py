"""`megaspark sft CONFIG.yaml`: supervised fine-tuning by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaspark.posttraining import Method
from megaspark.trl_runs import command

EPILOG = """examples:
  megaspark sft ds_configs/sft-demo.yaml trainer.learning_rate=1e-4
  deepspeed --no_local_rank --num_gpus 2 --module megaspark sft ds_configs/sft-demo.yaml deepspeed=zero2.json"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return command(argv, METHOD, "Teaches a model to answer, from examples: prompt and completion, conversations, or text.", EPILOG)


def _classes() -> tuple[type, type]:
    import peft  # noqa: F401 (asked for here so that a missing one is told at the start)
    from trl import SFTConfig, SFTTrainer

    return SFTConfig, SFTTrainer


def _forms(trainer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    text = trainer.get("dataset_text_field", "text")
    return [("prompt", "completion"), ("messages",), ("input_ids",), (text,)]


METHOD = Method("sft", _classes, _forms, ("train_loss", "eval_loss", "eval_mean_token_accuracy"))
