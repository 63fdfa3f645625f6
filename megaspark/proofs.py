"""Shows that transformers computes our logits from a Hugging Face folder, one block at a time.

The folder's own config makes transformers' model and ours, of one block and a slice of the vocabulary, which share their
memory. The tokens' states go through every block of the checkpoint and, again, of the folder; so all weights take part, and
memory holds one block of them, however large the model is. A second pass through probe weights, drawn anew, exposes what
trained ones may hide: at the usual std of .02 a wrong rotary layout moves logits by 2e-2 only, at the probe's by 13.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megaspark import hf
from megaspark.models.blocks import Execution
from megaspark.safetensors_files import Rows, row_ranges

TOLERANCE = 1e-5  # of logits in fp32 up to size 10, some 16 roundings there; of larger ones a millionth of the largest
BATCH, LENGTH = 2, 64
TABLE_ROWS = 1024  # of embedding and head at a time
PROBE_LAYERS = 2
PROBE_STD = 0.2  # of matrices 64 wide; wider ones less, so that products keep their size and softmax is not all or nothing


# What is proven are weights and shapes; kernels that sum in another order than transformers only blur it.
PLAIN = Execution(kernels={"attention": "reference", "linear": "reference"})


class Unequal(RuntimeError):
    """transformers computes something else than we do."""


def prove_logits(module: ModuleType, config: Any, folder: Path, ours: Rows, theirs: Rows) -> str:
    """Compares the logits of random tokens in fp32, with all weights and with probe weights; says how near they were.

    folder: of the config.json; ours: parts of our parameters by our names; theirs: of the folder's tensors by its names.
    Raises Unequal where they differ by 1e-5 or more (1e-6 of the largest logit, where that is above 10).
    """
    pair = _Pair(module, config, folder)
    shown = []
    probe_layers = min(PROBE_LAYERS, config.layers)
    passes = {
        "trained": (ours, lambda name, a, b: theirs(pair.hf_name[name], a, b), config.layers),
        "probe": (_probe(pair.shapes), _probe(pair.shapes), probe_layers),
    }
    for what, (own_rows, hf_rows, layers) in passes.items():
        difference = largest = 0.0
        mine = list(pair.logits(pair.run_ours, own_rows, layers))
        for mine_BSV, other_BSV in zip(mine, pair.logits(pair.run_theirs, hf_rows, layers), strict=True):
            off = (mine_BSV - other_BSV).abs().max().item()
            difference = off if off > difference or math.isnan(off) else difference  # a NaN stays
            largest = max(largest, other_BSV.abs().max().item())
        if not difference < max(TOLERANCE, TOLERANCE / 10 * largest):
            raise Unequal(f"transformers computes other logits than we do with {what} weights: off by {difference:.2e}")
        shown.append(f"{difference:.1e} ({what} weights, {layers} {'layer' if layers == 1 else 'layers'})")
    return f"logits in fp32 equal transformers' to {' and '.join(shown)}, over {BATCH} x {LENGTH} random tokens"


def check_names(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises Unequal unless the tensors of `shapes` are just those that transformers looks for by that config.json."""
    described = _config(folder)
    with torch.device("meta"):
        model = _model(described)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if described.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    if wanted != shapes:
        odd = next(name for name in [*wanted, *shapes] if wanted.get(name) != shapes.get(name))
        raise Unequal(f"transformers looks for {odd} {wanted.get(odd)}, {folder} has {shapes.get(odd)}")


class _Pair:
    """Our model and transformers', of one block and TABLE_ROWS of the tables each, on the same memory."""

    def __init__(self, module: ModuleType, config: Any, folder: Path) -> None:
        small = {"layers": 1, "vocab": TABLE_ROWS, "tie_embeddings": False}
        self.config = config
        with torch.device("meta"):
            whole, self.ours = module.Model(config), module.Model(config.model_copy(update=small), PLAIN).eval()
        sizes = {"num_hidden_layers": 1, "vocab_size": TABLE_ROWS, "tie_word_embeddings": False, "pad_token_id": None}
        self.theirs = _model(_config(folder, **sizes)).eval()
        self.norm, self.theirs.base_model.norm = self.theirs.base_model.norm, nn.Identity()  # states leave a block as they are
        self.shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
        self.hf_name = hf.hf_names(module.HF_NAMES, self.shapes)
        others = dict(self.theirs.named_parameters())
        others |= {f"model.norm.{name}": parameter for name, parameter in self.norm.named_parameters()}
        wanted = {name: tuple(parameter.shape) for name, parameter in self.ours.named_parameters()}
        for name, other in hf.hf_names(module.HF_NAMES, wanted).items():
            if other not in others or others[other].shape != wanted[name]:
                raise Unequal(f"transformers has no {other} of the shape of our {name}, {wanted[name]}")
        self.own = {name: others[other].data for name, other in hf.hf_names(module.HF_NAMES, wanted).items()}
        self.ours.load_state_dict(self.own, assign=True)

    def run_ours(self, part: str, x: Tensor) -> Tensor:
        """The embedding, the block or the head of our model."""
        embedding, block, head = self.ours.layers()
        if part == "block":
            positions_BS = torch.arange(LENGTH)[None]
            return block(x, self.ours.context(positions_BS, x.dtype, False))
        return (embedding if part == "embedding" else head)(x)

    def run_theirs(self, part: str, x: Tensor) -> Tensor:
        """The embedding, the block or the head (with its norm) of transformers' model."""
        if part == "block":
            return self.theirs.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
        return self.theirs.get_input_embeddings()(x) if part == "embedding" else self.theirs.lm_head(self.norm(x))

    @torch.no_grad()
    def logits(self, run: Callable[[str, Tensor], Tensor], rows: Rows, layers: int) -> Iterator[Tensor]:
        """The logits [B, S, a part of V] of fixed random tokens, through `layers` blocks of weights from `rows`, by our names."""
        vocab = self.config.vocab
        tokens_N = torch.randint(vocab, (BATCH * LENGTH,), generator=torch.Generator().manual_seed(1))
        for place, token in enumerate(tokens_N.tolist()):
            self.own["embedding.weight"][place].copy_(rows("embedding.weight", token, token + 1)[0])
        x_BSE = run("embedding", torch.arange(len(tokens_N)).view(BATCH, LENGTH))
        for layer in range(layers):
            for name in (name for name in self.own if name.startswith("blocks.0.")):
                self._fill(name, name.replace("blocks.0.", f"blocks.{layer}.", 1), rows)
            x_BSE = run("block", x_BSE)
        for name in (name for name in self.own if name.startswith("head.") and name != "head.weight"):
            self._fill(name, name, rows)
        table = "head.weight" if "head.weight" in self.shapes else "embedding.weight"
        for first in range(0, vocab, TABLE_ROWS):
            last = min(first + TABLE_ROWS, vocab)
            self.own["head.weight"][: last - first].copy_(rows(table, first, last))
            yield run("head", x_BSE)[..., : last - first].clone()

    def _fill(self, name: str, source: str, rows: Rows) -> None:
        for first, last in row_ranges(self.shapes[source]):
            self.own[name][first:last].copy_(rows(source, first, last))


def _probe(shapes: dict[str, tuple[int, ...]]) -> Rows:
    """Weights drawn from their name and place: norm weights uniform in [.5, 1.5], biases and matrices normal."""

    def rows(name: str, first: int, last: int) -> Tensor:
        key = hashlib.blake2b(f"{name}/{first}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        out = torch.empty(last - first, *shapes[name][1:])
        if out.ndim > 1:
            return out.normal_(0.0, PROBE_STD * min(1.0, math.sqrt(64 / out.shape[1])), generator=generator)
        if name.endswith(".bias"):
            return out.normal_(0.0, PROBE_STD, generator=generator)
        return out.uniform_(0.5, 1.5, generator=generator)

    return rows


def _config(folder: Path, **changes: Any) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, **changes)
    except (ValueError, OSError) as error:
        raise Unequal(f"transformers does not take {folder / hf.CONFIG}: {' '.join(str(error).split())}") from None


def _model(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
