"""Finds the filters that a job names (`steps: [{length: {min_chars: 200}}]`) in `data_prep/filters/` and asks them, in order.

A filter is a module there with `reason_to_drop(doc, ...) -> str | None`; what it may be told is its function's signature.
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


@dataclass(frozen=True)
class Step:
    """One filter with its arguments."""

    name: str
    function: Callable[..., str | None]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def reason_to_drop(self, doc: Document) -> str | None:
        """The text "name: reason" if this filter drops `doc`, else None."""
        reason = self.function(doc, **self.arguments)
        return reason and f"{self.name}: {reason}"


def load_steps(specs: Sequence[Spec]) -> list[Step]:
    """The steps of a job; raises UserError for an unknown filter or argument, naming the nearest, and for a wrong type."""
    return [_load(spec) for spec in specs]


def reason_to_drop(doc: Document, steps: Sequence[Step]) -> str | None:
    """The first reason that a step has to drop `doc`, or None; a document without text is "empty"."""
    if not doc.text:
        return "empty"
    return next((reason for step in steps if (reason := step.reason_to_drop(doc))), None)


def _load(spec: Spec) -> Step:
    if isinstance(spec, dict) and len(spec) != 1:
        raise UserError(f"steps: each is one filter and its arguments, such as {{length: {{min_chars: 200}}}}, not {spec}")
    name, arguments = (spec, {}) if isinstance(spec, str) else next(iter(spec.items()))
    import megaspark.data_prep.filters as filters

    known = [module.name for module in pkgutil.iter_modules(filters.__path__)]
    if name not in known:
        raise UserError(f"steps: no filter {name!r} in data_prep/filters{nearest(name, known)}")
    function = importlib.import_module(f"{filters.__name__}.{name}").reason_to_drop
    return Step(name, function, _checked(name, function, arguments or {}))


def _checked(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a step, each of the type that the function's signature says."""
    parameters = list(inspect.signature(function).parameters.values())[1:]  # the first is the document
    types = typing.get_type_hints(function)
    for argument in arguments:
        if argument not in types or argument not in [p.name for p in parameters]:
            choices = [f"steps.{name}.{p.name}" for p in parameters]
            raise UserError(f"unknown argument steps.{name}.{argument}{nearest(f'steps.{name}.{argument}', choices)}")
    out = {}
    for parameter in parameters:
        if parameter.name in arguments:
            try:
                out[parameter.name] = TypeAdapter(types[parameter.name]).validate_python(arguments[parameter.name])
            except ValidationError as error:
                value, message = arguments[parameter.name], error.errors()[0]["msg"]
                raise UserError(f"steps.{name}.{parameter.name} = {value!r}: {message}") from None
        elif parameter.default is parameter.empty:
            raise UserError(f"steps.{name}.{parameter.name} is missing")
    return out
