"""First weights: the same for a parameter whoever holds it, of the right spread, a tied table tied, nothing else made."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaspark.groups import Group, Groups
from megaspark.models.blocks import Execution
from megaspark.models.llama import Config
from megaspark.weights import build_model, fill, make_model, parameter_shapes, parts


def config_of(**changes) -> Config:
    return Config(**{"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 97, **changes})


def test_weights_depend_on_seed_and_name_only():
    """Drawn in sequence from one generator, a block's weights would depend on who holds which layers."""
    torch.manual_seed(1)
    small = build_model(config_of(layers=2), 7)
    torch.manual_seed(2)
    large = build_model(config_of(layers=3), 7)
    theirs = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        scale = math.sqrt(3 / 2) if name.endswith(("attention.o.weight", "mlp.down.weight")) else 1.0
        assert torch.allclose(parameter, theirs[name] * scale, rtol=1e-6), name
    other = build_model(config_of(layers=2), 8)
    assert not torch.equal(other.embedding.weight, small.embedding.weight)
    drawn = [p.flatten()[:50].tolist() for p in small.parameters() if p.ndim > 1]
    assert len({tuple(row) for row in drawn}) == len(drawn), "two parameters start alike"
    half = make_model(config_of(layers=2))
    fill(half, parts(half), 7, torch.bfloat16)
    assert torch.equal(half.embedding.weight, small.embedding.weight.bfloat16())


def test_weights_have_the_spread_that_the_config_says():
    """A std that is a variance, norms at 0, or residual layers that are not scaled down with depth."""
    config = config_of(layers=8, hidden=128, ffn=352, heads=4, kv_heads=2)
    model = build_model(config, 1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith((".o.weight", ".down.weight"))
        expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
        spread, n = parameter.std().item(), parameter.numel()
        assert abs(spread / expected - 1) < 5 / math.sqrt(2 * n), name  # five standard errors
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name


def test_first_loss_is_that_of_a_uniform_guess():
    """An initialization too wide, or a head that is not the table's size, starts far above ln V."""
    model = build_model(config_of(vocab=1000, hidden=128, heads=4, ffn=352), 1)
    tokens = torch.randint(1000, (4, 65), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(tokens[:, :-1], None, tokens[:, 1:]).item() == pytest.approx(math.log(1000), rel=0.02)


@given(tensor=st.sampled_from([1, 2, 4]), tied=st.booleans(), kv_heads=st.sampled_from([1, 2, 4]))
def test_shares_of_a_tensor_group_make_up_the_whole(tensor, tied, kv_heads):
    """A share cut along the wrong dimension, drawn by itself, or a copy that counts on two processes."""
    config = config_of(tie_embeddings=tied, kv_heads=kv_heads)
    whole = dict(build_model(config, 5).named_parameters())
    counted = dict.fromkeys(whole, 0)
    for rank in range(tensor):
        model = make_model(config, Execution(groups=Groups(tensor=Group(rank, tensor))))
        fill(model, parts(model, rank), 5, torch.float32)
        for name, parameter in model.named_parameters():
            part = parameter.part
            assert (part.name, part.shape) == (name, tuple(whole[name].shape))
            first, count = part.columns or (0, part.shape[-1])
            columns = whole[name][..., first : first + count].flatten() if part.columns else whole[name].flatten()
            assert torch.equal(parameter.flatten(), columns[part.offset : part.offset + parameter.numel()])
            counted[name] += parameter.numel() if part.counted else 0
        assert (model.head.weight is model.embedding.weight) == tied
    assert counted == {name: parameter.numel() for name, parameter in whole.items()}


def test_only_what_is_wanted_is_made():
    """A stage of a pipeline that fills, or a shape that allocates, the whole model."""
    model = make_model(config_of())
    every = parts(model)
    fill(model, {name: part for name, part in every.items() if name.startswith("blocks.1.")}, 1, torch.float32)
    made = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert made == {name for name in every if name.startswith("blocks.1.")}
    assert parameter_shapes(config_of())["blocks.1.mlp.down.weight"] == (32, 48)
