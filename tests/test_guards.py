"""Guards: one run in a folder at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHECKOUT, process_environment
from megaspark.errors import UserError
from megaspark.guards import claim

CLAIMER = """
import sys, time
from pathlib import Path
from megaspark.guards import claim
claim(Path(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


def test_second_run_in_the_same_folder_waits_or_is_refused(tmp_path: Path) -> None:
    """The same command started again while the old run still saves, or by mistake twice: two writers in one folder."""
    (tmp_path / "config.yaml").write_text("")
    command = [sys.executable, "-c", CLAIMER, str(tmp_path)]
    other = subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE, cwd=CHECKOUT)
    assert other.stdout and other.stdout.readline()
    with pytest.raises(UserError, match="in use"):
        claim(tmp_path, wait_s=0.3)
    other.kill()
    other.wait()
    other.stdout.close()
    claim(tmp_path, wait_s=0)  # the kernel frees a killed process's lock
    claim(tmp_path / "nothing there", wait_s=0)
    assert not (tmp_path / "nothing there").exists()
