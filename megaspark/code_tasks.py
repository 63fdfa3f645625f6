"""Programming problems in HumanEval's format, solved by completing a prompt and judged by running the tests in a sandbox.

A problem is a line of JSON: task_id, prompt (a Python function's beginning), entry_point (its name), test (text that defines
`check(candidate)`), canonical_solution. The format and pass@k are those of Chen et al. 2021 (arXiv 2107.03374).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megaspark.errors import UserError
from megaspark.sandboxes import Limits, Outcome, run_program

# Where a completion has left the function that it was to complete: text at the margin that cannot belong to it.
STOPS = ("\nclass ", "\ndef ", "\nasync def ", "\n@", "\n#", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\nfrom ", "\n```")


@dataclass(frozen=True)
class Problem:
    """One line of a problem file."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file, in its order; raises UserError naming the line that is not one, or is there twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        problem = _problem(line, f"{path}:{number}")
        if problem.task_id in problems:
            raise UserError(f"{path}:{number}: task_id {problem.task_id!r} is there twice")
        problems[problem.task_id] = problem
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return list(problems.values())


def _problem(line: str, place: str) -> Problem:
    try:
        told = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    for item in fields(Problem):
        if not isinstance(told, dict) or not isinstance(told.get(item.name), str):
            wanted = ", ".join(field.name for field in fields(Problem))
            raise UserError(f"{place}: {item.name} is missing or no text; a problem has {wanted}")
    problem = Problem(**{item.name: told[item.name] for item in fields(Problem)})
    if not problem.entry_point.isidentifier():
        raise UserError(f"{place}: entry_point {problem.entry_point!r} is no name of a function")
    return problem


def program(problem: Problem, completion: str) -> str:
    """The text that runs to its end exactly if the completion passes the tests."""
    return f"{problem.prompt}{completion}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def cut(completion: str) -> str:
    """A completion up to where it leaves the function."""
    ends = [found for stop in STOPS if (found := completion.find(stop)) >= 0]
    return completion[: min(ends)] if ends else completion


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of k samples, drawn from `samples` without putting back, is among the `correct` ones.

    1 - C(n-c, k) / C(n, k), as the product of Chen et al. 2021, section 2.1: unbiased, unlike 1 - (1 - c/n)^k.
    """
    if not 0 <= correct <= samples or not 0 < k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def judge(programs: Sequence[str], limits: Limits, progress: Callable[[int], None] = lambda _: None) -> list[Outcome]:
    """Runs programs, as many at a time as there are processors, and tells how each ended, in their order."""

    def run(text: str) -> Outcome:
        outcome = run_program(text, limits)
        progress(1)
        return outcome

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(run, programs))


def check_problems(problems: Sequence[Problem], limits: Limits, progress: Callable[[int], None] = lambda _: None) -> None:
    """Runs every problem's own solution; raises UserError for the first that fails: then nobody's failing would mean much."""
    outcomes = judge([program(p, p.canonical_solution) for p in problems], limits, progress)
    for problem, outcome in zip(problems, outcomes, strict=True):
        if not outcome.passed:
            raise UserError(
                f"{problem.task_id}: its own canonical_solution {outcome.status} here ({outcome.detail}); mend the problem, or "
                "give it more with --time-limit"
            )


def score(
    problems: Sequence[Problem],
    completions: Mapping[str, Sequence[str]],
    ks: Sequence[int],
    limits: Limits,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs all completions of each problem and reports pass@k, averaged over problems, and what became of each problem.

    completions: by task_id, the same number for every problem, each already cut.
    """
    flat = [program(problem, text) for problem in problems for text in completions[problem.task_id]]
    outcomes = iter(judge(flat, limits, progress))
    by_problem: dict[str, Any] = {}
    for problem in problems:
        ended = [next(outcomes) for _ in completions[problem.task_id]]
        counts: dict[str, int] = {}
        for outcome in ended:
            counts[outcome.status] = counts.get(outcome.status, 0) + 1
        by_problem[problem.task_id] = {"correct": counts.pop("passed", 0), "samples": len(ended), "failures": counts}
    rates = {
        f"pass@{k}": float(np.mean([pass_at_k(entry["samples"], entry["correct"], k) for entry in by_problem.values()])) for k in ks
    }
    return {**rates, "problems": by_problem}
