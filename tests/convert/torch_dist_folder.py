"""Write a torch_dist folder by hand, in any chunks: what a job of several processes leaves, without the job."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Chunks = Sequence[tuple[tuple[int, ...], torch.Tensor]]


def write_torch_dist(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], Chunks]], num_files: int = 2
) -> Metadata:
    """Write ``{name: (shape, [(offsets, chunk), ...])}``; chunks go to files in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = [bytearray() for _ in range(num_files)]
    entries, places, turn = {}, {}, 0
    for name, (shape, chunks) in tensors.items():
        for offsets, chunk in chunks:
            stream = io.BytesIO()
            torch.save(chunk.clone(), stream)
            file = turn % num_files
            places[MetadataIndex(name, offsets)] = _StorageInfo(
                f"__{file}_0.distcp", len(contents[file]), len(stream.getvalue())
            )
            contents[file] += stream.getvalue()
            turn += 1
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=chunks[0][1].dtype), torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(offsets), chunk.shape) for offsets, chunk in chunks],
        )
    metadata = Metadata(state_dict_metadata=entries, storage_data=places)
    for number, content in enumerate(contents):
        (folder / f"__{number}_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def stacked(tensor: torch.Tensor, pieces: int = 1, axis: int = 0) -> tuple[tuple[int, ...], Chunks]:
    """A tensor of layers ``[L, ...]`` as Megatron stores it: a chunk per layer and tensor-parallel process."""
    chunks = []
    for layer in range(len(tensor)):
        start = 0
        for piece in tensor[layer].tensor_split(pieces, axis):
            offsets = [layer, *[0] * piece.dim()]
            offsets[1 + axis] = start
            start += piece.shape[axis]
            chunks.append((tuple(offsets), piece[None]))
    return tuple(tensor.shape), chunks
