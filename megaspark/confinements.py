"""The inside of the sandbox: shuts its process in, runs the program given on stdin, says in one line how it ended.

`sandboxes` passes this file's text to `python -c` under `unshare`, so it needs the standard library only and is process 1 of
its own process namespace: when it ends, the kernel ends whatever the program left running. It forks once; the child gives up
its rights for good and runs the program, the parent keeps the time.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
# Own memory-backed folders lie over these and over /proc: homes, sockets, other processes' environments are out of sight.
HIDDEN = ("/tmp", "/run", "/home", "/root", "/dev/shm")
MOUNT_SETATTR = 442  # the same number on every architecture (Linux 5.12)
AT_FDCWD, AT_RECURSIVE, RDONLY = -100, 0x8000, 1
NOSUID_NODEV, BIND_RECURSIVE = 2 | 4, 0x1000 | 0x4000
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
CAPABILITIES_V3 = 0x20080522
DETAIL_CHARS = 200


def main() -> None:
    """Reads the settings (JSON, first argument) and the program (stdin); writes `{"status", "detail"}` to stdout."""
    settings = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    verdict = os.dup(1)
    if settings["confined"]:
        try:
            hide_the_machine(settings["disk_bytes"])
        except OSError as error:
            end(verdict, "refused", f"{error.strerror}: {error.filename}")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program must not trace its keeper
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(verdict)
        run(program, settings, told)
    signal.signal(signal.SIGALRM, lambda *_: end(verdict, "timed out", f"after {settings['wall_s']:g} s"))
    signal.setitimer(signal.ITIMER_REAL, settings["wall_s"])
    while (ended := os.wait())[0] != child:
        pass  # an orphan of the program's
    end(verdict, *last_words(heard, os.waitstatus_to_exitcode(ended[1])))


def last_words(heard: int, code: int) -> tuple[str, str]:
    """Status and detail that the child told before it ended, or how it ended if it told nothing that can be read."""
    os.set_blocking(heard, False)
    try:
        told = json.loads(os.read(heard, 1 << 16).partition(b"\n")[0])
        return str(told["status"]), str(told["detail"])[:DETAIL_CHARS]
    except (OSError, ValueError, TypeError, KeyError):  # the pipe is within the program's reach: it may hold anything
        pass
    if -code == signal.SIGXCPU:
        return "timed out", "all its CPU time is used"
    return "died", signal.Signals(-code).name if code < 0 else f"exit status {code}"


def hide_the_machine(disk_bytes: int) -> None:
    """Makes every mount read-only and lays empty folders over HIDDEN and /proc; /tmp can be written. Raises OSError."""
    attributes = (ctypes.c_uint64 * 4)(RDONLY, 0, 0, 0)
    if LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes)):
        raise_errno("making the file system read-only")
    prefix = os.path.realpath(sys.base_prefix)
    python = os.open(prefix, os.O_PATH | os.O_DIRECTORY)
    os.umask(0o022)
    for folder in filter(os.path.isdir, HIDDEN):
        options = f"size={disk_bytes},mode=1777" if folder == "/tmp" else "size=256k,mode=0755"
        mount("tmpfs", folder, "tmpfs", NOSUID_NODEV, options)
    if f"{prefix}/".startswith(tuple(f"{folder}/" for folder in HIDDEN)):  # Python itself was hidden: shown again
        os.makedirs(prefix, exist_ok=True)
        mount(f"/proc/self/fd/{python}", prefix, "none", BIND_RECURSIVE, "")
    mount("tmpfs", "/proc", "tmpfs", NOSUID_NODEV, "size=0,mode=0555")
    os.close(python)
    os.chdir("/tmp")


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """mount(2); raises OSError."""
    if LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()):
        raise_errno(f"mounting over {target}")


def raise_errno(what: str) -> NoReturn:
    """Raises the OSError of the last call into libc."""
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


def run(program: bytes, settings: dict[str, Any], verdict: int) -> NoReturn:
    """Gives up all rights, sets the limits, runs the program and tells how it ended; never returns."""
    if settings["uid"]:
        os.setgroups([])
        os.setgid(settings["uid"])
        os.setuid(settings["uid"])
    if settings["confined"]:
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if LIBC.capset((ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()):
            end(verdict, "refused", "capabilities cannot be given up")
    if not os.access(os.__file__, os.R_OK):
        end(verdict, "refused", f"Python's own library {os.path.dirname(os.__file__)} is not readable for others")
    cpu_s = max(1, round(settings["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU, which names the reason, then SIGKILL
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_FSIZE: settings["disk_bytes"],
        resource.RLIMIT_NPROC: settings["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: a program that exits early has not passed its tests
        end(verdict, "failed", f"{type(error).__name__}: {error}"[:DETAIL_CHARS])
    end(verdict, "passed", "")


def end(verdict: int, status: str, detail: str) -> NoReturn:
    """Writes the one line and ends this process at once, whatever threads it still has."""
    os.write(verdict, (json.dumps({"status": status, "detail": detail}) + "\n").encode())
    os._exit(0)


if __name__ == "__main__":
    main()
