"""Write a torch_dist folder one chunk at a time, without Megatron, a process group or a model in memory.

What is written is what Megatron-Core's own save leaves: ``.metadata`` (which chunk of which tensor lies where),
``*.distcp`` files of chunks, ``common.pt`` and ``metadata.json``.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FILE_BYTES = 4 << 30
"""A new ``*.distcp`` file is begun once one has grown past this."""


class CheckpointWriter:
    """Chunks of tensors into one folder; nothing but the chunk at hand is in memory.

    Args:
        folder: an existing, empty folder.
        file_bytes: see ``FILE_BYTES``.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._file: IO[bytes] | None = None
        self._number = 0
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, shape: Sequence[int], offsets: Sequence[int], chunk: torch.Tensor) -> None:
        """Append one chunk.

        Args:
            name: the tensor's name.
            shape: shape of the whole tensor, the same for each of its chunks.
            offsets: where the chunk begins in it.
            chunk: the numbers.

        Raises:
            ValueError: the chunk does not lie inside the tensor, or contradicts an earlier one.
        """
        known = self._shapes.setdefault(name, (torch.Size(shape), chunk.dtype))
        inside = len(shape) == len(offsets) == chunk.dim() and all(
            start >= 0 and start + size <= whole
            for start, size, whole in zip(offsets, chunk.shape, shape, strict=True)
        )
        if known != (torch.Size(shape), chunk.dtype) or not inside:
            raise ValueError(
                f"a chunk {list(chunk.shape)} {chunk.dtype} at {list(offsets)} does not fit {name} {list(shape)}, of "
                f"which {known[1]} {list(known[0])} was written."
            )
        if self._file is None or self._file.tell() >= self._file_bytes:
            self._next_file()
        assert self._file is not None
        start = self._file.tell()
        # Through a buffer: torch.save seeks, and offsets inside it must count from its own start.
        buffer = io.BytesIO()
        torch.save(chunk.detach().contiguous().clone(), buffer)
        self._file.write(buffer.getbuffer())
        self._chunks.setdefault(name, []).append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
        place = _StorageInfo(Path(self._file.name).name, start, buffer.getbuffer().nbytes)
        self._places[MetadataIndex(name, torch.Size(offsets))] = place

    def finish(self) -> None:
        """Write the index; the folder is a checkpoint after it.

        Raises:
            ValueError: chunks of a tensor do not add up to it.
        """
        entries: dict[str, STORAGE_TYPES] = {}
        for name, (shape, dtype) in self._shapes.items():
            covered = sum(chunk.sizes.numel() for chunk in self._chunks[name])
            if covered != shape.numel():
                raise ValueError(f"chunks of {name} hold {covered} numbers of {shape.numel()}.")
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, self._chunks[name])
        if self._file is not None:
            _close(self._file)
            self._file = None
        with (self._folder / "common.pt").open("wb") as file:
            torch.save({}, file)
            _sync(file)
        described = {
            "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1,
        }
        with (self._folder / "metadata.json").open("w", encoding="utf-8") as text:
            json.dump(described, text)
            text.flush()
            os.fsync(text.fileno())
        with (self._folder / ".metadata").open("wb") as file:
            pickle.dump(Metadata(state_dict_metadata=entries, storage_data=self._places), file)
            _sync(file)

    def _next_file(self) -> None:
        if self._file is not None:
            _close(self._file)
        self._file = (self._folder / f"__{self._number}_0.distcp").open("wb")
        self._number += 1


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _close(file: IO[bytes]) -> None:
    _sync(file)
    file.close()
