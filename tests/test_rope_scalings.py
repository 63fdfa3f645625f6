"""Rotary scaling: the frequencies are transformers' own, bit for bit, and its config is read in all the ways it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaspark import rope_scalings
from megaspark.kernels.rope import rope_frequencies
from megaspark.rope_scalings import RopeScaling

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["linear", "llama3"]),
    dim=st.sampled_from([8, 64, 104, 128]),
    theta=st.sampled_from([1e4, 5e5, 1e6]),
    factor=st.sampled_from([1.0, 2.0, 8.0, 32.0]),
    context=st.sampled_from([256, 2048, 8192]),
)
def test_frequencies_are_transformers_own(kind: str, dim: int, theta: float, factor: float, context: int) -> None:
    """A rounding in another place is a centiradian at position 100,000; a wrong band is a different model past 8,192."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = RopeScaling(kind=kind, factor=factor, original_positions=context)
    described = rope_scalings.to_hf(theta, scaling)
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, **described))
    assert torch.equal(rope_scalings.scaled(rope_frequencies(dim, theta), scaling), theirs.inv_freq)
    expected = scaling if kind == "llama3" else RopeScaling(kind=kind, factor=factor)
    assert rope_scalings.from_hf(described) == (theta, expected)


@pytest.mark.parametrize("described", [
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA31}, "max_position_embeddings": 131072},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA31}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA31}, "rope_scaling": {"type": "llama3", **LLAMA31}},
])  # fmt: skip
def test_old_and_new_words_mean_the_same(described: dict[str, Any]) -> None:
    """Llama 3.1 as published, as transformers 5 saves it, and both at once."""
    expected = RopeScaling(kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_positions=8192)
    assert rope_scalings.from_hf(described) == (5e5, expected)


@pytest.mark.parametrize(("described", "words"), [
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 10000 and 500000"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "different things"),
    ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "rope type linear and yarn"),
    ({"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn' is not built; built are default, linear and llama3"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not built"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks its low_freq_factor"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
])  # fmt: skip
def test_what_is_not_built_or_contradicts_is_refused(described: dict[str, Any], words: str) -> None:
    """Silently taken for the default, either would be a model that falls apart on long texts only."""
    with pytest.raises(ValueError, match=words):
        rope_scalings.from_hf(described)
    assert rope_scalings.from_hf({}) == (1e4, None) and rope_scalings.from_hf({"rope_scaling": {"type": "default"}}) == (1e4, None)
