"""A folder of index files that jobs share: found by what they were made from, whole or not there at all.

A file's name is the SHA-256 of everything that decides its content: the token file (the hash of its manifest, or size
and time of Megatron's own), seed, name, sequence length, and the version of the code that made it. So nothing in the
folder is ever stale: text that was tokenised again in place, another seed or another version of the package have other
names. What is old takes room and nothing else; what no job opened for 90 days is removed. On a local disk the folder
may be emptied at any time, also while jobs run.

Of several processes that miss the same file one builds it and the others wait (a file lock, for a limited time). On
nodes with disks of their own each builds once. Where the folder cannot be written every process keeps what it built in
memory.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import remove_abandoned, whole_file, whole_folder
from megatron_xalign.formats.token_file import TokenFile, companion

log = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Of all that is kept; in every name. Raise it when anything that decides an index changes."""
WAIT_SECONDS = 1800.0
"""How long a process waits for another one to build an index before it builds its own."""

_UNUSED_SECONDS = 90 * 86400.0
_MAGIC = b"XAINDEX\x00"
_HEADER = struct.Struct("<8sII32s")
_ALIGNMENT = 64
# In a folder: what it was made from.
_WANTED = "made_from.json"
_IS_OURS = re.compile(r"^[a-z_]+-[0-9a-f]{64}$")
_KINDS = frozenset({"i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "|i1", "|u1"})


class IndexCache:
    """Keeps arrays under what they were made from; made by :meth:`at`."""

    def __init__(self, folder: Path | None, wait_seconds: float = WAIT_SECONDS) -> None:
        """Nothing is opened or made yet.

        Args:
            folder: made when first written to; None: nothing is kept.
            wait_seconds: for another process that builds the same.
        """
        self.folder = folder
        self._wait_seconds = wait_seconds
        self._told = False
        self._swept = False
        self._temporary: list[tempfile.TemporaryDirectory[str]] = []

    @classmethod
    def at(cls, setting: str | Path | None) -> IndexCache:
        """The cache that a setting names.

        Args:
            setting: a folder; empty or None: ``megatron-xalign/index`` in the user's cache folder (``XDG_CACHE_HOME``,
                or ``.cache`` at home); ``none``: nothing is kept.

        Raises:
            ConfigError: there is something else than a folder.
        """
        if str(setting) == "none" and setting is not None:
            return cls(None)
        if setting:
            folder = Path(setting).expanduser()
            if folder.exists() and not folder.is_dir():
                raise ConfigError(
                    f"data.index_cache_dir={setting} is not a folder; name one, leave it empty for the user's cache "
                    "folder, or use none to keep nothing."
                )
            return cls(folder)
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
        # Without a home there is nowhere to keep anything.
        return cls(Path(home) / "megatron-xalign" / "index" if Path(home).is_absolute() else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexCache, (self.folder, self._wait_seconds)

    def arrays(
        self, kind: str, made_from: Mapping[str, Any], build: Callable[[], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Arrays by what they are made from; built if they are not there.

        Args:
            kind: a short word for what they are; the beginning of the file's name.
            made_from: everything that decides the arrays, JSON-able.
            build: makes them; called in at most one process at a time per folder, again only if they are lost.

        Returns:
            The arrays, read-only: memory maps of the kept file, or what ``build`` gave where nothing can be kept.
        """
        wanted = _canonical(kind, made_from)
        if self.folder is None:
            return _read_only(build())
        path = self.folder / f"{kind}-{_name_of(wanted)}"
        found = _open(path, wanted)
        if found is not None:
            return found
        with self._only_one(path) as alone:
            if alone != "unlocked":
                found = _open(path, wanted)
                if found is not None:
                    return found
            built = _read_only(build())
            if alone == "late" or not self._keep(path, wanted, built):
                return built
            # From the file, so that the built arrays are given back and processes share the pages.
            found = _open(path, wanted)
            return built if found is None else found

    def folder_of(self, kind: str, made_from: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
        """A folder of files by what they are made from, for what is too large to be built in memory.

        Args:
            kind: a short word for what they are; the beginning of the folder's name.
            made_from: everything that decides the files, JSON-able.
            build: writes them into the empty folder it is given; they are on the disk before the folder gets its name.

        Returns:
            The folder, whole and not to be written to; where nothing can be kept, a temporary one that goes with this
            object.
        """
        wanted = _canonical(kind, made_from)
        if self.folder is None:
            return self._temporary_folder(build)
        path = self.folder / f"{kind}-{_name_of(wanted)}"
        if _is_whole(path, wanted):
            return path
        with self._only_one(path) as alone:
            if _is_whole(path, wanted):
                return path
            if alone == "late":
                return self._temporary_folder(build)
            try:
                self._sweep()
                with whole_folder(path) as beside:
                    (beside / _WANTED).write_text(wanted, encoding="ascii")
                    build(beside)
            except OSError as error:
                # What building itself runs into on a disk that can be written is met again in the next line.
                self._tell(error)
                return self._temporary_folder(build)
        return path

    def _temporary_folder(self, build: Callable[[Path], None]) -> Path:
        holder = tempfile.TemporaryDirectory(prefix="xalign-index-")
        build(Path(holder.name))
        self._temporary.append(holder)
        return Path(holder.name)

    def _sweep(self) -> None:
        """Once per object: what killed processes left, and what no job opened for a long time."""
        if self._swept or self.folder is None:
            return
        self._swept = True
        remove_abandoned(self.folder)
        oldest = time.time() - _UNUSED_SECONDS
        for entry in os.scandir(self.folder):
            if not _IS_OURS.match(entry.name) or entry.stat(follow_symlinks=False).st_mtime > oldest:
                continue
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)  # noqa: PTH108

    def _keep(self, path: Path, wanted: str, arrays: Mapping[str, np.ndarray]) -> bool:
        try:
            self._sweep()
            _write(path, wanted, arrays)
        except OSError as error:
            self._tell(error)
            return False
        return True

    def _tell(self, error: OSError) -> None:
        # Once: a run has hundreds of such files.
        if not self._told:
            self._told = True
            log.warning(
                "index files cannot be kept in %s (%s): every process keeps its own in memory. "
                "Name a folder that can be written as data.index_cache_dir, or none.",
                self.folder, error.strerror or error,
            )  # fmt: skip

    @contextmanager
    def _only_one(self, path: Path) -> Iterator[Literal["alone", "late", "unlocked"]]:
        """Hold the lock of a file.

        Yields:
            ``alone`` with the lock; ``late`` if another process held it all the time; ``unlocked`` where there are no
            locks, or no place for them.
        """
        lock = path.with_name(f".{path.name}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = self._locked(lock, path)
        except OSError as error:
            if error.errno == errno.ETIMEDOUT:
                log.warning(
                    "%s: another process has been building it for %.0f seconds; building it here too.",
                    path, self._wait_seconds,
                )  # fmt: skip
                yield "late"
            else:
                yield "unlocked"
            return
        try:
            yield "alone"
        finally:
            # Unlinked while held: whoever waits for it finds that it has no name any more and makes a new one.
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)

    def _locked(self, lock: Path, path: Path) -> int:
        """A descriptor that holds the lock; OSError(ETIMEDOUT) if another process keeps it for too long."""
        until = time.monotonic() + self._wait_seconds
        pause = 0.005
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(descriptor, lock):
                    return descriptor
            except BlockingIOError:
                if time.monotonic() > until:
                    os.close(descriptor)
                    raise TimeoutError(errno.ETIMEDOUT, "the lock is held") from None
                time.sleep(pause)
                pause = min(2 * pause, 0.25)
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)


def file_identity(file: TokenFile) -> dict[str, Any]:
    """What the content of a token file is known by, JSON-able.

    Args:
        file: an open token file.

    Returns:
        The SHA-256 of the manifest, which has those of the other files; of Megatron's own files sizes and times of
        modification and the SHA-256 of the beginning of the index.
    """
    if file.manifest:
        text = json.dumps(file.manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return {"manifest_sha256": hashlib.sha256(text.encode("ascii")).hexdigest()}
    identity: dict[str, Any] = {}
    for kind in ("bin", "idx"):
        status = companion(file.prefix, kind).stat()
        identity[kind] = [status.st_size, status.st_mtime_ns]
    with companion(file.prefix, "idx").open("rb") as index:
        identity["idx_begins"] = hashlib.sha256(index.read(1 << 16)).hexdigest()
    return identity


def _canonical(kind: str, made_from: Mapping[str, Any]) -> str:
    return json.dumps([INDEX_VERSION, kind, made_from], sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _name_of(wanted: str) -> str:
    return hashlib.sha256(wanted.encode("ascii")).hexdigest()


def _touch(path: Path) -> None:
    """Note that it was used, at most once a day; for :meth:`IndexCache._sweep`."""
    with suppress(OSError):
        if path.stat().st_mtime < time.time() - 86400:
            os.utime(path)


def _is_whole(folder: Path, wanted: str) -> bool:
    try:
        found = (folder / _WANTED).read_text(encoding="ascii") == wanted
    except (OSError, ValueError):
        return False
    _touch(folder)
    return found


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _read_only(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    views = {name: np.ascontiguousarray(array).view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return views


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _write(path: Path, wanted: str, arrays: Mapping[str, np.ndarray]) -> None:
    """One file: a fixed header with the SHA-256 of the list that follows it, then the arrays it lists."""
    entries: list[dict[str, Any]] = []
    size = 0
    for name, array in arrays.items():
        if array.dtype.str not in _KINDS:
            raise ValueError(f"array {name} of dtype {array.dtype} cannot be kept; whole numbers can.")
        entries.append({"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "at": size})
        size = _aligned(size + array.nbytes)
    text = json.dumps({"wanted": wanted, "arrays": entries, "bytes": size}, ensure_ascii=True).encode("ascii")
    header = _HEADER.pack(_MAGIC, INDEX_VERSION, len(text), hashlib.sha256(text).digest()) + text
    with whole_file(path) as file:
        file.write(header.ljust(_aligned(len(header)), b" "))
        for array in arrays.values():
            file.write(array.reshape(-1).view(np.uint8).data)
            file.write(bytes(_aligned(array.nbytes) - array.nbytes))


def _open(path: Path, wanted: str) -> dict[str, np.ndarray] | None:
    """The arrays of a kept file; None if it is not there, or is not what it should be."""
    try:
        with path.open("rb") as file:
            header = _read_header(file, wanted)
            if header is None:
                log.warning("%s is damaged or not an index file of this package; built again.", path)
                return None
            first, entries, size = header
            mapped: np.ndarray = np.zeros(0, dtype=np.uint8)
            if size:
                mapped = np.memmap(file, dtype=np.uint8, mode="r", offset=first, shape=(size,))
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s); built again.", path, error.strerror or error)
        return None
    # One map for all; plain arrays because slices of np.memmap are several times slower.
    _touch(path)
    whole, arrays = mapped.view(np.ndarray), {}
    for entry in entries:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        end = entry["at"] + dtype.itemsize * math.prod(shape)
        arrays[entry["name"]] = whole[entry["at"] : end].view(dtype).reshape(shape)
    return _read_only(arrays)


def _read_header(file: IO[bytes], wanted: str) -> tuple[int, list[dict[str, Any]], int] | None:
    """Where the arrays begin, the list of them, and their bytes; None if the file is not what is wanted."""
    begin = file.read(_HEADER.size)
    if len(begin) < _HEADER.size:
        return None
    magic, version, length, digest = _HEADER.unpack(begin)
    if magic != _MAGIC or version != INDEX_VERSION:
        return None
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        return None
    content = json.loads(text)
    first = _aligned(_HEADER.size + length)
    if content["wanted"] != wanted or os.fstat(file.fileno()).st_size != first + content["bytes"]:
        return None
    return first, content["arrays"], content["bytes"]
