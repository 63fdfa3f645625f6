"""Writes the tokenizer of a Hugging Face folder so that `AutoTokenizer` gives SentencePiece's own ids, for every string.

transformers' own conversions of a SentencePiece model differ from it on spaces, on literal special tokens and on tied scores.
Here the `tokenizers` BPE is built by hand, under three facts:

- SentencePiece merges the adjacent pair of the highest score, the leftmost among equals. A piece that comes out of a text
  went through the same merges as when it is encoded alone, for nothing crossed its borders: so each piece has exactly one last
  merge, found by encoding it alone, and pieces that never come out need none. Ranked by score, `tokenizers` does the same.
- A normalized text holds no ASCII space, for SentencePiece writes U+2581: nothing else needs escaping.
- A user-defined symbol is cut out of the normalized text, leftmost and longest first, and merges with nothing.

Special tokens are declared, but in a text they are text (`split_special_tokens`), as in data preparation.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megaspark.errors import UserError
from megaspark.manifests import write_atomically

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type of sentencepiece_model.proto
LONGEST = 1 << 30
ROLES = ("unk", "bos", "eos", "pad")
ODD_WORDS = """<s> </s> <unk> <pad> <0x0A> <0xFF> <|endoftext|> [INST] the The ing tion er re in def f(x): return self. http://
3.14159 2024 don't Grüße été Привет мир שלום مرحبا नमस्ते สวัสดี こんにちは 東京 中文 한국어 Ελλάδα Việt"""
# Names by which a tokenizer.json without a tokenizer_config.json beside it is understood.
USUAL_NAMES = {
    "unk": ("<unk>", "<|unk|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"),
    "pad": ("<pad>", "<|pad|>", "<fim_pad>"),
}
# An answer's tokens, its end included, stand inside {% generation %}, for a loss on answers only.
CHATML = """\
{%- set end = '<|im_end|>' + (eos_token if eos_token and eos_token != '<|im_end|>' else '') -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + end -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `.model` file says: its pieces as (text, score, type), in the order of their ids, and how text is normalized."""

    pieces: list[tuple[str, float, int]]
    byte_fallback: bool
    dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    special_ids: dict[str, int]

    def of_type(self, kind: int) -> list[str]:
        """The texts of the pieces of one type, by id."""
        return [text for text, _, own in self.pieces if own == kind]


def write_tokenizer(source: Path, out: Path, *, max_length: int, add_bos: bool = False) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, of a SentencePiece model, tokenizer.model into the folder `out`.

    `source` is a SentencePiece BPE `.model` or an HF `tokenizer.json`; `max_length` is the model's context, in tokens.
    `AutoTokenizer.from_pretrained(out)` then gives the ids of `source`, with special tokens in a text taken as text. A
    `.model` puts no BOS before a text, a tokenizer.json what its template says, unless `add_bos` asks for it.
    Raises UserError, before anything is written, for a model that `tokenizers` cannot express. Not every string comes out
    equal under a charsmap (nmt_nfkc): `tokenizers` applies it to grapheme clusters, so that a rewritten letter under a
    combining mark can differ. `check_tokenizer` tells.
    """
    if not source.is_file():
        raise UserError(f"no such tokenizer: {source}")
    if source.suffix == ".json":
        names = _json_special_tokens(source)
        tokenizer = Tokenizer.from_file(str(source))
    else:
        model = read_model(source)
        tokenizer = build(model, source)
        names = {role: model.pieces[i][0] for role, i in model.special_ids.items()}
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    if add_bos:
        if "bos" not in names:
            raise UserError(f"{source} has no BOS token to begin a text with")
        begin = processors.TemplateProcessing(
            single=f"{names['bos']} $A", special_tokens=[(names["bos"], tokenizer.token_to_id(names["bos"]))]
        )
        tokenizer.post_processor = processors.Sequence([p for p in (tokenizer.post_processor, begin) if p])
    copied = source.suffix == ".json" and not add_bos
    text = source.read_text(encoding="utf-8") if copied else tokenizer.to_str(pretty=True) + "\n"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        **{f"{role}_token": name for role, name in names.items()},
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "split_special_tokens": True,  # "</s>" in a text is text
        "clean_up_tokenization_spaces": False,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer.json", text.encode())
    write_atomically(out / "tokenizer_config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if source.suffix != ".json":
        write_atomically(out / "tokenizer.model", source.read_bytes())  # converters to GGUF want it


def customize(folder: Path, vocab: int, chat_template: str | None, special: list[tuple[str, str]]) -> None:
    """Adds a chat template and special tokens, as (role or "extra", text), to the tokenizer in `folder`.

    A text that is no piece yet takes the next free row of the model's `vocab`. With a template, special tokens in a text are
    no longer taken as text, for a rendered conversation has them in it. Raises UserError where there is no tokenizer or row.
    """
    if chat_template is None and not special:
        return
    path, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        raise UserError("--chat-template and --special-token need a tokenizer.json, and this model has none")
    config = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = Tokenizer.from_file(str(path))
    for role, text in special:
        if tokenizer.token_to_id(text) is None and tokenizer.get_vocab_size() >= vocab:
            raise UserError(f"--special-token {text!r} is no piece of the tokenizer, and the model's {vocab:,} rows are all taken")
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if role != "extra":
            config[f"{role}_token"] = text
    if special:
        write_atomically(path, (tokenizer.to_str(pretty=True) + "\n").encode())
    if chat_template is not None:
        config["split_special_tokens"] = False
        config.pop("chat_template", None)
        write_atomically(folder / "chat_template.jinja", chat_template.encode())
    write_atomically(about, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def special_ids(folder: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of the tokenizer in `folder`, as far as it names them."""
    about, path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not about.is_file() or not path.is_file():
        return {}
    config, tokenizer = json.loads(about.read_text(encoding="utf-8")), Tokenizer.from_file(str(path))
    named = {role: config.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    texts = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items() if token}
    found = {f"{role}_token_id": tokenizer.token_to_id(text) for role, text in texts.items()}
    return {key: number for key, number in found.items() if number is not None}


def check_tokenizer(source: Path, out: Path, texts: Iterable[str]) -> list[str]:
    """The texts that `AutoTokenizer.from_pretrained(out)` encodes or decodes differently from `source`: none, if exact."""
    from transformers import AutoTokenizer

    texts = list(texts)
    ours = AutoTokenizer.from_pretrained(out)
    if source.suffix == ".json":
        reference = Tokenizer.from_file(str(source))
        reference.encode_special_tokens = True
        reference.no_truncation()
        reference.no_padding()
        expected = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
        decoded = reference.decode_batch(expected, skip_special_tokens=False)
    else:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
        expected = processor.encode(texts)
        unk = processor.unk_id()  # SentencePiece prints it as " ⁇ ", tokenizers as the piece
        decoded = [None if unk in ids else processor.decode(ids) for ids in expected]
    said = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}  # no warning of long ones
    got = [ours.encode(text, **said) for text in texts]
    return [
        text
        for text, ids, want, plain in zip(texts, got, expected, decoded, strict=True)
        if ids != want or (plain is not None and ours.decode(ids) != plain)
    ]


def adversarial_texts(n: int = 5000, seed: int = 0, symbols: Sequence[str] = ()) -> list[str]:
    """`n` strings, the same for a seed, of what tokenizers get wrong: spaces, runs, special tokens, scripts, controls.

    symbols: a tokenizer's own special and user-defined tokens; they come alone, at borders, after spaces and among the rest.
    """
    rng = random.Random(seed)
    spaces = [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", SPACE, SPACE * 2, "\xa0", "\u3000", "\u200b", "\u2028"]
    odd = ["\0", "\x1b", "\x7f", "\u200d", "\ufe0f", "\ufeff", "\ufffd", "\U0010ffff", "e\u0301", "👩\u200d💻", "𝔘"]
    atoms = [*spaces, *odd, *ODD_WORDS.split(), *map(chr, range(33, 127))]
    planes = ((0, 0x80), (0x80, 0x250), (0x370, 0x700), (0x900, 0xE00), (0x2000, 0x2C00), (0x3000, 0xD7A4), (0xE000, 0x20000))
    texts = ["", " " + SPACE, "</s> <s> <0x0A>", *atoms]
    chosen = rng.sample(sorted(symbols), min(len(symbols), 100)) if symbols else []
    texts += [text for symbol in chosen for text in (symbol, f"a{symbol}", f" {symbol} b", f"{symbol}{symbol}a")]
    atoms += chosen * (1 + 20 // len(chosen)) if chosen else []
    texts += [c * length for c in ' a-=\n\t0."\u2581\0é東😀' for length in (*range(2, 40), 64, 100, 1000)]
    while len(texts) < n:
        parts = rng.choices(atoms, k=rng.randint(1, 12))
        kind = rng.random()
        if kind < 0.25:
            parts = [chr(rng.randrange(*rng.choice(planes))) for _ in parts]
        elif kind < 0.5:
            parts = [part * rng.randint(1, 20) for part in parts]
        elif kind < 0.6:
            parts = rng.choices(parts[:2], k=30)  # two parts in all orders, which ties and overlaps need
        texts.append("".join(parts))
    return texts[:n]


def symbols_of(folder: Path) -> list[str]:
    """The special and user-defined tokens of the tokenizer in `folder`, which an adversarial set for it should hold."""
    path, model = folder / "tokenizer.json", folder / "tokenizer.model"
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"] if path.is_file() else []
    pieces = read_model(model) if model.is_file() else None
    own = [*pieces.of_type(USER_DEFINED), *pieces.of_type(CONTROL)] if pieces else []
    return sorted({*own, *(token["content"] for token in added)})


def _json_special_tokens(source: Path) -> dict[str, str]:
    """The special tokens by role of a tokenizer.json: by the tokenizer_config.json beside it, or their usual names."""
    try:
        added_tokens = json.loads(Tokenizer.from_file(str(source)).to_str())["added_tokens"]
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{source}: not a tokenizer.json ({error})") from None
    beside = source.with_name("tokenizer_config.json")
    if beside.is_file():
        config = json.loads(beside.read_text(encoding="utf-8"))
        said = {role: config.get(f"{role}_token") for role in ROLES}
        return {role: name["content"] if isinstance(name, dict) else name for role, name in said.items() if name}
    special = {token["content"] for token in added_tokens if token["special"]}
    found = {role: next((name for name in names if name in special), None) for role, names in USUAL_NAMES.items()}
    return {role: name for role, name in found.items() if name}


# --- SentencePiece -> tokenizers


def build(model: SentencePieceModel, source: Path) -> Tokenizer:
    """The `tokenizers` pipeline that equals `model`, without its special tokens; `source` is named in errors."""
    vocab = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    options: dict[str, Any] = {
        "vocab": vocab,
        "merges": find_merges(model),
        "unk_token": model.pieces[model.special_ids["unk"]][0],
        "fuse_unk": True,  # SentencePiece gives one unk for a run of unknown characters
        "byte_fallback": model.byte_fallback,
    }
    symbols = sorted(model.of_type(USER_DEFINED), key=len, reverse=True)
    tokenizer = Tokenizer(models.BPE(**options, ignore_merges=bool(symbols)))
    tokenizer.normalizer = _normalizer(model)
    if symbols:
        tokenizer.pre_tokenizer = _symbol_splitter(model, symbols, models.BPE(**options), source)
    tokenizer.decoder = _decoder(model)
    return tokenizer


def find_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The one last merge of every piece that can come out, highest score first; among equals the longest first.

    Longest first makes a run of one character grow from its left end, as SentencePiece's leftmost-first rule does: Llama's
    runs of spaces all have score -1e9.
    """
    scores = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    found = []
    for text, score in scores.items():
        last = _last_merge(text, scores)
        if last:
            found.append((-score, -len(text), last))
    return [merge for _, _, merge in sorted(found, key=lambda item: item[:2])]


def _last_merge(text: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """Encodes one piece alone as SentencePiece does; the pair that made it whole, or None if it does not become whole."""
    symbols, last = list(text), None
    while len(symbols) > 1:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return None
        i = -max(pairs)[1]
        last = (symbols[i], symbols[i + 1])
        symbols[i : i + 2] = ["".join(last)]
    return last


def _normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    """SentencePiece's normalization; its dummy prefix goes to every text but the empty one."""
    steps: list[normalizers.Normalizer] = []
    if model.dummy_prefix and not model.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(SPACE))  # before the charsmap: a text of which it leaves nothing has the prefix too
    if model.charsmap:
        charsmap = normalizers.Precompiled(model.charsmap)
        if charsmap.normalize_str("\r") == charsmap.normalize_str("\n"):
            steps.append(normalizers.Replace("\r\n", "\n\n"))  # Precompiled takes "\r\n" for one character
        steps.append(charsmap)
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if model.dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{SPACE}+\\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.dummy_prefix or model.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", LONGEST if model.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence(steps)


def _symbol_splitter(
    model: SentencePieceModel, symbols: list[str], bpe: models.BPE, source: Path
) -> pre_tokenizers.PreTokenizer:
    """Cuts user-defined symbols out of the text, for a BPE with `ignore_merges`, which takes a whole section that is a piece.

    (An added token would not do: the dummy prefix before a symbol that opens the text would be lost.) A section between
    symbols may happen to be a piece that merging does not reach, such as a literal "<s>": those are cut in two, at a border
    of their own encoding.
    """
    borders = {}  # of each such piece: the places in it where its own encoding has a border
    for text, _, kind in model.pieces:
        tokens = bpe.tokenize(text) if kind != USER_DEFINED else []
        if tokens and [token.value for token in tokens] != [text] and len(text) > 1:
            ends = {token.offsets[1] for token in tokens}  # in bytes
            borders[text] = [i for i in range(1, len(text)) if len(text[:i].encode()) in ends]
    cuts = []
    for text, places in borders.items():
        at = next((i for i in places if text[:i] not in borders and text[i:] not in borders), None)
        if at is None:
            raise UserError(f"{source}: beside user-defined symbols, piece {text!r} cannot be told from the same text")
        cuts.append(f"{_escape(text[:at])}(?={_escape(text[at:])}\\z)")
    steps = [pre_tokenizers.Split(Regex("|".join(map(_escape, symbols))), "isolated")]
    if cuts:
        steps.append(pre_tokenizers.Split(Regex(f"\\A(?:{'|'.join(cuts)})"), "isolated"))
    return pre_tokenizers.Sequence(steps)


def _escape(text: str) -> str:
    """A pattern for Oniguruma, the regex engine of `tokenizers`, that matches just `text`."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


# --- the .model file


def read_model(path: Path) -> SentencePieceModel:
    """Reads a SentencePiece BPE model; raises UserError for another kind of model, or one `tokenizers` cannot express."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path}: not a SentencePiece model (a .model file, or a tokenizer.json, is needed)") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    refusals = {
        "holds no pieces": not pieces,
        "is no BPE model (only BPE is supported)": trainer.model_type != trainer.BPE,
        "writes its spaces behind words (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        "does not write spaces as U+2581 (escape_whitespaces=false)": not normalizer.escape_whitespaces,
        "has unused pieces": any(kind == UNUSED for _, _, kind in pieces),
        "removes extra whitespaces but not those of its user-defined symbols": normalizer.remove_extra_whitespaces
        and any(kind == USER_DEFINED and {" ", SPACE} & set(text) for text, _, kind in pieces),
    }
    for reason, refused in refusals.items():
        if refused:
            raise UserError(f"{path} {reason}: tokenizers cannot give the same ids")
    ids = {role: getattr(trainer, f"{role}_id") for role in ROLES}
    return SentencePieceModel(
        pieces=pieces,
        byte_fallback=trainer.byte_fallback,
        dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
        special_ids={role: i for role, i in ids.items() if 0 <= i < len(pieces)},
    )
