"""The README's commands as they stand: they exist, agree with ./quickstart, and together walk the road from text to text."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import CHECKOUT, free_port, process_environment
from megaspark.cli import VERBS
from megaspark.config import load_config

README = (CHECKOUT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
ROAD = [line for line in BLOCKS[1].splitlines() if not line.startswith("source")]


def test_quickstart_runs_the_commands_that_the_readme_shows() -> None:
    """Two lists of the same commands drift apart."""
    road = (CHECKOUT / "quickstart").read_text().partition("road() {")[2].partition("\n}")[0]
    steps = [line.split("step ", 1)[1] for line in road.splitlines() if line.strip().startswith("step ")]
    assert [step.replace("$processes", "2").replace(" --force", "") for step in steps] == ROAD


def test_every_command_shown_exists() -> None:
    """A verb renamed, a config moved, a setting misspelled: the first thing that a new user types would fail."""
    commands = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
    assert len(commands) > 10
    for words in commands:
        if words[0] == "megaspark":
            assert words[1] in VERBS
        elif words[0] == "deepspeed":
            config = words[words.index("--config") + 1]
            load_config(CHECKOUT / config, [word for word in words if re.match(r"\w+\.\w+=", word)])
        else:
            assert words[0] in ("source", "./quickstart")


def test_tree_names_every_module_of_the_trainer() -> None:
    """The README's tree is the map that newcomers walk by; a file that it does not show, or shows in vain, misleads them."""
    tree = README.partition("## The tree")[2]
    shown = {Path(name).name for name in re.findall(r"^\s+([\w/]+\.py) ", tree, flags=re.MULTILINE)}
    modules = {path.name for path in (CHECKOUT / "megaspark").rglob("*.py") if not path.name.startswith("__")}
    assert shown == modules


def test_quickstart_tells_what_it_lacks() -> None:
    """Without Python, or with a wrong word, the script must say what to do instead of failing somewhere inside."""
    for argument, environment, word in (("", {"PYTHON": "no-python"}, "apt-get install"), ("tset", {}, "usage")):
        command = [CHECKOUT / "quickstart", *filter(None, [argument])]
        done = subprocess.run(command, env=process_environment(**environment), capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What happens when `line` is typed in `folder`."""
    return subprocess.run(
        line, shell=True, cwd=folder, env=process_environment(), capture_output=True, text=True, timeout=300
    )  # fmt: skip


@pytest.mark.launch
def test_readme_road_from_text_to_text(tmp_path: Path) -> None:
    """The commands one after the other, as typed, only with fewer steps: each must find what the one before it left."""
    for name in ("megaspark", "ds_configs"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    outputs = []
    for line in ROAD:
        if line.startswith("deepspeed"):
            line = line.replace("deepspeed ", f"deepspeed --master_port {free_port()} ", 1)
            line += " run.steps=30 run.save_every=0 run.eval_every=15 run.eval_batches=1 optim.warmup_steps=5 data.seq=64"
        done = typed(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        outputs.append(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "split" not in line]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1.5
    assert [line["step"] for line in lines if line.get("split") == "validation"] == [15, 30]
    size = sum(path.stat().st_size for path in (tmp_path / "data/demo/train").glob("*.bin"))
    assert size > 10e6 / 8 * 2  # at least 10 MB of text at under 8 bytes a token, 2 bytes each
    assert (tmp_path / "runs/demo/loss.svg").stat().st_size > 1000
    assert "'def __init__(self, name'" in outputs[-1]
    again = typed(ROAD[2], tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.long
@pytest.mark.launch
def test_quickstart_goes_on_after_ctrl_c_at_any_point(tmp_path: Path) -> None:
    """Interrupted in the corpus, the tokenizer, the shards, the training, the export: started again, it must end well."""
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(CHECKOUT / ".venv")
    said = ""
    for seconds in (1, 3, 6, 9, 12, 20, 45, 80, 10_000):
        with open(tmp_path / "output", "w+") as output:
            child = subprocess.Popen(
                [tmp_path / "quickstart"], cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, env=process_environment(OMP_NUM_THREADS=""),
            )  # fmt: skip
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGINT)
                child.wait(30)
            output.seek(0)
            said = output.read()
        if child.returncode == 0:
            break
    assert child.returncode == 0 and "continuation" in said, said[-3000:]
    metrics = (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, metrics) if "split" not in line]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == load_config("llama-demo.yaml", [])[0].run.steps
