"""A folder that appears under its name whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaspark.errors import UserError
from megaspark.manifests import fsync_folder


@contextmanager
def whole_folder(out: Path, *, force: bool, marker: str, need_bytes: int) -> Iterator[Path]:
    """Gives a folder beside `out` to write into, and names it `out` at the end; after any failure nothing is left of it.

    With `force` an `out` that holds a file named `marker`, or nothing, is replaced, by the finished folder only. Raises
    UserError where `out` may not be replaced, where there is no room for `need_bytes`, and for whatever the disk refuses.
    """
    _check_free(out, force, marker)
    out = out.absolute()
    partial, old = (out.with_name(f".{out.name}.{state}") for state in ("partial", "old"))
    room = next(folder for folder in out.parents if folder.exists())
    if not room.is_dir():
        raise UserError(f"{out}: {room} is a file, not a folder")
    free = shutil.disk_usage(room).free
    if need_bytes > free:
        raise UserError(f"no room for {out}: it takes {need_bytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        fsync_folder(partial)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        os.replace(partial, out)
        fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error} ({error.filename or partial})") from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, force: bool, marker: str) -> None:
    if not out.exists():
        if not out.name:
            raise UserError(f"{out} is no name for a new folder")
        return
    if not force:
        raise UserError(f"{out} exists; choose another folder, or --force to replace it")
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"{out} is not a folder; --force replaces folders only")
    if any(out.iterdir()) and not (out / marker).is_file():
        raise UserError(f"{out} holds other things ({marker} is not among them); --force replaces only what this command made")
