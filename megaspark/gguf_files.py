"""A model and its tokenizer as GGUF for llama.cpp, read back and held against what was exported.

llama.cpp's "llama" rotates neighbouring features, Hugging Face's the two halves of a head: the rows of q and k are
permuted here as its own converter permutes them. Norm weights are kept in f32, as it requires, with the rounded values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaspark import hf, hf_tokenizers, rope_scalings
from megaspark.errors import UserError
from megaspark.gguf_readers import CONTROL, GGUF, LLAMA3, USER_DEFINED, GGUFTokenizer
from megaspark.kernels.rope import rope_frequencies
from megaspark.safetensors_files import Rows, row_ranges

NAMES = {
    "llama": {
        "embedding.weight": "token_embd.weight",
        "blocks.{i}.attention_norm.weight": "blk.{i}.attn_norm.weight",
        "blocks.{i}.attention.q.weight": "blk.{i}.attn_q.weight",
        "blocks.{i}.attention.k.weight": "blk.{i}.attn_k.weight",
        "blocks.{i}.attention.v.weight": "blk.{i}.attn_v.weight",
        "blocks.{i}.attention.o.weight": "blk.{i}.attn_output.weight",
        "blocks.{i}.mlp_norm.weight": "blk.{i}.ffn_norm.weight",
        "blocks.{i}.mlp.gate.weight": "blk.{i}.ffn_gate.weight",
        "blocks.{i}.mlp.up.weight": "blk.{i}.ffn_up.weight",
        "blocks.{i}.mlp.down.weight": "blk.{i}.ffn_down.weight",
        "head.norm.weight": "output_norm.weight",
        "head.weight": "output.weight",
    }
}
PERMUTED = (".attention.q.weight", ".attention.k.weight")
FREQUENCY_FACTORS = "rope_freqs.weight"
NORMAL, UNUSED = 1, 5
TEXTS = 5000


def check_possible(config: Any) -> None:
    """Raises UserError where the `gguf` package is not installed or the architecture has no GGUF names."""
    if config.arch not in NAMES:
        raise UserError(f"--gguf: architecture {config.arch} has no GGUF export here, only {', '.join(NAMES)}")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("--gguf needs the package gguf: pip install 'megaspark[gguf]'") from None


def export(
    path: Path, folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], rows: Rows, dtype: torch.dtype
) -> list[str]:
    """Writes `path` and reads it back; returns what was shown.

    folder: of the exported tokenizer and config.json; shapes, rows: our parameters, rounded to `dtype` (fp32 or bf16).
    Raises UserError where llama.cpp would tokenize differently, RuntimeError where a weight reads back as other bits.
    """
    import gguf

    writer = gguf.GGUFWriter(path, config.arch)
    _describe(writer, config, folder, dtype)
    tokens = _tokenizer_fields(folder, config.vocab)
    _write_tokenizer(writer, tokens, folder)
    names = hf.hf_names(NAMES[config.arch], shapes)
    factors_C = _frequency_factors(config)
    for name, shape in shapes.items():
        stored = _stored(shape, dtype)
        kind = gguf.GGMLQuantizationType.BF16 if stored == torch.bfloat16 else gguf.GGMLQuantizationType.F32
        size = torch.Size(shape).numel() * stored.itemsize
        writer.add_tensor_info(names[name], shape, _bits(torch.empty(0, dtype=stored)).dtype, size, kind)
    if factors_C is not None:
        writer.add_tensor_info(FREQUENCY_FACTORS, factors_C.shape, factors_C.numpy().dtype, factors_C.nbytes)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file):
        write()
    for name, shape in shapes.items():
        whole = torch.cat([rows(name, a, b).to(_stored(shape, dtype)) for a, b in row_ranges(shape)])
        writer.write_tensor_data(_bits(_permuted(whole, config.dim) if name.endswith(PERMUTED) else whole))
    if factors_C is not None:
        writer.write_tensor_data(factors_C.numpy())
    writer.close()
    return [*_check_weights(GGUF(path), config, names, shapes, rows), *_check_tokenizer(GGUF(path), folder, bool(tokens))]


def _stored(shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    return dtype if len(shape) > 1 else torch.float32


def _bits(tensor: Tensor) -> Any:
    """The tensor as numpy; bf16, which it does not know, as 16-bit integers."""
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()


def _permuted(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads x D, E] from halves side by side to pairs side by side, head by head."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _unpermuted(weight: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _frequency_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, [D/2] fp32, under llama3's scaling."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain_C = rope_frequencies(config.dim, config.rope_theta)
    return plain_C / rope_scalings.scaled(plain_C, config.rope_scaling)


def _describe(writer: Any, config: Any, folder: Path, dtype: torch.dtype) -> None:
    import gguf

    positions = int(json.loads((folder / hf.CONFIG).read_text())["max_position_embeddings"])
    file_type = gguf.LlamaFileType.MOSTLY_BF16 if dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab)
    writer.add_context_length(positions)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.dim)
    writer.add_value_length(config.dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


# --- the tokenizer


def _tokenizer_fields(folder: Path, vocab: int) -> dict[str, Any]:
    """model, pre, tokens, types, and scores or merges, of the tokenizer in `folder`; empty where there is none."""
    path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if not path.is_file() and not model_path.is_file():
        return {}
    spelled = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"added_tokens": []}
    fields = _sentencepiece(model_path) if model_path.is_file() else _byte_level(spelled, path)
    tokens, types = fields["tokens"], fields["types"]
    for number in range(len(tokens), vocab):  # rows of the model without a token
        tokens.append(f"[PAD{number}]")
        types.append(UNUSED)
    for token in spelled["added_tokens"]:
        tokens[token["id"]] = token["content"]
        if token["special"]:
            types[token["id"]] = CONTROL if types[token["id"]] in (NORMAL, UNUSED, USER_DEFINED) else types[token["id"]]
        elif types[token["id"]] in (NORMAL, UNUSED):
            types[token["id"]] = USER_DEFINED
    if "scores" in fields:
        fields["scores"] += [0.0] * (len(tokens) - len(fields["scores"]))
    return fields


def _sentencepiece(path: Path) -> dict[str, Any]:
    model = hf_tokenizers.read_model(path)
    if model.charsmap or model.remove_extra_whitespaces:
        raise UserError(f"--gguf: {path.name} normalizes text, which llama.cpp does not: it would tokenize differently")
    if not model.byte_fallback:
        raise UserError(f"--gguf: {path.name} has no byte_fallback, which llama.cpp needs")
    texts, scores, types = (list(column) for column in zip(*model.pieces, strict=True))
    return {"model": "llama", "pre": "default", "tokens": texts, "types": types, "scores": scores, "prefix": model.dummy_prefix}


def _byte_level(spelled: dict[str, Any], path: Path) -> dict[str, Any]:
    model = spelled["model"]
    pre = _pre_tokenizer(spelled)
    if model.get("type") != "BPE" or model.get("byte_fallback") or spelled.get("normalizer") or pre is None:
        raise UserError(f"--gguf: {path.name} is no byte-level BPE of a kind that llama.cpp knows (gpt-2, starcoder, llama-bpe)")
    vocab = sorted(model["vocab"], key=model["vocab"].__getitem__)
    added = sorted(spelled["added_tokens"], key=lambda token: token["id"])
    vocab += [token["content"] for token in added if token["id"] >= len(model["vocab"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": vocab, "types": [NORMAL] * len(vocab), "merges": merges}


def _pre_tokenizer(spelled: dict[str, Any]) -> str | None:
    """llama.cpp's name of a way to cut words; None for one that it does not have."""
    given = spelled.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    *cuts, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    whole_words = bool(spelled["model"].get("ignore_merges"))
    kinds = [(cut.get("type"), cut.get("individual_digits"), (cut.get("pattern") or {}).get("Regex")) for cut in cuts]
    known = {(): "gpt-2", (("Digits", True, None),): "starcoder"}
    if last.get("use_regex", True) and not whole_words:
        return known.get(tuple(kinds))
    return "llama-bpe" if kinds == [("Split", None, LLAMA3)] and whole_words and not last.get("use_regex", True) else None


def _write_tokenizer(writer: Any, fields: dict[str, Any], folder: Path) -> None:
    writer.add_tokenizer_model(fields.get("model", "no_vocab"))
    if not fields:
        return
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    if "scores" in fields:
        writer.add_token_scores(fields["scores"])
        writer.add_add_space_prefix(fields["prefix"])
    else:
        writer.add_token_merges(fields["merges"])
    about = folder / "tokenizer_config.json"
    config = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    ids = {text: i for i, text in enumerate(fields["tokens"])}
    for role in hf_tokenizers.ROLES:
        token = config.get(f"{role}_token")
        text = token["content"] if isinstance(token, dict) else token
        if text in ids:
            getattr(writer, f"add_{role}_token_id")(ids[text])
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))
    writer.add_add_eos_token(bool(config.get("add_eos_token", False)))
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


# --- read back


def _check_weights(
    found: GGUF, config: Any, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], rows: Rows
) -> Iterator[str]:
    for name, shape in shapes.items():
        if found.shapes.get(names[name]) != shape:
            raise RuntimeError(f"{found.path}: {names[name]} reads back as {found.shapes.get(names[name])}, not {shape}")
        permuted = name.endswith(PERMUTED)
        for a, b in [(0, shape[0])] if permuted else row_ranges(shape):
            read = found.rows(names[name], a, b)
            expected = rows(name, a, b).to(read.dtype)
            if not torch.equal(_unpermuted(read, config.dim) if permuted else read, expected):
                raise RuntimeError(f"{found.path}: {names[name]} reads back as other bits")
    yield f"{found.path.name}: {len(shapes)} tensors read back bit for bit"


def _check_tokenizer(found: GGUF, folder: Path, present: bool) -> Iterator[str]:
    if not present:
        return
    from transformers import AutoTokenizer

    ours, reference = GGUFTokenizer(found.metadata), AutoTokenizer.from_pretrained(folder)
    texts = hf_tokenizers.adversarial_texts(TEXTS, seed=2, symbols=hf_tokenizers.symbols_of(folder))
    said = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    wrong = [text for text in texts if ours.encode(text) != reference.encode(text, **said)]
    if wrong:
        many = f"{len(wrong)} of {len(texts):,} texts"
        raise UserError(f"--gguf: llama.cpp would tokenize {many} differently, first {wrong[0][:60]!r}")
    yield f"{found.path.name}: {len(texts):,} adversarial texts tokenize the same"
