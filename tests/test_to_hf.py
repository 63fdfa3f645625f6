"""The exporter: what transformers loads must compute and tokenize what was trained, or not exist."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from conftest import snapshot
from megaspark import checkpoint, hf
from megaspark.checkpoint import Checkpoint
from megaspark.cli import main
from megaspark.engine import build_model
from megaspark.fragments import Fragment
from megaspark.manifests import sha256_of
from megaspark.models import llama
from megaspark.models.blocks import Execution

TEXT = [f"def function_{i}(x):\n    return x + {i}  # é {'y' * (i % 7)}\n" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with a dummy prefix: the kind that exports wrong most easily."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, vocab_size=330, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    return path


def write_run(run: Path, tokenizer: Path, **model: Any) -> tuple[Path, torch.nn.Module]:
    """A run folder with one checkpoint of random weights, cut unevenly over three files as three ranks would; and its model."""
    config = llama.Config(**{"hidden": 48, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 72, "vocab": 330, **model})
    weights = build_model(config, 5, Execution())
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.2)
    run.mkdir(parents=True)
    state = {
        "step": 7, "samples": 70, "tokens": 4480, "identity": {"training data sha256": "d" * 64}, "config_sha256": "c" * 64,
        "config": {"model": config.model_dump(), "data": {"seq": 64}, "run": {"name": run.name}}, "written_by": "a test",
        "tokenizer": {"path": str(tokenizer), "sha256": sha256_of(tokenizer), "prepend_bos": False},
    }  # fmt: skip
    held: list[list[Fragment]] = [[], [], []]
    for name, parameter in weights.named_parameters():
        flat = parameter.detach().flatten()
        cuts = [0, flat.numel() // 5, flat.numel() // 2, flat.numel()]
        for rank, (start, end) in enumerate(pairwise(cuts)):
            piece = flat[start:end]
            tensors = {"master": piece, "exp_avg": torch.zeros_like(piece), "exp_avg_sq": torch.zeros_like(piece)}
            held[rank].append(Fragment(name, tuple(parameter.shape), start, end - start, tensors))
    assert save_as_ranks(checkpoint.step_folder(run, 7), state, held) is None
    return run, weights


def save_as_ranks(folder: Path, state: dict[str, Any], held: list[list[Fragment]]) -> str | None:
    """`checkpoint.save` by several ranks, as threads that meet at every gather."""
    import threading

    barrier, slots = threading.Barrier(len(held)), [None] * len(held)
    problems: list[str | None] = [None] * len(held)

    def work(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            out = list(slots)
            barrier.wait()
            return out

        problems[rank] = checkpoint.save(folder, state, held[rank], rank, gather)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(held))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return next((p for p in problems if p), None)


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_embeddings": True},
    "head 26, theta": {"head_dim": 26, "rope_theta": 5e5},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_export_holds_the_masters_bit_for_bit(shape: str, tokenizer: Path, tmp_path: Path) -> None:
    """A transposed, swapped, rounded or missing tensor: every exported one must be the master's bits, in several files too."""
    run, weights = write_run(tmp_path / "run", tokenizer, **SHAPES[shape])
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--dtype", "fp32", "--max-shard", "50KB"]) == 0
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    names = hf.hf_names(llama.HF_NAMES, [name for name, _ in weights.named_parameters()])
    assert len(files) > 2 and tensors.keys() == set(names.values())
    assert all(torch.equal(tensors[names[name]], parameter) for name, parameter in weights.named_parameters())
    index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())


def test_plain_transformers_loads_and_generates(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder must need nothing of ours: no missing key, sentencepiece's own ids, bf16 as said, text out of `generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, weights = write_run(tmp_path / "run", tokenizer)
    assert main(["to-hf", str(run / "checkpoints" / "step_00000007"), str(tmp_path / "hf")]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16 and model.config.max_position_embeddings == 64
    assert torch.equal(model.lm_head.weight, weights.head.weight.bfloat16())
    ours, theirs = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ["", " ", "  a", "</s> <s> <0x0A>", "é\n\tx", *TEXT[:20]]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (ours.bos_id(), ours.eos_id())
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "hf"), "--prompt", "def f", "--tokens", "5"]) == 0
    assert "'def f'" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "d" * 64 in card and "4,480" in card and "logits equal" in card


def test_wrong_export_is_never_left(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof must have teeth: q and k exchanged, or another eps, moves logits, and then no folder may remain."""
    run, _ = write_run(tmp_path / "run", tokenizer, kv_heads=4)
    right = llama.hf_config
    monkeypatch.setattr(llama, "hf_config", lambda config, n: right(config, n) | {"rms_norm_eps": 1e-3})
    with pytest.raises(RuntimeError, match="other logits"):
        main(["to-hf", str(run), str(tmp_path / "hf")])
    monkeypatch.setattr(llama, "hf_config", right)
    swapped = {"blocks.{i}.attention.q.weight": "model.layers.{i}.self_attn.k_proj.weight",
               "blocks.{i}.attention.k.weight": "model.layers.{i}.self_attn.q_proj.weight"}  # fmt: skip
    monkeypatch.setattr(llama, "HF_NAMES", llama.HF_NAMES | swapped)
    with pytest.raises(RuntimeError, match="other logits"):
        main(["to-hf", str(run), str(tmp_path / "hf")])
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_mistakes_are_told_and_nothing_is_written(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run there, no checkpoint in it, an OUT that exists, a tokenizer gone or changed, a damaged file: exit 2, one line."""
    run, _ = write_run(tmp_path / "run", tokenizer)
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.model"
    other.write_bytes(b"another tokenizer")
    cases = {
        ("nowhere", "hf"): "nowhere",
        ("empty", "hf"): "no checkpoint",
        ("run", "empty"): "--force",
        ("run", "hf", "--tokenizer", str(other)): "not the tokenizer",
        ("run", "hf", "--tokenizer", "gone"): "gone",
        ("run", "hf", "--max-shard", "5 apples"): "500MB",
    }
    before = snapshot(tmp_path)
    for (source, out, *options), word in cases.items():
        assert main(["to-hf", str(tmp_path / source), str(tmp_path / out), *options]) == 2
        said = capsys.readouterr().err
        assert word in said and said.count("\n") == 1, said
    assert snapshot(tmp_path) == before
    file = next((run / "checkpoints" / "step_00000007").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    assert main(["to-hf", str(run), str(tmp_path / "hf")]) == 2
    assert str(file) in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_force_replaces_only_by_a_proven_folder(tokenizer: Path, tmp_path: Path) -> None:
    """With --force the old folder must stay until the new one has proven itself."""
    run, _ = write_run(tmp_path / "run", tokenizer)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").touch()
    shutil.copytree(run, tmp_path / "broken")
    next((tmp_path / "broken" / "checkpoints" / "step_00000007").glob("*.safetensors")).write_bytes(b"")
    assert main(["to-hf", str(tmp_path / "broken"), str(tmp_path / "hf"), "--force"]) == 2
    assert (tmp_path / "hf" / "old").exists()
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--force"]) == 0
    assert not (tmp_path / "hf" / "old").exists() and (tmp_path / "hf" / "config.json").exists()


def test_checkpoint_from_ranks_reads_back(tokenizer: Path, tmp_path: Path) -> None:
    """The cutting above must itself be right: the exporter's source equals the model's weights."""
    run, weights = write_run(tmp_path / "run", tokenizer)
    found = Checkpoint(run / "checkpoints" / "step_00000007")
    assert all(torch.equal(found.tensor(name), parameter) for name, parameter in weights.named_parameters())
