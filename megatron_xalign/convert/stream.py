"""Write safetensors files one tensor at a time, so that a model of any size passes through a little memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from megatron_xalign.formats.resumable import piece

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Announced:
    """A tensor that is going to be written: what a safetensors header says of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(announced: Sequence[Announced]) -> bytes:
    """How a safetensors file with these tensors begins.

    Raises:
        ValueError: a tensor is announced twice.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for item in announced:
        if item.name in header:
            raise ValueError(f"{item.name} is announced twice.")
        stop = start + item.num_bytes
        header[item.name] = {
            "dtype": _DTYPE_NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [start, stop]
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers start at a multiple of eight
    return len(text).to_bytes(8, "little") + text


class SafetensorsStream:
    """One safetensors file being written; tensors come in the order they were announced in."""

    def __init__(self, file: IO[bytes], announced: Sequence[Announced]) -> None:
        self._file = file
        self._expected = iter(announced)
        file.write(header_bytes(announced))

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Append the next tensor, given as consecutive parts; ValueError if it is not the one announced."""
        expected = next(self._expected, None)
        if expected is None or expected.name != name:
            raise ValueError(f"{name} was written where {expected} was announced.")
        written = 0
        for part in parts:
            if part.dtype != expected.dtype:
                raise ValueError(f"{name} {part.dtype} was written where {expected} was announced.")
            # NumPy knows no bfloat16, but every type as bytes.
            self._file.write(part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
            written += part.numel() * part.dtype.itemsize
        if written != expected.num_bytes:
            raise ValueError(f"{written} bytes of {name} were written where {expected} was announced.")

    def finish(self) -> None:
        """Make sure that nothing announced is missing."""
        missing = next(self._expected, None)
        if missing is not None:
            raise ValueError(f"{missing.name} was announced but not written.")


@contextmanager
def open_stream(path: Path, announced: Sequence[Announced]) -> Iterator[SafetensorsStream]:
    """Open a file for ``announced`` tensors; it has its name once all are on the disk.

    Raises:
        ValueError: the block was left without having written all of them.
    """
    with piece(path) as file:
        stream = SafetensorsStream(file, announced)
        yield stream
        stream.finish()


def is_written(path: Path, announced: Sequence[Announced]) -> bool:
    """Whether a file is the one that ``open_stream`` would make, by its beginning and its size."""
    if not path.is_file():
        return False
    header = header_bytes(announced)
    with path.open("rb") as file:
        begins = file.read(len(header)) == header
    return begins and path.stat().st_size == len(header) + sum(item.num_bytes for item in announced)


def plan_shards(groups: Sequence[Sequence[Announced]], max_shard_bytes: int) -> list[list[int]]:
    """Deal groups of tensors to files in order, each file as full as it may be.

    Args:
        groups: tensors that are written together, since they come from one tensor that is read once.
        max_shard_bytes: bytes of tensors in one file; a group larger than that gets a file of its own.

    Returns:
        Numbers of the groups in each file.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive.")
    shards: list[list[int]] = []
    filled = 0
    for number, group in enumerate(groups):
        size = sum(item.num_bytes for item in group)
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(number)
        filled += size
    return shards


def shard_index(files: Mapping[str, str], total_bytes: int) -> dict[str, object]:
    """Contents of ``model.safetensors.index.json``: which file holds which tensor."""
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(files)}
