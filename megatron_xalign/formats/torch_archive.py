"""Read what ``torch.save`` wrote without running anything that is in it.

Such a file is a zip archive, nothing in it compressed: ``data.pkl``, a pickle that describes the object, and
``data/0``, ``data/1``, ... with the numbers of its tensors. A pickle can run any program, so neither reader here lets
it build anything but descriptions:

- ``read_tensor_into`` takes the one tensor of an archive straight into memory that is there already, and compares the
  numbers with the checksum that the archive has of them (``torch.load`` does not);
- ``read_plain_values`` gives the numbers, text and containers of an archive, with everything else (enums of Megatron,
  tensors, random states) as objects that do and hold nothing. Names outside a short list of harmless ones are refused.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import struct
import types
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from megatron_xalign.errors import CheckpointError

_PIECE_BYTES = 8 << 20
_MOST_PICKLE_BYTES = 64 << 20
"""A pickle of settings or of one tensor has some kilobytes."""

_STORAGES = {
    "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}

_HARMLESS = ("megatron", "torch", "numpy", "transformer_engine", "enum", "functools", "signal", "datetime")
"""Packages whose classes appear in the settings that Megatron-LM saves. None of their code is run."""

_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, EOFError, KeyError, ValueError, TypeError,
    AttributeError, IndexError, OverflowError, RuntimeError, MemoryError, RecursionError, ImportError,
    pickle.UnpicklingError,
)
"""What the zip and pickle modules document, and what damaged bytes were seen to raise."""


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(content)
        return content


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    num_items: int


@dataclass(frozen=True)
class _Described:
    """A tensor as ``data.pkl`` describes it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _OneTensor(pickle.Unpickler):
    """Knows how one tensor is described, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *rest: _Described(
                storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides))
            )
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no tensor needs")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, num_items = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"it asks for {pid!r}, which is not a storage")
        return _Storage(dtype, str(key), int(num_items))


class _Nothing:
    """Stands for an object that was not built: takes whatever a pickle gives it and keeps none of it."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return _Nothing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As of a list."""

    def extend(self, values: Any) -> None:
        """As of a list."""


class _Settings(types.SimpleNamespace):
    """Stands for ``argparse.Namespace``, which has attributes and nothing more."""


class _PlainValues(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("argparse", "Namespace"): _Settings, ("types", "SimpleNamespace"): _Settings,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("pathlib", "PosixPath"): pathlib.PurePosixPath, ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
            ("builtins", "set"): set, ("builtins", "frozenset"): frozenset, ("__builtin__", "set"): set,
        }
        if (module_name, global_name) in known:
            return known[module_name, global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        if module_name.split(".")[0] in _HARMLESS:
            return _Nothing
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no settings need")

    def persistent_load(self, pid: Any) -> _Nothing:
        return _Nothing()


def read_tensor_into(path: Path, start: int, length: int, out: torch.Tensor, what: str) -> bool:
    """Read the one tensor of an archive inside a file into ``out``.

    Args:
        path: the file.
        start: where the archive begins in it.
        length: bytes of the archive.
        out: contiguous, of the tensor's shape and type.
        what: names the archive in errors.

    Returns:
        False if the archive is whole, but lies otherwise than ``torch.save`` leaves a plain tensor (compressed, big
        endian, with strides): read it with ``torch.load(weights_only=True)``.

    Raises:
        CheckpointError: it is missing, truncated or damaged, or is another tensor.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(0, io.SEEK_END)
            if file.tell() < start + length:
                raise CheckpointError(
                    f"{path} is truncated: {length} bytes were written at byte {start}, "
                    f"{max(0, file.tell() - start)} are there."
                )
            with zipfile.ZipFile(_Window(file, start, length)) as archive:
                entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
                if "byteorder" in entries and _small(archive, entries["byteorder"]) != b"little":
                    return False
                found = _OneTensor(io.BytesIO(_small(archive, entries["data.pkl"]))).load()
                if not isinstance(found, _Described):
                    raise pickle.UnpicklingError(f"it holds a {type(found).__name__} and no tensor")
                if found.shape != tuple(out.shape) or found.storage.dtype != out.dtype:
                    raise CheckpointError(
                        f"{what} is a {found.storage.dtype} tensor of shape {list(found.shape)}, not the {out.dtype} "
                        f"tensor of shape {list(out.shape)} that the checkpoint's index announces."
                    )
                data = entries[f"data/{found.storage.key}"]
                num_bytes = out.numel() * out.dtype.itemsize
                plain = found.strides == out.stride() or out.numel() <= 1
                if not plain or found.offset or data.compress_type != zipfile.ZIP_STORED or data.file_size != num_bytes:
                    return False
            file.seek(start + data.header_offset)
            header = file.read(30)
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            if header[:4] != b"PK\x03\x04":
                raise zipfile.BadZipFile("no entry where the archive's index has one")
            file.seek(start + data.header_offset + 30 + name_length + extra_length)
            _read_checked(file, out, data.CRC, what)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from the checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read at byte {start}: {error}.") from None
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"{what} is damaged, or holds more than tensors: {_reason(error)}") from None
    return True


def read_plain_values(file: IO[bytes], what: str, start: int = 0, length: int | None = None) -> Any:
    """The object of an archive with numbers, text, types of torch and containers; anything else becomes an object
    without content.

    Args:
        file: the file.
        what: names the archive in errors.
        start: where the archive begins in it.
        length: bytes of the archive; to the end of the file if left out.

    Raises:
        CheckpointError: it is damaged, or asks for something that settings never need.
    """
    try:
        file.seek(0, io.SEEK_END)
        length = file.tell() - start if length is None else length
        with zipfile.ZipFile(_Window(file, start, length)) as archive:
            entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            return _PlainValues(io.BytesIO(_small(archive, entries["data.pkl"]))).load()
    except (OSError, *_ZIP_ERRORS) as error:
        raise CheckpointError(f"{what} is damaged, or holds more than settings: {_reason(error)}") from None


def plain_attributes(settings: Any) -> dict[str, Any]:
    """The attributes of a namespace (or entries of a mapping) that are numbers, text, types of torch, lists or None."""
    items = dict(settings) if isinstance(settings, dict) else dict(vars(settings)) if settings is not None else {}
    kinds = (str, int, float, bool, list, tuple, torch.dtype, type(None))
    return {name: value for name, value in items.items() if isinstance(name, str) and isinstance(value, kinds)}


def _small(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > _MOST_PICKLE_BYTES:
        raise zipfile.BadZipFile(f"{entry.filename} has {entry.file_size} bytes")
    return archive.read(entry)


def _read_checked(file: IO[bytes], out: torch.Tensor, expected: int, what: str) -> None:
    target = memoryview(out.reshape(-1).view(torch.uint8).numpy().data) if out.numel() else memoryview(b"")
    checksum = at = 0
    while at < len(target):
        piece = target[at : at + _PIECE_BYTES]
        count = file.readinto(piece)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{what} ends {len(target) - at} bytes early.")
        checksum = zlib.crc32(piece[:count], checksum)
        at += count
    if checksum != expected:
        raise CheckpointError(
            f"{what} is damaged: its numbers have checksum {checksum:08x}, {expected:08x} was written."
        )


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{text.splitlines()[0] if text else type(error).__name__}."
