"""Samples of a run by number, as arrays [B, S] that one call of the C++ library fills."""

# B samples of a batch, S sequence

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_xalign import _native
from megatron_xalign.data.source_stream import SourceStream

FIELDS: Mapping[str, Any] = {
    "tokens": np.int64,
    "labels": np.int64,
    "position_ids": np.int64,
    "loss_mask": np.float32,
    "language_ids": np.int8,
    "label_language_ids": np.int8,
    "source_ids": np.int16,
    "document_ids": np.int32,
}
"""Names and types of a batch's arrays, as ``batch.Batch`` has them."""


class BlendReader:
    """Reads the samples that an index names from the sources they are in."""

    def __init__(
        self,
        streams: Sequence[SourceStream],
        index: _native.SampleIndex,
        *,
        seq_length: int,
        padding_token: int,
        reset_position_ids: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        """Nothing is read yet.

        Args:
            streams: the sources, by the number the index gives them.
            index: what each sample is made of.
            seq_length: S.
            padding_token: what stands where a sample of whole documents holds nothing.
            reset_position_ids: positions start again at every document.
            eod_mask_loss: no loss where an end-of-document token is read.

        Raises:
            ValueError: a stream is cut for another S.
        """
        for stream in streams:
            if stream.seq_length != seq_length:
                raise ValueError(f"{stream.name} is cut for seq_length={stream.seq_length}, not {seq_length}.")
        self.streams = list(streams)
        self.seq_length = seq_length
        self._index = index
        self._options: dict[str, Any] = {
            "padding_token": padding_token,
            "reset_position_ids": reset_position_ids,
            "eod_mask_loss": eod_mask_loss,
        }
        self._native = _native.BatchReader(
            index=index, streams=[stream.native for stream in streams], seq_length=seq_length, **self._options
        )
        self._positions_BS = np.zeros((0, seq_length), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._index)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.streams, self._index, {"seq_length": self.seq_length, **self._options})

    def batch(
        self, samples: Sequence[int] | np.ndarray, out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Read samples.

        Args:
            samples: their numbers, in any order.
            out: arrays to fill, as an earlier call returned them for as many samples; new ones if left out.

        Returns:
            Arrays [B, S] by name (``FIELDS``). Where a sample of whole documents holds nothing there is
            ``padding_token`` without loss, of language, source and document -1. Unless positions start again,
            ``position_ids`` is one array for many batches (as Megatron's are): not to be written to.

        Raises:
            IndexError: there is no such sample.
            FormatError: a token file is damaged.
        """
        numbers = np.ascontiguousarray(samples, dtype=np.int64)
        if out is not None:
            filled = out
        else:
            shape = (len(numbers), self.seq_length)
            out = {name: np.empty(shape, dtype=dtype) for name, dtype in FIELDS.items()}
            filled = dict(out)
            if not self._options["reset_position_ids"]:
                out["position_ids"] = self._positions(len(numbers))
                del filled["position_ids"]
        # An epoch's index is built or opened when the first of its samples is read. Each time round one thing more is
        # there: the order of an epoch, then its index; of windows of whole documents one epoch after the other.
        while missing := self._native.read(numbers, filled):
            for source, epoch in set(missing):
                stream = self.streams[source]
                assert not stream.native.has_windows(epoch)
                if stream.native.has_keys(epoch):
                    stream.load_epoch(epoch)
                else:
                    stream.load_keys(epoch)
        return out

    def _positions(self, num_samples: int) -> np.ndarray:
        """0, 1, 2, .. in every row, int64 [B, S]."""
        if len(self._positions_BS) < num_samples:
            row = np.arange(self.seq_length, dtype=np.int64)
            self._positions_BS = np.tile(row, (num_samples, 1))
        return self._positions_BS[:num_samples]


def _again(streams: list[SourceStream], index: _native.SampleIndex, options: dict[str, Any]) -> BlendReader:
    return BlendReader(streams, index, **options)
