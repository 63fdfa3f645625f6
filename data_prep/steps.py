"""Finds the steps that a job names (`steps: [nfc, {length: {min_chars: 200}}]`) in `data_prep/filters/`, applies them in order.

A step is a module there with one function: `reason_to_drop(doc, ...) -> str | None`, or `rewrite(doc, ...) -> Document`, which
gives the document another text. What it may be told is that function's signature. A module that reads files also has
`fingerprint(...) -> str`, of the same arguments: the hash of what they hold. Modules named `_...` are no steps.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megaspark.data_prep.documents import Document
from megaspark.errors import UserError
from megaspark.settings import nearest

Spec = str | dict[str, dict[str, Any] | None]

KINDS = ("reason_to_drop", "rewrite")


@dataclass(frozen=True)
class Step:
    """One filter with its arguments; `function` is the module's `reason_to_drop` or its `rewrite`."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, doc: Document) -> Document | str:
        """The document as it goes on from here, or the text "name: reason" if it ends here."""
        result = self.function(doc, **self.arguments)
        if self.function.__name__ == "rewrite":
            return result if result.text else f"{self.name}: nothing left"
        return f"{self.name}: {result}" if result else doc

    def reason_to_drop(self, doc: Document) -> str | None:
        """The text "name: reason" if this step drops `doc`, else None."""
        result = self.apply(doc)
        return result if isinstance(result, str) else None


def load_steps(specs: Sequence[Spec]) -> list[Step]:
    """The steps of a job; raises UserError for an unknown filter or argument, naming the nearest, and for a wrong value."""
    return [_load(spec) for spec in specs]


def apply_steps(doc: Document, steps: Sequence[Step]) -> Document | str:
    """The document as the steps leave it, or the first reason to drop it; a document without text is "empty"."""
    result: Document | str = doc if doc.text else "empty"
    for step in steps:
        if isinstance(result, str):
            break
        result = step.apply(result)
    return result


def step_names() -> list[str]:
    """The names of all filters that there are, sorted."""
    import megaspark.data_prep.filters as filters

    return sorted(module.name for module in pkgutil.iter_modules(filters.__path__) if not module.name.startswith("_"))


def _load(spec: Spec) -> Step:
    if isinstance(spec, dict) and len(spec) != 1:
        raise UserError(f"steps: each is one filter and its arguments, such as {{length: {{min_chars: 200}}}}, not {spec}")
    name, arguments = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    if name not in step_names():
        raise UserError(f"steps: no filter {name!r} in data_prep/filters{nearest(name, step_names())}")
    module = importlib.import_module(f"megaspark.data_prep.filters.{name}")
    function = next(getattr(module, kind) for kind in KINDS if hasattr(module, kind))
    return Step(name, function, _checked(name, function, arguments or {}))


def _checked(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a step, each of the type, and within the limits, that the function's signature says."""
    parameters = {p.name: p for p in list(inspect.signature(function).parameters.values())[1:]}  # the first is the document
    types = typing.get_type_hints(function, include_extras=True)
    for argument in arguments:
        if argument not in parameters:
            choices = [f"steps.{name}.{known}" for known in parameters]
            hint = nearest(f"steps.{name}.{argument}", choices) if choices else "; it takes none"
            raise UserError(f"unknown argument steps.{name}.{argument}{hint}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"steps.{name}.{parameter.name} is missing")
    return {key: _typed(f"steps.{name}.{key}", types[key], value) for key, value in arguments.items()}


def _typed(where: str, kind: Any, value: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{where} = {value!r}: {error.errors()[0]['msg']}") from None
