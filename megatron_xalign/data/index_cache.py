"""A folder of index files that jobs share: found by what they were made from, whole or not there at all.

A file's name is the SHA-256 of everything that decides its content: the token file (the hash of its manifest, or size
and time of Megatron's own), seed, name, sequence length, and the version of the code that made it. So nothing in the
folder is ever stale: text that was tokenised again in place, another seed or another version of the package have other
names. What is old takes room and nothing else; the folder may be emptied at any time, also while jobs run.

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
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import remove_abandoned, whole_file
from megatron_xalign.formats.token_file import TokenFile, companion

log = logging.getLogger(__name__)

INDEX_VERSION = 1
"""Of all that is kept; in every name. Raise it when anything that decides an index changes."""
WAIT_SECONDS = 1800.0
"""How long a process waits for another one to build an index before it builds its own."""

_MAGIC = b"XAINDEX\x00"
_HEADER = struct.Struct("<8sII32s")
_ALIGNMENT = 64
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
        wanted = json.dumps([INDEX_VERSION, kind, made_from], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        if self.folder is None:
            return _read_only(build())
        path = self.folder / f"{kind}-{hashlib.sha256(wanted.encode('ascii')).hexdigest()}"
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

    def _keep(self, path: Path, wanted: str, arrays: Mapping[str, np.ndarray]) -> bool:
        try:
            if not self._swept:
                self._swept = True
                remove_abandoned(path.parent)
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
