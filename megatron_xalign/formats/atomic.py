"""Files that appear whole or not at all: write beside, fsync, rename.

What is being written is called ``.NAME.partial-HOST-PID`` and held by a file lock, so that what a killed process left
can be told from what a living one is writing (:func:`remove_abandoned`).
"""

from __future__ import annotations

import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_xalign.errors import FormatError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
"""What ``flock`` fails with where a file system has no locks."""


@functools.cache
def _host() -> str:
    """A short name of this machine, the same for all its processes."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{_host()}-{os.getpid()}")


def _hold(descriptor: int) -> None:
    """Lock a file or folder until it is closed, or its process has ended in whatever way."""
    # A file system without locks only loses the clean-up after a kill.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_files(
    paths: Sequence[str | Path], before_naming: Callable[[], None] | None = None
) -> Iterator[list[IO[bytes]]]:
    """Open several files for writing that appear together, and only if the block ends without an exception.

    All are on the disk before the first gets its name; they get their names in the order given, so a process killed
    in between leaves the first of them without the last. Whoever reads them goes by the last.

    Args:
        paths: the names they get.
        before_naming: called when all are written and none has its name: the place to remove what must not be seen
            together with some of them.
    """
    names = [Path(path) for path in paths]
    besides = [_beside(path) for path in names]
    files: list[IO[bytes]] = []
    named: list[Path] = []
    try:
        for path, beside in zip(names, besides, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(beside.open("wb"))
            _hold(files[-1].fileno())
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for file in files:
            file.close()
        if before_naming is not None:
            before_naming()
        folders = dict.fromkeys(path.parent for path in names)
        for path, beside in zip(names, besides, strict=True):
            if path is names[-1] and len(names) > 1:
                for folder in folders:
                    sync_folder(folder)
            beside.replace(path)
            named.append(path)
        for folder in folders:
            sync_folder(folder)
    except BaseException:
        # The first error is the one to tell: on a full disk closing fails as well.
        for file in files:
            with suppress(OSError):
                file.close()
        for path in (*besides, *named):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing; it appears under its name only if the block ends without an exception."""
    with whole_files([path]) as (file,):
        yield file


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder beside ``path``; it takes that name only if the block ends without an exception.

    A folder already there is replaced. Files inside are fsynced before the rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    held = os.open(beside, os.O_RDONLY)
    try:
        _hold(held)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        replace_folder(beside, path)
    finally:
        os.close(held)
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Give ``new`` the name ``path``; what had that name before is removed afterwards."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.replace(old)
    new.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_abandoned(folder: str | Path, stem: str = "") -> list[Path]:
    """Remove what killed processes of this machine were writing in a folder.

    A partial file or folder goes if its process is no more and nobody holds its lock: both, since process numbers
    mean nothing across containers that share a folder. Where the file system has no locks, everything stays.

    Args:
        folder: looked through, not its subfolders; it need not exist.
        stem: only files whose names were to begin with it.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(f".{glob.escape(stem)}*.partial-{_host()}-*")):
        pid = path.name.rpartition("-")[2]
        if not pid.isascii() or not pid.isdecimal() or _is_running(int(pid)) or _is_held(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    try:
        # In a container nobody may reap what was orphaned: a zombie has a number and writes no more.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _is_held(path: Path) -> bool:
    """Whether somebody has the lock, or it cannot be found out."""
    try:
        # NFS gives exclusive locks on files open for writing only.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def json_bytes(content: Any) -> bytes:
    """A JSON file's bytes; NaN and infinity are refused (ValueError)."""
    return (json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode("utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all; NaN and infinity are refused (ValueError)."""
    content_bytes = json_bytes(content)
    with whole_file(path) as file:
        file.write(content_bytes)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FormatError: it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a readable JSON file: {error}.") from None


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_WAYS_OUT = {
    errno.ENOSPC: "the disk is full; make room or write elsewhere",
    errno.EDQUOT: "your quota on this disk is used up; make room or write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "you may not write there; write elsewhere or change the folder's permissions",
    errno.EPERM: "you may not write there; write elsewhere or change the folder's permissions",
    errno.ENOTDIR: "a part of the path is a file and not a folder; write elsewhere or remove that file",
    errno.EEXIST: "a part of the path is a file and not a folder; write elsewhere or remove that file",
    errno.EISDIR: "there is a folder of that name; write elsewhere or remove it",
    errno.EFBIG: "the file is larger than this file system or your limits (ulimit -f) allow; write elsewhere",
    errno.EIO: "the disk reports an error; look into the system's log and write elsewhere",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; end something or raise fs.file-max",
    errno.ENOMEM: "there is not enough memory, or too many memory maps (sysctl vm.max_map_count)",
}


def cannot_write(path: str | Path, error: OSError) -> FormatError:
    """What to tell somebody whose file could not be written: which, why, and the way out."""
    if error.errno == errno.ENAMETOOLONG:
        # A partial file's name is the longest.
        spare = len(_beside(Path("x")).name) - 1
        way = f"the name has {len(os.fsencode(Path(path).name))} bytes; use a shorter one (255 less {spare} at most)"
    else:
        way = _WAYS_OUT.get(error.errno or 0, error.strerror or str(error))
    return FormatError(f"{path} cannot be written: {way}. What was begun is removed.")


def cannot_read(path: str | Path, error: OSError) -> FormatError:
    """The same for a file that could not be read."""
    if isinstance(error, PermissionError):
        way = "you may not read it; change its permissions"
    elif error.errno == errno.EIO:
        way = "the disk reports an error; look into the system's log and copy it from elsewhere"
    else:
        way = _WAYS_OUT.get(error.errno or 0, error.strerror or str(error))
    return FormatError(f"{path} cannot be read: {way}.")
