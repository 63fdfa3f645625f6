"""ZeRO's options that keep or send things elsewhere, CPU offload and ZeRO++'s second copy, compute what one process does.

The processes run `test_engine.py`; one launch builds all the engines in turn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_engine import launch_cases
from test_parallel import CLIPPING, MODEL, SAVED_AT, STEPS, TIED, TOLERANCE, apart, check_resumed

from conftest import Launch, TinyData, tiny_run

CPU = {"device": "cpu"}
OPTIONS: dict[str, str | dict[str, Any]] = {
    "zero2 offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3 offload of the optimizer": {"stage": 3, "offload_optimizer": CPU},
    "zero3-offload.json": "zero3-offload.json",
    "hpz": {"stage": 3, "zero_hpz_partition_size": 2},
}
WORLD = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def config(tiny_data: TinyData, home: Path) -> str:
    return str(tiny_run(tiny_data, home)[0])


def case(config: str, home: Path, option: str) -> dict[str, Any]:
    said = OPTIONS[option]
    path = home / f"{option.replace(' ', '-')}.json"
    if isinstance(said, dict):
        path.write_text(json.dumps({"zero_optimization": said}))
    saving = {"save": str(home / f"saved-{path.stem}" / f"step_{SAVED_AT:08d}"), "save_at": SAVED_AT}
    overrides = [*MODEL, *CLIPPING, *TIED, f"deepspeed={path if isinstance(said, dict) else said}"]
    return {"name": option, "config": config, "steps": STEPS, "overrides": overrides, **saving}


@pytest.mark.long
@pytest.mark.launch
def test_options_compute_and_resume_what_one_process_does(launch: Launch, home: Path, config: str) -> None:
    """A gradient that is not added up in host memory, a second copy that is not renewed after a step or a resume, moments
    that are not the checkpoint's because the optimizer's memory lies elsewhere."""
    alone = {**case(config, home, "hpz"), "name": "one", "save": str(home / "one" / f"step_{SAVED_AT:08d}")}
    alone["overrides"] = [*alone["overrides"], "deepspeed=zero0.json"]
    one = launch_cases(launch, home / "one-cases", 1, [alone])["one"]
    fresh = [case(config, home, option) for option in OPTIONS]
    again = [{key: value for key, value in {**each, "load": each["save"]}.items() if key[:4] != "save"} for each in fresh]
    # In launches of their own: DeepSpeed makes hpZ's groups once a process, and refuses to again.
    found = launch_cases(launch, home / "fresh", WORLD, fresh)
    resumed = launch_cases(launch, home / "again", WORLD, again)
    print({option: f"{apart(found[option]['losses'], one['losses']):.1e}" for option in OPTIONS})
    for option in OPTIONS:
        result = found[option]
        assert result["pristine"], f"{option}: the first weights are others"
        assert apart(result["losses"], one["losses"]) < TOLERANCE, option
        assert apart(result["norms"], one["norms"]) < 1e-3, option
        assert abs(result["saved_loss"] - one["saved_loss"]) < TOLERANCE * one["saved_loss"], option
        check_resumed(option, resumed[option], result, result)
