"""The exporter: what transformers loads must compute and tokenize what was trained, or not exist."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from conftest import Finished, snapshot
from megaspark import checkpoint, checkpoint_writers, hf
from megaspark.checkpoint import Checkpoint
from megaspark.cli import main
from megaspark.fragments import Fragment
from megaspark.manifests import sha256_of
from megaspark.models import llama
from megaspark.models.blocks import Execution
from megaspark.weights import build_model, parameter_shapes

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
    """`checkpoint_writers.save` by several ranks, as threads that meet at every gather."""
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

        problems[rank] = checkpoint_writers.save(folder, state, held[rank], rank, gather)

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
    assert "d" * 64 in card and "4,480" in card and "logits in fp32 equal" in card


def test_wrong_export_is_never_left(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof must have teeth: q and k exchanged, or another eps, moves logits, and then no folder may remain."""
    run, _ = write_run(tmp_path / "run", tokenizer, kv_heads=4)
    right = llama.hf_config
    monkeypatch.setattr(llama, "hf_config", lambda config, n: right(config, n) | {"rms_norm_eps": 1e-3})
    with pytest.raises(RuntimeError, match="other logits"):
        main(["to-hf", str(run), str(tmp_path / "hf")])
    monkeypatch.setattr(llama, "hf_config", right)
    monkeypatch.setattr(llama, "hf_config", lambda config, n: right(config, n) | {"rope_parameters": {"rope_theta": 1e4 + 1}})
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
        ("run", "hf", "--special-token", "end=<x>"): "ROLE=TEXT",
        ("run", "hf", "--special-token", "pad=<not there>"): "rows are all taken",
        ("run", "hf", "--chat-template", "gone.jinja"): "no such file",
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
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--force"]) == 2  # somebody's own things
    assert main(["to-hf", str(run), str(run / "checkpoints" / "step_00000007"), "--force"]) == 2
    (tmp_path / "hf" / "config.json").touch()
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


# ---- what users add


def test_chat_template_and_special_tokens(tokenizer: Path, tmp_path: Path) -> None:
    """A template whose end token is spelled in characters never ends an answer; new tokens must take free rows of the table."""
    from transformers import AutoTokenizer

    run, _ = write_run(tmp_path / "run", tokenizer, vocab=340)
    flags = [f"--special-token={said}" for said in ("extra=<|im_start|>", "eos=<|im_end|>", "pad=<pad>")]
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--chat-template", "chatml", *flags]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return x"}]
    got = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids = got["input_ids"]
    assert ids.count(330) == 2 and ids.count(331) == 2 and theirs.eos_token_id == 331 and theirs.pad_token_id == 332
    answer = [i for i, mine in zip(ids, got["assistant_masks"], strict=True) if mine]
    assert answer[-1] == 331 and theirs.decode(answer[:-1]).strip() == "return x"
    assert theirs.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False).endswith("assistant\n")
    for name in ("config.json", "generation_config.json"):
        said = json.loads((tmp_path / "hf" / name).read_text())
        assert (said["eos_token_id"], said["pad_token_id"]) == (331, 332), name


def test_template_from_a_file_ends_answers_with_the_models_own_end(tokenizer: Path, tmp_path: Path) -> None:
    """Without <|im_end|> as a token the built-in template must still end an answer with EOS, as one token."""
    from transformers import AutoTokenizer

    run, _ = write_run(tmp_path / "run", tokenizer)
    assert main(["to-hf", str(run), str(tmp_path / "a"), "--chat-template", "chatml"]) == 0
    (tmp_path / "my.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    assert main(["to-hf", str(run), str(tmp_path / "b"), "--chat-template", str(tmp_path / "my.jinja")]) == 0
    messages = [{"role": "assistant", "content": "x"}]
    for name in "ab":
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.apply_chat_template(messages, return_dict=True)["input_ids"].count(theirs.eos_token_id) == 1
        assert "</s>" in theirs.apply_chat_template(messages, tokenize=False)


def test_card_tells_loss_and_energy_and_what_is_unknown(tokenizer: Path, tmp_path: Path) -> None:
    """A guess where nothing was measured, steps after the checkpoint counted in, or a figure left out of the card."""
    run, _ = write_run(tmp_path / "run", tokenizer)
    lines = [{"step": i, "loss": 9.0 - i, "joules": 1000.0} for i in range(1, 10)]
    lines.insert(5, {"step": 5, "split": "validation", "loss": 4.25})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')
    assert main(["to-hf", str(run), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in ("2.0000 nats a token at step 7", "4.2500 nats a token at step 5", "7,000 J", "TO BE CHOSEN", "c" * 64):
        assert words in card, words
    (run / "metrics.jsonl").unlink()
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--force"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| training loss | unknown |" in card and "| energy | unknown (not measured) |" in card


@pytest.mark.parametrize("scaling", [None, {"kind": "llama3", "factor": 8.0}, {"kind": "linear", "factor": 2.0}])
def test_config_is_what_vllm_expects(scaling: Any, tokenizer: Path, tmp_path: Path) -> None:
    """vLLM reads rope_parameters (new) or rope_theta and rope_scaling (old, theta 10,000 if unsaid), and takes no other names."""
    run, _ = write_run(tmp_path / "run", tokenizer, hidden=64, rope_theta=5e5, rope_scaling=scaling)
    assert main(["to-hf", str(run), str(tmp_path / "hf")]) == 0
    said = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert said["architectures"] == ["LlamaForCausalLM"] and said["hidden_act"] == "silu" and said["dtype"] == "bfloat16"
    assert not said["attention_bias"] and not said["mlp_bias"] and said["head_dim"] % 8 == 0
    assert said["num_attention_heads"] % said["num_key_value_heads"] == 0
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 5e5
    old, new = said.get("rope_scaling"), {key: v for key, v in said["rope_parameters"].items() if key != "rope_theta"}
    assert (old or {"rope_type": "default"}) == new and new["rope_type"] == (scaling or {"kind": "default"})["kind"]
    if scaling and scaling["kind"] == "llama3":
        assert new.keys() == {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    names = {name for file in (tmp_path / "hf").glob("*.safetensors") for name in load_file(file)}
    loaded = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj input_layernorm post_attention_layernorm".split()
    tops = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {name.split(".")[-2] for name in names - tops} == set(loaded) and tops < names


# ---- what goes wrong


@pytest.mark.parametrize("change", ["missing", "renamed", "extra", "reshaped"])
def test_checkpoint_of_other_parameters_is_refused(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that is whole but not of the model it says: its tensors would be left out, or random in the export."""
    config = llama.Config(hidden=48, layers=2, heads=4, kv_heads=2, ffn=72, vocab=330)
    shapes = parameter_shapes(config)
    if change in ("missing", "renamed"):
        shape = shapes.pop("blocks.1.mlp.up.weight")
    if change == "renamed":
        shapes["blocks.1.mlp.upp.weight"] = shape
    if change == "extra":
        shapes["blocks.2.mlp.up.weight"] = (72, 48)
    if change == "reshaped":
        shapes["blocks.1.mlp.up.weight"] = (48, 72)
    state = {"step": 0, "tokenizer": None, "config": {"model": config.model_dump(mode="json")}, "source": {"files": {}}}
    (tmp_path / "c").mkdir()
    checkpoint_writers.write_masters(tmp_path / "c", state, shapes, lambda name, a, b: torch.zeros(b - a, *shapes[name][1:]))
    assert main(["to-hf", str(tmp_path / "c"), str(tmp_path / "hf")]) == 2
    said = capsys.readouterr().err
    assert "mlp.up" in said and said.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_killed_or_out_of_room_leaves_no_folder(tokenizer: Path, tmp_path: Path, run_python: Callable[..., Finished]) -> None:
    """A kill -9 in mid-write, and a disk that takes no more: no OUT, and the next run is not confused by what is left."""
    run, _ = write_run(tmp_path / "run", tokenizer, hidden=256, ffn=704)
    full = (
        "import sys, resource, signal\nfrom megaspark.cli import main\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))\nsys.exit(main(sys.argv[1:]))"
    )
    done = run_python(full, "to-hf", str(run), str(tmp_path / "hf"))
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    killed = full.replace("signal.SIG_IGN", "signal.SIG_DFL")
    assert run_python(killed, "to-hf", str(run), str(tmp_path / "hf")).returncode == -signal.SIGXFSZ
    assert not (tmp_path / "hf").exists() and (tmp_path / ".hf.partial").exists()
    assert main(["to-hf", str(run), str(tmp_path / "hf")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


# ---- memory

MEASURE = """
import json, sys
from pathlib import Path
import torch
from megaspark import checkpoint_writers
from megaspark.cli import main
from megaspark.weights import parameter_shapes
from megaspark.models.llama import Config

def held_bytes(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def make(folder, **model):
    config = Config(**model)
    shapes = parameter_shapes(config)
    folder.mkdir()
    state = {
        "step": 0, "samples": 0, "tokens": 0, "identity": {}, "config_sha256": "", "tokenizer": None, "written_by": "a test",
        "config": {"model": config.model_dump(mode="json"), "run": {"name": "x"}}, "source": {"folder": "x", "files": {}},
    }
    checkpoint_writers.write_masters(folder, state, shapes, lambda name, a, b: torch.randn(b - a, *shapes[name][1:]) * 0.02)

home, peaks = Path(sys.argv[1]), {}
make(home / "small", hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=320, max_positions=64)
make(home / "large", hidden=512, layers=16, heads=8, kv_heads=8, ffn=1792, vocab=16000, max_positions=64)
main(["to-hf", str(home / "small"), str(home / "small-hf")])  # what is imported and kept is not the large model's
for argv in (["to-hf", "large", "large-hf", "--dtype=fp32", "--max-shard=60MB"], ["from-hf", "large-hf", "again"]):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = held_bytes("VmRSS")
    assert main([argv[0], *(str(home / name) for name in argv[1:3]), *argv[3:]]) == 0
    peaks[argv[0]] = held_bytes("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.mark.long
def test_memory_is_a_layer_and_a_shard_however_large_the_model(tmp_path: Path, run_python: Callable[..., Finished]) -> None:
    """Tensors kept, a mapping that stays open, or a proof that loads the model: measured on 309 MB of weights, RSS at its peak."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs here to measure a peak by")
    peaks = json.loads(run_python(MEASURE, str(tmp_path), timeout_s=240).checked().stdout.splitlines()[-1])
    layer_bytes = 4 * (4 * 512 * 512 + 3 * 512 * 1792 + 2 * 512)
    assert peaks["to-hf"] < layer_bytes + 60e6 and peaks["from-hf"] < layer_bytes + 60e6, peaks
