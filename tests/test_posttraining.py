"""SFT and DPO on tiny models: what is learned, what comes out, what is refused before anything starts, and that nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import CHECKOUT, free_port, process_environment, snapshot
from megaspark import hf_tokenizers
from megaspark.cli import main
from megaspark.manifests import sha256_of
from megaspark.posttrained_folders import newest_checkpoint

pytest.importorskip("trl")
pytest.importorskip("peft")
VOCAB = 330
WORDS = "alpha beta gamma delta epsilon zeta eta theta".split()
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama of 50,000 parameters and a tokenizer that takes "</s>" in a text as text."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    text = [f"Question: what comes after {a}?\nAnswer: {b} def f(x): return {a}" for a, b in pairwise(WORDS)]
    model = folder.with_suffix(".model")
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text * 20), model_writer=file, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    hf_tokenizers.write_tokenizer(model, folder, max_length=128)
    return folder


def rows(kind: str) -> list[dict[str, Any]]:
    """Twenty-four examples of a kind, the same task in all: after a word comes the next one."""
    pairs = [(a, b) for a, b in zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True)] * 3
    ask = "Question: what comes after {}?\nAnswer:"
    makers: dict[str, Callable[[str, str], dict[str, Any]]] = {
        "text": lambda a, b: {"text": f"{ask.format(a)} {b}"},
        "pairs": lambda a, b: {"prompt": ask.format(a), "completion": f" {b}"},
        "chat": lambda a, b: {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]},
        "preferences": lambda a, b: {"prompt": ask.format(a), "chosen": f" {b}", "rejected": f" {b} {a}"},
    }
    return [makers[kind](a, b) for a, b in pairs]


def write_rows(path: Path, table: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


Run = Callable[..., tuple[int, Path]]


@pytest.fixture
def post_train(tiny_model: Path, tmp_path: Path) -> Run:
    """post_train(method, kind, *overrides): runs the command on rows of a kind; (exit status, output folder)."""

    def run(method: str, kind: str, *overrides: str, out: str = "out") -> tuple[int, Path]:
        config = write_config(tmp_path, tiny_model, method, kind)
        return main([method, str(config), f"output={tmp_path / out}", *overrides]), tmp_path / out

    return run


def write_config(folder: Path, model: Path, method: str, kind: str) -> Path:
    data = write_rows(folder / f"{kind}.jsonl", rows(kind))
    extra = "precompute_ref_log_probs: true" if method == "dpo" else "max_length: 64"
    path = folder / f"{method}.yaml"
    path.write_text(
        f"""\
model: {{folder: {model}}}
data: {{train: {data}}}
output: {folder / "out"}
trainer:
  max_steps: 4
  learning_rate: 1e-2   # a string, to YAML
  per_device_train_batch_size: 4
  logging_steps: 1
  seed: 7
  {extra}
"""
    )
    return path


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def loaded(out: Path) -> tuple[Any, Any]:
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), AutoTokenizer.from_pretrained(out)


LONG_ENOUGH = ["trainer.max_steps=200", "trainer.lr_scheduler_type=constant", "trainer.per_device_train_batch_size=8"]


# --- SFT


def test_sft_learns_to_answer_and_to_stop(post_train: Run, tiny_model: Path) -> None:
    """The trap of tokenizers that take special tokens in a text as text: TRL's end would be four pieces, and no answer ever end."""
    status, out = post_train("sft", "pairs", *LONG_ENOUGH)
    assert status == 0 and losses(out)[-1] < losses(out)[0] / 10
    model, tokenizer = loaded(out)
    prompt = tokenizer(rows("pairs")[2]["prompt"], return_tensors="pt", return_token_type_ids=False)
    told = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(told) == " delta</s>" and told[-1] == 2
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes(), name
    found = {path.name for path in out.iterdir()}
    assert found == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "README.md", "post_training.json", "metrics.jsonl",
    }  # fmt: skip
    assert not out.with_name("out.partial").exists() and json.loads((out / "config.json").read_text())["use_cache"]


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("pairs", []), ("text", ["trainer.packing=true"]), ("text", ["trainer.packing=true", "trainer.packing_strategy=wrapped"])],
    ids=["padded", "packed", "wrapped"],
)
def test_losses_with_and_without_our_kernels(post_train: Run, kind: str, overrides: list[str]) -> None:
    """Twenty steps: a kernel that is wrong in the third digit still learns. At 1e-3 fp32 rounding stays below 1e-5."""
    said = ["trainer.max_steps=20", "trainer.learning_rate=1e-3", *overrides]
    both = []
    for kernels in ("true", "false"):
        status, out = post_train("sft", kind, *said, f"kernels={kernels}", out=kernels)
        assert status == 0
        both.append((losses(out), json.loads((out / "post_training.json").read_text())["modules_with_our_kernels"]))
    assert both[0][1] == {"attention": 2, "rms_norm": 5, "mlp": 2} and not any(both[1][1].values())
    assert len(both[0][0]) == 20 and both[0][0] == pytest.approx(both[1][0], rel=1e-5)


def test_same_seed_same_bits_and_another_seed_others(post_train: Run) -> None:
    """The order of examples is all that is random; and the record must tell what the bits were made from."""
    made = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        status, out = post_train("sft", "pairs", f"trainer.seed={seed}", out=name)
        assert status == 0
        made[name] = sha256_of(out / "model.safetensors")
    assert made["a"] == made["b"] != made["c"]
    record = json.loads((out / "post_training.json").read_text())
    data = record["data"]["train"][0]
    assert data["rows"] == 24 and data["sha256"] == sha256_of(Path(data["file"]))
    folder = Path(record["model"]["folder"])
    assert record["model"]["sha256"]["model.safetensors"] == sha256_of(folder / "model.safetensors")
    assert record["config"]["trainer"]["seed"] == 8 and record["steps"] == 4


def test_conversations_with_a_template_and_the_assistants_loss(post_train: Run, tmp_path: Path) -> None:
    """The template must come out with the model, and a rendered conversation give the very tokens of training."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    said = [f"trainer.chat_template_path={template}", "trainer.assistant_only_loss=true", *LONG_ENOUGH]
    status, out = post_train("sft", "chat", *said)
    assert status == 0 and losses(out)[-1] < losses(out)[0] / 10
    model, tokenizer = loaded(out)
    asked = [{"role": "user", "content": "gamma"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    told = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert tokenizer.decode(told) == "delta</s>"
    whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": "delta"}], tokenize=False)
    assert tokenizer(whole)["input_ids"][-1] == tokenizer.eos_token_id


def test_a_template_that_asks_with_other_tokens_is_told(
    post_train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """"assistant: " before "delta": in training the space is part of the answer's first token, when asked it stands alone."""
    for name, text, told in (("good", TEMPLATE, False), ("bad", TEMPLATE.replace(":\n", ": "), True)):
        (tmp_path / f"{name}.jinja").write_text(text)
        said = [f"trainer.chat_template_path={tmp_path / name}.jinja", "trainer.max_steps=1"]
        assert post_train("sft", "chat", *said, out=name)[0] == 0
        assert ("other tokens than it was taught" in capsys.readouterr().out) == told


@pytest.mark.parametrize("merge", ["true", "false"])
def test_lora(post_train: Run, tiny_model: Path, merge: str) -> None:
    """Merged, the folder is a whole model that computes what base and adapter do together; else it is the adapter."""
    from peft import PeftModel

    status, out = post_train("sft", "pairs", f"lora={{r: 4, lora_alpha: 8, target_modules: all-linear, merge: {merge}}}")
    assert status == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapter = out / "adapter" if merge == "true" else out
    together = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokens_BS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, before = together(tokens_BS).logits, AutoModelForCausalLM.from_pretrained(tiny_model)(tokens_BS).logits
    assert (wanted - before).abs().max() > 0.01
    if merge == "true":
        with torch.no_grad():
            assert (loaded(out)[0](tokens_BS).logits - wanted).abs().max() < 1e-4
    else:
        assert not (out / "model.safetensors").exists()


def test_examples_left_out_or_cut_are_counted(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL drops an example whose prompt fills max_length, and cuts long ones, without a word."""
    config = write_config(tmp_path, tiny_model, "sft", "pairs")
    table = rows("pairs")
    table[0]["prompt"] *= 30
    table[1]["completion"] *= 60
    table[2]["completion"] = " </s> and more"
    table[3]["note"] = "not read"
    write_rows(tmp_path / "pairs.jsonl", table)
    assert main(["sft", str(config), "trainer.max_steps=1"]) == 0
    said = capsys.readouterr().out
    for line in ("24 given", "1 with a note that is not read", "1 left out: the prompt alone fills trainer.max_length",
                 "1 that fill trainer.max_length = 64", "1 texts that hold a special token"):  # fmt: skip
        assert f"examples: {line}" in said, said


# --- DPO


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_dpo_learns_to_prefer(post_train: Run, tmp_path: Path, precompute: str) -> None:
    """With the reference computed once or in every step: held-out pairs are told apart, and the margin grows."""
    said = [f"trainer.precompute_ref_log_probs={precompute}", "trainer.max_steps=25", "trainer.learning_rate=3e-3"]
    status, out = post_train("dpo", "preferences", *said, f"data.validation={tmp_path / 'preferences.jsonl'}")
    assert status == 0
    metrics = json.loads((out / "post_training.json").read_text())["metrics"]
    assert metrics["eval_rewards/accuracies"] > 0.8 and losses(out)[0] == pytest.approx(0.6931, abs=1e-3) and losses(out)[-1] < 0.6
    loaded(out)


def test_precomputed_reference_gives_the_same_losses(post_train: Run) -> None:
    """The reference must be the model before training, with the same kernels, however it is computed."""
    found = []
    for precompute in ("true", "false"):
        status, out = post_train("dpo", "preferences", f"trainer.precompute_ref_log_probs={precompute}", out=precompute)
        assert status == 0
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("loss", ["ipo", "[sigmoid, sft]", "[hinge]"])
def test_dpo_losses(post_train: Run, loss: str) -> None:
    """Each comes through under its own name, one or several."""
    status, out = post_train("dpo", "preferences", f"trainer.loss_type={loss}", "trainer.max_steps=2")
    assert status == 0 and len(losses(out)) == 2


def test_dpo_with_lora(post_train: Run) -> None:
    """The reference is then the model without its adapter; merged, a whole model comes out."""
    status, out = post_train("dpo", "preferences", "lora={r: 4, merge: true, target_modules: all-linear}")
    assert status == 0 and losses(out)[0] == pytest.approx(0.6931, abs=1e-3)
    loaded(out)


# --- and back


def test_back_into_megaspark_bit_for_bit(post_train: Run, tmp_path: Path) -> None:
    """SFT, then DPO on what it made, then a checkpoint of ours, and out again: the same fp32 tensors at the end of the road."""
    status, sft = post_train("sft", "pairs", out="sft")
    assert status == 0
    status, dpo = post_train("dpo", "preferences", f"model.folder={sft}", out="dpo")
    assert status == 0
    assert main(["from-hf", str(dpo), str(tmp_path / "ours")]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "again"), "--dtype", "fp32"]) == 0
    before, after = load_file(dpo / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (dpo / "tokenizer.json").read_bytes()


# --- what is refused


BAD = [
    ("sft", "pairs", ["trainer.learning_rat=1"], "trainer.learning_rate"),
    ("sft", "pairs", ["trainer.lr=1e-3"], "trainer.learning_rate"),
    ("sft", "pairs", ["trainer.beta=0.1"], "SFTConfig has no such argument"),
    ("sft", "pairs", ["trainer.learning_rate=fast"], "trainer.learning_rate = 'fast'"),
    ("sft", "pairs", ["trainer.packing_strategy=bdf"], "did you mean bfd"),
    ("sft", "pairs", ["trainer.output_dir=x"], "say output at the top"),
    ("sft", "pairs", ["trainer.use_liger_kernel=true"], "kernels: true"),
    ("sft", "pairs", ["trainer.max_length=256"], "made for 128 tokens"),
    ("sft", "pairs", ["trainer.eval_strategy=epoch"], "data.validation"),
    ("sft", "pairs", ["kernels={atention: true}"], "kernels.attention"),
    ("sft", "pairs", ["lora={lora_alfa: 4}"], "did you mean lora.lora_alpha"),
    ("sft", "pairs", ["lora={merge: maybe}"], "true or false"),
    ("sft", "pairs", ["modle.folder=x"], "did you mean model"),
    ("sft", "pairs", ["model.folder=nowhere"], "no config.json"),
    ("sft", "pairs", ["data.train=nowhere.jsonl"], "no such file: nowhere.jsonl"),
    ("sft", "pairs", ["deepspeed=zero4.json"], "zero"),
    ("sft", "chat", [], "no chat template"),
    ("sft", "pairs", ["trainer.assistant_only_loss=true"], "needs conversations"),
    ("sft", "preferences", [], "no column completion"),
    ("sft", "pairs", ["trainer.padding_free=true"], "max_length"),
    ("sft", "pairs", ["trainer.max_length=4"], "no example has anything to learn"),
    ("dpo", "preferences", ["trainer.max_length=4", "trainer.precompute_ref_log_probs=false"], "no example has anything"),
    ("dpo", "pairs", [], "no column chosen"),
    ("dpo", "preferences", ["trainer.loss_type=sigmoidd"], "did you mean sigmoid"),
    ("dpo", "preferences", ["trainer.padding_free=true"], "ignores it"),
    ("dpo", "preferences", ["trainer.loss_type=[exo_pair]"], "Label smoothing"),
]


@pytest.mark.parametrize(("method", "kind", "overrides", "word"), BAD, ids=[f"{b[0]} {b[1]} {' '.join(b[2])}" for b in BAD])
def test_mistakes_are_told_in_one_line(
    post_train: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], method: str, kind: str, overrides: list[str], word: str
) -> None:
    """Exit status 2, one clear line, and no output that could be taken for a model."""
    status, out = post_train(method, kind, *overrides)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megaspark: ")]
    assert status == 2 and len(said) == 1 and word in said[0], said
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_an_output_is_not_replaced_unasked(post_train: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Neither a finished model, nor another run's unfinished work, nor, with --force, what is none of ours."""
    status, out = post_train("sft", "pairs", "trainer.max_steps=1")
    before = snapshot(out)
    assert status == 0 and post_train("sft", "pairs", "trainer.max_steps=1")[0] == 2 and snapshot(out) == before
    assert post_train("sft", "pairs", "trainer.max_steps=2", "--force")[0] == 0 and snapshot(out) != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    assert post_train("sft", "pairs", "--force", out="thesis")[0] == 2 and (tmp_path / "thesis" / "chapter1").exists()
    (tmp_path / "half.partial").mkdir()
    (tmp_path / "half.partial" / "identity.json").write_text("{}")
    assert post_train("sft", "pairs", out="half")[0] == 2
    assert "unfinished work of another run" in capsys.readouterr().err


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    """One that was cut off while it was written has no trainer_state.json, or half of one; 9 is older than 10."""
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# --- real processes


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megaspark", *words], cwd=CHECKOUT, env=process_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


@pytest.mark.launch
def test_killed_and_started_again_it_computes_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 after the first checkpoint: the same command goes on, and ends with the bits of a run that never stopped."""
    config = write_config(tmp_path, tiny_model, "sft", "pairs")
    said = ["trainer.max_steps=40", "trainer.save_steps=10"]
    assert main(["sft", str(config), f"output={tmp_path / 'whole'}", *said]) == 0
    command = ["sft", str(config), f"output={tmp_path / 'out'}", *said]
    child = start(*command)
    end = time.monotonic() + 90
    while child.poll() is None and time.monotonic() < end and newest_checkpoint(tmp_path / "out.partial") is None:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists(), "too fast to be killed"
    again = start(*command)
    told = again.communicate(timeout=90)[0]
    assert again.returncode == 0 and "goes on from" in told, told
    assert sha256_of(tmp_path / "out" / "model.safetensors") == sha256_of(tmp_path / "whole" / "model.safetensors")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def under_deepspeed(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command of the documentation, as typed."""
    command = [str(Path(sys.executable).parent / "deepspeed"), "--no_local_rank", "--num_gpus", str(processes)]
    command += ["--master_port", str(free_port()), "--module", "megaspark"]
    return subprocess.run([*command, *words], cwd=CHECKOUT, env=process_environment(), capture_output=True, text=True, timeout=170)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("method", "stage", "extra"),
    [
        ("sft", 2, []),
        pytest.param("sft", 3, [], marks=pytest.mark.long),
        pytest.param("sft", 0, [], marks=pytest.mark.long),
        pytest.param("dpo", 2, [], marks=pytest.mark.long),
        pytest.param("dpo", 3, ["trainer.precompute_ref_log_probs=false"], marks=pytest.mark.long),
        pytest.param("sft", 3, ["lora={r: 4, target_modules: all-linear}"], marks=pytest.mark.long),
    ],
)
def test_two_processes_under_deepspeed_compute_what_one_does(
    tiny_model: Path, tmp_path: Path, method: str, stage: int, extra: list[str]
) -> None:
    """The same global batch on two processes and ZeRO: the same losses to rounding, a folder that loads, and the same weights."""
    config = write_config(tmp_path, tiny_model, method, "pairs" if method == "sft" else "preferences")
    assert main([method, str(config), f"output={tmp_path / 'one'}", *extra]) == 0
    words = [method, str(config), f"output={tmp_path / 'two'}", f"deepspeed=zero{stage}.json", *extra]
    done = under_deepspeed(2, *words, "trainer.per_device_train_batch_size=2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert json.loads((tmp_path / "two" / "post_training.json").read_text())["processes"] == 2
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-3, name
    loaded(tmp_path / "two")


@pytest.mark.launch
@pytest.mark.parametrize("words", [["deepspeed=zero2.json"], pytest.param(["deepspeed=zero3.json"], marks=pytest.mark.long)])
def test_deepspeed_without_a_launcher(tiny_model: Path, tmp_path: Path, words: list[str]) -> None:
    """One process must find itself: no MPI is asked, nothing is compiled, and the losses are those without ZeRO."""
    config = write_config(tmp_path, tiny_model, "sft", "pairs")
    assert main(["sft", str(config), f"output={tmp_path / 'one'}"]) == 0
    alone = start("sft", str(config), f"output={tmp_path / 'alone'}", *words)
    told = alone.communicate(timeout=170)[0]
    assert alone.returncode == 0, told
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.launch
def test_a_mistake_under_deepspeed_is_told_once(tiny_model: Path, tmp_path: Path) -> None:
    """Two processes find it; one speaks, and the launcher hands on that it failed."""
    config = write_config(tmp_path, tiny_model, "sft", "pairs")
    done = under_deepspeed(2, "sft", str(config), "trainer.learning_rat=1")
    assert done.returncode != 0 and (done.stdout + done.stderr).count("megaspark: unknown key") == 1
    assert not (tmp_path / "out.partial").exists()
