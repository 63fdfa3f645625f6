"""`megaspark plot RUN...`: loss against tokens, of one run with its evaluations by source or of several, as SVG, PNG or PDF."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaspark.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = "metrics.jsonl"
FORMATS = (".svg", ".png", ".pdf")
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
SOURCE_COLORS = COLORS[2:]  # the first two are of training and of all sources
INK, MUTED, GRID = "#111827", "#6b7280", "#e5e7eb"
SMOOTHED = 200  # steps from which a smoothed line stands before the raw one


@dataclass
class Curve:
    """What a run's metrics.jsonl says of its loss: (tokens, nats) of each training step and of each evaluation."""

    name: str
    train: list[tuple[int, float]] = field(default_factory=list)
    evaluations: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    unigram_entropy: float | None = None
    not_finite: int = 0


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="megaspark plot",
        description="Draws the loss of runs against the tokens that they were trained on.",
        epilog="example: megaspark plot runs/demo runs/demo-tied --out losses.svg",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"ends in {', '.join(FORMATS)} (default: loss.svg in RUN)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "loss.svg"
    if out.suffix not in FORMATS:
        raise UserError(f"--out {out}: the file's name should end in {', '.join(FORMATS)}")
    curves = [read_curve(run) for run in args.runs]
    draw(curves, out)
    for curve in curves:
        if curve.not_finite:
            print(f"{curve.name}: {curve.not_finite:,} losses that are not finite are not drawn")
    print(out)
    return 0


def read_curve(run: Path) -> Curve:
    """Reads a run folder; raises UserError if it has no loss to draw."""
    if not (run / METRICS).is_file():
        raise UserError(f"{run} is no run folder: it has no {METRICS}")
    curve = Curve(run.resolve().name)
    for number, text in enumerate((run / METRICS).read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
            tokens, loss = line["tokens"], line["loss"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{run / METRICS}:{number}: not a line of metrics") from None
        if loss is None or not math.isfinite(loss):
            curve.not_finite += 1
        elif "split" in line:
            curve.evaluations.setdefault(line["split"], []).append((tokens, loss))
        else:
            curve.train.append((tokens, loss))
    if not curve.train:
        raise UserError(f"{run / METRICS} has no training loss yet")
    if (run / "data.json").is_file():
        curve.unigram_entropy = json.loads((run / "data.json").read_text()).get("unigram_entropy")
    return curve


def draw(curves: list[Curve], out: Path) -> None:
    """Draws all curves into one file; the same curves give the same bytes."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'megaspark[plot]'") from None
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    style = {"font.size": 10, "svg.hashsalt": "megaspark", "axes.edgecolor": MUTED, "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            _draw_curve(axes, curve, COLORS[i % len(COLORS)], alone=len(curves) == 1)
        _draw_entropies(axes, curves)
        _dress(axes, curves)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _draw_curve(axes: Axes, curve: Curve, color: str, alone: bool) -> None:
    tokens, losses = zip(*curve.train, strict=True)
    label = "training" if alone else curve.name
    if len(losses) >= SMOOTHED:
        axes.plot(tokens, losses, color=color, alpha=0.22, linewidth=0.8)
        axes.plot(tokens, smooth(losses), color=color, linewidth=1.8, label=f"{label} (smoothed)" if alone else label)
    else:
        axes.plot(tokens, losses, color=color, linewidth=1.5, label=label)
    whole = {split: points for split, points in sorted(curve.evaluations.items()) if "/" not in split}
    for split, points in whole.items():
        face = COLORS[1] if alone else "white"
        kind: dict[str, Any] = {"color": COLORS[1] if alone else color, "markerfacecolor": face, "linestyle": "none"}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4.5, label=split if alone else None, zorder=3, **kind)
    sources = sorted(curve.evaluations.keys() - whole.keys(), key=lambda split: -curve.evaluations[split][-1][1])
    if alone and len(sources) > 1:  # the only one is the whole; of several runs there would be too many
        _draw_sources(axes, {split: curve.evaluations[split] for split in sources})


def _draw_sources(axes: Axes, points: dict[str, list[tuple[int, float]]]) -> None:
    """A thin line a source, in the order in which they end, which is the legend's too."""
    for i, (split, found) in enumerate(points.items()):
        dashes = ("-", "--", ":")[i // len(SOURCE_COLORS) % 3]
        axes.plot(
            *zip(*found, strict=True), marker="o", markersize=2.5, linewidth=1, linestyle=dashes,
            color=SOURCE_COLORS[i % len(SOURCE_COLORS)], label=split.partition("/")[2],
        )  # fmt: skip


def _draw_entropies(axes: Axes, curves: list[Curve]) -> None:
    """A line for each dataset's unigram entropy: a model above it has learnt no more than how often tokens occur."""
    for entropy in sorted({curve.unigram_entropy for curve in curves if curve.unigram_entropy is not None}):
        axes.axhline(entropy, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        text = f"unigram entropy {entropy:.2f}"
        axes.annotate(text, (1, entropy), xytext=(-4, 3), color=MUTED, fontsize=9, **place)


def _dress(axes: Axes, curves: list[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter

    last = curves[0].train[-1]
    axes.set_title(
        f"{curves[0].name}: loss {last[1]:.3f} after {count(last[0])} tokens" if len(curves) == 1 else "Loss", loc="left"
    )
    axes.set_xlabel("tokens trained on", color=MUTED)
    axes.set_ylabel("loss, nats a token", color=MUTED)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(curves) > 1 and any(curve.evaluations for curve in curves):
        axes.plot(
            [], [], marker="o", markersize=4.5, color=MUTED, markerfacecolor="white", linestyle="none", label="evaluations"
        )
    axes.legend(frameon=False, labelcolor=INK, ncols=2 if len(axes.get_legend_handles_labels()[1]) > 8 else 1)


def smooth(values: Sequence[float]) -> list[float]:
    """A centred mean over about a fiftieth of the values, without lag: narrower at the steep start, cut short at the end."""
    sums = [0.0, *accumulate(values)]
    last, half = len(values) - 1, len(values) // 100
    out = []
    for i in range(len(values)):
        start, stop = i - min(half, i), min(i + min(half, i), last) + 1
        out.append((sums[stop] - sums[start]) / (stop - start))
    return out


def count(tokens: float) -> str:
    """A number of tokens as people say it: 1.5M, 500B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"
