"""The tensors of a Hugging Face folder, read into memory that is there already.

Only ``*.safetensors`` are opened. Mapping them into memory, as the safetensors library does, would count every page
that was read as memory of this process until the file is closed; here a tensor's bytes go where they are wanted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.atomic import read_json

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class _Place:
    file: str
    descriptor: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class FolderTensors:
    """The tensors of a folder by name, whatever files they lie in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """Open the files; ``stack`` closes them.

        Raises:
            CheckpointError: one is missing, damaged, outside the folder, or the index contradicts them.
        """
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        files = None
        if index.is_file():
            stated: Any = read_json(index)
            files = stated.get("weight_map") if isinstance(stated, dict) else None
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise CheckpointError(f"{index} has no weight_map from tensors to files.")
        elif not (folder / "model.safetensors").is_file():
            raise CheckpointError(
                f"{folder} holds no model.safetensors and no index of several; pickled weights (*.bin) are not read. "
                "Save the model again with save_pretrained(..., safe_serialization=True)."
            )
        paths = {"model.safetensors"} if files is None else set(files.values())
        for name in sorted(paths):
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {name!r}, which is not a file inside the folder.")
        self._places: dict[str, _Place] = {}
        for name in sorted(paths):
            for tensor, place in _read_header(folder / name, stack).items():
                if files is not None and files.get(tensor) != name:
                    raise CheckpointError(f"{index} and {folder / name} disagree about {tensor}.")
                self._places[tensor] = place
        missing = sorted(set(files or {}) - set(self._places))
        if missing:
            raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}, which {index.name} promises.")

    @staticmethod
    def check(folder: Path) -> None:
        """Raise CheckpointError unless every file is there, whole by its header and inside the folder."""
        with ExitStack() as stack:
            FolderTensors(folder, stack)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        return self._places[name].dtype

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, into ``out`` (contiguous, of its shape and type) if that is given.

        Raises:
            CheckpointError: the file cannot be read, or its numbers are not finite.
        """
        place = self._places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype) if out is None else out
        if tensor.shape != place.shape or tensor.dtype != place.dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} {list(place.shape)} {place.dtype} does not fit {list(tensor.shape)}.")
        if not tensor.numel():
            return tensor
        target = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        at = 0
        try:
            while at < len(target):
                count = os.preadv(place.descriptor, [target[at : at + _PIECE_BYTES]], place.start + at)
                if count <= 0:
                    raise CheckpointError(f"{place.file} ends in the middle of {name}.")
                at += count
        except OSError as error:
            raise CheckpointError(f"{place.file} cannot be read: {error}.") from None
        if tensor.is_floating_point() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
            raise CheckpointError(f"{name} in {self.folder} holds values that are not finite.")
        return tensor

    def identity(self) -> list[Any]:
        """Changes when a file does."""
        opened = {place.file: place.descriptor for place in self._places.values()}
        status = {file: os.fstat(descriptor) for file, descriptor in sorted(opened.items())}
        return [[file, item.st_size, item.st_mtime_ns, item.st_ino] for file, item in status.items()]


def _read_header(path: Path, stack: ExitStack) -> dict[str, _Place]:
    """Where each tensor of a file lies; nothing overlaps, nothing lies outside the file."""
    try:
        file = stack.enter_context(path.open("rb", buffering=0))
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
        header.pop("__metadata__", None)
        places, used = {}, []
        for name, entry in header.items():
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in _DTYPES:
                raise ValueError(f"{name} is stored as {dtype}, which is not read")
            numbers = [*shape, start, stop]
            if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
                raise ValueError(f"{name} has sizes that are none")
            if stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
                raise ValueError(f"{name} of shape {shape} has {stop - start} bytes")
            used.append((start, stop))
            places[name] = _Place(str(path), file.fileno(), 8 + length + start, _DTYPES[dtype], tuple(shape))
        _check_cover(used, size - 8 - length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing or damaged: there is no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from None
    return places


def _check_cover(used: Iterable[tuple[int, int]], num_bytes: int) -> None:
    at = 0
    for start, stop in sorted(used):
        if start != at:
            raise ValueError(f"bytes {min(at, start)} to {max(at, start)} belong to no tensor, or to two")
        at = stop
    if at != num_bytes:
        raise ValueError(f"its tensors end at byte {at} of {num_bytes}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return found
