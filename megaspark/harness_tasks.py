"""Tasks of EleutherAI's lm-evaluation-harness on a Hugging Face folder: its own, and those that lie in a folder here."""

from __future__ import annotations

import math
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaspark.errors import UserError
from megaspark.manifests import sha256_of
from megaspark.settings import nearest

BOOTSTRAPS = 1000  # resamples for the standard errors that have no formula


def require() -> None:
    """Raises UserError where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-eval, which is not installed here: pip install 'megaspark[eval]'")


def run_tasks(folder: Path, tasks: list[str], task_dir: Path | None, limit: int | None, device: str, dtype: str) -> dict[str, Any]:
    """Runs tasks and returns by task its metrics, number of examples, shots, version and the sha256 of its files in `task_dir`.

    folder: a Hugging Face model; limit: examples of each task, at most; dtype: "float32" or "bfloat16". Raises UserError for a
    task that neither the harness nor `task_dir` has, for one that runs code, and where the harness is not installed.
    """
    require()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if task_dir is not None and not task_dir.is_dir():
        raise UserError(f"no such folder of tasks: {task_dir}; `megaspark demo-tasks` makes one from the demo corpus")
    own = str(task_dir) if task_dir else None
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # the harness's own are thousands of files to look through
        manager = TaskManager(include_path=own)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"no such task: {name}{_near(name, manager.all_tasks)}")
    try:
        with redirect_stdout(sys.stderr):  # the harness prints, and stdout is for results
            told = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": dtype},
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                device=device,
                batch_size=1,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise UserError(f"{error}; run problems as code with --code, where they are shut in") from None
    files = {path.stem: sha256_of(path) for path in sorted(task_dir.glob("*.jsonl"))} if task_dir else {}
    return {name: _figures(told, name, files.get(name)) for name in sorted(told["results"])}


def _figures(told: Any, name: str, sha256: str | None) -> dict[str, Any]:
    """One task's results as plain data; null for a figure that is not a finite number."""
    metrics = {}
    for key, value in told["results"][name].items():
        metric, _, rest = key.partition(",")
        if rest:  # "acc,none" is a metric and its filter; "alias" and the like are not
            label = metric if rest == "none" else f"{metric} ({rest})"
            metrics[label] = float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    samples = told.get("n-samples", {}).get(name, {})
    return {
        "metrics": dict(sorted(metrics.items())),
        "examples": samples.get("effective"),
        "shots": told.get("n-shot", {}).get(name),
        "version": told.get("versions", {}).get(name),
        "data_sha256": sha256,
    }


def _near(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("; did you mean") else f" among the {len(known):,} of lm-eval and --task-dir"
