"""Our kernels inside transformers: the same numbers as SDPA, whatever the padding, packing or window, and no trace afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MistralConfig, Starcoder2Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.monkey_patching import get_patch_mapping

from megaspark import hf_kernels
from megaspark.hf_kernels import Kernels, MegasparkMLP, MegasparkRMSNorm, installed, loading

VOCAB, SEQ = 61, 24
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
# fp32 rounding of sums over at most 64 terms, through 2 layers of activations of order 10: 2 x 64 x 10 x 6e-8 = 8e-5.
TOLERANCE = 1e-4
Build = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(kernels, config): the same random weights each time, computed with `kernels` (None: SDPA), norm weights not 1."""
    folders: dict[str, Path] = {}

    def make(kernels: Kernels | None, config: Any = None, **changes: Any) -> nn.Module:
        config = config or LlamaConfig(**{**SIZES, **changes})
        key = config.to_json_string()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("model")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    nn.init.uniform_(parameter, 0.5, 1.5)
            model.save_pretrained(folders[key])
        with installed(kernels):
            return AutoModelForCausalLM.from_pretrained(folders[key], dtype=torch.float32, **loading(kernels)).eval()

    return make


def tokens(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (rows, SEQ), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, tokens_BS: Tensor, **inputs: Any) -> Tensor:
    return model(tokens_BS, **{"use_cache": False, **inputs}).logits


def padded(*lengths: int, left: bool) -> Tensor:
    """An attention mask of rows that have so many tokens, the padding on one side."""
    rows = [[1] * n + [0] * (SEQ - n) for n in lengths]
    return torch.tensor([row[::-1] if left else row for row in rows])


def test_every_kernel_is_in_place_and_computes_the_same(build: Build) -> None:
    """A hook that is not reached changes nothing and shows nothing: count what was replaced, then hold the numbers together."""
    ours, theirs = build(Kernels()), build(None)
    assert hf_kernels.replaced(ours) == {"attention": 2, "rms_norm": 5, "mlp": 2}
    assert hf_kernels.replaced(theirs) == {"attention": 0, "rms_norm": 0, "mlp": 0}
    assert (logits(ours, tokens()) - logits(theirs, tokens())).abs().max() < TOLERANCE


@pytest.mark.parametrize("kernel", ["attention", "rms_norm", "mlp"])
def test_each_kernel_goes_on_and_off_alone(build: Build, kernel: str) -> None:
    """`kernels: {attention: false}` must turn off that one and leave the others."""
    counts = hf_kernels.replaced(build(Kernels(**{kernel: False})))
    assert counts.pop(kernel) == 0 and all(counts.values())


def test_weights_keep_their_names_and_nothing_stays_behind(build: Build) -> None:
    """A patched class would rename tensors in the saved file, or poison every model that the process loads later."""
    ours, theirs = build(Kernels()), build(None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    with pytest.raises(OSError, match="no-such"), installed(Kernels()):
        AutoModelForCausalLM.from_pretrained("./no-such")
    assert get_patch_mapping() == {}
    norm = build(None).model.norm
    assert type(norm) is LlamaRMSNorm and isinstance(ours.model.norm, MegasparkRMSNorm)


def test_weights_differ_by_their_gradients_only_in_rounding(build: Build) -> None:
    """A backward pass that forgets the scale, a group of heads or the gate still gives the right loss."""
    gradients, mask = [], padded(SEQ, SEQ - 5, left=False)
    for kernels in (Kernels(), None):
        model = build(kernels)
        model(tokens(), labels=tokens().where(mask.bool(), -100), attention_mask=mask).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


# --- padding


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_attended_to(build: Build, left: bool) -> None:
    """A row padded on either side must compute what it computes alone; what the padding holds must not matter."""
    ours, mask = build(Kernels()), padded(SEQ, 9, 15, left=left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    tokens_BS = tokens(3)
    together = logits(ours, tokens_BS, attention_mask=mask, position_ids=positions)
    other = logits(ours, torch.where(mask.bool(), tokens_BS, 3), attention_mask=mask, position_ids=positions)
    assert torch.isfinite(together).all()
    for row in range(3):
        real = mask[row].bool()
        alone = logits(ours, tokens_BS[row][real][None])[0]
        assert (together[row][real] - alone).abs().max() < TOLERANCE
        assert torch.equal(together[row][real], other[row][real])


def test_padding_would_leak_without_the_mask_hook(build: Build) -> None:
    """The trap itself: registered as attention only, transformers hands over no mask; if that changes, we may simplify."""
    AttentionInterface.register("attention_only", hf_kernels.attend)
    model, mask = build(Kernels()), padded(SEQ, 9, left=True)
    right = logits(model, tokens(), attention_mask=mask)
    model.config._attn_implementation = "attention_only"
    assert (logits(model, tokens(), attention_mask=mask)[1, -9:] - right[1, -9:]).abs().max() > 0.1


def test_a_mask_with_holes_is_left_to_sdpa(build: Build) -> None:
    """Padding between tokens is nothing that positions can say: it must not be taken for padding at an end."""
    mask = padded(SEQ, SEQ, left=True)
    mask[1, 5:9] = 0
    ours, theirs = (logits(build(kernels), tokens(), attention_mask=mask) for kernels in (Kernels(), None))
    assert (ours - theirs)[mask.bool()].abs().max() < TOLERANCE


# --- packed documents

PACKED = torch.cat([torch.arange(9), torch.arange(4), torch.arange(11)])[None]
STARTS = torch.tensor([0, 9, 13, 24], dtype=torch.int32)


@pytest.mark.parametrize("inputs", [{}, {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}, {"use_cache": True}], ids=str)
def test_packed_documents_do_not_leak(build: Build, inputs: dict[str, Any]) -> None:
    """One token of the first document is changed: not a bit of the others may move, also where SDPA leaks (use_cache=True)."""
    ours, tokens_1S = build(Kernels()), tokens(1)
    changed = tokens_1S.clone()
    changed[0, 4] = 3 if tokens_1S[0, 4] != 3 else 4
    before, after = (logits(ours, t, position_ids=PACKED, **inputs) for t in (tokens_1S, changed))
    assert torch.equal(before[:, 9:], after[:, 9:]) and not torch.equal(before[:, 4:9], after[:, 4:9])
    for start, end in ((0, 9), (9, 13), (13, 24)):
        alone = logits(ours, tokens_1S[:, start:end])
        assert (before[:, start:end] - alone).abs().max() < TOLERANCE


def test_packed_documents_leak_in_sdpa_with_a_cache(build: Build) -> None:
    """The trap itself: the reason why post-training says use_cache=False everywhere but in our attention."""
    theirs, tokens_1S = build(None), tokens(1)
    alone = logits(theirs, tokens_1S[:, 13:])
    assert (logits(theirs, tokens_1S, position_ids=PACKED)[:, 13:] - alone).abs().max() < TOLERANCE
    assert (logits(theirs, tokens_1S, position_ids=PACKED, use_cache=True)[:, 13:] - alone).abs().max() > 0.1


def test_a_mask_is_not_kept_for_other_positions(build: Build) -> None:
    """The mask is made once for all layers; the next batch, or the same tensor with other numbers in it, needs its own."""
    ours, tokens_1S = build(Kernels()), tokens(1)
    position_ids = PACKED.clone()
    first = logits(ours, tokens_1S, position_ids=position_ids)
    position_ids.copy_(torch.arange(SEQ)[None])
    assert torch.equal(logits(ours, tokens_1S, position_ids=position_ids), logits(ours, tokens_1S))
    assert torch.equal(logits(ours, tokens_1S, position_ids=PACKED), first)


def test_gradient_checkpointing_computes_the_same(build: Build) -> None:
    """The layers run twice then: the second time must see the same mask."""
    gradients = []
    for checkpointing in (False, True):
        model = build(Kernels()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(1), labels=tokens(1), position_ids=PACKED, use_cache=False).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_positions_of_documents(lengths: list[int]) -> None:
    """From boundaries and from position ids alike; boundaries may repeat, and ids may start above 0."""
    expected = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    assert torch.equal(hf_kernels.positions_from_cu_seqlens(ends, sum(lengths)), expected)
    found = hf_kernels.positions_from_ids(expected)
    assert found is None if len(lengths) == 1 else torch.equal(found, expected)
    shifted = hf_kernels.positions_from_ids(expected + 7)
    assert shifted is None if len(lengths) == 1 else torch.equal(shifted, expected)


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
@settings(max_examples=300)
def test_positions_of_padding(rows: list[list[bool]]) -> None:
    """Every token must see just the tokens of its row up to itself, or the mask must be called one that positions cannot say."""
    mask = torch.tensor(rows)
    positions = hf_kernels.positions_from_padding(mask)
    holes = any("0" in "".join("01"[b] for b in row).strip("0") for row in rows)
    assert (positions is None) == holes
    if positions is not None:
        for row, place in zip(rows, positions.tolist(), strict=True):
            for m, real in enumerate(row):
                seen = {n for n in range(7) if 0 <= m - n <= place[m]}
                assert seen == ({n for n in range(m + 1) if row[n]} if real else {m})


# --- windows, caches, other models


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, head_dim=8, sliding_window=5),
        Starcoder2Config(**SIZES, sliding_window=5, embedding_dropout=0.0, residual_dropout=0.0),
        Starcoder2Config(**SIZES, sliding_window=None, embedding_dropout=0.0, residual_dropout=0.0),
    ],
    ids=["mistral", "starcoder2", "starcoder2-whole"],
)
def test_sliding_windows(build: Build, config: Any) -> None:
    """A window that is ignored, or off by one, hides in short tests: here it is a fifth of the sequence."""
    ours, theirs = build(Kernels(), config), build(None, copy.deepcopy(config))
    mask = padded(SEQ, SEQ - 6, left=False)
    for inputs in ({}, {"position_ids": PACKED.expand(2, -1)}, {"attention_mask": mask}):
        difference = logits(ours, tokens(), **inputs) - logits(theirs, tokens(), **inputs)
        real = inputs.get("attention_mask", torch.ones_like(mask)).bool()
        assert difference[real].abs().max() < TOLERANCE, inputs.keys()


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_with_a_cache(build: Build, implementation: str) -> None:
    """Steps against a cache have other lengths of queries and keys; a batch padded on the left must give SDPA's tokens."""
    mask = padded(SEQ, 9, left=True)
    said = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": implementation}
    ours, theirs = (build(kernels).generate(tokens(), attention_mask=mask, **said) for kernels in (Kernels(), None))
    assert ours.shape == (2, SEQ + 12) and torch.equal(ours, theirs)


def test_another_scale_and_activation(build: Build) -> None:
    """A model may scale by other than 1/sqrt(D), and a Llama config may name another activation than SiLU."""
    pair = []
    for kernels in (Kernels(), None):
        model = build(kernels, hidden_act="gelu")
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.7
        pair.append(logits(model, tokens()))
    assert isinstance(build(Kernels(), hidden_act="gelu").model.layers[0].mlp, LlamaMLP)
    assert (pair[0] - pair[1]).abs().max() < TOLERANCE


def test_what_the_kernel_does_not_do_is_refused(build: Build) -> None:
    """Dropout, soft caps, sinks and attention in both directions would be left out in silence."""
    x = torch.zeros(1, 4, 6, 8)
    for extra in ({"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}):
        with pytest.raises(ValueError, match=r"kernels\.attention=false"):
            hf_kernels.attend(nn.Module(), x, x, x, None, **extra)
    chunked = SimpleNamespace(attention_chunk_size=4)
    from transformers.masking_utils import causal_mask_function

    mask = hf_kernels.make_mask(
        batch_size=1, q_length=6, kv_length=6, q_offset=0, kv_offset=0, mask_function=causal_mask_function, config=chunked
    )
    assert mask is not None and mask.shape == (1, 1, 6, 6)


def test_the_mlp_is_llamas(build: Build) -> None:
    """Biases and the gate's side must stay: swapped, gate and up give other numbers with the same shapes."""
    config = LlamaConfig(**SIZES, mlp_bias=True)
    torch.manual_seed(0)
    theirs, ours = LlamaMLP(config), MegasparkMLP(config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 32)
    assert (ours(x) - theirs(x)).abs().max() < TOLERANCE
