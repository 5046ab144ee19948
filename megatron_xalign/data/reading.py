"""What readers of corpora report while they run: progress, what was left out and why, and where it lay."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_xalign.errors import CorpusError

OnError = Literal["raise", "skip"]

_MOST_EXAMPLES = 10
_MOST_REASONS = 200
# Naming the line of an example means counting the lines before it; far into a file the byte is named instead.
_FARTHEST_COUNTED = 1 << 30
_COUNTED_AT_A_TIME = 1 << 22


@dataclass
class Reading:
    """How far a reader is and what it left out; readers fill it in while they run."""

    documents: int = 0
    """Documents (monolingual texts or pairs) yielded."""
    bytes_read: int = 0
    """Bytes as they lie on disk (compressed, if so), over all files so far."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines (records) left out, by reason: malformed ones, blank ones, and those in languages not asked for."""
    malformed: int = 0
    """How many of ``skipped`` are malformed."""
    examples: list[str] = field(default_factory=list)
    """The first few malformed ones: ``FILE:LINE: reason``."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """For each piece read to its end: ``{"path", "begin", "end", "sha256"}``, the hash being of the bytes on disk from
    ``begin`` to ``end``."""

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count lines that are left out without being malformed."""
        if count:
            self.skipped[self._bounded(reason)] += count

    def reject(self, place: Place, number: int, reason: str, detail: str = "", *, on_error: OnError) -> None:
        """Count a malformed line, or raise.

        Args:
            place: of the piece it is in.
            number: its number within the piece, from 0.
            reason: what is wrong, in words that many lines may share.
            detail: what is wrong with this one.
            on_error: ``raise`` or ``skip``.

        Raises:
            CorpusError: ``on_error`` is ``raise``.
        """
        if on_error == "raise":
            raise CorpusError(
                f"{place.where(number)}: {reason}{detail}. Mend it, or leave such lines out with --on-error skip."
            )
        if len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(f"{place.where(number, exact=False)}: {reason}{detail}")
        self.skipped[self._bounded(reason)] += 1
        self.malformed += 1

    def _bounded(self, reason: str) -> str:
        # A reason may quote the data (a language code); a hostile file must not fill memory with reasons.
        return reason if reason in self.skipped or len(self.skipped) < _MOST_REASONS else "other reasons"


class Place:
    """Names the records of one stretch of a file; counts the lines before it only when a name is asked for."""

    def __init__(self, path: Path, *, offset_bytes: int = 0, first: int = 0, unit: str = "line") -> None:
        """Args: path; the byte the stretch begins at, or the number of its first record; what is numbered."""
        self.path = path
        self._offset_bytes = offset_bytes
        self._first: int | None = None if offset_bytes else first
        self._unit = unit

    def where(self, number: int, *, exact: bool = True) -> str:
        """``FILE:LINE`` of record ``number`` (from 0); with ``exact=False`` the byte may be named instead."""
        if self._unit == "file":
            return str(self.path)
        if self._first is None:
            if not exact and self._offset_bytes > _FARTHEST_COUNTED:
                return f"{self.path}: line {number + 1} from byte {self._offset_bytes}"
            # A line begins at byte 0 and after every line break.
            self._first = 1 + _count_line_breaks(self.path, self._offset_bytes - 1)
        if self._unit == "line":
            return f"{self.path}:{self._first + number + 1}"
        return f"{self.path}: {self._unit} {self._first + number + 1}"


def _count_line_breaks(path: Path, num_bytes: int) -> int:
    count = 0
    with path.open("rb") as file:
        while num_bytes > 0 and (chunk := file.read(min(num_bytes, _COUNTED_AT_A_TIME))):
            count += chunk.count(b"\n")
            num_bytes -= len(chunk)
    return count
