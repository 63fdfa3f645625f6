"""Model architectures, one file each, found by name."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megaspark.errors import UserError
from megaspark.settings import nearest

ARCHITECTURES = tuple(sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem not in ("__init__", "blocks")))


def architecture(name: str) -> ModuleType:
    """The module of an architecture: Config, SIZES, Model, HF_NAMES. Raises UserError for a name that is none."""
    if name not in ARCHITECTURES:
        raise UserError(f"model.arch = {name!r} is no architecture here{nearest(name, ARCHITECTURES)}")
    return import_module(f"megaspark.models.{name}")


def architecture_of_hf(model_type: str) -> ModuleType:
    """The module of the architecture that Hugging Face calls `model_type`; raises UserError where none is built."""
    known = {architecture(name).HF_TYPE: architecture(name) for name in ARCHITECTURES}
    if model_type not in known:
        raise UserError(f"model_type {model_type!r} is no architecture here{nearest(model_type, [*known])}")
    return known[model_type]


# What a model computes does not depend on these; the head's dimension is compared as it follows, said or not.
NOT_COMPUTED_WITH = ("size", "init_std", "max_positions", "head_dim")


def differing(ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """The first setting (key, ours, theirs) that makes two configs of one architecture compute different things, or None."""
    if ours.arch != theirs.arch:
        return "arch", ours.arch, theirs.arch
    pairs = {key: (getattr(ours, key), getattr(theirs, key)) for key in type(ours).model_fields if key not in NOT_COMPUTED_WITH}
    pairs["head_dim"] = (ours.dim, theirs.dim)
    return next(((key, a, b) for key, (a, b) in pairs.items() if a != b), None)
