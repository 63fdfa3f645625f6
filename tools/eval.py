"""`megaspark eval MODEL`: perplexity and bits per byte on token datasets, lm-eval tasks, and code that must pass its tests.

MODEL is a Hugging Face folder, or a run or step folder of ours: datasets are then scored by our own model from the fp32 masters,
and what transformers must do (tasks, code) happens on a temporary export by `megaspark to-hf`. Nothing in the results depends
on the date or the machine's names; what was measured, on what and with what is in them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import megaspark
from megaspark import checkpoint, code_tasks, harness_tasks, settings
from megaspark.completions import Sampling, complete
from megaspark.config import open_datasets
from megaspark.errors import UserError
from megaspark.evaluations import Reading, Score, evaluate, token_bytes_of, tokens_to_score
from megaspark.manifests import sha256_of
from megaspark.sandboxes import Limits
from megaspark.scorers import DTYPES, is_hf, model_facts, open_scorer
from megaspark.shards import TokenDataset

DEMO_TASKS = Path("data/demo/tasks")
SAMPLED_TEMPERATURE = 0.8


def main(argv: list[str]) -> int:
    """Evaluates as the command line says; returns the exit status."""
    args = _parser().parse_args(argv)
    _check(args)
    path = Path(args.model)
    datasets = _datasets(args, path)
    problems = code_tasks.read_problems(settings.find(args.code)) if args.code else []
    if args.tasks:
        harness_tasks.require()
    limits = Limits(wall_s=args.time_limit, cpu_s=args.time_limit, confined=not args.unconfined)
    if problems:
        if args.unconfined:
            print("megaspark: --unconfined: programs of the model run with your rights and network", file=sys.stderr, flush=True)
        with _bar("canonical solutions", len(problems), "program") as bar:
            code_tasks.check_problems(problems, limits, bar.update)
    results: dict[str, Any] = {"model": model_facts(path), "versions": _versions(args), "dtype": args.dtype}
    if datasets:
        results["perplexity"] = _score_data(args, path, datasets)
    if args.tasks or problems:
        with _hf_folder(path) as folder:
            if args.tasks:
                results["tasks"] = _run_tasks(args, folder)
            if problems:
                results["code"] = _score_code(args, folder, problems, limits)
    print(json.dumps(results, indent=1, allow_nan=False) if args.json else "\n".join(table(results)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaspark eval",
        description="Evaluates a model: bits per byte on token datasets, lm-eval tasks, code against its tests.",
        epilog="example: megaspark eval runs/demo --data data/demo/validation --code code-demo.jsonl --samples 10 --k 1 10",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a run (its latest checkpoint) or a step folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the computation (default: fp32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    data = parser.add_argument_group("perplexity and bits per byte")
    data.add_argument("--data", help="a token dataset or a folder of them (default: a run's own validation data)")
    data.add_argument("--seq", type=int, help="tokens of a window (default: as trained, or the context up to 4096)")
    data.add_argument("--stride", type=int, help="tokens between windows (default: --seq, so that they do not overlap)")
    data.add_argument("--windows", type=int, help="score so many windows of each dataset, evenly spread (default: all)")
    data.add_argument("--batch", type=int, default=4, help="windows at a time (default: 4)")
    data.add_argument(
        "--document-mask", action=argparse.BooleanOptionalAction,
        help="attention stays inside documents (default: as trained; of a Hugging Face folder: yes)",
    )  # fmt: skip
    tasks = parser.add_argument_group("lm-eval tasks")
    tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of lm-eval, or of --task-dir")
    tasks.add_argument("--task-dir", type=Path, help=f"a folder of task YAML (default: {DEMO_TASKS} if it exists)")
    tasks.add_argument("--limit", type=int, help="examples of each task, at most")
    code = parser.add_argument_group("code")
    code.add_argument("--code", metavar="FILE.jsonl", help="problems in HumanEval's format; code-demo.jsonl is shipped")
    code.add_argument("--samples", type=int, default=1, help="completions of each problem (default: 1)")
    code.add_argument("--k", type=int, nargs="+", default=[1], help="report pass@k (default: 1)")
    code.add_argument("--temperature", type=float, help="default: 0 (the likeliest) for one sample, else 0.8")
    code.add_argument("--tokens", type=int, default=256, help="of a completion, at most (default: 256)")
    code.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    code.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="of one program (default: 10)")
    code.add_argument("--unconfined", action="store_true", help="run programs even where they cannot be shut in: at your risk")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses options that cannot go together, before anything is loaded."""
    positive = ("seq", "stride", "windows", "batch", "limit", "samples", "tokens", "time_limit")
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    for k in args.k:
        if not 0 < k <= args.samples:
            raise UserError(f"--k {k}: must be within 1 and --samples = {args.samples}; set --samples {max(1, k)}")
    if args.temperature is None:
        args.temperature = SAMPLED_TEMPERATURE if args.samples > 1 else 0.0
    if args.temperature < 0 or (args.temperature == 0 and args.samples > 1):
        raise UserError(f"--temperature {args.temperature:g}: {args.samples} samples need one above 0, or they are all the same")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be 0 or more")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: there is no GPU that torch can use; set --device cpu")
    if args.task_dir is None and DEMO_TASKS.is_dir():
        args.task_dir = DEMO_TASKS


def _datasets(args: argparse.Namespace, path: Path) -> dict[str, TokenDataset]:
    """The datasets of --data; a checkpoint asked for nothing else is scored on its run's validation data."""
    folder, hf = args.data, is_hf(path)
    if folder is None and not args.tasks and not args.code:
        folder = None if hf else checkpoint.newest(path).state["config"]["data"].get("validation")
        if folder is None:
            raise UserError(f"{path}: say what to evaluate it on: --data, --tasks or --code")
    return open_datasets(folder) if folder else {}


def _score_data(args: argparse.Namespace, path: Path, datasets: dict[str, TokenDataset]) -> dict[str, Any]:
    """Scores each dataset; the same figures for all of them together."""
    scorer = open_scorer(path, DTYPES[args.dtype], args.device)
    scorer.check_data(datasets)
    seq = args.seq or scorer.seq
    if seq > scorer.context and is_hf(path):
        raise UserError(f"--seq {seq}: the model's context is {scorer.context}; set --seq {scorer.context}")
    if (args.stride or seq) > seq:
        raise UserError(f"--stride {args.stride} is above --seq {seq}: windows would leave tokens out; set --stride {seq}")
    documents = next((said for said in (args.document_mask, scorer.documents) if said is not None), True)
    for name, dataset in datasets.items():
        if documents and not dataset.manifest.append_eos:
            raise UserError(f"dataset {name} has append_eos: false, its documents cannot be told apart; add --no-document-mask")
    reading = Reading(seq, args.stride or seq, args.batch, documents, args.windows)
    by_source: dict[str, Any] = {}
    total = Score()
    with _bar("scoring", tokens_to_score([*datasets.values()], reading), "token") as bar:
        for name, dataset in datasets.items():
            bar.set_description(name)
            score = evaluate(dataset, scorer.logits, reading, token_bytes_of(dataset), bar.update)
            total.add(score)
            digest = settings.digest([info.bin_sha256 for info in dataset.manifest.shards])
            by_source[name] = {**score.figures(), "dataset_tokens": dataset.tokens, "data_sha256": digest}
    read = {"seq": reading.seq, "stride": reading.stride, "windows": args.windows, "batch": args.batch, "document_mask": documents}
    return {"reading": read, "sources": by_source, "all": total.figures()}


def _run_tasks(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    dtype = str(DTYPES[args.dtype]).removeprefix("torch.")
    return harness_tasks.run_tasks(folder, args.tasks, args.task_dir, args.limit, args.device, dtype)


def _score_code(args: argparse.Namespace, folder: Path, problems: list[code_tasks.Problem], limits: Limits) -> dict[str, Any]:
    sampling = Sampling(args.samples, args.temperature, tokens=args.tokens, seed=args.seed)
    with _bar("completions", args.samples * len(problems), "completion") as bar:
        texts = complete(folder, [problem.prompt for problem in problems], sampling, DTYPES[args.dtype], args.device, bar.update)
    crowded = [problem.task_id for problem, found in zip(problems, texts, strict=True) if found is None]
    if crowded:
        print(f"megaspark: counted as failed, their prompts fill the context: {', '.join(crowded)}", file=sys.stderr, flush=True)
    completions = {
        problem.task_id: [code_tasks.cut(text) for text in found or [""] * args.samples]
        for problem, found in zip(problems, texts, strict=True)
    }
    with _bar("programs", args.samples * len(problems), "program") as bar:
        scored = code_tasks.score(problems, completions, args.k, limits, bar.update)
    return {
        "file_sha256": sha256_of(settings.find(args.code)),
        "sampling": {"samples": args.samples, "temperature": args.temperature, "tokens": args.tokens, "seed": args.seed},
        "confined": limits.confined,
        "prompts_without_room": crowded,
        **scored,
    }


@contextmanager
def _hf_folder(path: Path) -> Iterator[Path]:
    """The model as a Hugging Face folder: itself, or a temporary fp32 export that proved itself."""
    if is_hf(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="megaspark-eval-") as temporary:
        out = Path(temporary) / "hf"
        root = str(Path(megaspark.__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        command = [sys.executable, "-m", "megaspark", "to-hf", str(path), str(out), "--dtype", "fp32"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no reason given"]
            raise UserError(f"{path} could not be exported: {said[-1].removeprefix('megaspark: ')}")
        yield out


def _versions(args: argparse.Namespace) -> dict[str, str]:
    names = ["torch", "transformers", *(["lm_eval"] if args.tasks else [])]
    return {"megaspark": megaspark.__version__, "python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def _bar(what: str, total: int, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=f" {unit}s", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty())


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines for people."""
    model = results["model"]
    step = f", step {model['step']:,}" if "step" in model else ""
    lines = [f"{model['name']}{step} ({model['kind']}, sha256 {model['sha256'][:12]}), {results['dtype']}"]
    if told := results.get("perplexity"):
        read = told["reading"]
        apart = "inside documents" if read["document_mask"] else "across documents"
        lines += ["", f"windows of {read['seq']:,} tokens, {read['stride']:,} apart, attention {apart}"]
        rows = [*told["sources"].items(), *([("all", told["all"])] if len(told["sources"]) > 1 else [])]
        width = max(len(name) for name, _ in [("source", 0), *rows])
        lines.append(f"{'source':{width}} {'tokens':>15} {'bytes':>15} {'loss':>9} {'perplexity':>12} {'bits/byte':>10}")
        for name, row in rows:
            figures = (_number(row[key], spec) for key, spec in _COLUMNS)
            lines.append(f"{name:{width}} " + " ".join(figures))
    for name, row in results.get("tasks", {}).items():
        lines += ["", f"{name}: {row['examples']} examples, {row['shots']} shots"]
        lines += [f"  {metric:24} {_number(value, '12.4f')}" for metric, value in row["metrics"].items() if value is not None]
    if code := results.get("code"):
        rates = [f"{key} {value:.1%}" for key, value in code.items() if key.startswith("pass@")]
        lines += ["", f"code: {len(code['problems'])} problems, {code['sampling']['samples']} samples each: {', '.join(rates)}"]
        lines += [f"  {name:32} {row['correct']:>4} of {row['samples']}" for name, row in code["problems"].items()]
    return lines


_COLUMNS = (("tokens", "15,"), ("text_bytes", "15,"), ("loss", "9.4f"), ("perplexity", "12,.3f"), ("bits_per_byte", "10.4f"))


def _number(value: float | None, spec: str) -> str:
    width = int(spec.partition(".")[0].rstrip(","))
    return f"{'-':>{width}}" if value is None else format(value, spec)
