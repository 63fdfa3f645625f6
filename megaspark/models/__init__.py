"""Model architectures, one file each, found by name."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from megaspark.errors import UserError
from megaspark.settings import nearest

ARCHITECTURES = tuple(sorted(f.stem for f in Path(__file__).parent.glob("*.py") if f.stem not in ("__init__", "blocks")))


def architecture(name: str) -> ModuleType:
    """The module of an architecture: Config, SIZES, Model, HF_NAMES. Raises UserError for a name that is none."""
    if name not in ARCHITECTURES:
        raise UserError(f"model.arch = {name!r} is no architecture here{nearest(name, ARCHITECTURES)}")
    return import_module(f"megaspark.models.{name}")
