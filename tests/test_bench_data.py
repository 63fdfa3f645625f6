"""The data bench: its figures are of work that was done, and a missing piece is said, not guessed."""

import json

import pytest
import zstandard

from megaspark.errors import UserError
from megaspark.tools.bench import main


@pytest.fixture
def arguments(tmp_path, huggingface_tokenizer):
    """What names a corpus of two files and a tokenizer."""
    (tmp_path / "text").mkdir()
    for k in range(2):
        lines = [json.dumps({"text": f"a text {k} {i} " * 20, "meta": {}}).encode() for i in range(50)]
        (tmp_path / "text" / f"{k}.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))
    return ["--corpus", str(tmp_path / "text"), "--tokenizer", str(huggingface_tokenizer), "--megabytes", "0.1"]


@pytest.fixture
def huggingface_tokenizer(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(["a text 1 2"], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet))
    model.add_special_tokens([AddedToken("</s>", special=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def lines_of(capsys) -> list[dict]:
    """What was printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_figures_are_of_all_the_text(arguments, capsys):
    """A bench that skips work, or divides by the wrong bytes, flatters itself."""
    assert main(["data", "encoders", "scaling", *arguments]) == 0
    lines = lines_of(capsys)
    reference, *fast = [line for line in lines if line["bench"] == "data.encoders"]
    assert (reference["encoder"], reference["text_mb"], reference["times_reference"]) == ("reference", 0.1, 1.0)
    assert all("skipped" in line or (line["text_mb"] == 0.1 and line["text_mb_per_cpu_s"] > 0) for line in fast)
    one, two = (line for line in lines if line["bench"] == "data.scaling")
    assert (one["workers"], one["times_1_workers"], two["workers"]) == (1, 1.0, 2)
    assert all(10 < line["peak_rss_mb_a_worker"] < 1000 for line in (one, two))


def test_megatron_is_timed_without_its_imports(arguments, tmp_path, capsys):
    """5 of its 17 seconds are imports, which a large input does not notice."""
    script = tmp_path / "preprocess_data.py"
    spin = "import sys, time\nend = {} + time.process_time()\nwhile time.process_time() < end: pass\n"
    script.write_text(spin.format("(0.5 if '--help' in sys.argv else 0.9)"))
    assert main(["data", "megatron", "--megatron", str(script), *arguments]) == 0
    theirs, _ = lines_of(capsys)
    assert 0.1 / 0.6 < theirs["text_mb_per_cpu_s"] < 0.1 / 0.3
    with pytest.raises(UserError, match=r"it is tools/preprocess_data\.py of Megatron-LM"):
        main(["data", "megatron", "--megatron", "nowhere.py", *arguments])
    script.write_text("raise SystemExit('no such option')")
    with pytest.raises(UserError, match="failed: no such option"):
        main(["data", "megatron", "--megatron", str(script), *arguments])


def test_mistakes_are_told(arguments, tmp_path):
    """An empty corpus gives no figure; an unknown bench names those that there are."""
    with pytest.raises(UserError, match="no bench 'date'; did you mean data"):
        main(["date"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="megaspark demo-corpus"):
        main(["data", *arguments, "--corpus", str(tmp_path / "none")])
