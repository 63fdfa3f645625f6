"""`megaspark eval` from end to end, on tiny models: both roads agree, results do not drift, mistakes are one line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from test_sandboxes import needs_namespaces

from conftest import process_environment, snapshot
from megaspark import checkpoint, checkpoint_writers
from megaspark.errors import UserError
from megaspark.fragments import Fragment
from megaspark.models import llama
from megaspark.models.blocks import Execution
from megaspark.shards import Counts, Manifest, ShardWriter, dtype_for, sha256_of
from megaspark.tools import demo_tasks, to_hf
from megaspark.tools.eval import main
from megaspark.weights import build_model

TEXT = [f"def function_{i}(x):\n    return x + {i}  # é {'y' * (i % 7)}\n" for i in range(400)]
VOCAB, SEQ = 330, 64


@dataclass(frozen=True)
class Evaluated:
    """A run folder, its export and the data to score them on."""

    run: Path
    hf: Path
    data: Path


def write_dataset(folder: Path, tokenizer: Path, texts: list[str]) -> Path:
    """A dataset of texts, as data prep writes it, with its count of their bytes."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    folder.mkdir(parents=True)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    with ShardWriter(folder, f"{folder.name}-00000", dtype_for(VOCAB), source=folder.name) as writer:
        for text in texts:
            writer.add([*processor.encode(text), processor.eos_id()])
    counts = Counts(read=len(texts), kept=len(texts), tokens=writer.info.tokens, text_bytes=sum(len(t.encode()) for t in texts))
    Manifest(
        name=folder.name, tokenizer="tokenizer.model", tokenizer_sha256=sha256_of(tokenizer), vocab=VOCAB,
        dtype=dtype_for(VOCAB).name, eos_id=processor.eos_id(), bos_id=processor.bos_id(), append_eos=True, prepend_bos=False,
        settings_sha256="0" * 64, shards=(writer.info,), counts={folder.name: counts}, job=counts,
    ).save(folder)  # fmt: skip
    return folder


def write_run(run: Path, tokenizer: Path, data: Path) -> Path:
    """A run folder with one checkpoint, of random weights large enough for losses to depend on all that is computed."""
    config = llama.Config(hidden=48, layers=2, heads=4, kv_heads=2, ffn=72, vocab=VOCAB, init_std=0.2)
    run.mkdir(parents=True)
    told = {
        "model": config.model_dump(), "data": {"train": str(data), "validation": str(data), "seq": SEQ, "document_mask": True},
        "run": {"name": run.name},
    }  # fmt: skip
    state = {
        "step": 7, "samples": 70, "tokens": 4480, "identity": {"training data sha256": "d" * 64}, "config_sha256": "c" * 64,
        "config": told, "written_by": "a test", "phases": [],
        "tokenizer": {"path": str(tokenizer), "sha256": sha256_of(tokenizer), "prepend_bos": False},
    }  # fmt: skip
    held = []
    for name, parameter in build_model(config, 5, Execution()).named_parameters():
        flat = parameter.detach().flatten()
        tensors = {"master": flat, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        held.append(Fragment(name, tuple(parameter.shape), 0, flat.numel(), tensors))
    assert checkpoint_writers.save(checkpoint.step_folder(run, 7), state, held, 0, lambda value: [value]) is None
    return run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Two datasets, a checkpoint, and what to-hf makes of it."""
    folder = tmp_path_factory.mktemp("evaluated")
    tokenizer = folder / "tokenizer.model"
    with tokenizer.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    write_dataset(folder / "data" / "code", tokenizer, [text * (1 + i % 3) for i, text in enumerate(TEXT[:30])])
    write_dataset(folder / "data" / "odd", tokenizer, ["x", "", "東京 and more", *TEXT[50:60]])
    run = write_run(folder / "tiny", tokenizer, folder / "data")
    assert to_hf.main([str(run), str(folder / "hf"), "--dtype", "fp32"]) == 0
    return Evaluated(run, folder / "hf", folder / "data")


@pytest.fixture
def results(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """results(arguments...): what `megaspark eval ... --json` prints."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_checkpoint_and_its_export_score_the_same(evaluated: Evaluated, results: Callable[..., dict[str, Any]]) -> None:
    """Our own model from the masters, and transformers from the folder: packed documents, windows and bytes alike."""
    for options in ((), ("--no-document-mask",), ("--stride", 16, "--batch", 1), ("--seq", 33), ("--windows", 3)):
        ours = results(evaluated.run, "--data", evaluated.data, *options)["perplexity"]
        theirs = results(evaluated.hf, "--data", evaluated.data, *options)["perplexity"]
        assert list(ours["sources"]) == ["code", "odd"]
        for a, b in ((ours["all"], theirs["all"]), *zip(ours["sources"].values(), theirs["sources"].values(), strict=True)):
            assert a["tokens"] == b["tokens"] and a["text_bytes"] == b["text_bytes"]
            assert a["nats"] == pytest.approx(b["nats"], rel=1e-6)  # logits equal to 1e-5, losses of several nats
        assert ours["reading"] == theirs["reading"]
    masked, plain = (results(evaluated.run, f"--{no}document-mask")["perplexity"]["all"]["loss"] for no in ("", "no-"))
    assert abs(masked - plain) > 1e-3


def test_bytes_are_the_texts_and_the_totals_add_up(evaluated: Evaluated, results: Callable[..., dict[str, Any]]) -> None:
    """Bits per byte of all is not the mean of the sources' but of all bits over all bytes; a run's own data are the default."""
    told = results(evaluated.run)["perplexity"]
    sources = told["sources"].values()
    for row, folder in zip(sources, ("code", "odd"), strict=True):
        manifest = Manifest.load(evaluated.data / folder)
        assert (row["tokens"], row["text_bytes"]) == (manifest.tokens, manifest.text_bytes)
    assert told["all"]["nats"] == sum(row["nats"] for row in sources)
    bits = told["all"]["nats"] / math.log(2) / sum(row["text_bytes"] for row in sources)
    assert told["all"]["bits_per_byte"] == pytest.approx(bits)
    assert results(evaluated.run, "--data", evaluated.data)["perplexity"] == told


def test_the_same_evaluation_gives_the_same_bytes(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No date, path or host in what is printed; a moved folder tells the same, other weights another sha256."""
    moved = tmp_path / "hf"
    shutil.copytree(evaluated.hf, moved)
    said = []
    for folder in (evaluated.hf, evaluated.hf, moved):
        assert main([str(folder), "--data", str(evaluated.data), "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    told = json.loads(said[0])
    assert {"model", "versions", "dtype", "perplexity"} == set(told)
    assert all(len(row["data_sha256"]) == 64 for row in told["perplexity"]["sources"].values())
    assert str(tmp_path.parent) not in said[0]


def test_the_table_is_for_people(evaluated: Evaluated, capsys: pytest.CaptureFixture[str]) -> None:
    """A source, or the sum of all, missing from what people read."""
    assert main([str(evaluated.run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny, step 7 (checkpoint, sha256 ")
    assert [line.split()[0] for line in lines[-3:]] == ["code", "odd", "all"]
    assert all(len(line.split()) == 6 for line in lines[-4:])


def test_another_tokenizer_is_refused_but_the_same_in_another_file_is_not(evaluated: Evaluated, tmp_path: Path) -> None:
    """Ids of another vocabulary give a loss that means nothing, without any error."""
    other = tmp_path / "other"
    shutil.copytree(evaluated.data / "code", other)
    (other / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes()[:-40])
    manifest = json.loads((other / "manifest.json").read_text()) | {"tokenizer_sha256": sha256_of(other / "tokenizer.model")}
    (other / "manifest.json").write_text(json.dumps(manifest))
    for model in (evaluated.run, evaluated.hf):
        with pytest.raises(UserError, match=r"dataset code was made with another tokenizer"):
            main([str(model), "--data", str(other)])
    renamed = tmp_path / "hf"
    shutil.copytree(evaluated.hf, renamed)
    (renamed / "tokenizer.model").unlink()  # only the tokenizer.json is left, another file that encodes the same
    assert main([str(renamed), "--data", str(evaluated.data)]) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--seq", "0"], "--seq 0: must be above 0"),
        (["--seq", "4096", "--data", "DATA"], "context is 64; set --seq 64"),
        (["--stride", "99", "--data", "DATA"], "--stride 99 is above --seq 64"),
        (["--k", "2"], "--k 2: must be within 1 and --samples = 1"),
        (["--samples", "4", "--temperature", "0"], "they are all the same"),
        (["--data", "nowhere"], "no such dataset: nowhere"),
        (["--code", "code-dem.jsonl"], "did you mean code-demo.jsonl"),
        ([], "say what to evaluate it on"),
        (["--device", "cuda"], "no GPU"),
    ],
)
def test_mistakes_are_one_line(evaluated: Evaluated, options: list[str], reason: str) -> None:
    """Found before hours of work, not after."""
    if "no GPU" in reason and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = [str(evaluated.data) if option == "DATA" else option for option in options]
    with pytest.raises(UserError, match=reason) as caught:
        main([str(evaluated.hf), *arguments])
    assert "\n" not in str(caught.value)


def test_damaged_models_are_refused(evaluated: Evaluated, tmp_path: Path) -> None:
    """transformers fills a missing tensor with random values and goes on; a checkpoint may have been cut short."""
    from safetensors.torch import load_file, save_file

    hf, run = tmp_path / "hf", tmp_path / "run"
    shutil.copytree(evaluated.hf, hf)
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(evaluated.run, run)
    part = next(run.rglob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for model, reason in (
        (hf, "up_proj"), (run, "should have"), (tmp_path / "empty", "is no model"), (tmp_path / "absent", "no such model"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            main([str(model), "--data", str(evaluated.data)])


@pytest.mark.long
@pytest.mark.launch
def test_a_failed_export_says_why(evaluated: Evaluated, tmp_path: Path) -> None:
    """The reason is in another process's stderr, and the model is not to be blamed."""
    tokenizer = shutil.copy(evaluated.run.parent / "tokenizer.model", tmp_path / "lost.model")
    run = write_run(tmp_path / "run", Path(tokenizer), evaluated.data)
    Path(tokenizer).unlink()
    assert main([str(run), "--data", str(evaluated.data)]) == 0  # our own model needs no export
    with pytest.raises(UserError, match=r"could not be exported: .*lost\.model"):
        main([str(run), "--code", "code-demo.jsonl"])


# ---- tasks and code


def test_tasks_without_the_harness_say_what_to_install(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError's traceback tells nobody which extra is missing."""
    monkeypatch.setattr("megaspark.harness_tasks.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"megaspark\[eval\]"):
        main([str(evaluated.hf), "--tasks", "demo_text"])


needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo tasks, of a few documents of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "corpus").mkdir()
    documents = ["".join(TEXT[40 * d : 40 * d + 20]) for d in range(6)]
    (folder / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert demo_tasks.main([str(folder / "corpus"), str(folder / "tasks"), "--examples", "6"]) == 0
    return folder / "tasks"


@needs_harness
def test_demo_tasks_run_on_a_checkpoint(
    evaluated: Evaluated, task_dir: Path, results: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Offline, through a temporary export: every question is asked, and bits per byte are near those of our own windows."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    told = results(evaluated.run, "--tasks", "demo_next_line", "demo_text", "--task-dir", task_dir, "--limit", 5)["tasks"]
    assert told["demo_next_line"]["examples"] == 5 and 0 <= told["demo_next_line"]["metrics"]["acc"] <= 1
    assert told["demo_text"]["data_sha256"] == sha256_of(task_dir / "demo_text.jsonl")
    own = results(evaluated.run)["perplexity"]["sources"]["code"]["bits_per_byte"]
    assert told["demo_text"]["metrics"]["bits_per_byte"] == pytest.approx(own, rel=0.2)  # like text, another context rule
    assert not list(tmp_path.glob("megaspark-eval-*"))


@needs_harness
@pytest.mark.long
@pytest.mark.launch
def test_lm_eval_takes_the_export_and_the_demo_tasks_unchanged(evaluated: Evaluated, task_dir: Path, tmp_path: Path) -> None:
    """The harness's own command, offline; and the same figures through ours, from the checkpoint."""
    environment = process_environment(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    names = ["demo_next_line", "demo_text"]
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={evaluated.hf},dtype=float32",
        "--tasks", ",".join(names), "--include_path", str(task_dir), "--device", "cpu", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    code = "import sys; from megaspark.tools.eval import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(evaluated.run), "--tasks", *names, "--task-dir", str(task_dir), "--json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads(done.stdout)["tasks"]
    for name, metric in (("demo_next_line", "acc"), ("demo_next_line", "acc_norm"), ("demo_text", "bits_per_byte")):
        assert ours[name]["metrics"][metric] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-6)
    assert ours["demo_next_line"]["examples"] == 6
    assert ours["demo_text"]["data_sha256"] == sha256_of(task_dir / "demo_text.jsonl")


@needs_harness
@pytest.mark.long
def test_an_unknown_task_is_named(evaluated: Evaluated, task_dir: Path) -> None:
    """With the nearest of the thousands that there are."""
    with pytest.raises(UserError, match="demo_txt; did you mean demo_text"):
        main([str(evaluated.hf), "--tasks", "demo_txt", "--task-dir", str(task_dir)])
    with pytest.raises(UserError, match="megaspark demo-tasks"):
        main([str(evaluated.hf), "--tasks", "demo_text", "--task-dir", str(task_dir / "absent")])


@pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")
def test_peft_takes_the_export_unchanged(evaluated: Evaluated, tmp_path: Path) -> None:
    """LoRA on the export: starts where the model is, trains, and merges into a folder that this command scores."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(evaluated.hf, dtype=torch.float32)
    tokens = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    before = base(tokens).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(model(tokens).logits, before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(evaluated.hf).save_pretrained(tmp_path / "merged")
    assert main([str(tmp_path / "merged"), "--data", str(evaluated.data)]) == 0


@needs_namespaces
def test_code_is_sampled_alike_for_a_seed_and_judged(
    evaluated: Evaluated, tmp_path: Path, results: Callable[..., dict[str, Any]]
) -> None:
    """A random model solves nothing, but a problem that any text solves; samples of one seed are the same, and are reported."""
    anything = {"task_id": "t/any", "prompt": "x = '''\n", "entry_point": "x", "canonical_solution": "'''\n"}
    hard = {"task_id": "t/hard", "prompt": "def f(n):\n", "entry_point": "f", "canonical_solution": "    return n * 7\n"}
    problems = [
        {**anything, "test": "'''\ndef check(candidate):\n    pass\n"},  # closes what the completion has left open
        {**hard, "test": "def check(candidate):\n    assert candidate(6) == 42\n"},
    ]
    problems[0]["canonical_solution"] = ""
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    before = snapshot(evaluated.hf)
    options = ("--code", path, "--samples", 3, "--k", 1, 3, "--tokens", 12, "--seed", 4)
    first, again = (results(evaluated.hf, *options)["code"] for _ in range(2))
    assert first == again and snapshot(evaluated.hf) == before
    assert first["problems"]["t/hard"]["correct"] == 0
    assert first["problems"]["t/any"]["samples"] == 3 and first["problems"]["t/any"]["correct"] >= 1
    assert first["pass@3"] == 0.5 and first["confined"] is True and first["file_sha256"] == sha256_of(path)


@needs_namespaces
def test_a_prompt_that_fills_the_context_fails_and_is_named(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left out, it would raise the score of models with short contexts."""
    test = "def check(candidate):\n    assert candidate() == 1\n"
    long = {"task_id": "t/long", "prompt": "def f():\n" + "    # é\n" * 60, "entry_point": "f", "test": test}
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({**long, "canonical_solution": "    return 1\n"}) + "\n")
    assert main([str(evaluated.hf), "--code", str(path), "--json"]) == 0
    said = capsys.readouterr()
    code = json.loads(said.out)["code"]
    assert code["pass@1"] == 0.0 and code["prompts_without_room"] == ["t/long"] and "t/long" in said.err
