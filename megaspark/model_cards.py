"""The README.md of an exported model: what it is, what it was made from, what was shown of it; what is unknown says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megaspark.meters import METRICS

UNKNOWN = "unknown"
FRONT = """---
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: to-be-chosen
---
"""
LICENCE = "TO BE CHOSEN by whoever publishes this model, with regard to the licences of its training data"


def training_facts(run: Path | None, step: int) -> dict[str, str]:
    """Loss, validation loss and energy up to `step`, by the metrics.jsonl of a run folder; "unknown" where it has none."""
    lines = [line for line in _lines(run) if line.get("step", step + 1) <= step] if run else []
    steps = {line["step"]: line for line in lines if "split" not in line}  # the last line of each step
    held_out = [line for line in lines if line.get("split") == "validation" and line.get("loss") is not None]
    last = steps.get(step, {}).get("loss")
    return {
        "training loss": UNKNOWN if last is None else f"{last:.4f} nats a token at step {step:,}",
        "validation loss": f"{held_out[-1]['loss']:.4f} nats a token at step {held_out[-1]['step']:,}" if held_out else UNKNOWN,
        "energy": _energy([line.get("joules") for line in steps.values()], step),
    }


def _energy(joules: list[float | None], step: int) -> str:
    measured = [j for j in joules if j is not None]
    if not measured:
        return f"{UNKNOWN} (not measured)"
    total = f"{sum(measured):,.0f} J ({sum(measured) / 3.6e6:.3g} kWh)"
    return total if len(measured) == step else f"{total} over {len(measured):,} of {step:,} steps; the others {UNKNOWN}"


def _lines(run: Path) -> Iterable[dict[str, Any]]:
    try:
        text = (run / METRICS).read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # the torn last line of a run that was killed
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


def model_card(name: str, facts: Mapping[str, Any], shown: Iterable[str]) -> str:
    """The text of a card: a table of facts, the licence still to be chosen, and what was shown when it was made."""
    rows = {**facts, "licence": LICENCE}
    table = "\n".join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items())
    proven = "\n".join(f"- {line}" for line in shown)
    return f"{FRONT}\n# {name}\n\n| | |\n|---|---|\n{table}\n\nShown when it was made:\n\n{proven}\n"
