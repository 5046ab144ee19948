"""Sums of what a blend holds, as the C++ library counted them while it chose: the numbers behind an audit."""

# J sources, P phases of the schedule, B slots of a global batch, K languages of the run, F languages of a file
# origins: 0 monolingual, 1 parallel

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TextSums:
    """Sums of parts of a run."""

    content: np.ndarray
    """int64 [parts, origins, K]: content tokens."""
    tokens: np.ndarray
    """int64 [parts, origins]: tokens read, padding left out."""
    loss: np.ndarray
    """int64 [parts, origins]: tokens whose label bears loss."""
    rows: np.ndarray
    """int64 [parts, origins]: windows, or documents that begin there."""


@dataclass(frozen=True)
class Tally:
    """Sums of a whole run."""

    rows_J: np.ndarray
    """int64 [J]: windows, or documents that begin in the run."""
    tokens_J: np.ndarray
    """int64 [J]: tokens read, padding left out."""
    loss_J: np.ndarray
    """int64 [J]: tokens whose label bears loss."""
    content_JK: np.ndarray
    """int64 [J, K]: content tokens."""
    begun_J: np.ndarray
    """int64 [J]: documents whose first token is in a sample of the run, once per epoch."""
    cut_J: np.ndarray
    """int64 [J]: documents with a border of one of the run's samples inside, once per epoch."""
    left_out_J: np.ndarray
    """int64 [J]: documents drawn that are too long to be kept whole (mixed documents)."""
    left_out_tokens_J: np.ndarray
    """int64 [J]: their tokens."""
    phases: TextSums
    slots: TextSums
    padding_B: np.ndarray
    """int64 [B]: positions that hold nothing."""
    asked_P: tuple[int, ...]
    """Sum over counted tokens of the fraction asked for them, times the denominator of the schedule."""
    worst_parallel: int
    """Largest distance of the parallel tokens from what was asked, after any row, times the denominator."""
    worst_languages_K: tuple[int, ...]
    """Largest distance of a language's tokens from its share, after any row, times the sum of shares."""
    largest_row: int
    """Counted tokens of the largest window or document."""

    @classmethod
    def of(
        cls,
        native: Mapping[str, Any],
        languages_of_source: Sequence[Sequence[int]],
        begun_J: np.ndarray,
        cut_J: np.ndarray,
    ) -> Tally:
        """Take the numbers of ``_native.Blender.tally``."""
        counts = native["source_counts"]
        num_languages = native["phases"]["content"].shape[2]
        content_JK = np.zeros((len(counts), num_languages), dtype=np.int64)
        for row, columns, content_F in zip(content_JK, languages_of_source, native["source_content"], strict=True):
            row[list(columns)] = content_F
        return cls(
            rows_J=counts[:, 0].copy(),
            tokens_J=counts[:, 1].copy(),
            loss_J=counts[:, 2].copy(),
            content_JK=content_JK,
            begun_J=np.ascontiguousarray(begun_J),
            cut_J=np.ascontiguousarray(cut_J),
            left_out_J=counts[:, 4].copy(),
            left_out_tokens_J=counts[:, 5].copy(),
            phases=TextSums(**native["phases"]),
            slots=TextSums(**native["slots"]),
            padding_B=native["padding_of_slots"],
            asked_P=tuple(native["asked"]),
            worst_parallel=native["worst_parallel"],
            worst_languages_K=tuple(native["worst_languages"]),
            largest_row=native["largest_row"],
        )

    def write(self, folder: Path) -> None:
        """Write ``tally.npz`` and, for integers of any size, ``tally.json``."""
        arrays: dict[str, Any] = {}
        numbers: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, TextSums):
                arrays |= {f"{item.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
            elif isinstance(value, np.ndarray):
                arrays[item.name] = value
            else:
                numbers[item.name] = value
        np.savez(folder / "tally.npz", **arrays)
        (folder / "tally.json").write_text(json.dumps(numbers), encoding="ascii")

    @classmethod
    def read(cls, folder: Path) -> Tally:
        """Read what :meth:`write` wrote.

        Raises:
            OSError: it is not there.
            ValueError: it is damaged.
            KeyError: something is missing.
        """
        numbers = json.loads((folder / "tally.json").read_text(encoding="ascii"))
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in numbers.items()
        }
        try:
            with np.load(folder / "tally.npz", allow_pickle=False) as arrays:
                for item in fields(cls):
                    if item.name in ("phases", "slots"):
                        values[item.name] = TextSums(
                            **{part.name: arrays[f"{item.name}.{part.name}"] for part in fields(TextSums)}
                        )
                    elif item.name not in values:
                        values[item.name] = arrays[item.name]
        except zipfile.BadZipFile as error:
            raise ValueError(f"tally.npz: {error}") from None
        return cls(**values)
