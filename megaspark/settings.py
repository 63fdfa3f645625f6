"""YAML files, their `base:` files and `key=value` overrides become one checked pydantic model.

Every value remembers where it was said, so that an error can name the file and line. An unknown key is an error that names
the nearest right one. No torch in here: a data-prep job on a head node starts in a blink.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megaspark.errors import UserError

COMMAND_LINE = "command line"


class Section(BaseModel):
    """A group of settings: unknown keys are refused, values do not change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SettingsT = TypeVar("SettingsT", bound=Section)


@dataclass
class Tree:
    """Nested settings before they are checked, with the place ("file:line") where each dotted key was said."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Where `key`, the first thing inside it, or the nearest value around it, was said; "default" if nowhere."""
        inside = (place for said, place in self.places.items() if said.startswith(f"{key}."))
        if key not in self.places and (first := next(inside, None)):
            return first
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return "default"

    def set(self, key: str, value: Any, place: str) -> None:
        """Puts `value` at dotted `key`; a mapping replaces only the keys that it names."""
        if isinstance(value, Mapping) and value:
            for name, inner in value.items():
                self.set(f"{key}.{name}", inner, place)
            return
        *sections, last = key.split(".")
        node = self.values
        for i, section in enumerate(sections):
            if node.get(section) is None:  # not said yet, or null
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise UserError(f"{key} ({place}): {'.'.join(sections[: i + 1])} is a value, not a section")
        node[last] = value
        self.places[key] = place


def load(path: str | Path, overrides: Sequence[str], schema: type[SettingsT]) -> tuple[SettingsT, Tree]:
    """Reads a settings file, its `base:` chain and `key=value` overrides into `schema`.

    Returns the checked settings and the tree with the place of every value. Raises UserError, in one line, for a missing
    file, bad YAML, an unknown key (with the nearest right one) or a value of the wrong type.
    """
    tree = read(path, overrides)
    return check(tree, schema), tree


def read(path: str | Path, overrides: Sequence[str]) -> Tree:
    """Reads a settings file, its `base:` chain and `key=value` overrides, last word wins; nothing is checked yet."""
    tree = Tree()
    _read_chain(find(path), tree, seen=())
    for override in overrides:
        key, value = parse_override(override)
        tree.set(key, value, f"{COMMAND_LINE}: {override}")
    return tree


def check(tree: Tree, schema: type[SettingsT]) -> SettingsT:
    """Validates a tree against `schema`; raises UserError naming the first mistake, its place and the nearest right key."""
    for key, choices in unknown_keys(tree.values, schema):
        elsewhere = [known for known in dotted_keys(schema) if known.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"; did you mean {elsewhere[0]}?" if elsewhere else nearest(key, choices)
        raise UserError(f"unknown key {key} ({tree.place(key)}){hint}")
    try:
        return schema.model_validate(tree.values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise UserError(f"{key} is missing ({next(iter(tree.places.values()), 'no file')})") from None
        shown = "" if isinstance(first["input"], (dict, BaseModel)) or not key else f" = {first['input']!r}"
        raise UserError(f"{key}{shown} ({tree.place(key)}): {message}" if key else message) from None


def nearest(wrong: str, choices: Sequence[str]) -> str:
    """The tail of an error message: "; did you mean X?", or the list of choices when nothing is near."""
    section = wrong[: wrong.rfind(".") + 1]
    if not all(choice.startswith(section) for choice in choices):
        section = ""
    name = wrong.removeprefix(section)  # a section alike in all must not make anything look near
    names = {choice.removeprefix(section): choice for choice in choices}
    match = [known for known in names if _abbreviated(name, known) or sorted(name) == sorted(known)]
    match = match or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {names[match[0]]}?" if match else f"; known are {', '.join(sorted(choices))}"


def _abbreviated(one: str, other: str) -> bool:
    """Whether one is made of the other's initials, like `lr` of `learning_rate`."""
    short, long = sorted((one, other), key=len)
    return 1 < len(short) < len(long) and short == "".join(word[:1] for word in long.split("_"))


def parse_override(text: str) -> tuple[str, Any]:
    """Splits `a.b=c` into the dotted key and the value, read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"{text!r} on the {COMMAND_LINE} is not of the form section.key=value")
    try:
        return key.strip(), yaml.safe_load(value) if value.strip() else None
    except yaml.YAMLError:
        raise UserError(f"{text!r} on the {COMMAND_LINE}: the value is not YAML") from None


def find(path: str | Path, beside: Path | None = None) -> Path:
    """Finds a settings file: as given, beside the file that names it, or among the shipped ds_configs."""
    shipped = Path(str(resources.files("megaspark.ds_configs").joinpath("")))
    places = [Path(path)] if beside is None else [beside / path]
    for candidate in [*places, Path(path), shipped / path]:
        if candidate.is_file():
            return candidate
    suffix = Path(path).suffix
    names = [p.name for p in shipped.glob("*.*") if p.suffix == suffix] or [p.name for p in shipped.glob("*.yaml")]
    raise UserError(f"no such file: {path} (looked here and in {shipped}){nearest(Path(path).name, names)}")


def canonical_json(values: Any) -> str:
    """JSON with sorted keys and no spaces: equal settings give equal text on every machine."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(values: Any) -> str:
    """The sha256 of settings, as 64 hex digits, independent of their order."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def _read_chain(path: Path, tree: Tree, seen: tuple[Path, ...]) -> None:
    """Reads `path` into `tree` on top of the files that its `base:` names."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base: goes in a circle ({' -> '.join(p.name for p in seen)} -> {path.name})")
    own = read_yaml(path)
    base = own.values.pop("base", None)
    if base is not None:
        if not isinstance(base, str) or not base:
            raise UserError(f"base = {base!r} ({own.place('base')}) should be the name of one file")
        _read_chain(find(base, beside=path.parent), tree, (*seen, path.resolve()))
    for key, value in _leaves(own.values):
        tree.set(key, value, own.place(key))


def read_yaml(path: Path) -> Tree:
    """Reads one YAML mapping with the line of every key; raises UserError for bad YAML and for a key said twice."""
    try:
        return _tree(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), path)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a date that does not exist
        where = getattr(error, "problem_mark", None)
        line = f":{where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None


def _tree(node: yaml.Node | None, path: Path) -> Tree:
    tree = Tree()
    if node is not None:
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: should be a mapping of settings, is a {node.id}")
        tree.values = _mapping(node, path, "", tree.places)
    return tree


def _mapping(node: yaml.MappingNode, path: Path, prefix: str, places: dict[str, str]) -> dict[str, Any]:
    constructor = yaml.SafeLoader("")
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, place = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        dotted = f"{prefix}{key}"
        if dotted in places:
            raise UserError(f"{dotted} is said twice: {places[dotted]} and {place}")
        places[dotted] = place
        if isinstance(value_node, yaml.MappingNode):
            out[key] = _mapping(value_node, path, f"{dotted}.", places)
        else:
            out[key] = constructor.construct_object(value_node, deep=True)
    return out


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of `schema` and of the sections inside it."""
    for name, field_info in schema.model_fields.items():
        yield f"{prefix}{name}"
        for section in _sections(field_info.annotation):
            yield from dotted_keys(section, f"{prefix}{name}.")


def unknown_keys(values: Mapping[str, Any], schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields (dotted key, known dotted keys beside it) for every key that `schema`, or a section inside it, does not have."""
    fields = {alias: f for name, f in schema.model_fields.items() for alias in {name, f.alias or name}}
    choices = [f"{prefix}{name}" for name in fields]
    for name, value in values.items():
        if name not in fields:
            yield f"{prefix}{name}", choices
        elif isinstance(value, Mapping):
            for section in _sections(fields[name].annotation)[:1]:
                yield from unknown_keys(value, section, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The schemas that an annotation holds, such as the one of `Section | None`."""
    return [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
