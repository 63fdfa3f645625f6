"""A checked SFT or DPO run becomes a Hugging Face folder: TRL trains, with our kernels in the model."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megaspark import hf_kernels, posttrained_folders
from megaspark.accelerators import settle_accelerator
from megaspark.errors import UserError
from megaspark.posttrained_folders import TOKENIZER_FILES, WORK, newest_checkpoint, partial_of
from megaspark.posttraining import Checked, Method, load_run
from megaspark.ranks import Ranks, threads_per_process

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def command(argv: list[str], method: Method, about: str, epilog: str) -> int:
    """The command line that `megaspark sft` and `megaspark dpo` share; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"megaspark {method.name}", description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="see docs/post_training.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the file, such as trainer.max_steps=10")
    parser.add_argument("--force", action="store_true", help="replace the output if it exists, and an unfinished one")
    args = parser.parse_args(argv)
    ranks = Ranks.from_environment()
    settle_accelerator()
    checked = load_run(args.config, args.overrides, method)
    out = Path(checked.config.output)
    if ranks.first:
        posttrained_folders.prepare(out, checked.identity | {"processes": ranks.world}, args.force)
    try:
        metrics = train(checked, out, ranks)
    except UserError:
        if ranks.first and newest_checkpoint(partial_of(out)) is None:
            shutil.rmtree(partial_of(out), ignore_errors=True)
        raise
    if ranks.first:
        shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in method.shown if name in metrics)
        print(f"{out}: done, {shown}")
    return 0


def train(checked: Checked, out: Path, ranks: Ranks) -> dict[str, float]:
    """Trains in OUT.partial, evaluates, writes the folder and names it OUT; returns the metrics, on every process."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)  # TRL's own default
    tokens = len(checked.tokenizer)
    partial = partial_of(out)
    arguments = _arguments(checked, partial, ranks)
    datasets = _datasets(checked, partial, arguments)
    kernels = checked.config.chosen_kernels
    with hf_kernels.installed(kernels):
        trainer = _trainer(checked, arguments, datasets)
    counts = _counts(checked, trainer.train_dataset)
    if ranks.first:
        print("\n".join(f"examples: {count:,} {what}" for what, count in counts.items() if count), flush=True)
        if _asks_otherwise(checked):
            print("note: the chat template ends the question otherwise than it begins the answer (a space?): when it is asked, the "
                  "model sees other tokens than it was taught")  # fmt: skip
    checkpoint = newest_checkpoint(partial)
    if checkpoint and ranks.first:
        print(f"goes on from {checkpoint}", flush=True)
    metrics = dict(trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics)
    if checked.validation:
        metrics |= trainer.evaluate()
    trainer.model.config.use_cache = True  # training turned it off
    _save(checked, trainer, partial, tokens, ranks)
    if ranks.first:
        trained = {
            "examples": counts,
            "resolved": {"trainer": checked.trainer, "lora": checked.lora, "seed": trainer.args.seed, "bf16": trainer.args.bf16},
            "modules_with_our_kernels": hf_kernels.replaced(trainer.model),
            "steps": trainer.state.global_step,
            "metrics": metrics,
        }
        posttrained_folders.finish(out, posttrained_folders.record(checked, trained, ranks.world), trainer.state.log_history)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _arguments(checked: Checked, partial: Path, ranks: Ranks) -> Any:
    """TRL's config: what the run says over what fits this machine; with it the processes find each other."""
    cuda = torch.cuda.is_available()
    fitting = {
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": cuda,  # it saves memory for time, and on a CPU memory is not what lacks
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "disable_tqdm": not (ranks.first and sys.stderr.isatty()),
    }
    if not cuda:
        torch.set_num_threads(threads_per_process(ranks))
        if ranks.world > 1:
            fitting["ddp_backend"] = "gloo"
    deepspeed = None
    if checked.deepspeed:
        _join(ranks)
        deepspeed = json.loads(json.dumps(dict(checked.deepspeed.values)))
        if checked.deepspeed.stage == 3:  # without it the weights could not be written in the end
            deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return _told(checked.method.classes()[0], **{**fitting, **checked.trainer}, output_dir=str(partial), deepspeed=deepspeed)


def _join(ranks: Ranks) -> None:
    """Joins DeepSpeed's process group, which ZeRO-3 wants before a model is loaded, with or without a launcher.

    Left to transformers, a run on CPUs joins torch's alone, and ZeRO-3 takes each process for the only one.
    """
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    import deepspeed

    # Its build takes minutes, and one killed half-way leaves a lock that hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)


def _told(make: Any, **arguments: Any) -> Any:
    """Calls TRL; what it refuses by ValueError is the user's to mend."""
    try:
        return make(**arguments)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"TRL refuses this run: {' '.join(str(error).split())}") from error


def _datasets(checked: Checked, partial: Path, arguments: Any) -> dict[str, Any]:
    """The examples as datasets on disk, so that what one process prepares of them the others find."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        os.environ.setdefault("TQDM_DISABLE", "1")  # what TRL asks before it draws its own
    out = {}
    for name, examples in (("train", checked.train), ("eval", checked.validation)):
        if examples is None:
            continue
        folder = partial / WORK / name
        with arguments.main_process_first():
            if not (folder / "state.json").is_file():
                datasets.Dataset.from_list(examples.rows).save_to_disk(folder)
        out[f"{name}_dataset"] = datasets.load_from_disk(str(folder))
    return out


def _trainer(checked: Checked, arguments: Any, datasets: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    config = checked.config
    model = AutoModelForCausalLM.from_pretrained(
        config.model.folder, dtype=DTYPES[config.model.dtype], local_files_only=True, **hf_kernels.loading(config.chosen_kernels)
    )
    peft_config = None
    if checked.lora is not None:
        from peft import LoraConfig

        peft_config = _told(LoraConfig, **checked.lora)
    return _told(
        checked.method.classes()[1],
        model=model,
        args=arguments,
        processing_class=checked.tokenizer,
        peft_config=peft_config,
        **datasets,
    )


def _counts(checked: Checked, prepared: Any) -> dict[str, int]:
    """What became of the examples, by what is said of them; raises UserError if none is left."""
    limit = checked.trainer["max_length"]
    given, packed = len(checked.train.rows), bool(checked.trainer.get("packing"))
    names = prepared.column_names
    if len(prepared) == 0:
        raise UserError(f"no example has anything to learn within trainer.max_length = {limit} tokens")
    counts = {"given": given, f"with a {', '.join(checked.train.left_out)} that is not read": sum(checked.train.left_out.values())}
    if not packed:
        counts["left out: the prompt alone fills trainer.max_length"] = given - len(prepared)
    if limit and "chosen_ids" in names:
        longest = (row["prompt_ids"] + max(row["chosen_ids"], row["rejected_ids"], key=len) for row in prepared)
        counts[f"cut at trainer.max_length = {limit}"] = sum(len(ids) > limit for ids in longest)
    elif limit:
        lengths = [n for row in prepared["seq_lengths"] for n in row] if "seq_lengths" in names else map(len, prepared["input_ids"])
        counts[f"that fill trainer.max_length = {limit} and may have lost their end"] = sum(n >= limit for n in lengths)
    special = checked.tokenizer.all_special_tokens
    if not checked.train.conversational and checked.train.columns != ("input_ids",):
        texts = (row[name] for row in checked.train.rows for name in checked.train.columns)
        counts["texts that hold a special token, read as that token"] = sum(any(s in text for s in special) for text in texts)
    return counts


def _asks_otherwise(checked: Checked) -> bool:
    """Whether a conversation up to its last answer, rendered to be answered, is no beginning of the whole conversation's tokens."""
    render = checked.tokenizer.apply_chat_template
    for row in checked.train.rows[:100]:
        messages = row.get("messages", [])
        if messages and messages[-1]["role"] == "assistant":
            asked = render(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
            if render(messages, return_dict=True)["input_ids"][: len(asked)] != asked:
                return True
    return False


def _save(checked: Checked, trainer: Any, partial: Path, tokens: int, ranks: Ranks) -> None:
    """Weights, config and tokenizer into `partial`; all processes take part, the first one writes."""
    adapter = partial / "adapter" if checked.merge else partial
    trainer.save_model(str(adapter if checked.lora is not None else partial))
    if not ranks.first:
        return
    if checked.merge:
        _merge(checked, adapter, partial)
    for path in (adapter / "training_args.bin", partial / "training_args.bin", adapter / "README.md"):
        path.unlink(missing_ok=True)
    if checked.merge:
        for name in TOKENIZER_FILES:
            (adapter / name).unlink(missing_ok=True)
    if not {"save_strategy", "save_steps"} & checked.trainer.keys():  # nobody asked for them: they were there to go on from
        for checkpoint in partial.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    for path in partial.glob("**/*.safetensors"):
        path.chmod(0o644)  # they are written as private
    posttrained_folders.write_tokenizer(Path(checked.config.model.folder), trainer.processing_class, tokens, partial)


def _merge(checked: Checked, adapter: Path, partial: Path) -> None:
    """Adds a LoRA adapter to the model that it was trained on, and writes the sum."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # ZeRO-3 would spread also this copy over the processes
    model = checked.config.model
    base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=DTYPES[model.dtype], local_files_only=True)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(partial)
