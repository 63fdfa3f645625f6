"""`megaspark dpo CONFIG.yaml`: direct preference optimization (arXiv 2305.18290) by TRL's DPOTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaspark.posttraining import Method
from megaspark.trl_runs import command

EPILOG = """examples:
  megaspark dpo ds_configs/dpo-demo.yaml trainer.beta=0.2
  megaspark dpo ds_configs/dpo-demo.yaml 'trainer.loss_type=[sigmoid,sft]' trainer.precompute_ref_log_probs=true
  deepspeed --no_local_rank --num_gpus 2 --module megaspark dpo ds_configs/dpo-demo.yaml deepspeed=zero2.json"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return command(argv, METHOD, "Teaches a model to prefer one answer to another, from pairs: prompt, chosen, rejected.", EPILOG)


def _classes() -> tuple[type, type]:
    import peft  # noqa: F401 (asked for here so that a missing one is told at the start)
    from trl import DPOConfig, DPOTrainer

    return DPOConfig, DPOTrainer


def _forms(trainer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [("prompt", "chosen", "rejected"), ("chosen", "rejected")]


LOSSES = """sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft
sigmoid_norm""".split()
METHOD = Method(
    "dpo",
    _classes,
    _forms,
    ("train_loss", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"),
    refused={"padding_free": "TRL 1.16's DPOTrainer ignores it"},
    choices={"loss_type": LOSSES, "f_divergence_type": ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]},
)
