"""DeepSpeed's JSON files: no key that DeepSpeed would ignore passes, and every number is said once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megaspark.deepspeed_files import AUTO, ELSEWHERE, OWNED, PASSED_ON, read_deepspeed_file
from megaspark.errors import UserError

SHIPPED = [f"zero{stage}.json" for stage in range(4)]
RUN = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16.enabled": True,
}


def write(folder: Path, values: Any) -> str:
    path = folder / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def refusal(folder: Path, values: Any) -> str:
    path = write(folder, values)
    with pytest.raises(UserError) as caught:
        read_deepspeed_file(path).resolved(RUN)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wrong, right", [("gradient_clipp1ng", "gradient_clipping"), ("zero_optimisation", "zero_optimization")])
def test_key_that_deepspeed_ignores_is_refused(tmp_path, wrong, right):
    """DeepSpeed 0.19 accepts a misspelled top-level key in silence: the clipping, or all of ZeRO, would be off."""
    assert f"unknown key {wrong} " in (message := refusal(tmp_path, {wrong: 1.0})) and f"did you mean {right}?" in message


@pytest.mark.parametrize(
    "section, wrong, right",
    [("zero_optimization", "stagee", "stage"), ("zero_optimization", "overlap_com", "overlap_comm"), ("bf16", "enable", "enabled")],
)
def test_nested_key_is_refused(tmp_path, section, wrong, right):
    """Inside a section DeepSpeed's own error is a pydantic dump without the file's name."""
    message = refusal(tmp_path, {section: {wrong: 1}})
    assert f"unknown key {section}.{wrong} " in message and f"did you mean {section}.{right}?" in message


def misspellings(key: str) -> set[str]:
    """The key with a letter dropped, doubled, or swapped with the next."""
    dropped = {key[:i] + key[i + 1 :] for i in range(len(key))}
    doubled = {key[:i] + key[i] + key[i:] for i in range(len(key))}
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    return (dropped | doubled | swapped) - {key, ""}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_file_misspelled_is_refused(tmp_path, name):
    """One key without a check is enough for a run that is not what its file says."""
    values = dict(read_deepspeed_file(name).values)
    tried = 0
    for key, value in values.items():
        others = {k: v for k, v in values.items() if k != key}
        for wrong in misspellings(key):
            assert f"did you mean {key}?" in refusal(tmp_path, {**others, wrong: value})
            tried += 1
        for inner in value if isinstance(value, dict) else ():
            for wrong in misspellings(inner):
                assert f"did you mean {key}.{inner}?" in refusal(tmp_path, {**others, key: {wrong: value[inner]}})
                tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    "text, hint",
    [('{"bf16": {}, "bf16": {}}', "twice"), ("[1]", "mapping"), ("{", "not JSON"), ("", "not JSON"), ('{"bf16": 3}', "section")],
)
def test_damaged_file_is_one_line(tmp_path, text, hint):
    """A key said twice (JSON keeps the last), a list, or half a file must not end in a traceback."""
    assert hint in refusal(tmp_path, text)


@pytest.mark.parametrize("value", [4, -1, "two", 1.5, None])
def test_impossible_stage_is_refused(tmp_path, value):
    """A stage that DeepSpeed does not have must be refused before any process starts."""
    assert "zero_optimization.stage" in refusal(tmp_path, {"zero_optimization": {"stage": value}})


@pytest.mark.parametrize("key", OWNED)
def test_second_value_names_both_places(tmp_path, key):
    """Two places that disagree kept gpt-neox's clipping off for years: it must be an error that names both."""
    section, _, name = key.rpartition(".")
    value = not RUN[key] if isinstance(RUN[key], bool) else RUN[key] + 1
    message = refusal(tmp_path, {section: {name: value}} if section else {name: value})
    ours = OWNED[key].partition(" ")[0]
    assert f"{key} = {json.dumps(value)}" in message and ours in message and json.dumps(RUN[key]) in message


@pytest.mark.parametrize("key", OWNED)
def test_auto_the_same_value_and_silence_mean_the_runs_number(tmp_path, key):
    """An "auto" that reaches DeepSpeed, or an owned number that falls back to DeepSpeed's default (clipping 1.0)."""
    section, _, name = key.rpartition(".")
    for said in (AUTO, RUN[key]):
        file = read_deepspeed_file(write(tmp_path, {section: {name: said}} if section else {name: said}))
        out = file.resolved(RUN)
        assert (out[section] if section else out)[name] == RUN[key]
    out = read_deepspeed_file(write(tmp_path, {})).resolved(RUN)
    assert (out[section] if section else out)[name] == RUN[key]


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_is_left_auto(name):
    """DeepSpeed takes the text "auto" for a value in places, and fails far away in others."""
    file = read_deepspeed_file(name)
    before = json.dumps(file.values)
    assert AUTO not in json.dumps(file.resolved(RUN))
    assert json.dumps(file.values) == before, "the file's own values must not change"
    assert file.stage == int(name[4])


def test_auto_where_the_run_owns_nothing_is_deepspeeds_default(tmp_path):
    """Hugging Face's files say "auto" for bucket sizes too; DeepSpeed itself knows no such word."""
    path = write(tmp_path, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto", "overlap_comm": True}})
    assert read_deepspeed_file(path).resolved(RUN)["zero_optimization"] == {"stage": 3, "overlap_comm": True}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_what_a_run_says_elsewhere_is_refused_with_the_place(tmp_path, key):
    """A scheduler or fp16 section in the file would fight the run's own."""
    assert ELSEWHERE[key] in refusal(tmp_path, {key: {}})


@pytest.mark.parametrize("key", sorted(PASSED_ON))
def test_known_keys_are_passed_on_and_deepspeed_reads_them(tmp_path, key):
    """A key in our table that DeepSpeed no longer reads would be accepted and do nothing, the very thing we forbid."""
    import deepspeed

    values = {"zero_optimization": {"stage": 2}} if key == "zero_optimization" else {key: {}}
    assert read_deepspeed_file(write(tmp_path, values)).resolved(RUN)[key] == values[key]
    assert re.search(rf"""["']{key}["']|^\s+{key}: """, deepspeed_source(Path(deepspeed.__file__).parent), re.MULTILINE)


def deepspeed_source(folder: Path, cache: dict[Path, str] = {}) -> str:  # noqa: B006 (read once)
    """The text of every DeepSpeed module in which a setting's name can stand."""
    if folder not in cache:
        places = [p for part in ("runtime", "profiling", "monitor", "comm", "utils") for p in (folder / part).rglob("*.py")]
        cache[folder] = "\n".join(path.read_text() for path in places)
    return cache[folder]


@pytest.mark.parametrize("name", SHIPPED)
def test_hugging_face_takes_our_files_as_they_are(tmp_path, name):
    """TRL and the Trainer fill every "auto" themselves, or leave one that DeepSpeed then refuses."""
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    path = read_deepspeed_file(name).path
    try:
        arguments = TrainingArguments(
            str(tmp_path), bf16=True, use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.5
        )
        config = HfTrainerDeepSpeedConfig(str(path))
        config.trainer_config_process(arguments)
        model = type("Model", (), {"config": type("Config", (), {"hidden_size": 64})})
        config.trainer_config_finalize(arguments, model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()
    assert AUTO not in json.dumps(config.config)
    assert config.config["gradient_clipping"] == 0.5 and config.config["bf16"] == {"enabled": True}
    assert config.config["train_batch_size"] == 2 * 4 * arguments.world_size
