"""What an SFT or DPO run is told, and every check of it before a model is loaded, a process joined or a byte written.

The `trainer:` section is TRL's: its keys are the names of SFTConfig's or DPOConfig's arguments and go through as they are; so
do those of `lora:` to PEFT's LoraConfig. TRL takes a misspelled or mistyped value only where it knows better; here each key must
exist and each value be of its declared type, so that `2e-5`, a string to YAML, arrives as the number that was meant.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megaspark import settings
from megaspark.deepspeed_files import DeepSpeedFile, read_deepspeed_file
from megaspark.errors import UserError
from megaspark.example_files import Examples, read_examples
from megaspark.hf_kernels import Kernels
from megaspark.manifests import sha256_of
from megaspark.settings import Section, Tree, nearest

MAX_LENGTH = 1024  # TRL's default, where the model's context allows it
# Names that people know from elsewhere.
OTHER_NAMES = {
    "lr": "learning_rate", "steps": "max_steps", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "micro_batch": "per_device_train_batch_size", "seq": "max_length", "clip": "max_grad_norm", "rank": "r", "alpha": "lora_alpha",
}  # fmt: skip
OURS = {
    "output_dir": "say output at the top of the file",
    "deepspeed": "say deepspeed at the top of the file",
    "resume_from_checkpoint": "the same command goes on from the newest checkpoint by itself",
    "model_init_kwargs": "say model.dtype and kernels",
    "trust_remote_code": "no code out of a model's folder is run",
    "use_liger_kernel": "say kernels: true for ours; Liger's fail on a CPU and stay in the process",
    "do_train": "a run trains",
    "do_eval": "a run with data.validation evaluates",
    "local_rank": "the launcher says it",
}


class Model(Section):
    """What is trained on: a Hugging Face folder, such as `megaspark to-hf` writes."""

    folder: str
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="of the weights while they train, and as they are written")


class Data(Section):
    """Files of examples: paths or globs of .jsonl, .jsonl.gz, .jsonl.zst and .parquet."""

    train: str | list[str]
    validation: str | list[str] | None = None


class PostTraining(Section):
    """One YAML file: everything that an SFT or DPO run is."""

    model: Model
    data: Data
    output: str = Field(description="the folder to make")
    lora: dict[str, Any] | None = Field(None, description="LoraConfig's arguments, and merge: whether to add it to the weights")
    kernels: bool | Kernels = Field(True, description="our kernels: all, none, or attention, rms_norm, mlp one by one")
    trainer: dict[str, Any] = Field(default_factory=dict, description="SFTConfig's or DPOConfig's arguments")
    deepspeed: str | None = None

    @property
    def chosen_kernels(self) -> Kernels | None:
        """The kernels that are on; None without any."""
        if isinstance(self.kernels, bool):
            return Kernels() if self.kernels else None
        return self.kernels


@dataclass(frozen=True)
class Method:
    """What tells SFT from DPO.

    classes: gives TRL's (config, trainer); forms: the columns that its examples may have, given `trainer:`; shown: the metrics
    that a run's last line shows; refused: arguments of TRL's that would not do what they say, with the reason; choices: values
    that TRL would find wrong only in the first step.
    """

    name: str
    classes: Callable[[], tuple[type, type]]
    forms: Callable[[Mapping[str, Any]], Sequence[tuple[str, ...]]]
    shown: tuple[str, ...]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A run in which no mistake was found: its settings with every argument of the right type, and what it reads."""

    config: PostTraining
    method: Method
    trainer: dict[str, Any]
    lora: dict[str, Any] | None
    merge: bool
    train: Examples
    validation: Examples | None
    deepspeed: DeepSpeedFile | None
    model_files: dict[str, str]  # name -> sha256
    tokenizer: Any

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must agree in to go on where another one stopped."""
        files = [*self.train.files, *(self.validation.files if self.validation else [])]
        return {
            "method": self.method.name,
            "config_sha256": settings.digest(self.config.model_dump(mode="json")),
            "data_sha256": [file["sha256"] for file in files],
            "model_sha256": self.model_files,
        }


def load_run(path: str | Path, overrides: Sequence[str], method: Method) -> Checked:
    """Reads a run's YAML and its overrides and holds them against the machine, the model and the data; writes nothing.

    Raises UserError for the first thing that is not right.
    """
    config, tree = settings.load(path, overrides, PostTraining)
    arguments_class = _classes(method)[0]
    trainer = check_arguments(config.trainer, arguments_class, tree, "trainer", {**OURS, **method.refused})
    _check_choices(trainer, arguments_class, method, tree)
    lora, merge = _check_lora(config, tree)
    folder = Path(config.model.folder)
    model, files = _check_model(folder, tree.place("model.folder"))
    _check_kernels(config, model, tree)
    _check_length(trainer, model, tree)
    deepspeed = _check_deepspeed(config, tree)
    forms = method.forms(trainer)
    train = read_examples(_listed(config.data.train), forms, tree.place("data.train"))
    said = config.data.validation
    validation = read_examples(_listed(said), [train.columns], tree.place("data.validation")) if said else None
    if validation is None and trainer.get("eval_strategy", "no") != "no":
        raise UserError(f"trainer.eval_strategy = {trainer['eval_strategy']} needs data.validation")
    tokenizer = _check_tokenizer(folder, trainer, train, tree)
    return Checked(config, method, trainer, lora, merge, train, validation, deepspeed, files, tokenizer)


def check_arguments(
    said: Mapping[str, Any], cls: type, tree: Tree, section: str, refused: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments of a dataclass from elsewhere, each known and of the type that it declares; numbers in quotes become numbers.

    Raises UserError naming the place and the nearest argument, or the reason why one is refused.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    out = {}
    for key, value in said.items():
        place = tree.place(f"{section}.{key}")
        if key in refused:
            raise UserError(f"{section}.{key} ({place}): {refused[key]}")
        if key not in known:
            other = OTHER_NAMES.get(key)
            hint = f"; did you mean {other}?" if other in known else nearest(key, known)
            near = hint.startswith("; did")
            hint = hint.replace("mean ", f"mean {section}.") if near else f"; {cls.__name__} has no such argument"
            raise UserError(f"unknown key {section}.{key} ({place}){hint}")
        try:
            out[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            if hints[key] == list[str] and isinstance(value, str):
                out[key] = [value]
                continue
            raise UserError(f"{section}.{key} = {value!r} ({place}): {error.errors()[0]['msg']}") from None
    return out


def _check_choices(trainer: Mapping[str, Any], cls: type, method: Method, tree: Tree) -> None:
    declared = {field.name: field.metadata["choices"] for field in dataclasses.fields(cls) if "choices" in field.metadata}
    for key, choices in {**declared, **method.choices}.items():
        said = trainer.get(key)
        for value in said if isinstance(said, list) else [said]:
            if value is not None and value not in choices:
                place = tree.place(f"trainer.{key}")
                raise UserError(f"trainer.{key} = {value!r} ({place}){nearest(str(value), [*choices])}")


def _classes(method: Method) -> tuple[type, type]:
    try:
        return method.classes()
    except ImportError as error:
        raise UserError(f"megaspark {method.name} needs TRL and PEFT ({error}): pip install 'megaspark[posttrain]'") from None


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _check_lora(config: PostTraining, tree: Tree) -> tuple[dict[str, Any] | None, bool]:
    if config.lora is None:
        return None, False
    from peft import LoraConfig

    said = dict(config.lora)
    merge = said.pop("merge", True)
    if not isinstance(merge, bool):
        raise UserError(f"lora.merge = {merge!r} ({tree.place('lora.merge')}) should be true or false")
    return {"task_type": "CAUSAL_LM", **check_arguments(said, LoraConfig, tree, "lora", {})}, merge


def _check_model(folder: Path, place: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The folder's config.json, and the sha256 of it and of its weights; raises UserError if there is no whole model in it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.folder = {folder} ({place}) is no Hugging Face folder: it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder}/config.json: not JSON ({error})") from None
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = next((name for name in [*names, "tokenizer.json"] if not (folder / name).is_file()), None)
    if missing:
        raise UserError(f"model.folder = {folder} ({place}) has no {missing}")
    return config, {name: sha256_of(folder / name) for name in ["config.json", *names]}


def _check_kernels(config: PostTraining, model: Mapping[str, Any], tree: Tree) -> None:
    kernels = config.chosen_kernels
    if kernels and kernels.attention and model.get("attention_dropout"):
        raise UserError(
            f"the model's attention_dropout = {model['attention_dropout']} and the attention kernel has no dropout: "
            f"say kernels.attention=false ({tree.place('kernels')})"
        )


def _check_length(trainer: dict[str, Any], model: Mapping[str, Any], tree: Tree) -> None:
    context = model.get("max_position_embeddings")
    if "max_length" not in trainer:
        trainer["max_length"] = min(MAX_LENGTH, context or MAX_LENGTH)
    elif context and (trainer["max_length"] or 0) > context:
        raise UserError(
            f"trainer.max_length = {trainer['max_length']} ({tree.place('trainer.max_length')}), but the model was made for "
            f"{context} tokens: beyond them it has learned no positions"
        )


def _check_deepspeed(config: PostTraining, tree: Tree) -> DeepSpeedFile | None:
    if config.deepspeed is None:
        return None
    place = tree.place("deepspeed").rpartition(":")[0]
    return read_deepspeed_file(config.deepspeed, Path(place).parent if Path(place).is_file() else None)


def _check_tokenizer(folder: Path, trainer: Mapping[str, Any], train: Examples, tree: Tree) -> Any:
    """The model's tokenizer, as post-training needs it: "</s>" in a text is the token that ends it, for TRL writes it so."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its tokenizer does not load ({str(error).splitlines()[0]})") from None
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {folder} names no eos_token, and without one no answer would ever end")
    template, said = tokenizer.chat_template, trainer.get("chat_template_path")
    if said and str(said).endswith((".jinja", ".j2")):
        if not Path(said).is_file():
            raise UserError(f"no such file: {said} (trainer.chat_template_path, {tree.place('trainer.chat_template_path')})")
        template = Path(said).read_text(encoding="utf-8")
    if train.conversational and not (template or said):
        raise UserError(
            f"{train.files[0]['file']} holds conversations and {folder} has no chat template: "
            "give trainer.chat_template_path=FILE.jinja, or use text columns"
        )
    if trainer.get("assistant_only_loss"):
        if not train.conversational:
            raise UserError("trainer.assistant_only_loss = true needs conversations: rows with messages {role, content}")
        if isinstance(template, str) and "{% generation %}" not in template and "{%- generation" not in template:
            raise UserError(
                "trainer.assistant_only_loss = true needs a chat template that marks what the assistant says with "
                "{% generation %} ... {% endgeneration %}; this one does not"
            )
    return tokenizer
