"""Our kernels inside Hugging Face models, by transformers' two official hooks; weights and their names stay what they are.

    with installed(Kernels()):
        model = AutoModelForCausalLM.from_pretrained(folder, **loading(Kernels()))

Attention is a function registered under a name, and with it the function that makes its mask: without the second, transformers
passes no mask at all and padding is attended to. RMSNorm and the gated MLP are classes put in place of the model's while it is
built. What attention needs is `positions`: query m sees key n exactly when 0 <= m - n <= positions[m]. That says packed
documents, padding on either side and a sliding window alike. What it cannot say (steps of generation against a cache, masks
with holes) goes to transformers' own SDPA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from megaspark.kernels.attention import Spans, attention, spans
from megaspark.kernels.rms_norm import rms_norm
from megaspark.kernels.swiglu import swiglu
from megaspark.settings import Section

NAME = "megaspark"  # of the attention, as in attn_implementation="megaspark"
REFUSED = ("softcap", "s_aux", "position_bias")  # arguments of other models' attention that ours does not have


class Kernels(Section):
    """Which of our kernels a model computes with."""

    attention: bool = True
    rms_norm: bool = True
    mlp: bool = Field(True, description="the gated feed-forward layer, SiLU only")


# --- attention


class _Memory:
    """The last thing made of one tensor: a mask made once serves all layers of a forward pass."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.version = -1
        self.value: Any = None

    def get(self, tensor: Tensor, *rest: Any, make: Callable[[], Any]) -> Any:
        """`make()`, unless the last call was for this very tensor, unchanged, and equal `rest`."""
        known = self.key and self.key[0] is tensor and self.key[1:] == rest and self.version == tensor._version
        if not known:
            self.value, self.key, self.version = make(), (tensor, *rest), tensor._version
        return self.value


_positions_memory, _spans_memory = _Memory(), _Memory()


def positions_from_cu_seqlens(cu_seqlens: Tensor, seq: int) -> Tensor:
    """The place of each token in its document, [1, seq], from where documents begin and end, [documents + 1] integers."""
    index = torch.arange(seq, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
    return (index - cu_seqlens.long()[document])[None]


def positions_from_ids(position_ids_BS: Tensor) -> Tensor | None:
    """The place of each token in its document, [B, S], from position ids: a document starts where they do not go on by one.

    None where no row has more than one document.
    """
    index = torch.arange(position_ids_BS.shape[1], device=position_ids_BS.device)
    starts_BS = torch.diff(position_ids_BS, dim=1, prepend=position_ids_BS[:, :1] - 2) != 1
    if not starts_BS[:, 1:].any():
        return None
    return index - torch.where(starts_BS, index, 0).cummax(dim=1).values


def positions_from_padding(attention_mask_BS: Tensor) -> Tensor | None:
    """The place of each token among its row's tokens, [B, S], and 0 for padding, so that a pad sees itself only.

    None where a row has padding between its tokens: no positions say that.
    """
    real_BS = attention_mask_BS.bool()
    place_BS = real_BS.long().cumsum(dim=1) - 1
    first_B1 = real_BS.int().argmax(dim=1, keepdim=True)
    index = torch.arange(real_BS.shape[1], device=real_BS.device)
    if (real_BS & (index - first_B1 != place_BS)).any():
        return None
    return torch.where(real_BS, place_BS, 0)


def make_mask(
    *, q_length: int, kv_length: int, attention_mask: Tensor | None = None, config: Any = None, use_vmap: bool = False, **rest: Any
) -> Tensor | None:
    """transformers' mask interface: what it hands to `attend`, made once for all layers.

    None: causal, or as the position ids say. [B, S] integers: positions, because of padding. [B, 1, Q, K]: for SDPA, because
    of a cache, a mask with holes, or a rule that positions cannot say.
    """
    plain = not use_vmap and getattr(config, "attention_chunk_size", None) is None
    if plain and q_length == kv_length and not rest.get("q_offset"):
        if attention_mask is None or bool(attention_mask.all()):
            return None
        positions_BS = positions_from_padding(attention_mask) if attention_mask.shape[1] == kv_length else None
        if positions_BS is not None:
            return positions_BS
    rest |= {"allow_is_causal_skip": False, "use_vmap": use_vmap, "config": config}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **rest)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over our kernel: query [B, H, S, D], key and value [B, K, S, D] -> ([B, S, H, D], None).

    Raises ValueError for what the kernel does not do: dropout, attention that is not causal, soft caps, sinks.
    """
    wanted = [name for name in REFUSED if kwargs.get(name) is not None]
    if wanted or dropout or not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        what = wanted[0] if wanted else f"dropout of {dropout:g}" if dropout else "anything but causal attention"
        raise ValueError(f"the attention kernel has no {what}: say kernels.attention=false")
    if key.shape[2] != query.shape[2] or (attention_mask is not None and attention_mask.ndim == 4):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling)
    positions = attention_mask
    if positions is None:
        positions = _positions_of(query, kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids"))
    q_BSHD, k_BSKD, v_BSKD = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q_BSHD, k_BSKD, v_BSKD, _spans(positions, query, sliding_window), scale=scaling), None


def _positions_of(query: Tensor, cu_seqlens: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    batch, seq = query.shape[0], query.shape[2]
    if cu_seqlens is not None and batch == 1:
        return _positions_memory.get(cu_seqlens, seq, make=lambda: positions_from_cu_seqlens(cu_seqlens, seq))
    if position_ids is not None and position_ids.shape[-1] == seq:
        return _positions_memory.get(position_ids, make=lambda: positions_from_ids(position_ids.view(-1, seq)))
    return None


@functools.lru_cache(maxsize=1)
def _whole(seq: int, device: torch.device) -> Tensor:
    return torch.arange(seq, device=device)[None]


def _spans(positions: Tensor | None, query: Tensor, window: int | None) -> Spans | None:
    """What the kernel must know of who sees whom, made once a forward pass; None for plain causal attention."""
    _, _, seq, head_dim = query.shape
    if positions is None and (window is None or window >= seq):
        return None
    known = _whole(seq, query.device) if positions is None else positions

    def make() -> Spans | None:
        return spans(known, seq, window, query.dtype, device=query.device, head_dim=head_dim)

    return _spans_memory.get(known, window, query.dtype, make=make)


# --- modules


class MegasparkRMSNorm(LlamaRMSNorm):
    """Llama's RMSNorm, computed by our kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., E] -> [..., E] in the promoted dtype of the input and the weight."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MegasparkMLP(LlamaMLP):
    """Llama's gated MLP, its elementwise part computed by our kernel; another activation than SiLU is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        if self.config.hidden_act not in ("silu", "swish"):
            return super().forward(x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


# --- on and off


def register() -> None:
    """Makes `attn_implementation="megaspark"` known to transformers; harmless when done before."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def loading(kernels: Kernels | None) -> dict[str, str]:
    """The arguments of `from_pretrained` that `kernels` ask for; without ours, transformers' SDPA."""
    return {"attn_implementation": NAME if kernels and kernels.attention else "sdpa"}


@contextmanager
def installed(kernels: Kernels | None) -> Iterator[None]:
    """Models that `from_pretrained` builds inside compute with these kernels; models built before or after do not."""
    kernels = kernels or Kernels(attention=False, rms_norm=False, mlp=False)
    if kernels.attention:
        register()
    # Anchored: transformers searches the pattern anywhere in a class's name.
    chosen: dict[str, type[nn.Module]] = {"^LlamaRMSNorm$": MegasparkRMSNorm} if kernels.rms_norm else {}
    chosen |= {"^LlamaMLP$": MegasparkMLP} if kernels.mlp else {}
    register_patch_mapping(chosen, overwrite=True)
    try:
        yield
    finally:
        unregister_patch_mapping(list(chosen))


def replaced(model: nn.Module) -> dict[str, int]:
    """How many modules of a model compute with our kernels, by kernel: what was asked for and not found counts 0."""
    modules = list(model.modules())
    own = getattr(model.config, "_attn_implementation", None) == NAME
    layers = getattr(model.config, "num_hidden_layers", 0)
    return {
        "attention": layers if own else 0,
        "rms_norm": sum(isinstance(module, MegasparkRMSNorm) for module in modules),
        "mlp": sum(isinstance(module, MegasparkMLP) for module in modules),
    }
