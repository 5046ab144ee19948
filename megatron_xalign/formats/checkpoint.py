"""Read tensors out of a torch_dist checkpoint without Megatron, without a process group, and without unpickling.

A torch_dist folder is ``.metadata``, a pickle that says which chunk of which tensor lies where, and ``*.distcp``
files of chunks, each written by ``torch.save``. A pickle can run any program; this reader lets ``.metadata`` build
the few classes such a file needs and nothing else, and chunks are read without building anything (``torch_archive``).

One tensor, or one layer of a stacked one, is in memory at a time, whatever tensor- and pipeline-parallel layout wrote
the folder.
"""

# L layers

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.torch_archive import read_plain_values, read_tensor_into

METADATA = ".metadata"
COMMON = "common.pt"
"""Written by core 0.16; 0.19 keeps the same among the ``*.distcp`` files, under the name ``COMMON_STATE``."""
COMMON_STATE = "common_state"

_ALLOWED: dict[tuple[str, str], Any] = {
    (thing.__module__, thing.__qualname__): thing
    for thing in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.MetadataIndex, metadata.TensorProperties, metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, filesystem._StoragePrefix,
        # Megatron keeps every process's plan in the metadata, for a faster next save.
        planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData,
        torch.serialization._get_layout,
    )
} | {
    ("torch", "Size"): torch.Size,
    # torch's own writer notes where it wrote; a pure path is text.
    ("pathlib", "PosixPath"): PurePosixPath, ("pathlib._local", "PosixPath"): PurePosixPath,
}

_NUMBERED = re.compile(r"(?P<head>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<tail>.+)")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of ``_ALLOWED``, and refuses a pickle that asks for anything else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        allowed = _ALLOWED.get((module_name, global_name))
        if allowed is None and module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            allowed = getattr(torch, global_name)
        if allowed is None:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no checkpoint needs")
        return allowed


def read_metadata(folder: Path) -> metadata.Metadata:
    """The index of a torch_dist folder, read without running what is in it.

    Raises:
        CheckpointError: it is missing, damaged, or asks for a class that no checkpoint needs.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            index = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: {folder} is not a torch_dist checkpoint, or was not written to its end."
        ) from None
    except (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError,
        MemoryError, RecursionError, OSError,
    ) as error:
        # The list is what the pickle module documents and what damaged bytes were seen to raise.
        raise CheckpointError(f"{path} is damaged or not a checkpoint index: {error}.") from None
    if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{path} holds a {type(index).__name__}, not a checkpoint index.")
    return index


@dataclass(frozen=True)
class _Chunk:
    """A box of one tensor, and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored_sizes: tuple[int, ...]
    """As in the file, without the axis of layers where each layer is a tensor of its own."""
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class CheckpointReader:
    """Tensors of one torch_dist folder by name, one at a time.

    Megatron stacks the layers of a model to one tensor ``[L, ...]`` without the layer number in its name, or, where
    layers differ, keeps a tensor for each. Both read the same here: stacked.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the folder's index.

        Raises:
            CheckpointError: the folder is not a checkpoint, or its index is damaged or malicious.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"checkpoint {self.folder} does not exist.")
        index = read_metadata(self.folder)
        self._bytes: dict[str, tuple[str, int, int]] = {}
        self._tensors = _stack_layers(self._read_index(index), self.folder)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, whole over all processes; ``[L, ...]`` for tensors of layers."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's numbers."""
        return self._find(name).dtype

    def tensor(self, name: str, layer: int | None = None) -> torch.Tensor:
        """Read a tensor, or one layer of a stacked one, put together from its chunks.

        Args:
            name: one of ``names()``.
            layer: global, 0-based; the result then lacks the first axis.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or the chunks leave a hole.
            ValueError: there is no such tensor or layer.
        """
        found = self._find(name)
        low, high = (0,) * len(found.shape), found.shape
        if layer is not None:
            if not found.shape or not 0 <= layer < found.shape[0]:
                raise ValueError(f"{name} of shape {list(found.shape)} has no layer {layer}.")
            low, high = (layer, *low[1:]), (layer + 1, *high[1:])
        shape = tuple(stop - start for start, stop in zip(low, high, strict=True))
        parts = [
            (chunk, box)
            for chunk in found.chunks
            if (box := _overlap(chunk.offsets, chunk.sizes, low, shape)) is not None
        ]
        self._check_cover(name, [box for _, box in parts], shape)
        # Nothing is allocated for numbers that the files cannot hold.
        for chunk, _ in parts:
            if math.prod(chunk.sizes) * found.dtype.itemsize > chunk.length:
                raise CheckpointError(
                    f"{self.folder / METADATA} announces {list(chunk.sizes)} {found.dtype} of {name} in "
                    f"{chunk.length} bytes of {chunk.file}."
                )
        whole = torch.empty(shape, dtype=found.dtype)
        for chunk, (start, size) in parts:
            target = whole[tuple(
                slice(at - first, at - first + length) for at, first, length in zip(start, low, size, strict=True)
            )]
            if size == chunk.sizes and target.is_contiguous():
                self._read_chunk(name, chunk, target.view(chunk.stored_sizes))
                continue
            piece = torch.empty(chunk.stored_sizes, dtype=found.dtype)
            self._read_chunk(name, chunk, piece)
            source = tuple(
                slice(at - first, at - first + length)
                for at, first, length in zip(start, chunk.offsets, size, strict=True)
            )
            target.copy_(piece.view(chunk.sizes)[source])
        return whole if layer is None else whole[0]

    def bytes_names(self) -> list[str]:
        """Names of the entries that are no tensors (state objects of layers, common state of core 0.19)."""
        return sorted(self._bytes)

    def read_settings(self) -> dict[str, Any] | None:
        """What Megatron-LM saved beside the tensors (``args``, ``iteration``, ...), without its objects; None if there
        is nothing.

        Raises:
            CheckpointError: it is damaged, or asks for something that settings never need.
        """
        settings: Any = None
        if (self.folder / COMMON).is_file():
            with (self.folder / COMMON).open("rb") as file:
                settings = read_plain_values(file, str(self.folder / COMMON))
        else:
            name = next((name for name in self._bytes if name.partition("/")[0] == COMMON_STATE), None)
            if name is not None:
                place, start, length = self._bytes[name]
                with self._open(place) as file:
                    settings = read_plain_values(file, f"{self.folder / place} ({name})", start, length)
            # Core 0.19 puts it into a list of one.
            if isinstance(settings, list) and len(settings) == 1:
                settings = settings[0]
        return settings if isinstance(settings, dict) else None

    def file_sizes(self) -> dict[str, int]:
        """Bytes that each file must have at least, by the index."""
        sizes: dict[str, int] = {}
        places = [(chunk.file, chunk.start + chunk.length) for item in self._tensors.values() for chunk in item.chunks]
        places += [(file, start + length) for file, start, length in self._bytes.values()]
        for file, end in places:
            sizes[file] = max(sizes.get(file, 0), end)
        return sizes

    def read_object(self, name: str) -> Any:
        """Read an entry that is no tensor; only tensors, numbers, text and plain containers are let in.

        Raises:
            CheckpointError: it is damaged, or holds anything else.
            ValueError: there is no such entry.
        """
        if name not in self._bytes:
            raise ValueError(f"{self.folder} holds no entry {name}.")
        file, start, length = self._bytes[name]
        return _load_plain(io.BytesIO(self._read_bytes(file, start, length)), f"{self.folder / file} ({name})")

    def check_plain(self) -> None:
        """Make sure that nothing in the folder needs unpickling beyond tensors and plain containers.

        Raises:
            CheckpointError: something does; the entry is named.
        """
        for name in self._bytes:
            self.read_object(name)
        if (self.folder / COMMON).is_file():
            with (self.folder / COMMON).open("rb") as file:
                _load_plain(file, str(self.folder / COMMON))

    def _find(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise ValueError(f"{self.folder} holds no tensor {name}.")
        return self._tensors[name]

    def _read_index(self, index: metadata.Metadata) -> dict[str, _Tensor]:
        tensors = {}
        try:
            for name, entry in index.state_dict_metadata.items():
                if isinstance(entry, metadata.BytesStorageMetadata):
                    place = index.storage_data[metadata.MetadataIndex(name)]
                    self._bytes[name] = (self._plain_name(place.relative_path), int(place.offset), int(place.length))
                    continue
                chunks = []
                for box in entry.chunks:
                    place = index.storage_data[metadata.MetadataIndex(name, box.offsets)]
                    if getattr(place, "transform_descriptors", None):
                        raise CheckpointError(
                            f"{name} in {self.folder} is stored with {place.transform_descriptors}, which this program "
                            "does not read."
                        )
                    sizes = tuple(map(int, box.sizes))
                    chunks.append(_Chunk(
                        tuple(map(int, box.offsets)), sizes, sizes,
                        self._plain_name(place.relative_path), int(place.offset), int(place.length),
                    ))
                shape = tuple(map(int, entry.size))
                if not isinstance(entry.properties.dtype, torch.dtype) or any(
                    len(chunk.sizes) != len(shape) or len(chunk.offsets) != len(shape) for chunk in chunks
                ):
                    raise TypeError(f"{name} is described by the wrong types")
                tensors[name] = _Tensor(shape, entry.properties.dtype, tuple(chunks))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder / METADATA} contradicts itself or is damaged: {error!r}.") from None
        return tensors

    def _plain_name(self, file: str) -> str:
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{self.folder / METADATA} names {file!r}, which is not a file inside the folder.")
        return file

    def _check_cover(
        self, name: str, boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]
    ) -> None:
        volume = sum(math.prod(size) for _, size in boxes)
        disjoint = all(
            _overlap(*one, *other) is None for i, one in enumerate(boxes) for other in boxes[:i]
        )
        if volume != math.prod(shape) or not disjoint:
            raise CheckpointError(
                f"the chunks of {name} in {self.folder / METADATA} do not cover its shape {list(shape)} exactly once."
            )

    def _open(self, file: str) -> IO[bytes]:
        try:
            return (self.folder / file).open("rb")
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder / file} is missing from the checkpoint.") from None
        except OSError as error:
            raise CheckpointError(f"{self.folder / file} cannot be read: {error}.") from None

    def _read_bytes(self, file: str, start: int, length: int) -> bytes:
        path = self.folder / file
        try:
            with self._open(file) as stream:
                stream.seek(start)
                content = stream.read(length)
        except (OSError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} cannot be read at byte {start}: {error}.") from None
        if len(content) != length:
            raise CheckpointError(
                f"{path} is truncated: {length} bytes were written at byte {start}, {len(content)} are there."
            )
        return content

    def _read_chunk(self, name: str, chunk: _Chunk, out: torch.Tensor) -> None:
        what = f"{self.folder / chunk.file} ({name} at byte {chunk.start})"
        if read_tensor_into(self.folder / chunk.file, chunk.start, chunk.length, out, what):
            return
        piece = _load_plain(io.BytesIO(self._read_bytes(chunk.file, chunk.start, chunk.length)), what)
        if not isinstance(piece, torch.Tensor) or piece.shape != out.shape or piece.dtype != out.dtype:
            raise CheckpointError(
                f"{what} is not the {out.dtype} tensor of shape {list(out.shape)} that {METADATA} announces."
            )
        out.copy_(piece)


def _load_plain(stream: Any, what: str) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, KeyError, ValueError, TypeError,
        AttributeError, IndexError, OSError,
    ) as error:
        # The classes that torch.load was seen to raise on damaged and on forbidden content.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{what} is damaged, or holds more than tensors and plain values: {reason}") from None


def _overlap(
    low_a: Sequence[int], size_a: Sequence[int], low_b: Sequence[int], size_b: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and sizes of the box that two boxes share, or None."""
    start = tuple(map(max, zip(low_a, low_b, strict=True)))
    stop = tuple(
        min(a + n, b + m) for a, n, b, m in zip(low_a, size_a, low_b, size_b, strict=True)
    )
    size = tuple(end - begin for begin, end in zip(start, stop, strict=True))
    return None if any(length <= 0 for length in size) else (start, size)


def _stack_layers(tensors: Mapping[str, _Tensor], folder: Path) -> dict[str, _Tensor]:
    """Turn ``...layers.7.rest`` into layer 7 of ``...layers.rest``."""
    stacked: dict[str, _Tensor] = {}
    single: dict[str, dict[int, _Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NUMBERED.fullmatch(name)
        if match is None:
            stacked[name] = tensor
        else:
            single.setdefault(match["head"] + match["tail"], {})[int(match["layer"])] = tensor
    for name, layers in single.items():
        first = next(iter(layers.values()))
        if (
            name in stacked or sorted(layers) != list(range(len(layers)))
            or any((layer.shape, layer.dtype) != (first.shape, first.dtype) for layer in layers.values())
        ):
            raise CheckpointError(
                f"{folder} holds {name} for layers {sorted(layers)} in different shapes or with gaps; models whose "
                "layers differ are not supported."
            )
        stacked[name] = _Tensor((len(layers), *first.shape), first.dtype, tuple(_with_layer(layers)))
    return stacked


def _with_layer(layers: Mapping[int, _Tensor]) -> Iterator[_Chunk]:
    for layer, tensor in layers.items():
        for chunk in tensor.chunks:
            yield replace(chunk, offsets=(layer, *chunk.offsets), sizes=(1, *chunk.sizes))
