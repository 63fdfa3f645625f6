"""docs/post_training.md: its commands exist, its configs are whole, and the example ends as it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from conftest import CHECKOUT, free_port, process_environment
from megaspark.cli import VERBS
from megaspark.posttraining import PostTraining, check_arguments
from megaspark.settings import load
from megaspark.tools import dpo, sft

GUIDE = (CHECKOUT / "docs" / "post_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
EXAMPLE = BLOCKS[1].splitlines()
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
README_ROAD = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)[1].splitlines()


def test_every_command_shown_exists() -> None:
    """A verb or a config that was renamed: the first thing that a reader types would fail."""
    for line in [*BLOCKS[0].splitlines(), *EXAMPLE]:
        words = shlex.split(line.replace("$'", "'"))
        if words[0] == "megaspark":
            assert words[1] in VERBS, line
        for name in re.findall(r"ds_configs/[\w.-]+", line):
            assert (CHECKOUT / name).is_file(), name


@pytest.mark.parametrize(("name", "method"), [("sft-demo.yaml", sft.METHOD), ("dpo-demo.yaml", dpo.METHOD)])
def test_shipped_configs_are_right(name: str, method: object) -> None:
    """Every argument of TRL's known and typed; and each key misspelled must be refused."""
    config, tree = load(CHECKOUT / "ds_configs" / name, [], PostTraining)
    arguments = check_arguments(config.trainer, method.classes()[0], tree, "trainer", {})
    assert arguments["learning_rate"] < 1 and arguments.keys() == config.trainer.keys()


def test_defaults_are_those_of_the_table() -> None:
    """The table says where we differ from TRL: if TRL changes its own, the table lies."""
    from trl import SFTConfig

    theirs = SFTConfig("unused", use_cpu=True)
    assert theirs.bf16 is True and theirs.gradient_checkpointing is True and theirs.max_length == 1024


def typed(line: str, folder: Path, timeout_s: float) -> str:
    """What a line prints when it is typed in `folder`."""
    line = line.replace("deepspeed ", f"deepspeed --master_port {free_port()} ", 1) if line.startswith("deepspeed") else line
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=process_environment(OMP_NUM_THREADS=""), capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.long
@pytest.mark.launch
def test_the_example_runs_as_written(tmp_path: Path) -> None:
    """The README's road to a pre-trained model, then every line of the guide: SFT's loss falls, DPO tells held-out pairs apart."""
    for name in ("megaspark", "ds_configs"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    for line in [line for line in README_ROAD if not line.startswith(("source", "megaspark plot", "megaspark generate"))]:
        typed(line, tmp_path, 1800)
    outputs = [typed(line, tmp_path, 1800) for line in EXAMPLE]
    history = [json.loads(line) for line in (tmp_path / "runs/demo-sft/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses[-1] < losses[0] - 0.8
    metrics = json.loads((tmp_path / "runs/demo-dpo/post_training.json").read_text())["metrics"]
    assert metrics["eval_rewards/accuracies"] > 0.8
    assert "continuation" in outputs[3] and (tmp_path / "runs/demo-again/hf/model.safetensors").is_file()
