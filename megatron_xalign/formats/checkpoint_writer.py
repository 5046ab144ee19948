"""Write a torch_dist folder one chunk at a time, without Megatron, a process group or a model in memory.

What is written is what Megatron-Core's own save leaves: ``.metadata`` (which chunk of which tensor lies where),
``*.distcp`` files of chunks, ``common.pt`` and ``metadata.json``. A file gets its name when it is whole, with a note of
what is in it beside it, so that a writer in the same folder goes on where one was killed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

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

from megatron_xalign.errors import XAlignError
from megatron_xalign.formats.atomic import read_json, write_json
from megatron_xalign.formats.resumable import piece

FILE_BYTES = 4 << 30
"""A new ``*.distcp`` file is begun once one has grown past this."""


_HASHED_BESIDE = 1 << 16
"""Bytes from which content is hashed while it is written."""


class _Counted:
    """What ``torch.save`` writes to: it needs no more, and offsets inside an archive count from its own start."""

    def __init__(self, file: IO[bytes], hashing: ThreadPoolExecutor) -> None:
        self.file = file
        self._hashing = hashing
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.num_bytes += len(content)
        if len(content) < _HASHED_BESIDE:
            self.digest.update(content)
            return self.file.write(content)
        # Both let other threads run. The content is torch's memory, which it uses again after this call.
        hashed = self._hashing.submit(self.digest.update, content)
        try:
            return self.file.write(content)
        finally:
            hashed.result()

    def flush(self) -> None:
        """The file is flushed when it is closed."""


class CheckpointWriter:
    """Chunks of tensors into one folder; nothing but the chunk at hand is in memory.

    Args:
        folder: an existing folder, empty or left by a writer that was killed while it wrote the same.
        file_bytes: see ``FILE_BYTES``.
    """

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._stack = ExitStack()
        self._hashing = ThreadPoolExecutor(1, "hash")
        self._file: _Counted | None = None
        self._notes: list[list[Any]] = []
        self._number = 0
        self._shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self.files: dict[str, dict[str, Any]] = {}
        """Size and SHA-256 of what is whole so far, by name."""
        self._take_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._hashing:
            if kind is None:
                self._close_file()
            else:
                # As if the block inside had raised: what is begun gets no name.
                self._stack.__exit__(kind, error, trace)

    def has(self, name: str, offsets: Sequence[int]) -> bool:
        """Whether a writer that was killed had written this chunk."""
        return MetadataIndex(name, torch.Size(offsets)) in self._places

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
        if self._file is None or self._file.num_bytes >= self._file_bytes:
            self._close_file()
            path = self._folder / self._file_name(self._number)
            self._file = _Counted(self._stack.enter_context(piece(path)), self._hashing)
        start = self._file.num_bytes
        chunk = chunk.detach().contiguous()
        if chunk.untyped_storage().nbytes() != chunk.numel() * chunk.dtype.itemsize:
            chunk = chunk.clone()  # torch.save writes the whole storage
        torch.save(chunk, cast(IO[bytes], self._file))
        self._note(
            name, list(shape), str(chunk.dtype).removeprefix("torch."), list(offsets), list(chunk.shape), start,
            self._file.num_bytes - start,
        )

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
        self._close_file()
        common = io.BytesIO()
        torch.save({}, common)
        described = {
            "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
            "common_backend_version": 1,
        }
        metadata = pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=self._places))
        for name, content in (
            ("common.pt", common.getvalue()), ("metadata.json", json.dumps(described).encode()), (".metadata", metadata)
        ):
            with piece(self._folder / name) as file:
                file.write(content)
            self.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for number in range(self._number):
            self._notes_path(number).unlink()

    def _file_name(self, number: int) -> str:
        return f"__{number}_0.distcp"

    def _notes_path(self, number: int) -> Path:
        return self._folder / f"chunks-{number}.json"

    def _note(
        self, name: str, shape: list[int], dtype: str, offsets: list[int], sizes: list[int], start: int, length: int
    ) -> None:
        self._shapes[name] = (torch.Size(shape), getattr(torch, dtype))
        self._chunks.setdefault(name, []).append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        place = _StorageInfo(self._file_name(self._number), start, length)
        self._places[MetadataIndex(name, torch.Size(offsets))] = place
        self._notes.append([name, shape, dtype, offsets, sizes, start, length])

    def _close_file(self) -> None:
        if self._file is None:
            return
        self._stack.close()
        name = self._file_name(self._number)
        self.files[name] = {"bytes": self._file.num_bytes, "sha256": self._file.digest.hexdigest()}
        write_json(self._notes_path(self._number), {"file": self.files[name], "chunks": self._notes})
        self._file, self._notes = None, []
        self._number += 1

    def _take_over(self) -> None:
        """Take the files of a writer that was killed: those whose notes are there are whole."""
        while self._notes_path(self._number).is_file():
            try:
                notes = read_json(self._notes_path(self._number))
                path = self._folder / self._file_name(self._number)
                if path.stat().st_size != notes["file"]["bytes"]:
                    break
            except (XAlignError, OSError):
                break
            self.files[path.name] = notes["file"]
            for chunk in notes["chunks"]:
                self._note(*chunk)
            self._notes = []
            self._number += 1
        for path in [*self._folder.glob("*.distcp"), *self._folder.glob("chunks-*.json")]:
            number = path.name.removeprefix("__").removeprefix("chunks-").split("_")[0].split(".")[0]
            if int(number) >= self._number:
                path.unlink()
