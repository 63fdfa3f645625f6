"""Llama: pre-norm transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU, no biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from megaspark import rope_scalings
from megaspark.flops import Shape
from megaspark.kernels.attention import spans
from megaspark.kernels.rope import rope_angles, rope_frequencies
from megaspark.models.blocks import Attention, Context, Embedding, Execution, Head, RMSNorm, SwiGLU, run_block
from megaspark.rope_scalings import RopeScaling
from megaspark.settings import Section

# "3b" and "30b" are Table 1 of Litespark (arXiv 2510.02483): 2,289,158,144 and 32,528,943,616 parameters. It does not state
# the RoPE theta, the init or the tying; ours are Llama 2's.
SIZES: dict[str, dict[str, Any]] = {
    "demo": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 704, "vocab": 4096},
    "3b": {"hidden": 2048, "layers": 28, "heads": 16, "kv_heads": 2, "ffn": 11008, "vocab": 32000},
    "30b": {"hidden": 6656, "layers": 60, "heads": 64, "kv_heads": 64, "ffn": 17920, "vocab": 32000},
}


class Config(Section):
    """The shape of a Llama; `size` names a preset that the other keys override."""

    arch: str = "llama"
    size: str | None = None
    hidden: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    ffn: int = Field(gt=0)
    vocab: int = Field(gt=0)
    head_dim: int | None = Field(None, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    max_positions: int | None = Field(None, gt=0, description="the context that an export states; default: data.seq")
    norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = False
    init_std: float = Field(0.02, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> Config:
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"model.hidden = {self.hidden} does not divide by model.heads = {self.heads}; set model.head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads = {self.heads} does not divide by model.kv_heads = {self.kv_heads}")
        if self.dim % 2:
            raise ValueError(f"the head dimension is {self.dim}, and rotary positions need an even one")
        return self

    @property
    def dim(self) -> int:
        """Features of one head (D)."""
        return self.head_dim or self.hidden // self.heads

    @property
    def shape(self) -> Shape:
        """The plain numbers that FLOPs are counted from."""
        return Shape(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            ffn=self.ffn,
            vocab=self.vocab,
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config, execution: Execution) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, execution)
        self.attention = Attention(config.hidden, config.heads, config.kv_heads, config.dim, execution)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps, execution)
        self.mlp = SwiGLU(config.hidden, config.ffn, execution)

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        """x_BSE: [B, S, E]. Returns the same shape."""
        normed_BSE, x_BSE = self.mlp_norm(self.attention(self.attention_norm(x_BSE), context), x_BSE)
        return x_BSE + self.mlp(normed_BSE)


class Model(nn.Module):
    """A Llama of `config`'s shape, its parameters not yet filled (see `weights`), computing as `execution` says."""

    def __init__(self, config: Config, execution: Execution = Execution()) -> None:  # noqa: B008 (frozen)
        super().__init__()
        self.config, self.execution = config, execution
        self.embedding = Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(Block(config, execution.of_block(i, config.layers)) for i in range(config.layers))
        tied = self.embedding.weight if config.tie_embeddings else None
        norm = RMSNorm(config.hidden, config.norm_eps, execution)
        self.head = Head(norm, config.hidden, config.vocab, tied, execution)

    def layers(self) -> list[nn.Module]:
        """Embedding, blocks and head in order: tokens -> x, (x, context) -> x, x -> logits or loss."""
        return [self.embedding, *self.blocks, self.head]

    def context(self, positions_BS: Tensor, dtype: torch.dtype, documents: bool) -> Context:
        """What the blocks need to know of positions [B, S]: rotary angles and, if `documents`, where each of them starts.

        The positions are those of the whole sequence, also where this process has only some of its tokens.
        """
        frequencies_C = rope_frequencies(self.config.dim, self.config.rope_theta)
        sequence = self.execution.groups.sequence
        mine_BS = positions_BS.chunk(sequence.size, 1)[sequence.rank]
        cos_BSC, sin_BSC = rope_angles(mine_BS, rope_scalings.scaled(frequencies_C, self.config.rope_scaling))
        backend, seq = self.execution.backend("attention"), positions_BS.shape[1]
        seen = spans(positions_BS if documents else None, seq, None, dtype, backend, positions_BS.device, self.config.dim)
        return Context(cos_BSC, sin_BSC, seen)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor | None = None, labels_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, V], or with labels_BS the mean loss as a fp32 scalar.

        positions_BS: [B, S], restarting at 0 in every document, which attention then does not leave; None: one document. In a
        sequence group, tokens and labels are this process's, positions those of all.
        """
        embedding, *blocks, head = self.layers()
        x_BSE = embedding(tokens_BS)
        documents = positions_BS is not None
        if positions_BS is None:
            seq = tokens_BS.shape[1] * self.execution.groups.sequence.size
            positions_BS = torch.arange(seq, device=tokens_BS.device)[None]
        context = self.context(positions_BS, x_BSE.dtype, documents)
        for block in blocks:
            x_BSE = run_block(block, x_BSE, context, self.execution.recompute)
        return head(x_BSE, labels_BS)

    def std(self, name: str) -> float:
        """The standard deviation that a parameter starts with.

        The last layer of each residual branch is scaled by 1/sqrt(2 layers), so that the residual stream keeps its variance with
        depth (GPT-2, Radford et al. 2019, section 2.3).
        """
        residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
        return self.config.init_std / math.sqrt(2 * self.config.layers) if residual else self.config.init_std


# Ours -> Hugging Face, one line a parameter; {i} is the block's number. Read in both directions by hf.py.
HF_NAMES: dict[str, str] = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attention.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks.{i}.attention.k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks.{i}.attention.v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks.{i}.attention.o.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks.{i}.mlp.up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "head.norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


HF_TYPE = "llama"  # `model_type` of a config.json


def hf_config(config: Config, max_positions: int) -> dict[str, Any]:
    """The config.json with which transformers' LlamaForCausalLM computes what this model computes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "max_position_embeddings": max_positions,
        **rope_scalings.to_hf(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def config_from_hf(described: Mapping[str, Any]) -> Config:
    """The config with which this model computes what LlamaForCausalLM computes with that config.json.

    Raises ValueError for what is missing, contradictory or not built, in the words of config.json.
    """
    built = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for key, value in built.items():
        if described.get(key, value) not in (value, None):
            raise ValueError(f"{key} = {described[key]!r} is not built here (only {value!r})")
    theta, scaling = rope_scalings.from_hf(described)
    said = {key: value for key, value in described.items() if value is not None}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if key not in said:
            raise ValueError(f"{key} is missing")
    return Config(
        hidden=said["hidden_size"],
        layers=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        kv_heads=said.get("num_key_value_heads", said["num_attention_heads"]),
        ffn=said["intermediate_size"],
        vocab=said["vocab_size"],
        head_dim=said.get("head_dim"),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=said.get("max_position_embeddings", 2048),  # this and the next two: what transformers takes if unsaid
        norm_eps=said.get("rms_norm_eps", 1e-6),
        tie_embeddings=said.get("tie_word_embeddings", False),
        init_std=said.get("initializer_range", 0.02) or 0.02,
    )
