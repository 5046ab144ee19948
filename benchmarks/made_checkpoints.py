"""Checkpoints of any size for benchmarks: with random numbers, or hollow (zeros that take no disk)."""

from __future__ import annotations

import collections
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_xalign import names
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import to_tree
from megatron_xalign.formats.checkpoint_folder import FORMAT, MANIFEST
from megatron_xalign.formats.checkpoint_writer import CheckpointWriter

_ZEROS = bytes(8 << 20)
_STORAGE = {torch.bfloat16: torch.BFloat16Storage, torch.float32: torch.FloatStorage}


def chunks_of(config: RunConfig, vocab_size: int, rows: int, tensor_size: int) -> Iterator[tuple[Any, ...]]:
    """(name, shape, offsets, sizes) of every chunk that a job of this tensor-parallel size leaves."""
    for weight in names.weights_of(config.model):
        whole = names.megatron_shape(weight, config.model, rows)
        axis = 1 if weight.layout == "plain" and len(whole) == 2 else 0 if len(whole) == 2 else None
        pieces = 1 if axis is None else tensor_size
        for layer in range(config.model.num_layers) if weight.per_layer else [None]:
            shape = whole if layer is None else (config.model.num_layers, *whole)
            for piece in range(pieces):
                sizes, offsets = list(whole), [0] * len(whole)
                if axis is not None:
                    sizes[axis] //= pieces
                    offsets[axis] = piece * sizes[axis]
                if layer is not None:
                    sizes, offsets = [1, *sizes], [layer, *offsets]
                yield weight.megatron[0], shape, tuple(offsets), tuple(sizes)


def write_random(folder: Path, config: RunConfig, vocab_size: int, rows: int, dtype: torch.dtype) -> int:
    """A checkpoint of random numbers, as two tensor-parallel processes leave it; bytes of its numbers."""
    folder.mkdir(parents=True)
    generator, total = torch.Generator().manual_seed(0), 0
    # Drawn once: what the numbers are changes no time.
    drawn = torch.randn(8 << 20, generator=generator).to(dtype)
    with CheckpointWriter(folder) as writer:
        for name, shape, offsets, sizes in chunks_of(config, vocab_size, rows, 2):
            count = torch.Size(sizes).numel()
            writer.add(name, shape, offsets, drawn.repeat(-(-count // len(drawn)))[:count].view(sizes))
            total += count * dtype.itemsize
        writer.finish()
    _describe(folder, config, vocab_size)
    return total


def write_hollow(folder: Path, config: RunConfig, vocab_size: int, rows: int, dtype: torch.dtype) -> int:
    """A checkpoint of zeros that are holes in its files; bytes of its numbers."""
    folder.mkdir(parents=True)
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    total = 0
    with (folder / "__0_0.distcp").open("wb") as file:
        for name, shape, offsets, sizes in chunks_of(config, vocab_size, rows, 2):
            start = file.tell()
            total += _write_archive(file, sizes, dtype)
            entry = entries.setdefault(
                name, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            )
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(name, torch.Size(offsets))] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
        file.truncate(file.tell())
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=places)))
    _describe(folder, config, vocab_size)
    return total


class _Holes(io.RawIOBase):
    """A stretch of a file that begins at 0; zeros are skipped, not written."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file, self._start = file, file.tell()

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        return self._file.seek(self._start + offset) - self._start

    def write(self, content: Any) -> int:
        if isinstance(content, memoryview) and content.obj is _ZEROS:
            self._file.seek(len(content), io.SEEK_CUR)
        else:
            self._file.write(content)
        return len(content)


class _Storage:
    pass


class _Tensor:
    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.sizes, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (
            _Storage(), 0, tuple(self.sizes), tuple(strides), False, collections.OrderedDict()
        )


def _write_archive(file: IO[bytes], sizes: tuple[int, ...], dtype: torch.dtype) -> int:
    """What ``torch.save`` writes of a tensor of zeros."""
    count = torch.Size(sizes).numel()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return ("storage", _STORAGE[dtype], "0", "cpu", count) if isinstance(item, _Storage) else None

    described = io.BytesIO()
    Pickler(described, protocol=2).dump(_Tensor(sizes))
    left = count * dtype.itemsize
    with zipfile.ZipFile(_Holes(file), "w", zipfile.ZIP_STORED) as archive:  # type: ignore[arg-type]
        archive.writestr("archive/data.pkl", described.getvalue())
        archive.writestr("archive/byteorder", b"little")
        with archive.open("archive/data/0", "w", force_zip64=True) as data:
            while left:
                left -= data.write(memoryview(_ZEROS)[: min(left, len(_ZEROS))])
        archive.writestr("archive/version", b"3\n")
    return count * dtype.itemsize


def _describe(folder: Path, config: RunConfig, vocab_size: int) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in folder.glob("*.distcp")}
    extra = {"config": to_tree(config), "vocab_size": vocab_size, "tokenizer_sha256": "", "consumed_samples": 0}
    (folder / MANIFEST).write_text(json.dumps({
        "format": FORMAT, "version": 1, "step": 0, "extra": extra, "files": files, "weights_only": True,
        "versions": {"megatron_core": "made", "megatron_xalign": "made"},
    }), encoding="utf-8")
