"""Programs that misbehave on purpose: each is stopped, in time, and nothing of it is left."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from conftest import process_environment
from megaspark import sandboxes
from megaspark.errors import UserError
from megaspark.sandboxes import Limits, Outcome, run_program

QUICK = Limits(wall_s=1.5, cpu_s=1.0, memory_bytes=256 << 20, disk_bytes=4 << 20)


def can_confine() -> bool:
    try:
        return run_program("pass", QUICK).passed
    except UserError:
        return False


TAKE_RIGHTS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for path in (b"/proc", b"/run", b"/dev/shm"):
    assert libc.umount2(path, 2) == -1
assert libc.mount(b"none", b"/", None, 32 | 4096, None) == -1
libc.unshare(0x10000000 | 0x20000)  # its own user and mount namespace, where it may have rights
assert libc.umount2(b"/proc", 2) == -1
assert libc.mount(b"none", b"/", None, 32 | 4096, None) == -1 or not os.access("/var/tmp", os.W_OK)
try:
    open("/var/tmp/escaped", "w")
except OSError:
    pass
else:
    raise Exception("written")
"""

needs_namespaces = pytest.mark.skipif(not can_confine(), reason="this machine does not allow namespaces")


def alive(marker: str) -> list[str]:
    """The processes of this machine whose command line holds a marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue
    return found


@needs_namespaces
@pytest.mark.parametrize(
    ("program", "status", "detail"),
    [
        ("import math, json, decimal\nassert math.pi > 3", "passed", ""),
        ("raise ValueError('no')", "failed", "ValueError: no"),
        ("assert 1 == 2", "failed", "AssertionError"),
        ("def def", "failed", "SyntaxError"),
        ("def f(): f()\nf()", "failed", "RecursionError"),
        ("import sys; sys.exit(0)", "failed", "SystemExit"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("import os; os._exit(0)", "died", "exit status 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "died", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "died", "SIGSEGV"),
        ("input()", "failed", "EOFError"),
        ("x = bytearray(1 << 30)", "failed", "MemoryError"),
        ("open('big', 'wb').write(bytes(8 << 20))", "failed", "File too large"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()", "failed", "start new thread"),
    ],
)
def test_every_way_to_end_is_told_apart(program: str, status: str, detail: str) -> None:
    """Leaving early must not count as passing, whichever door the program takes."""
    outcome = run_program(program, QUICK)
    assert outcome.status == status and detail in outcome.detail, outcome


@needs_namespaces
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()"])
def test_time_is_up_for_the_busy_and_for_the_asleep(program: str) -> None:
    """CPU time alone does not stop a sleeper; the wall alone lets one core burn for long."""
    start = time.monotonic()
    assert run_program(program, QUICK).status == "timed out"
    assert time.monotonic() - start < QUICK.wall_s + sandboxes.GRACE_S


@needs_namespaces
def test_fork_bomb_is_held_and_killed() -> None:
    """Each fork past the limit fails; when the first process ends, the kernel ends the rest."""
    bomb = "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(60)"
    assert run_program(bomb, QUICK).status == "timed out"
    count = """
import os, time
n = 0
try:
    while os.fork(): n += 1
    time.sleep(60)
except OSError:
    raise Exception(f"{n} forks")
"""
    outcome = run_program(count, QUICK)
    if os.geteuid() == 0 or int(outcome.detail.split()[1]) < QUICK.processes:  # a user's other processes may count too
        assert 0 < int(outcome.detail.split()[1]) < QUICK.processes


@needs_namespaces
@pytest.mark.parametrize("escape", ["", "os.setsid()", "os.setsid(); os.fork() and os._exit(0)"])
def test_children_left_asleep_are_killed(escape: str) -> None:
    """A child in a session of its own, or whose parent has ended, is out of reach of a signal to the process group."""
    marker = f"marker-{uuid.uuid4()}"
    program = f"""
import os, time
if os.fork() == 0:
    {escape}
    os.execv({sys._base_executable!r}, ["python", "-S", "-c", "import time; time.sleep(60)", {marker!r}])
time.sleep(0.5)
"""
    seen: list[str] = []
    watcher = threading.Thread(target=lambda: seen.extend(watch(marker)))
    watcher.start()
    assert run_program(program, QUICK).passed
    watcher.join()
    assert seen, "the child never ran, so this would show nothing"
    assert not alive(marker)


def watch(marker: str) -> list[str]:
    end = time.monotonic() + 5
    while time.monotonic() < end and not (found := alive(marker)):
        time.sleep(0.02)
    return found


def gone(marker: str) -> bool:
    """Whether its processes end within a moment: a signal to a group takes effect when each is next scheduled."""
    end = time.monotonic() + 2
    while found := alive(marker):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return not found


@needs_namespaces
@pytest.mark.parametrize("stream", ["1", "2", "sys.stdout.fileno()"])
def test_a_flood_of_output_goes_nowhere(stream: str) -> None:
    """Output that somebody collects would fill the memory, or block the program on a full pipe."""
    flood = f"import os, sys\nfor _ in range(200): os.write({stream}, bytes(1 << 20))"
    assert run_program(flood, QUICK).passed


@needs_namespaces
def test_a_flood_into_every_open_file_is_no_verdict() -> None:
    """A program that finds the pipe of its verdict must not stop the evaluation of all others."""
    once = """
import os
for fd in range(3, 64):
    try: os.write(fd, b"x" * 1000)
    except OSError: pass
os._exit(3)
"""
    assert run_program(once, QUICK) == Outcome("died", "exit status 3")
    assert run_program(once.replace("try:", "try:\n        while True:"), QUICK).status == "timed out"


@needs_namespaces
def test_no_network() -> None:
    """Neither this machine's ports, nor the outside, nor a socket that lies in a folder."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(f"{folder}/socket")
        local.listen()
        for address in (server.getsockname(), ("192.0.2.1", 80)):
            program = f"import socket\nsocket.create_connection({address!r}, timeout=1)"
            outcome = run_program(program, QUICK)
            assert outcome.status == "failed" and ("unreachable" in outcome.detail or "refused" in outcome.detail), outcome
        assert not run_program(f"import socket\nsocket.socket(socket.AF_UNIX).connect({f'{folder}/socket'!r})", QUICK).passed


@needs_namespaces
def test_nothing_outside_its_folder_can_be_written(tmp_path: Path) -> None:
    """The file system is read-only and the homes are not there; its own folder can be written, and is gone afterwards."""
    for folder in (str(tmp_path), "/var/tmp", "/etc", os.path.expanduser("~"), os.path.dirname(os.__file__)):
        name = os.path.join(folder, f"escaped-{uuid.uuid4()}")
        run_program(f"open({name!r}, 'w').write('x')", QUICK)
        assert not os.path.exists(name), folder
    name = f"own-{uuid.uuid4()}"
    own = f"import os\nopen({name!r}, 'w').write('x')\nassert os.path.samefile('.', os.environ['HOME'])\nassert os.listdir('.')"
    assert run_program(own, QUICK).passed
    assert not list(Path("/tmp").glob(name)) and not Path(name).exists()
    assert run_program(f"import os\nassert {name!r} not in os.listdir('.')", QUICK).passed


@needs_namespaces
def test_secrets_of_the_environment_are_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own environment, that of other processes under /proc, files in homes and temporary folders."""
    secret = f"secret-{uuid.uuid4()}"
    monkeypatch.setenv("HF_TOKEN", secret)
    (tmp_path / "token").write_text(secret)
    program = f"""
import os
assert {secret!r} not in str(dict(os.environ))
assert os.listdir("/proc") == [], os.listdir("/proc")
assert not os.path.exists({str(tmp_path)!r}) or not {str(tmp_path)!r}.startswith("/tmp/")
assert not os.path.exists({os.path.expanduser("~/.cache")!r})
"""
    assert run_program(program, QUICK) == Outcome("passed")


@needs_namespaces
def test_rights_cannot_be_got_back() -> None:
    """With its first rights the program could take away what hides the machine, or become another user."""
    assert run_program(TAKE_RIGHTS, QUICK) == Outcome("passed")
    assert not os.path.exists("/var/tmp/escaped")


@needs_namespaces
@pytest.mark.skipif(os.geteuid() != 0, reason="shows what an ordinary user gets, from root's side")
def test_an_ordinary_user_gets_the_same() -> None:
    """Without root the namespaces come with a user namespace: another road, to be walked once."""
    code = f"""
from megaspark.sandboxes import Limits, run_program
for program in ("open('/var/tmp/escaped', 'w')", "assert __import__('os').listdir('/proc')", "import time; time.sleep(9)"):
    print(run_program(program, Limits(wall_s=0.5)).status)
print(run_program("import decimal; open('own', 'w').write('x')").status)
print(run_program({TAKE_RIGHTS!r}))
"""
    command = ["unshare", "--user", "--map-current-user", sys.executable, "-c", code]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=60)
    expected = ["failed", "failed", "timed out", "passed", str(Outcome("passed"))]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr


def test_where_nothing_can_be_shut_in_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without `unshare`, or that forbids it, must not silently run the program in the open."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="no `unshare`"):
        run_program("pass", QUICK)
    forbidding = tmp_path / "unshare"
    forbidding.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    forbidding.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda _: str(forbidding))
    with pytest.raises(UserError, match=r"Operation not permitted.*--unconfined"):
        run_program("pass", QUICK)


def test_unconfined_still_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without namespaces: time, memory, a clean environment, its own folder, and the group is killed."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    free = Limits(wall_s=1.0, cpu_s=1.0, memory_bytes=256 << 20, disk_bytes=1 << 20, confined=False)
    assert run_program("import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir('.') == []", free).passed
    assert run_program("x = bytearray(1 << 30)", free).detail.startswith("MemoryError")
    assert run_program("while True: pass", free).status == "timed out"
    marker = f"marker-{uuid.uuid4()}"
    sleeper = f"import subprocess, time\nsubprocess.Popen(['/bin/sh', '-c', 'sleep 60; : {marker}'])\ntime.sleep(60)"
    assert run_program(sleeper, free).status == "timed out"
    assert gone(marker)
    assert run_program("import os\nos.kill(os.getppid(), 9)", free).status == "died"
