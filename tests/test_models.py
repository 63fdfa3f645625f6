"""Models: the same logits as transformers, documents that do not see each other, weights that depend on seed and name only."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import EOS
from megaspark.batches import document_positions
from megaspark.flops import parameters
from megaspark.models import ARCHITECTURES, architecture, llama
from megaspark.models.llama import Config, Model

SHAPES = {
    "gqa": {"heads": 4, "kv_heads": 2},
    "mha": {"heads": 4, "kv_heads": 4},
    "mqa": {"heads": 4, "kv_heads": 1},
    "tied": {"heads": 4, "kv_heads": 2, "tie_embeddings": True},
    "head_dim": {"heads": 4, "kv_heads": 2, "head_dim": 6},
    "head_dim_104": {"hidden": 208, "heads": 2, "kv_heads": 2, "ffn": 96},  # the 30B's
    "theta_eps": {"heads": 4, "kv_heads": 2, "rope_theta": 5e5, "norm_eps": 1e-2},
}
LIMIT = 1e-5  # on max |logit difference| in fp32; logits are of size 10, so this is some 20 roundings


def config_of(**changes: Any) -> Config:
    return Config(**{"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 100, "vocab": 97, **changes})


def random_model(config: Config, seed: int = 0) -> Model:
    """Weights of std .2 and random norm weights: at the usual .02 and 1 a wrong rotary layout moves logits by 2e-2 only."""
    model = Model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * drawn if parameter.ndim == 1 else 0.2 * drawn / math.sqrt(parameter.shape[1] / 64))
    return model


def hf_state(model: Model) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, by HF_NAMES alone."""
    out = {}
    for name, parameter in model.named_parameters():
        number = next((part for part in name.split(".") if part.isdigit()), "")
        generic = name.replace(f"blocks.{number}.", "blocks.{i}.") if number else name
        out[llama.HF_NAMES[generic].format(i=number)] = parameter.detach()
    return out


def hf_model(model: Model, **changes: Any) -> nn.Module:
    """transformers' LlamaForCausalLM of the same weights; `changes` go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    described = {**llama.hf_config(model.config, 128), **changes}
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**described), attn_implementation="sdpa").eval()
    state = hf_state(model)
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    return theirs


def tokens_of(config: Config, batch: int = 2, length: int = 40, seed: int = 5) -> Tensor:
    return torch.randint(0, config.vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(model: Model, theirs: nn.Module) -> float:
    tokens = tokens_of(model.config)
    return (model(tokens) - theirs(tokens).logits).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_faces(shape):
    """Another rotary layout, epsilon, head order or residual order: the export would be a slightly different model."""
    model = random_model(config_of(**SHAPES[shape]))
    assert difference(model, hf_model(model)) < LIMIT


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """A projection's rows as Meta lays them out, pairs side by side."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


MUTATIONS = {
    "rotary layout": lambda s, p: s.update({p + "q_proj.weight": interleaved(s[p + "q_proj.weight"], 16)}),
    "head order": lambda s, p: s.update({p + "k_proj.weight": s[p + "k_proj.weight"].unflatten(0, (2, 16)).flip(0).flatten(0, 1)}),
    "q for o": lambda s, p: s.update({p + "o_proj.weight": s[p + "q_proj.weight"]}),
    "one norm forgotten": lambda s, p: s.update({"model.norm.weight": torch.ones(64)}),
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, "epsilon", "theta"])
def test_the_comparison_would_see_a_mistake(mutation):
    """The test above is worth nothing if a wrong layout, epsilon or theta passed its limit too."""
    model = random_model(config_of())
    if mutation in MUTATIONS:
        theirs = hf_model(model)
        state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
        MUTATIONS[mutation](state, "model.layers.0.self_attn.")
        theirs.load_state_dict(state)
    else:
        theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}}
        theirs = hf_model(model, **({"rms_norm_eps": 2e-5} if mutation == "epsilon" else theta))
    assert difference(model, theirs) > 3 * LIMIT


def test_loss_and_gradients_equal_hugging_faces():
    """Equal logits, but labels shifted twice, a mean over other tokens, or a gradient cut off somewhere."""
    model = random_model(config_of())
    theirs = hf_model(model)
    tokens = tokens_of(model.config, length=41)
    loss = model(tokens[:, :-1], None, tokens[:, 1:])
    loss.backward()
    logits = theirs(tokens[:, :-1]).logits
    other = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    other.backward()
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    mine = hf_state(nn_gradients(model))
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def nn_gradients(model: Model) -> Model:
    """A model whose weights are the gradients of `model`."""
    out = Model(model.config)
    with torch.no_grad():
        for p, q in zip(out.parameters(), model.parameters(), strict=True):
            p.copy_(q.grad)
    return out


def test_tied_table_gets_both_gradients():
    """With the head's share or the embedding's missing, a tied model learns half of what it should."""
    model = random_model(config_of(tie_embeddings=True))
    theirs = hf_model(model)
    tokens = tokens_of(model.config, length=41)
    model(tokens[:, :-1], None, tokens[:, 1:]).backward()
    nn.functional.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = theirs.model.embed_tokens.weight.grad
    assert (model.embedding.weight.grad - expected).norm() <= 1e-5 * expected.norm()


# ---- documents


def packed(config: Config, lengths: list[int], seed: int = 5) -> tuple[Tensor, Tensor]:
    """One row of documents of those lengths, each ended by EOS, and its positions."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(EOS + 1, config.vocab, (n,), generator=generator) for n in lengths]
    for document in documents:
        document[-1] = EOS
    tokens = torch.cat(documents)[None]
    return tokens, torch.from_numpy(document_positions(tokens.numpy(), EOS))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
@hypothesis_settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_packed_documents_give_what_each_gives_alone(lengths):
    """Attention over a boundary, or positions that go on: a packed document would not be the document."""
    model = random_model(config_of())
    tokens, positions = packed(model.config, lengths)
    together = model(tokens, positions)
    start = 0
    for length in lengths:
        alone = model(tokens[:, start : start + length])
        assert (together[:, start : start + length] - alone).abs().max() < LIMIT
        start += length


@torch.no_grad()
def test_nothing_leaks_between_documents():
    """Bit for bit: a token changed in one document must leave all others alone, and change its own."""
    model = random_model(config_of())
    tokens, positions = packed(model.config, [9, 7, 11])
    before = model(tokens, positions)
    for place, own in ((0, slice(0, 9)), (8, slice(8, 9)), (12, slice(12, 16)), (20, slice(20, 27))):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % model.config.vocab
        after = model(changed, positions)  # the same bounds: only the content of one place differs
        same = torch.ones(27, dtype=torch.bool)
        same[own] = False
        assert torch.equal(before[:, same], after[:, same])
        assert not torch.equal(before[:, own], after[:, own])


@torch.no_grad()
def test_without_positions_attention_runs_over_the_whole_sample():
    """The switch document_mask: false must really see across, or a user compares two runs that are the same."""
    model = random_model(config_of())
    tokens, positions = packed(model.config, [9, 7])
    assert (model(tokens)[:, 9:] - model(tokens, positions)[:, 9:]).abs().max() > 1e-2
    assert (
        torch.equal(model(tokens), model(tokens, torch.arange(16)[None]))
        or (model(tokens) - model(tokens, torch.arange(16)[None])).abs().max() < LIMIT
    )


# ---- weights


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_cover_every_parameter(arch):
    """A parameter without a Hugging Face name would be left out of the export, and be random there."""
    module = architecture(arch)
    model = module.Model(module.Config(**module.SIZES["demo"]))
    generic = {".".join("{i}" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_parameters()}
    assert generic == set(module.HF_NAMES)
    assert len(set(module.HF_NAMES.values())) == len(module.HF_NAMES)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(model.config.shape, tied=model.config.tie_embeddings)


@torch.no_grad()
def test_layers_composed_are_the_model():
    """The pipeline runs layers(), a single process forward(): they must be one model."""
    model = random_model(config_of())
    tokens, positions = packed(model.config, [9, 7, 11])
    embedding, *blocks, head = model.layers()
    x = embedding(tokens)
    context = model.context(positions, x.dtype, True)
    for block in blocks:
        x = block(x, context)
    assert torch.equal(head(x), model(tokens, positions))
    assert torch.equal(head(x, tokens), model(tokens, positions, tokens))


@torch.no_grad()
def test_bf16_is_near_fp32():
    """A part computed in the wrong dtype: an error beyond bf16's own, or an output in another dtype."""
    model = random_model(config_of())
    tokens, positions = packed(model.config, [9, 7, 11])
    exact, loss = model(tokens, positions), model(tokens, positions, tokens)
    model.bfloat16()
    rounded = model(tokens, positions)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() <= 8 * 2**-8 * exact.norm()  # some ten rounded layers, errors adding as squares
    found = model(tokens, positions, tokens)
    assert found.dtype == torch.float32 and abs(found - loss) < 0.02 * loss
