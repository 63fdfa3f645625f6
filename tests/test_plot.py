"""The loss plot: what is drawn is what metrics.jsonl says, and mistakes are told."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megaspark.errors import UserError
from megaspark.tools.plot import count, main, read_curve, smooth

ROOT = Path(__file__).resolve().parents[1]


def make_run(folder: Path, steps: int = 400, entropy: float | None = 6.2, shift: float = 0.0) -> Path:
    """A run folder with a falling loss, an evaluation each 50 steps."""
    rng = random.Random(folder.name)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = 2.6 + shift + 5.7 * math.exp(-step / 60)
        lines.append({"step": step, "tokens": step * 8192, "loss": loss + rng.gauss(0, 0.12), "lr": 1e-3})
        if step % 50 == 0:
            lines.append({"step": step, "tokens": step * 8192, "split": "validation", "loss": loss + 0.05})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if entropy is not None:
        (folder / "data.json").write_text(json.dumps({"unigram_entropy": entropy}))
    return folder


def test_curve_is_what_the_file_says(tmp_path):
    """Evaluation points among the training steps would look like a spike; a NaN must be counted, not drawn as a gap."""
    run = make_run(tmp_path / "a", steps=100)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "tokens": 827392, "loss": null, "loss_nonfinite": "nan"}\n')
    curve = read_curve(run)
    assert len(curve.train) == 100 and curve.train[1][0] == 2 * 8192
    assert [tokens for tokens, _ in curve.evaluations["validation"]] == [50 * 8192, 100 * 8192]
    assert (curve.unigram_entropy, curve.not_finite) == (6.2, 1)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_each_format_is_drawn(tmp_path, suffix):
    """The file must be of the kind that its name says."""
    run = make_run(tmp_path / "a", steps=30, entropy=None)
    assert main([str(run), "--out", str(tmp_path / f"x.{suffix}")]) == 0
    start = (tmp_path / f"x.{suffix}").read_bytes()[:200]
    assert {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}[suffix] in start or b"<?xml" in start


def test_default_out_and_same_bytes(tmp_path, capsys):
    """A plot in a repository must not change when nothing did."""
    run = make_run(tmp_path / "a")
    main([str(run)])
    first = (run / "loss.svg").read_bytes()
    main([str(run)])
    assert (run / "loss.svg").read_bytes() == first
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "loss.svg")


def test_several_runs_in_one_plot(tmp_path):
    """Each run by its own name and colour: the text of an SVG that names one run only compares nothing."""
    import matplotlib

    runs = [make_run(tmp_path / name, shift=i * 0.2) for i, name in enumerate(("base", "wide"))]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        main([*map(str, runs), "--out", str(tmp_path / "both.svg")])
    text = (tmp_path / "both.svg").read_text()
    assert ">base<" in text and ">wide<" in text and "unigram entropy 6.20" in text


TWENTY = [f"s{i}" for i in range(20)]


@pytest.mark.parametrize("sources, drawn", [(["a"], []), (["a", "b/c"], ["a", "b/c"]), (TWENTY, TWENTY)])
def test_sources_of_one_run_are_drawn_by_name(tmp_path, sources, drawn):
    """Which source stands still is what a mean hides; the only one is the whole, and of several runs they would be a thicket."""
    import matplotlib

    runs = [make_run(tmp_path / name) for name in ("base", "wide")]
    for run in runs:
        with open(run / "metrics.jsonl", "a") as file:
            for i, name in enumerate(sources):
                for step in (200, 400):
                    line = {"step": step, "tokens": step * 8192, "split": f"validation/{name}", "loss": 2 + i / 10 + 50 / step}
                    file.write(json.dumps(line) + "\n")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        main([str(runs[0]), "--out", str(tmp_path / "one.svg")])
        main([*map(str, runs), "--out", str(tmp_path / "both.svg")])
    one, both = (tmp_path / "one.svg").read_text(), (tmp_path / "both.svg").read_text()
    assert ">validation<" in one and all(f">{name}<" in one for name in drawn)
    assert drawn or ">a<" not in one
    assert not any(f">{name}<" in both for name in sources)


def test_smoothing_does_not_lag():
    """A mean that trails a falling loss draws a curve above every point of it."""
    assert smooth([3.0] * 300) == pytest.approx([3.0] * 300)
    falling = [10 - 0.01 * i for i in range(600)]
    assert smooth(falling)[:-6] == pytest.approx(falling[:-6])
    assert smooth(falling)[-1] == pytest.approx(falling[-1], abs=0.04)
    noisy = [5.0 + (-1) ** i for i in range(600)]
    assert max(abs(value - 5) for value in smooth(noisy)[20:-20]) < 0.2


def test_count():
    """Axis labels that people read."""
    assert [count(x) for x in (0, 512, 8192, 1.5e6, 5e11, 2e12)] == ["0", "512", "8.19k", "1.5M", "500B", "2T"]


def test_mistakes_are_told(tmp_path):
    """A wrong folder, an unfinished run or a wrong name is one line."""
    run = make_run(tmp_path / "a", steps=3)
    with pytest.raises(UserError, match="no run folder"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="should end in"):
        main([str(run), "--out", "x.gif"])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training loss yet"):
        main([str(run)])
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: not a line"):
        main([str(run)])


def test_without_matplotlib_the_extra_is_named(tmp_path):
    """matplotlib is optional: without it the command must say what to install."""
    run = make_run(tmp_path / "a", steps=3)
    code = "import sys; sys.modules['matplotlib'] = None; from megaspark.tools.plot import main; main(sys.argv[1:])"
    result = subprocess.run([sys.executable, "-c", code, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert "pip install 'megaspark[plot]'" in result.stderr and not (run / "loss.svg").exists()
