"""How rotary frequencies are stretched for contexts longer than those of training, and how Hugging Face's config says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megaspark.settings import Section

DEFAULT_THETA = 10000.0  # what transformers takes where a config says none
UNSCALED = ("default", None)


class RopeScaling(Section):
    """linear: every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595); llama3: only the slow ones.

    llama3 (Llama 3.1's model card and code): waves longer than original_positions / low_freq_factor are divided by `factor`,
    those shorter than original_positions / high_freq_factor stay, those between are interpolated.
    """

    kind: Literal["linear", "llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_positions: int = Field(8192, gt=0, description="the context before scaling, in tokens; of llama3 only")

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor = {self.high_freq_factor} is not above low_freq_factor = {self.low_freq_factor}")
        return self


def scaled(frequencies_C: Tensor, scaling: RopeScaling | None) -> Tensor:
    """The frequencies that positions turn by. frequencies_C: [D/2] fp32, radians a position; returns the same shape."""
    if scaling is None:
        return frequencies_C
    if scaling.kind == "linear":
        return frequencies_C / scaling.factor
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions
    wavelengths_C = 2 * math.pi / frequencies_C
    slow_C = wavelengths_C > context / low
    # Operation by operation as transformers has it: at position 100,000 an ulp of a frequency is 1e-2 of a radian.
    held_C = torch.where(slow_C, frequencies_C / scaling.factor, frequencies_C)
    share_C = (context / wavelengths_C - low) / (high - low)
    between_C = (1 - share_C) * held_C / scaling.factor + share_C * held_C
    return torch.where(slow_C | (wavelengths_C < context / high), held_C, between_C)


def to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The rotary keys of a config.json: `rope_parameters`, and `rope_theta` and `rope_scaling` for readers of before 2026.

    Such a reader (transformers 4, and what is built on it) would take theta for 10,000 without a word.
    """
    said: dict[str, Any] = {}
    if scaling is not None:
        said = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            said |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }
    parameters = {"rope_type": "default", **said, "rope_theta": theta}
    return {"rope_parameters": parameters, "rope_theta": theta, **({"rope_scaling": said} if said else {})}


def from_hf(described: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling of a config.json, in the words of transformers 4 or 5.

    Raises ValueError for a scaling that is not built, and where the two ways of saying it contradict each other.
    """
    old, new = dict(described.get("rope_scaling") or {}), dict(described.get("rope_parameters") or {})
    thetas = {float(place["rope_theta"]) for place in (described, old, new) if place.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(f"contradicts itself: rope_theta is {' and '.join(f'{theta:g}' for theta in sorted(thetas))}")
    context = int(described.get("max_position_embeddings") or 0)
    scalings = [_scaling(said, context) for said in (old, new) if said]
    if len(scalings) > 1 and scalings[0] != scalings[1]:
        raise ValueError("contradicts itself: rope_scaling and rope_parameters say different things")
    for place in (described, old, new):
        if place.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(f"partial_rotary_factor = {place['partial_rotary_factor']}: only whole heads are rotated here")
    return thetas.pop() if thetas else DEFAULT_THETA, scalings[0] if scalings else None


def _scaling(said: Mapping[str, Any], context: int) -> RopeScaling | None:
    kinds = {said[key] for key in ("rope_type", "type") if key in said}
    if len(kinds) > 1:
        raise ValueError(f"contradicts itself: rope type {' and '.join(sorted(map(str, kinds)))}")
    kind = kinds.pop() if kinds else None
    if kind in UNSCALED:
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope type {kind!r} is not built; built are default, linear and llama3")
    given = {key: said[key] for key in ("factor", "low_freq_factor", "high_freq_factor") if said.get(key) is not None}
    for key in ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor"):
        if key not in given:
            raise ValueError(f"rope type {kind} lacks its {key}")
    if kind == "linear":
        return RopeScaling(kind=kind, factor=given["factor"])
    return RopeScaling(kind=kind, original_positions=said.get("original_max_position_embeddings") or context, **given)
