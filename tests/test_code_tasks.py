"""Problems, the programs made of them, and the estimator that turns counts into pass@k."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sandboxes import needs_namespaces

from conftest import CHECKOUT
from megaspark import code_tasks
from megaspark.code_tasks import Problem, check_problems, cut, pass_at_k, program, read_problems, score
from megaspark.errors import UserError
from megaspark.sandboxes import Limits

SHIPPED = CHECKOUT / "ds_configs" / "code-demo.jsonl"
QUICK = Limits(wall_s=5.0, cpu_s=1.0, memory_bytes=256 << 20)
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
ADD = Problem("t/add", "def add(a, b):\n    '''a + b'''\n", "add", CHECK, "    return a + b\n")


@settings(deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(numbers: tuple[int, int, int]) -> None:
    """The plain 1 - (1 - c/n)^k is biased; here every draw of k of the n samples is looked at."""
    samples, correct, k = numbers
    draws = list(combinations(range(samples), k))
    exact = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
    assert pass_at_k(samples, correct, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_of_many_samples_stays_a_number() -> None:
    """Binomials of 10,000 samples overflow floats, and a product of factors near 1 must not lose itself."""
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
    assert 0 < pass_at_k(10_000, 5_000, 100) <= 1
    for wrong in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="not defined"):
            pass_at_k(*wrong)


@needs_namespaces
def test_shipped_problems_hold_and_tell_right_from_wrong() -> None:
    """A problem whose own solution fails judges nobody; one that an empty or a constant answer passes neither."""
    problems = read_problems(SHIPPED)
    assert len(problems) == 8
    done: list[int] = []
    check_problems(problems, QUICK, done.append)
    assert sum(done) == len(problems)
    wrong = ["    pass\n", "    return 0\n", "    return []\n", "    raise SystemExit(0)\n"]
    found = score(problems, {p.task_id: [p.canonical_solution, *wrong] for p in problems}, [1, 5], QUICK)
    assert found["pass@1"] == pytest.approx(1 / 5) and found["pass@5"] == 1.0
    for problem in problems:
        entry = found["problems"][problem.task_id]
        assert entry == {"correct": 1, "samples": 5, "failures": {"failed": 4}}, problem.task_id


@needs_namespaces
def test_completions_are_kept_apart_and_counted_by_what_became_of_them() -> None:
    """Outcomes come back from several workers at once: each must land at its own problem."""
    two = Problem("t/two", "def two():\n", "two", "def check(candidate):\n    assert candidate() == 2\n", "    return 2\n")
    texts = {
        "t/add": ["    return a - b\n", "    return b + a\n", "    while True: pass\n"],
        "t/two": ["    return 2\n", "    import os; os._exit(0)\n", "    return 1 + 1\n"],
    }
    found = score([ADD, two], texts, [1], QUICK)
    assert found["problems"]["t/add"] == {"correct": 1, "samples": 3, "failures": {"failed": 1, "timed out": 1}}
    assert found["problems"]["t/two"] == {"correct": 2, "samples": 3, "failures": {"died": 1}}
    assert found["pass@1"] == pytest.approx((1 / 3 + 2 / 3) / 2)


@needs_namespaces
def test_a_problem_that_its_own_solution_fails_is_named() -> None:
    """Otherwise every model fails it and nobody asks why."""
    broken = Problem("t/broken", ADD.prompt, "add", ADD.test, "    return a * b\n")
    with pytest.raises(UserError, match=r"t/broken: its own canonical_solution failed here \(AssertionError"):
        check_problems([ADD, broken], QUICK)


def test_programs_are_prompt_completion_tests_and_call() -> None:
    """A test that is defined but never called passes everything."""
    assert program(ADD, "    return 0").rstrip().endswith("check(add)")
    scope: dict[str, object] = {}
    with pytest.raises(AssertionError):
        exec(program(ADD, "    return 0"), scope)
    exec(program(ADD, ADD.canonical_solution), scope)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return 1\n\n\ndef other():\n    pass", "    return 1\n\n"),
        ("    return 1\nclass A:", "    return 1"),
        ("    # inside\n    if a:\n        return 1\n", "    # inside\n    if a:\n        return 1\n"),
        ("    return 1\nprint(add(1, 2))\n", "    return 1"),
        ("    return 1\n```\nExplanation", "    return 1"),
        ("", ""),
    ],
)
def test_a_completion_ends_with_its_function(text: str, kept: str) -> None:
    """What a model writes after the function would run too, and fail or print; what is inside must stay."""
    assert cut(text) == kept


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "task_id is missing"),
        (json.dumps({**vars(ADD), "test": None}), "test is missing or no text"),
        (json.dumps({k: v for k, v in vars(ADD).items() if k != "canonical_solution"}), "canonical_solution is missing"),
        (json.dumps({**vars(ADD), "entry_point": "add); import os; (add"}), "no name of a function"),
        (json.dumps(vars(ADD)), "twice"),
    ],
)
def test_a_bad_problem_file_names_the_line(line: str, reason: str, tmp_path: Path) -> None:
    """Each mistake found before a model is loaded."""
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{json.dumps(vars(ADD))}\n\n{line}\n")
    with pytest.raises(UserError, match=reason) as caught:
        read_problems(path)
    assert f"{path}:3" in str(caught.value)


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    """Zero problems would score as NaN."""
    with pytest.raises(UserError, match="cannot be read"):
        read_problems(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no problem"):
        read_problems(tmp_path / "empty.jsonl")
    assert {p.task_id.partition("/")[0] for p in code_tasks.read_problems(SHIPPED)} == {"megaspark"}
