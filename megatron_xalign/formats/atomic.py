"""Files that appear whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_xalign.errors import FormatError


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing; it appears under its name only if the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


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
    try:
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        replace_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Give ``new`` the name ``path``; what had that name before is removed afterwards."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.replace(old)
    new.replace(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FormatError: it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is not a readable JSON file: {error}.") from None


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
