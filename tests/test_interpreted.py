"""Runs every file of tests/interpreted in a process of its own with Triton's interpreter: TRITON_INTERPRET=1.

The variable counts when triton is first imported, and makes ahead-of-time compilation impossible, so these tests cannot share a
process with the others. One file by hand: TRITON_INTERPRET=1 pytest tests/interpreted/test_rope.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHECKOUT, process_environment

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file, request):
    """Whatever the file's own tests say; or that none of them ran."""
    every = ["--all"] if request.config.getoption("--all") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *every, str(file)],
        capture_output=True, text=True, cwd=CHECKOUT, env=process_environment(TRITON_INTERPRET="1"), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
