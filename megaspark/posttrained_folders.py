"""The folder that an SFT or DPO run makes: worked on beside its name, resumable, and named when it is whole.

OUTPUT.partial holds TRL's checkpoints and the identity of the run that makes them; the same run, started again, goes on there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megaspark import __version__
from megaspark.errors import UserError
from megaspark.hf_tokenizers import customize
from megaspark.manifests import fsync_folder, write_atomically
from megaspark.model_cards import model_card
from megaspark.posttraining import Checked

PROVENANCE = "post_training.json"
IDENTITY = "identity.json"
WORK = "work"  # prepared examples, gone at the end
LIBRARIES = ("torch", "transformers", "trl", "peft", "deepspeed")
TOKENIZER_FILES = """tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
chat_template.jinja""".split()


def partial_of(out: Path) -> Path:
    """Where the work on `out` lies."""
    return out.with_name(out.name + ".partial")


def prepare(out: Path, identity: Mapping[str, Any], force: bool) -> None:
    """Makes OUT.partial, or finds there what the same run has left.

    Raises UserError if OUT exists, or another run is unfinished there, unless `force`; and with it for an OUT not made by us.
    """
    partial = partial_of(out)
    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another output, or --force to replace it")
    if out.exists() and not (out / PROVENANCE).is_file():
        raise UserError(f"{out} holds other things ({PROVENANCE} is not among them); --force replaces only what this command made")
    if partial.exists():
        try:
            known = json.loads((partial / IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        differs = [name for name in identity if known.get(name) != identity[name]]
        if differs and not force:
            raise UserError(f"{partial} is unfinished work of another run (other {', '.join(differs)}); --force starts anew")
        if differs or force:
            shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_atomically(partial / IDENTITY, (json.dumps(identity, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {error.strerror}") from None


def newest_checkpoint(partial: Path) -> Path | None:
    """The newest checkpoint of TRL's that is whole: its trainer_state.json is written last."""
    found = []
    for state in partial.glob("checkpoint-*/trainer_state.json"):
        try:
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def write_tokenizer(source: Path, tokenizer: Any, tokens: int, out: Path) -> None:
    """The tokenizer of `source` as it lies there, so that it encodes as it always did, with the chat template if there is one.

    `tokens` is how many it had before training: one that has more now (a template cloned from another tokenizer brings its
    tokens along) is another tokenizer, and written as transformers writes it.
    """
    if len(tokenizer) > tokens:
        tokenizer.save_pretrained(out)
        return
    for name in TOKENIZER_FILES:
        (out / name).unlink(missing_ok=True)
        if (source / name).is_file():
            write_atomically(out / name, (source / name).read_bytes())
    customize(out, tokens, tokenizer.chat_template, [])


def record(checked: Checked, trained: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """What the folder was made from, and how: what another run would need to make it again."""
    config = checked.config
    return {
        "method": checked.method.name,
        "written_by": f"megaspark {__version__}",
        "libraries": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "model": {"folder": config.model.folder, "sha256": checked.model_files},
        "data": {"train": checked.train.files, "validation": checked.validation.files if checked.validation else []},
        "config": config.model_dump(mode="json"),
        "config_sha256": checked.identity["config_sha256"],
        "deepspeed": dict(checked.deepspeed.values) if checked.deepspeed else None,
        "processes": processes,
        **trained,
    }


def finish(out: Path, provenance: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
    """Writes provenance, metrics and card into OUT.partial, syncs every file and gives the folder its name."""
    partial = partial_of(out)
    shutil.rmtree(partial / WORK)
    (partial / IDENTITY).unlink()
    (partial / PROVENANCE).write_text(json.dumps(provenance, indent=2, default=str) + "\n", encoding="utf-8")
    (partial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
    (partial / "README.md").write_text(_card(out.name, provenance), encoding="utf-8")
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(partial)
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    fsync_folder(out.parent)


def _card(name: str, made: Mapping[str, Any]) -> str:
    data = "; ".join(f"{f['file']} ({f['rows']:,} rows, sha256 {f['sha256'][:12]}...)" for f in made["data"]["train"])
    weights = ", ".join(f"{file} sha256 {digest[:12]}..." for file, digest in made["model"]["sha256"].items())
    facts = {
        "method": f"{made['method'].upper()}{', LoRA' if made['config']['lora'] else ''} (TRL {made['libraries']['trl']})",
        "made from": f"{made['model']['folder']}: {weights}",
        "examples": data,
        "steps": f"{made['steps']:,}",
        "config": f"sha256 {made['config_sha256']}",
        "made by": made["written_by"],
        **{key: f"{value:.4g}" for key, value in made["metrics"].items() if "loss" in key or "accurac" in key},
    }
    return model_card(name, facts, [f"everything that it was made from: {PROVENANCE}; every figure of its training: metrics.jsonl"])
