"""A run's config: what ships loads, what is misspelled or illegal is refused with the way out, and nothing is written."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import CHECKOUT, VOCAB, TinyData, random_documents, snapshot, tiny_run, write_tokens
from megaspark import settings
from megaspark.config import RunConfig, check_run, load_config
from megaspark.data_prep.dedup_jobs import DedupSettings
from megaspark.data_prep.jobs import PrepSettings
from megaspark.errors import UserError
from megaspark.flops import parameters
from megaspark.kernels import native
from megaspark.kernels.dispatch import INTERPRETED
from megaspark.models import ARCHITECTURES, architecture
from megaspark.posttraining import PostTraining, check_arguments
from megaspark.tools import dpo, sft
from megaspark.weights import parameter_shapes

CONFIGS = CHECKOUT / "ds_configs"
SHIPPED = sorted(p.name for p in CONFIGS.glob("*.yaml"))
RUNS = [name for name in SHIPPED if name.startswith("llama-")]
POST_TRAINING = {"sft-demo.yaml": sft.METHOD, "dpo-demo.yaml": dpo.METHOD}


def schema_of(name: str) -> type[settings.Section]:
    """What a shipped config of this name is checked against."""
    kinds = {"prep": PrepSettings, "dedup": DedupSettings, "sft": PostTraining, "dpo": PostTraining}
    return kinds.get(name.partition("-")[0], RunConfig[architecture("llama").Config])


def load(name: str, path: Path) -> None:
    """Loads a config as its own program does."""
    if name in RUNS:
        load_config(path, [])
        return
    config, tree = settings.load(path, [], schema_of(name))
    if name in POST_TRAINING:
        arguments, _ = POST_TRAINING[name].classes()
        check_arguments(config.trainer, arguments, tree, "trainer", {})


def said_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key, sections included."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from said_keys(value, f"{prefix}{key}.")


def misspellings(word: str) -> list[str]:
    """The word with a letter dropped, doubled, or swapped with the next."""
    found = {word[:i] + word[i + 1 :] for i in range(len(word))} | {word[:i] + word[i] + word[i:] for i in range(len(word))}
    found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return sorted(found - {word, ""})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load(name):
    """A shipped config that its own program refuses."""
    load(name, CONFIGS / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_config_misspelled_is_refused(name, tmp_path):
    """One key that is read leniently is enough to train something else for a week."""
    tree = settings.read(CONFIGS / name, [])
    valid = {"base", *settings.dotted_keys(schema_of(name))}
    tried = 0
    for key in said_keys(tree.values):
        section, _, last = key.rpartition(".")
        for wrong in misspellings(last):
            if f"{section}.{wrong}".lstrip(".") in valid:
                continue
            values = copy.deepcopy(tree.values)
            node = values
            for part in filter(None, section.split(".")):
                node = node[part]
            node[wrong] = node.pop(last)
            path = tmp_path / name
            path.write_text(yaml.safe_dump(values))
            with pytest.raises(UserError) as caught:
                load(name, path)
            dotted = f"{section}.{wrong}" if section else wrong
            assert f"unknown key {dotted} ({path}:" in str(caught.value)
            assert f"did you mean {key}?" in str(caught.value)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("size, count", [("3b", 2_289_158_144), ("30b", 32_528_943_616)])
def test_litesparks_sizes_have_its_parameter_counts(size, count):
    """A head, a norm or the tying counted otherwise: the model would not be the published one (arXiv 2510.02483, Table 1)."""
    config, _ = load_config(CONFIGS / f"llama-{size}.yaml", [])
    assert sum(torch.Size(shape).numel() for shape in parameter_shapes(config.model).values()) == count
    assert parameters(config.model.shape, tied=config.model.tie_embeddings) == count


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_preset_of_every_architecture_loads(arch):
    """A preset with an illegal head count, found out when somebody first asks for it."""
    for size in architecture(arch).SIZES:
        config, tree = load_config(CONFIGS / "llama-demo.yaml", [f"model.arch={arch}", f"model.size={size}"])
        assert config.model.size == size
        assert tree.place("model.hidden") == f"model.size={size}"


def test_size_is_a_preset_that_other_keys_override():
    """A preset that wins over what the user says, from the file or the command line, trains another model."""
    config, _ = load_config(CONFIGS / "llama-3b.yaml", ["model.layers=3", "model.tie_embeddings=true"])
    assert (config.model.layers, config.model.hidden, config.model.tie_embeddings) == (3, 2048, True)
    with pytest.raises(UserError, match=r"model.size = '3B' \(command line: model.size=3B\) is no preset; .*\b3b\b"):
        load_config(CONFIGS / "llama-3b.yaml", ["model.size=3B"])
    with pytest.raises(UserError, match=r"'lama' is no architecture here; did you mean llama\?"):
        load_config(CONFIGS / "llama-3b.yaml", ["model.arch=lama"])
    with pytest.raises(UserError, match=r"model = 'llama'.*should be a section"):
        load_config(CONFIGS / "llama-3b.yaml", ["model=llama"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["model.hidden=100", "model.heads=3"], ["model.hidden = 100", "model.heads = 3", "model.head_dim"]),
        (["model.heads=4", "model.kv_heads=3"], ["model.heads = 4", "model.kv_heads = 3"]),
        (["model.head_dim=7"], ["head dimension is 7", "even"]),
        (["model.layers=0"], ["model.layers = 0"]),
        (["optim.lr=0.001", "optim.min_lr=0.01"], ["optim.min_lr = 0.01", "optim.lr = 0.001"]),
        (["optim.betas=[0.9, 1.0]"], ["optim.betas"]),
        (["optim.betas=[0.9]"], ["optim.betas"]),
        (["run.precision=fp16"], ["run.precision = 'fp16'", "bf16"]),
        (["kernels.atention=sdpa"], ["kernels", "'atention'", "did you mean attention?"]),
        (["kernels.attention=spda"], ["kernels", "'spda'", "did you mean sdpa?"]),
        (["kernels.rope=flash_attn"], ["rope has no backend 'flash_attn'", "triton"]),
        (["run.resume=maybe"], ["run.resume"]),
        (["run.name=../elsewhere"], ["run.name"]),
        (["run.keep_every=120"], ["run.keep_every = 120", "run.save_every = 50", "set 100"]),
        (["run.micro_batch=0"], ["run.micro_batch = 0"]),
        (["data.seq=-4"], ["data.seq = -4"]),
        (["data.blend={a: 0.5, b: 0}"], ["data.blend"]),
        (["optim.lr=.nan"], ["optim.lr"]),
    ],
)
def test_impossible_values_are_refused_with_both_sides(overrides, words):
    """A shape or a rate that fails in the middle of torch, an hour later and without a name."""
    with pytest.raises(UserError) as caught:
        load_config(CONFIGS / "llama-demo.yaml", overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---- against the processes, the data and the disk


def check(data: TinyData, folder: Path, world: int, *overrides: str) -> Any:
    path, _ = tiny_run(data, folder)
    config, tree = load_config(path, overrides)
    return check_run(config, tree, world)


def refusal(data: TinyData, folder: Path, world: int, *overrides: str) -> str:
    """The message of a run that is refused, after making sure that nothing was written anywhere near."""
    tiny_run(data, folder)
    before = snapshot(folder), snapshot(data.train.parent)
    with pytest.raises(UserError) as caught:
        path = folder / "run.yaml"
        config, tree = load_config(path, overrides)
        check_run(config, tree, world)
    assert (snapshot(folder), snapshot(data.train.parent)) == before, "a refused run wrote something"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("world, micro, accumulation", [(1, 8, 1), (1, 2, 4), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_accumulation_follows_from_the_global_batch(tiny_data, tmp_path, world, micro, accumulation):
    """A step of another size on another number of processes is another training run."""
    layout = check(tiny_data, tmp_path, world, f"run.micro_batch={micro}").layout
    assert (layout.world, layout.data_parallel, layout.accumulation, layout.stage) == (world, world, accumulation, 1)
    assert layout.deepspeed["train_batch_size"] == 8
    assert layout.deepspeed["train_micro_batch_size_per_gpu"] * layout.deepspeed["gradient_accumulation_steps"] * world == 8
    assert layout.deepspeed["gradient_clipping"] == 1.0 and layout.deepspeed["bf16"] == {"enabled": False}


def test_global_batch_that_does_not_divide_names_what_would(tiny_data, tmp_path):
    """A remainder that is dropped or repeated in silence; and the message must hold numbers that do work."""
    message = refusal(tiny_data, tmp_path, 3)
    assert "run.global_batch = 8" in message and "run.micro_batch = 2" in message and "3 processes" in message
    assert "run.global_batch=6" in message and "2 processes" in message
    assert check(tiny_data, tmp_path, 3, "run.global_batch=6").layout.accumulation == 1
    assert check(tiny_data, tmp_path, 2).layout.accumulation == 2
    message = refusal(tiny_data, tmp_path, 4, "run.micro_batch=3", "run.global_batch=20")
    assert "run.global_batch=24" in message and "processes" not in message.partition("nearest")[2]


def test_a_layout_that_is_none_is_refused_before_anything_is_written(tiny_data, tmp_path):
    """DeepSpeed refuses it at run time, after the cluster was taken (tests/test_layouts.py has the other cases)."""
    message = refusal(tiny_data, tmp_path, 2, "parallel.pipeline=2", "deepspeed=zero3.json")
    assert "parallel.pipeline = 2" in message and "stage 3" in message and "zero1.json" in message


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="Triton can run here")
def test_a_kernel_that_cannot_run_here(tiny_data, tmp_path):
    """Triton asked for by name where there is no GPU fails deep inside the first step."""
    message = refusal(tiny_data, tmp_path, 1, "kernels.attention=triton_fused")
    assert "kernels.attention = triton_fused" in message and "kernels.attention=auto" in message
    assert check(tiny_data, tmp_path, 1, "kernels.attention=sdpa").config.execution.backend("attention") == "sdpa"
    assert check(tiny_data, tmp_path, 1, "kernels.attention=sdpa").config.execution.backend("rope") == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="C++ is not asked for on a GPU")
def test_native_kernels_that_cannot_run_here(tiny_data, tmp_path, monkeypatch):
    """C++ asked for by name where it cannot be fails in the first step, on every process."""
    for precision in ("fp32", "bf16"):
        backends = ("kernels.linear=native", "kernels.attention=native", f"run.precision={precision}")
        assert check(tiny_data, tmp_path, 1, *backends).config.execution.backend("linear") == "native"
    message = refusal(tiny_data, tmp_path, 1, "kernels.attention=native", "model.head_dim=258")
    assert "takes heads of up to 256 features, not 258" in message
    monkeypatch.setattr(native, "available", lambda: False)
    assert "needs a C++ compiler" in refusal(tiny_data, tmp_path, 1, "kernels.attention=native")


def test_fp8_is_bf16_with_linears_that_fit_it(tiny_data, tmp_path):
    """A width that no 8-bit matrix product takes; or fp8 asked for and fp32 weights beneath."""
    widths = ("model.hidden=32", "model.head_dim=16", "model.ffn=96", "model.layers=3", "data.seq=32")
    layout = check(tiny_data, tmp_path, 1, "run.precision=fp8", *widths).layout
    assert layout.deepspeed["bf16"] == {"enabled": True}
    message = refusal(tiny_data, tmp_path, 1, "run.precision=fp8", *widths, "model.ffn=100")
    assert "model.ffn = 100" in message and "16" in message and "run.precision=bf16" in message
    assert "model.layers = 2" in refusal(tiny_data, tmp_path, 1, "run.precision=fp8", *widths, "model.layers=2")


def test_compiled_blocks_under_zero_3(tiny_data, tmp_path):
    """ZeRO-3 empties a module's weights between its calls, which compiled code does not see."""
    message = refusal(tiny_data, tmp_path, 2, "run.compile=true", "deepspeed=zero3.json")
    assert "run.compile = true" in message and "zero2.json" in message
    assert check(tiny_data, tmp_path, 2, "run.compile=true", "deepspeed=zero2.json").config.run.compile


def test_deepspeed_file_that_says_another_number(tiny_data, tmp_path):
    """Two places for one number: the file's would win in DeepSpeed, the config's in our own figures."""
    (tmp_path / "mine.json").write_text('{"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}')
    message = refusal(tiny_data, tmp_path, 1, f"deepspeed={tmp_path / 'mine.json'}")
    assert "gradient_clipping = 0.5" in message and "optim.clip" in message and "mine.json" in message
    assert check(tiny_data, tmp_path, 1, f"deepspeed={tmp_path / 'mine.json'}", "optim.clip=0.5").layout.stage == 1


def test_deepspeed_file_is_found_beside_the_file_that_names_it(tiny_data, tmp_path, monkeypatch):
    """A run moved with its DeepSpeed file must not need the user to stand in its folder."""
    path, _ = tiny_run(tiny_data, tmp_path)
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 2}}')
    path.write_text(path.read_text().replace("zero1.json", "own.json"))
    monkeypatch.chdir("/")
    config, tree = load_config(path, [])
    assert check_run(config, tree, 1).layout.stage == 2


@pytest.mark.parametrize("vocab, legal", [(VOCAB - 1, False), (VOCAB, True), (256, True), (32000, False)])
def test_vocabulary_must_be_the_tokenizers(tiny_data, tmp_path, vocab, legal):
    """Ids past the embedding table crash on the GPU; a far larger table means that the data is another tokenizer's."""
    if legal:
        check(tiny_data, tmp_path, 1, f"model.vocab={vocab}")
    else:
        message = refusal(tiny_data, tmp_path, 1, f"model.vocab={vocab}")
        assert f"model.vocab = {vocab}" in message and f"model.vocab={VOCAB}" in message


def test_tokenizer_must_be_the_datas(tiny_data, tmp_path):
    """Trained on ids of one tokenizer, exported with another: text out of it would be noise."""
    check(tiny_data, tmp_path, 1, f"data.tokenizer={tiny_data.tokenizer}")
    (tmp_path / "other.model").write_bytes(b"another tokenizer")
    message = refusal(tiny_data, tmp_path, 1, f"data.tokenizer={tmp_path / 'other.model'}")
    assert "other.model" in message and str(tiny_data.train) in message
    assert "no such file" in refusal(tiny_data, tmp_path, 1, f"data.tokenizer={tmp_path / 'none.model'}")


@pytest.mark.parametrize("where", ["train", "validation"])
def test_datasets_of_two_tokenizers_do_not_mix(tiny_data, tmp_path, where):
    """A blend, or a validation loss, over two vocabularies is meaningless and looks fine."""
    shutil.copytree(tiny_data.train, tmp_path / "train")
    shutil.copytree(tiny_data.validation, tmp_path / "validation")
    write_tokens(tmp_path / where / "odd", "odd", [random_documents(5, 20)], tokenizer=b"another")
    paths = [f"data.{kind}={tmp_path / kind}" for kind in ("train", "validation")]
    message = refusal(tiny_data, tmp_path, 1, *paths)
    assert "different tokenizers" in message and "odd" in message


def test_blend_names_must_be_datasets(tiny_data, tmp_path):
    """A misspelled source would get no samples, and the others all of its share."""
    check(tiny_data, tmp_path, 1, "data.blend={a: 0.5, b: 0.5}")
    write_tokens(tmp_path / "more" / "CommonCrawl", "CommonCrawl", [random_documents(5, 20)])
    message = refusal(tiny_data, tmp_path, 1, f"data.train={tmp_path / 'more'}", "data.blend={ComonCrawl: 1}")
    assert "ComonCrawl" in message and "did you mean CommonCrawl?" in message


def test_evaluation_without_validation_data(tiny_data, tmp_path):
    """Asked for by name and never done."""
    message = refusal(tiny_data, tmp_path, 1, "data.validation=null", "run.eval_every=5")
    assert "run.eval_every = 5" in message and "data.validation" in message
    check(tiny_data, tmp_path, 1, "data.validation=null")
    check(tiny_data, tmp_path, 1, "data.validation=null", "run.eval_every=0")


def test_data_that_is_not_there_names_the_command(tiny_data, tmp_path):
    """A wrong path, an empty folder or a data-prep job that was stopped half-way: told before a process starts."""
    for path in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "half"):
        if path.name != "nowhere":
            path.mkdir()
    (tmp_path / "half" / ".work").mkdir()
    for name in ("nowhere", "empty", "half"):
        for key in ("train", "validation"):
            message = refusal(tiny_data, tmp_path, 1, f"data.{key}={tmp_path / name}")
            assert name in message and "megaspark prep JOB.yaml" in message


def test_dataset_shorter_than_a_sample(tiny_data, tmp_path):
    """A sequence longer than the data would divide by zero samples."""
    message = refusal(tiny_data, tmp_path, 1, "data.seq=100000")
    assert "data.seq = 100000" in message and "too few" in message


def test_checkpoint_that_does_not_fit_the_disk(tiny_data, tmp_path):
    """The first save, hours in, would find the disk full."""
    message = refusal(tiny_data, tmp_path, 1, "model.hidden=65536", "model.layers=100000")
    assert "no space" in message and "run.dir" in message and str(tmp_path) in message
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tiny_data, tmp_path, 1, f"run.dir={tmp_path / 'file'}")


def test_resolved_config_says_everything_and_loads_again(tmp_path):
    """The config.yaml in a run folder is the run: a default left out of it changes when the program does."""
    config, _ = load_config(CONFIGS / "llama-30b.yaml", ["run.seed=5", "data.blend={C4: 0.3, ArXiv: 0.7}"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.resolved()))
    assert load_config(path, [])[0] == config
    for section in ("data", "optim", "parallel", "run"):
        assert set(config.resolved()[section]) == set(type(getattr(config, section)).model_fields)
