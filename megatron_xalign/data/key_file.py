"""Key files: what of each document of a part is needed to find duplicates without its text.

``XAKEYS\\0\\0``, uint32 version 1, uint32 bytes of a sketch (0 where near duplicates are not looked for, else 128),
uint64 documents N, the Unicode version of the folding as 16 bytes of text, SHA-256 of what follows; then N records of
two uint64, the exact key, and the sketch. Little-endian. Record i belongs to document i of the part.
"""

# N documents

from __future__ import annotations

import hashlib
import struct
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import whole_file

SKETCH_BINS = 128
"""Bytes of a sketch."""

_MAGIC = b"XAKEYS\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ16s32s")
# SHA-256 is computed over pieces of this size.
_CHUNK_BYTES = 1 << 18


def key_dtype(near: bool) -> np.dtype[Any]:
    """One document's keys: ``exact``, and with ``near`` its ``sketch``."""
    exact = ("exact", "<u8", (2,))
    return np.dtype([exact, ("sketch", "u1", (SKETCH_BINS,))] if near else [exact])


class KeyFileWriter:
    """Writes a key file as a stream; it appears when the ``with`` block ends without an exception."""

    def __init__(self, path: str | Path, *, near: bool) -> None:
        """Nothing is opened before the ``with`` block; ``near`` says whether the keys have sketches."""
        self.path = Path(path)
        self.near = near
        self.documents = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._file = stack.enter_context(whole_file(self.path))
            self._file.write(bytes(_HEADER.size))
            self._hash = hashlib.sha256()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            header = (
                _MAGIC, _VERSION, SKETCH_BINS if self.near else 0, self.documents,
                unicodedata.unidata_version.encode(), self._hash.digest(),
            )  # fmt: skip
            self._file.seek(0)
            self._file.write(_HEADER.pack(*header))
        self._stack.__exit__(kind, error, trace)

    def append(self, keys_N: NDArray[np.void]) -> None:
        """Add the keys of the next documents, of dtype ``key_dtype(near)``."""
        if keys_N.dtype != key_dtype(self.near):
            raise ValueError(f"keys have dtype {keys_N.dtype}; {key_dtype(self.near)} expected.")
        content = keys_N.tobytes()
        self._file.write(content)
        self._hash.update(content)
        self.documents += len(keys_N)


def read_keys(path: str | Path, *, check: bool = True) -> NDArray[np.void]:
    """Open a key file.

    Args:
        path: the file.
        check: read it once and compare its checksum.

    Returns:
        [N] of ``key_dtype(near)``, memory-mapped.

    Raises:
        FormatError: it is missing, damaged, of another version, or made with another Unicode version than this
            Python's, so that its keys and ours need not agree.
    """
    path = Path(path)
    again = "Delete it and run the same command again: its part is made anew."
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size:
                raise FormatError(f"{path} holds {len(head)} bytes, less than the header of a key file. {again}")
            magic, version, sketch_bytes, documents, unicode_version, digest = _HEADER.unpack(head)
            if magic != _MAGIC:
                raise FormatError(f"{path} is no key file: it begins with {magic!r}. {again}")
            if version != _VERSION:
                raise FormatError(f"{path} is a key file of version {version}; {_VERSION} expected. {again}")
            if sketch_bytes not in (0, SKETCH_BINS):
                raise FormatError(f"{path} has sketches of {sketch_bytes} bytes; 0 or {SKETCH_BINS} expected. {again}")
            dtype = key_dtype(sketch_bytes > 0)
            expected, found = _HEADER.size + documents * dtype.itemsize, path.stat().st_size
            if found != expected:
                raise FormatError(f"{path} holds {found} bytes; {documents} documents need {expected}. {again}")
            if check and _digest_of_rest(file) != digest:
                raise FormatError(f"{path} is damaged: its checksum does not fit. {again}")
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}. {again}") from None
    made_with = unicode_version.rstrip(b"\0").decode("ascii", "replace")
    if made_with != unicodedata.unidata_version:
        raise FormatError(
            f"{path} was made with Unicode {made_with}; this Python has {unicodedata.unidata_version}, and keys of the "
            f"two need not agree. Use one version of Python for all parts of a job, or delete the file and run again."
        )
    if documents == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=_HEADER.size, shape=(documents,))


def _digest_of_rest(file: Any) -> bytes:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.digest()
