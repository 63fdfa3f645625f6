"""The importer: what comes back out of a checkpoint is what transformers had, bit for bit; what is not understood is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_to_hf import tokenizer, write_run  # noqa: F401
from test_train import PRETRAIN, alone, losses

from conftest import EOS, VOCAB, TinyData, launch_deepspeed, snapshot, tiny_run
from megaspark import checkpoint, hf
from megaspark.checkpoint import Checkpoint
from megaspark.cli import main
from megaspark.config import Checked, check_run, load_config
from megaspark.errors import UserError
from megaspark.hf_tokenizers import adversarial_texts
from megaspark.models import ARCHITECTURES, architecture, architecture_of_hf, differing
from megaspark.samples import Samples
from megaspark.starts import find_start, find_weights

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha, not tied, theta": {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "tied": {"tie_word_embeddings": True},
    "head 26, eps": {"head_dim": 26, "rms_norm_eps": 1e-2},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "pad above the first rows": {"vocab_size": 1100, "pad_token_id": 1099, "eos_token_id": [1090, 1091], "bos_token_id": None},
}


def write_hf(folder: Path, dtype: torch.dtype = torch.float32, max_shard: str = "5GB", **changes: Any) -> Path:
    """A Hugging Face folder by transformers itself, with weights that expose mistakes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    said = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 72,
        "vocab_size": 330, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, **changes,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**said))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every tensor's bytes, by name."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    found = {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def masters(folder: Path) -> dict[str, torch.Tensor]:
    opened = checkpoint.newest(folder)
    return {name: opened.tensor(name) for name in opened.shapes}


@pytest.mark.parametrize("shape", SHAPES)
def test_hugging_face_to_ours_and_back_is_bitwise(shape: str, tmp_path: Path) -> None:
    """A transposed, permuted, rounded or left-out tensor, or a config that transformers would compute otherwise with."""
    from transformers import AutoConfig

    write_hf(tmp_path / "hf", **SHAPES[shape])
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "again"), "--dtype", "fp32"]) == 0
    assert digests(tmp_path / "hf") == digests(tmp_path / "again") != {}
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("hf", "again"))
    apart = ("_name_or_path", "rope_theta", "rope_scaling")  # the last two say again what rope_parameters say
    assert {key: value for key, value in after.items() if before.get(key) != value and key not in apart} == {}


def test_bf16_in_several_files_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """bf16 -> fp32 master -> bf16 must be exact, and an index must be followed both ways."""
    write_hf(tmp_path / "hf", torch.bfloat16, max_shard="60KB")
    assert (tmp_path / "hf" / hf.INDEX).is_file()
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "again"), "--max-shard", "50KB"]) == 0
    assert (tmp_path / "again" / hf.INDEX).is_file()
    assert digests(tmp_path / "hf") == digests(tmp_path / "again")
    assert Checkpoint(tmp_path / "ours").state["source"]["dtype"] == "bfloat16"


def test_ours_to_hugging_face_and_back_is_bitwise(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """The masters of a run of three ranks, out in fp32 and in again."""
    run, _ = write_run(tmp_path / "run", tokenizer)
    assert main(["to-hf", str(run), str(tmp_path / "hf"), "--dtype", "fp32", "--max-shard", "40KB"]) == 0
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    before, after = masters(run), masters(tmp_path / "ours")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_tokenizer_and_special_ids_come_back_as_they_were(tokenizer: Path, tmp_path: Path) -> None:  # noqa: F811
    """The source's tokenizer is the model's: lost, or rebuilt, the weights would mean other tokens."""
    from transformers import AutoTokenizer

    run, _ = write_run(tmp_path / "run", tokenizer, vocab=340)
    flags = ["--chat-template", "chatml", "--special-token", "eos=<|im_end|>"]
    assert main(["to-hf", str(run), str(tmp_path / "hf"), *flags]) == 0
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert first == second
    theirs, ours = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "again"))
    assert [theirs.encode(text) for text in adversarial_texts(300)] == [ours.encode(text) for text in adversarial_texts(300)]
    (tmp_path / "ours" / "source" / "tokenizer.json").write_text("{}")
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "third")]) == 2


def test_old_rotary_buffers_are_checked_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2's files carry inv_freq: harmless if it is theta's, and proof of a wrong theta if it is not."""
    write_hf(tmp_path / "hf")
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 12, 2) / 12)
    _edit_tensors(tmp_path / "hf", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": inv_freq.half()}))
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "more")]) == 2
    assert "inv_freq contradicts rope_theta" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_reads_back_what_it_says(arch: str) -> None:
    """A key that the export writes under one name and the import reads under another."""
    module = architecture(arch)
    config = module.Config(**module.SIZES["demo"])
    again = module.config_from_hf(module.hf_config(config, 77))
    assert differing(config, again) is None and again.init_std == config.init_std and again.max_positions == 77
    assert architecture_of_hf(module.HF_TYPE) is module


# ---- what is refused


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _edit_config(**values: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def _index(weight_map: dict[str, str]) -> Callable[[Path], Any]:
    return lambda folder: (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path("/nonexistent/boom").write_text, ("run",))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: _edit_tensors(f, lambda t: t.pop(UP)), f"lacks 1 tensors that its config.json asks for, first {UP}"),
    "renamed": (lambda f: _edit_tensors(f, lambda t: t.update({UP.replace("up", "upp"): t.pop(UP)})), "did you mean"),
    "extra": (lambda f: _edit_tensors(f, lambda t: t.update({BIAS: torch.zeros(48)})), f"does not ask for, first {BIAS}"),
    "reshaped": (lambda f: _edit_tensors(f, lambda t: t.update({UP: t[UP].T.contiguous()})), "is 48x72, but config.json makes"),
    "integers": (lambda f: _edit_tensors(f, lambda t: t.update({UP: t[UP].to(torch.int8)})), "is I8; only F32"),
    "truncated": (_truncate, "truncated or no safetensors"),
    "pickled": (_pickle, "could run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "architecture": (_edit_config(model_type="lama"), "did you mean llama"),
    "attention bias": (_edit_config(attention_bias=True), "attention_bias = True is not built"),
    "mlp bias": (_edit_config(mlp_bias=True), "mlp_bias = True is not built"),
    "activation": (_edit_config(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "quantized": (_edit_config(quantization_config={"bits": 4}), "quantization_config"),
    "theta twice": (_edit_config(rope_theta=5e5), "rope_theta is 10000 and 500000"),
    "yarn": (_edit_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "'yarn' is not built"),
    "odd sizes": (_edit_config(num_attention_heads=5, head_dim=None), "does not divide"),
    "size missing": (_edit_config(hidden_size=None), "hidden_size is missing"),
    "tied but not": (_edit_config(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight"),
    "too few layers": (_edit_config(num_hidden_layers=2), "holds 9 tensors that its config.json does not ask for"),
    "index elsewhere": (_index({UP: "other.safetensors"}), "other.safetensors is missing"),
    "index outside": (_index({UP: "../x"}), "no plain file name"),
    "index wrong": (_index({"nope": "model.safetensors"}), "nope is in"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_wrong_is_told_and_nothing_is_made(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers only warns of most of these, and trains or generates from random weights: here one line, exit 2, no OUT."""
    write_hf(tmp_path / "hf")
    harm, words = DAMAGE[damage]
    harm(tmp_path / "hf")
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said
    assert snapshot(tmp_path) == before


def test_out_that_exists_and_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An OUT is never overwritten unasked, and with --force only what this command made."""
    source, out = write_hf(tmp_path / "hf"), tmp_path / "ours"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    capsys.readouterr()
    cases = {
        ("gone", "new"): "is no folder", ("hf", "mine"): "--force", ("hf", "mine", "--force"): "holds other things",
        ("hf", "hf/config.json"): "exists", ("hf", "hf/config.json/x"): "is a file",
    }  # fmt: skip
    for (folder, target, *flags), words in cases.items():
        assert main(["from-hf", str(tmp_path / folder), str(tmp_path / target), *flags]) == 2
        assert words in capsys.readouterr().err
    assert main(["from-hf", str(source), str(out)]) == 0 and main(["from-hf", str(source), str(out), "--force"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mine", "ours"]


def test_the_unforeseen_is_found_by_the_proof(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a config says that we do not read moves logits: here eps, read wrongly."""
    from megaspark.models import llama

    write_hf(tmp_path / "hf", rms_norm_eps=1e-3)
    right = llama.config_from_hf
    monkeypatch.setattr(llama, "config_from_hf", lambda said: right(said).model_copy(update={"norm_eps": 1e-5}))
    capsys.readouterr()
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 2
    assert "computes other logits" in capsys.readouterr().err and not (tmp_path / "ours").exists()


# ---- on into pre-training


def run_on(data: TinyData, folder: Path, **model: Any) -> tuple[Path, Path]:
    """A Hugging Face model of the tiny data's vocabulary, converted, and a run's YAML that starts from it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 44, "vocab_size": VOCAB, "eos_token_id": EOS}
    write_hf(folder / "hf", **sizes, **model)
    assert main(["from-hf", str(folder / "hf"), str(folder / "ours")]) == 0
    config, _ = tiny_run(data, folder)
    text = "\n".join(line for line in config.read_text().splitlines() if not line.startswith("model:"))
    config.write_text(f"base: {folder / 'ours' / 'model.yaml'}\n{text}\n")
    return config, folder / "ours"


def test_a_runs_yaml_must_agree(tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another eps or theta trains on without a word, and worse: the first difference is named with its place."""
    config, _ = run_on(tiny_data, tmp_path)
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "a"), "--config", str(config)]) == 0
    capsys.readouterr()
    for key, value in {"norm_eps": "1.0e-6", "rope_theta": "5.0e5", "tie_embeddings": "true", "ffn": "48"}.items():
        config.with_name("other.yaml").write_text(f"base: {config}\nmodel: {{{key}: {value}}}\n")
        assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "b"), "--config", str(config.with_name("other.yaml"))]) == 2
        assert f"model.{key} is" in (said := capsys.readouterr().err) and "other.yaml:2" in said, said
    assert not (tmp_path / "b").exists()


@pytest.mark.launch
def test_pre_training_goes_on_from_it_in_any_layout(tiny_data: TinyData, tmp_path: Path) -> None:
    """Weights not pushed into the model, or drawn anew: step 1's loss must be transformers' own, the same in every layout."""
    scaling = {**LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    config, ours = run_on(tiny_data, tmp_path, rope_parameters=scaling)
    common = [f"run.init_from={ours}", "run.steps=3", "run.eval_every=0", "run.save_every=2"]
    alone("pretrain", "--config", str(config), *common, "run.name=one", "deepspeed=zero0.json").checked()
    done = launch_deepspeed(2, PRETRAIN, "--config", str(config), *common, "run.name=two", "deepspeed=zero3.json").checked()
    assert "starting at step 0 from the weights" in done.stdout
    first, second = losses(tmp_path / "runs/one"), losses(tmp_path / "runs/two")
    assert list(first) == [1, 2, 3] and first == pytest.approx(second, rel=1e-6)
    assert first[1] == pytest.approx(_loss_by_transformers(config, tmp_path / "hf"), rel=1e-5)
    assert first[1] > 4.9  # not the loss of small random weights, ln 131 = 4.88
    resumed = find_start(_checked(config, [*common, "run.name=one"]), say=False)
    assert resumed is not None and resumed.step == 3  # not from the weights again


def _loss_by_transformers(config: Path, folder: Path) -> float:
    """The mean loss of the run's first step, computed by transformers document by document."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    checked = _checked(config, ["run.eval_every=0"])
    samples = Samples(checked.train, checked.config.data.phases, checked.config.run.seed)
    model, total = AutoModelForCausalLM.from_pretrained(folder), []
    with torch.no_grad():
        for number in range(checked.config.run.global_batch):
            tokens = torch.as_tensor(samples[number].astype("int64"))
            inputs, labels = tokens[:-1], tokens[1:]
            ends = [0, *((inputs == EOS).nonzero()[:, 0] + 1).tolist(), len(inputs)]
            for a, b in pairwise(ends):
                if a < b:
                    total.append(F.cross_entropy(model(inputs[None, a:b]).logits[0], labels[a:b], reduction="none"))
    return torch.cat(total).mean().item()


def test_starting_weights_that_do_not_fit_are_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    """Another theta, another width, no checkpoint there, a damaged one: told before anything is written or launched."""
    config, ours = run_on(tiny_data, tmp_path)
    before = snapshot(tmp_path)
    cases = {
        f"run.init_from={ours} model.rope_theta=5.0e5": "model.rope_theta = 10000.0, this run has 500000.0",
        f"run.init_from={ours} model.ffn=48": "model.ffn = 44, this run has 48",
        f"run.init_from={tmp_path / 'gone'}": "holds no checkpoint",
        f"run.resume=required run.init_from={ours}": "no checkpoint to resume from",
    }
    for overrides, words in cases.items():
        with pytest.raises(UserError) as refusal:
            _start(config, overrides.split())
        assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert snapshot(tmp_path) == before
    _start(config, [f"run.init_from={ours}"])
    shutil.copytree(ours, tmp_path / "runs/tiny/checkpoints/step_00000000")
    with pytest.raises(UserError, match=r"set run\.init_from"):
        _start(config, [])
    masters_file = next(ours.glob("*.safetensors"))
    masters_file.write_bytes(masters_file.read_bytes()[:-4])
    with pytest.raises(UserError, match="should have"):
        find_weights(_checked(config, [f"run.init_from={ours}"]), say=False)


def test_data_of_another_tokenizer_is_warned_of(tiny_data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights trained on one tokenizer's ids and fed with another's: gibberish, and the loss does fall."""
    config, ours = run_on(tiny_data, tmp_path)
    for content, warned in ((b"another", True), (tiny_data.tokenizer.read_bytes(), False)):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
        assert main(["from-hf", str(tmp_path / "hf"), str(ours), "--force"]) == 0
        capsys.readouterr()
        find_weights(_checked(config, [f"run.init_from={ours}"]), say=True)
        assert ("WARNING: the data were not tokenized with" in capsys.readouterr().err) == warned


def _checked(config: Path, overrides: list[str]) -> Checked:
    loaded, tree = load_config(config, overrides)
    return check_run(loaded, tree, 1)


def _start(config: Path, overrides: list[str]) -> None:
    """What `pretrain` does before it writes or launches anything."""
    checked = _checked(config, ["run.eval_every=0", *overrides])
    if find_start(checked, say=False) is None:
        find_weights(checked, say=False)
