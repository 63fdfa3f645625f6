"""Work that goes through stages, each of independent parts that many processes do; whatever was finished stays finished.

WORK/NAME/part-00000/    what a part wrote, and done.json with what it said, written last
WORK/NAME.json           what all parts of a stage said; from then on its parts are not asked for again
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaspark.data_prep.workers import run_units
from megaspark.manifests import write_atomically

Result = dict[str, Any]

_DONE = "done.json"
_STOP = "stop"


def run_stage(work: Path, name: str, function: Callable[..., Result], items: Sequence[Any], workers: int) -> list[Result]:
    """Calls function(folder, item) for each item not finished yet, each in its own folder; returns what all said, in order.

    A part begins in an empty folder, and what it leaves there must depend on nothing but finished stages and its item.
    """
    summary = work / f"{name}.json"
    if summary.exists():
        return json.loads(summary.read_bytes())
    folder = work / name
    folder.mkdir(exist_ok=True)
    (folder / _STOP).unlink(missing_ok=True)
    parts = [part_folder(folder, number) for number in range(len(items))]
    todo = [(part, item) for part, item in zip(parts, items, strict=True) if not (part / _DONE).exists()]
    before = len(parts) - len(todo)
    if before:
        print(f"{name}: going on, {before:,} of {len(parts):,} parts were finished before, {len(todo):,} to do", flush=True)
    done = run_units(partial(_do_part, function), todo, workers, (folder / _STOP).touch)
    for _ in tqdm(done, desc=name, initial=before, total=len(parts), unit="part", mininterval=1.0, disable=len(parts) == 1):
        pass
    results = [json.loads((part / _DONE).read_bytes()) for part in parts]
    write_atomically(summary, json.dumps(results).encode())
    return results


def part_folder(stage: Path, number: int) -> Path:
    """Where part `number` of a stage writes."""
    return stage / f"part-{number:05d}"


def check_not_stopped(part: Path) -> None:
    """Ends a part that takes long when another has failed."""
    if (part.parent / _STOP).exists():
        raise RuntimeError("another part failed")


def _do_part(function: Callable[..., Result], todo: tuple[Path, Any]) -> None:
    part, item = todo
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write_atomically(part / _DONE, json.dumps(function(part, item)).encode())
