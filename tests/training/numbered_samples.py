"""Samples whose arrays tell their number; importable by name, so that data workers can open them again."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

LENGTH = 6


class NumberedSamples:
    """Sample k holds tokens k * 10, k * 10 + 1, ...; two languages, two sources."""

    def __init__(self, size: int, fails_at: int = -1) -> None:
        self.size, self.fails_at = size, fails_at

    def __len__(self) -> int:
        return self.size

    def batch(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        if self.fails_at in numbers:
            raise OSError(f"sample {self.fails_at} cannot be read by process {os.getpid()}")
        k = np.asarray(numbers, dtype=np.int64)[:, None]
        at = np.arange(LENGTH)[None, :]
        shape = (len(numbers), LENGTH)
        return {
            "tokens": k * 10 + at, "labels": k * 10 + at + 1, "loss_mask": np.ones(shape, np.float32),
            "position_ids": np.broadcast_to(at, shape).astype(np.int64),
            "language_ids": ((k + at) % 2).astype(np.int8), "label_language_ids": ((k + at) % 2).astype(np.int8),
            "source_ids": np.broadcast_to(k % 2, shape).astype(np.int16),
            "document_ids": np.zeros(shape, np.int32),
        }
