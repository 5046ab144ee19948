"""A folder that is made in pieces: it appears whole or not at all, and a killed job goes on with the pieces it had.

What is being made lies in ``.NAME.converting`` beside the folder, held by a lock. A piece is written under another
name, synced and renamed, so a piece under its own name is whole, whenever the job was killed. ``plan.json`` says what
the pieces belong to; pieces of anything else are removed. An error removes everything: only a kill leaves something to
go on from.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.formats.atomic import read_json, replace_folder, sync_folder, write_json

PLAN = "plan.json"
_PART = ".part"


@contextmanager
def resumable_folder(path: str | Path, identity: str) -> Iterator[Path]:
    """Yield the folder to make pieces in; it takes the name ``path`` if the block ends without an exception.

    A folder already there is replaced. Pieces from before are there if they were made for the same ``identity``.

    Raises:
        ConfigError: another process is making the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.converting")
    held = _hold(work, path)
    try:
        _keep_only(work, identity)
        yield work
        (work / PLAN).unlink()
        for file in work.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        replace_folder(work, path)
    except (XAlignError, OSError, ValueError):
        shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(held)


@contextmanager
def piece(path: Path) -> Iterator[IO[bytes]]:
    """Open a piece for writing; it has its name once it is on the disk."""
    part = path.with_name(path.name + _PART)
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def _hold(work: Path, path: Path) -> int:
    while True:
        work.mkdir(exist_ok=True)
        held = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise ConfigError(
                f"{path} is being written by another process; wait for it, or name another folder."
            ) from None
        except OSError:  # a file system without locks
            return held
        try:
            if os.fstat(held).st_ino == work.stat().st_ino:
                return held
        except FileNotFoundError:
            pass
        os.close(held)  # whoever had it before has just given it its name


def _keep_only(work: Path, identity: str) -> None:
    plan = work / PLAN
    try:
        same = plan.is_file() and read_json(plan) == {"identity": identity}
    except XAlignError:
        same = False
    for file in list(work.iterdir()):
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif not same or file.name.endswith(_PART) or file.name.startswith("."):
            file.unlink()
    if not same:
        write_json(plan, {"identity": identity})
