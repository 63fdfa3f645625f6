"""Runs a program that nobody has read, such as one a model wrote, so that a mistake in it harms nothing and ends in time.

The program gets fresh Linux namespaces (no network, no other process in sight, the file system read-only, homes and sockets
hidden), an empty folder in memory as cwd and HOME, a clean environment, no rights, limits on CPU time, memory, files and
processes, and a time after which all of it is killed. That is a guard against accidents and clumsy malice, not a security
boundary: one kernel bug is enough to leave it. Where a real attacker may have written the program, use a machine of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from megaspark.errors import UserError

GRACE_S = 5.0  # for namespaces to be made and undone around the program's own time
LINE_BYTES = 4096


@dataclass(frozen=True)
class Limits:
    """What a program may use; memory is each process's, `processes` counts threads too. `confined=False`: see `run_program`."""

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_bytes: int = 1 << 30
    disk_bytes: int = 16 << 20
    processes: int = 16
    confined: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a program ended: "passed" (to its end, without an exception), "failed", "timed out" or "died", and the reason."""

    status: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.status == "passed"


def run_program(text: str, limits: Limits | None = None) -> Outcome:
    """Runs Python text with the standard library alone; its output is thrown away.

    With `confined=False` there are no namespaces: the program has the network, reads and writes whatever you can, and a
    process of its that leaves the group outlives it. Raises UserError where the sandbox cannot be made.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="megaspark-sandbox-", ignore_cleanup_errors=True) as folder:
        home = "/tmp" if limits.confined else folder
        process = subprocess.Popen(
            _command(limits),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/" if limits.confined else folder,
            env={"HOME": home, "TMPDIR": home, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert process.stdin and process.stdout
        try:
            with suppress(BrokenPipeError), process.stdin:  # it ended before it read the program: its line says why
                process.stdin.write(text.encode("utf-8", "surrogatepass"))
            process.wait(limits.wall_s + GRACE_S)
            return _outcome(process.stdout.fileno(), limits.confined)
        except subprocess.TimeoutExpired:
            return Outcome("timed out", f"after {limits.wall_s:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def _command(limits: Limits) -> list[str]:
    """Python with `confinements` as its program, under `unshare` where namespaces are wanted."""
    root = _is_root()
    # A user id that nothing else on the machine has: then the limit on processes counts this sandbox's alone.
    uid = 10**9 + secrets.randbelow(10**9) if root and limits.confined else 0
    inside = resources.files("megaspark").joinpath("confinements.py").read_text(encoding="utf-8")
    python = getattr(sys, "_base_executable", sys.executable)  # not a virtual environment's: its packages are no business here
    command = [python, "-S", "-s", "-P", "-B", "-c", inside, json.dumps({**asdict(limits), "uid": uid})]
    if not limits.confined:
        return command
    unshare = shutil.which("unshare")
    if unshare is None:
        raise _refused("there is no `unshare` (util-linux) here")
    own_user = [] if root else ["--user", "--map-root-user"]
    return [unshare, *own_user, "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child", *command]


def _is_root() -> bool:
    """Whether this is the machine's root, who may become any user, and not merely a container's."""
    try:
        return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]
    except OSError:
        return False


def _outcome(output: int, confined: bool) -> Outcome:
    """The line that came out: the verdict, or what kept the sandbox from being made."""
    os.set_blocking(output, False)
    try:
        line = os.read(output, LINE_BYTES).decode("utf-8", "replace").partition("\n")[0]
    except BlockingIOError:
        line = ""
    if not line and not confined:
        return Outcome("died", "and its keeper with it")
    try:
        outcome = Outcome(**json.loads(line))
    except (ValueError, TypeError):
        raise _refused(line or "it ended without a word") from None
    if outcome.status == "refused":
        raise _refused(outcome.detail)
    return outcome


def _refused(why: str) -> UserError:
    return UserError(
        f"programs cannot be shut in on this machine ({why}); run where Linux namespaces are allowed, or take the risk "
        "with --unconfined (limits on time and memory only)"
    )
