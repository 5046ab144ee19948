"""Corpus files to batches of text: find the files, cut them into parts, read a part.

The parts depend on the inputs and ``part_bytes`` alone, never on the number of workers, so the documents of all parts
one after the other are those of the files one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

InputFormat = Literal["jsonl", "parquet", "text", "tsv", "moses", "tmx"]
Compression = Literal["gz", "zst"]
OnError = Literal["raise", "skip"]
PairRule = Literal["pivot", "all"] | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class InputFile:
    """One file of a corpus as it lay on disk when it was found."""

    path: Path
    format: InputFormat
    compression: Compression | None
    num_bytes: int
    """On disk."""
    mtime_ns: int
    language: str | None = None
    """Given as ``LANGUAGE=PATH``, or for Moses the ending of its name; mapped by ``Fields.language_map`` when read."""
    aligned_set: int | None = None
    """Moses: files of the same number are aligned line by line."""


@dataclass(frozen=True)
class Piece:
    """A stretch of one file, or the same lines of several aligned ones."""

    files: tuple[InputFile, ...]
    begin: int
    end: int
    unit: Literal["bytes", "lines", "row groups", "file"]
    """What ``begin`` and ``end`` count. A line belongs to the piece in whose bytes it begins; a ``file`` is whole."""
    offsets: tuple[int, ...] = ()
    """Aligned files: the byte of each at which line ``begin`` begins."""


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time: consecutive pieces of the input, about ``part_bytes`` in all; hashable."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, about; for progress."""
        raise NotImplementedError

    def to_tree(self) -> dict[str, Any]:
        """As JSON."""
        raise NotImplementedError

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Part:
        """From JSON."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where texts, languages and ids are found in a record; the same for every file of a job. Hashable."""

    kind: Literal["monolingual", "pairs"]
    text_key: str = "text"
    """Monolingual: key, parquet column, or TSV column (a name of the first line, or a number from 1)."""
    id_key: str = "id"
    """Key of the id (text or integer); a record without one is named by its place."""
    language: str | None = None
    """Monolingual: language of files that have none of their own (``LANGUAGE=PATH``)."""
    language_key: str | None = None
    """Monolingual: key of the record's language (text, or a list whose first counts); goes before the other two."""
    languages: tuple[str, ...] = ()
    """Pairs: the languages wanted, two or more; their order decides the first side. Monolingual with ``language_key``:
    the languages wanted. Empty, where records name their languages: all of them."""
    language_map: tuple[tuple[str, str], ...] = ()
    """(code in the data, code in the token file): ``(("en", "eng_Latn"), ("fi", "fin_Latn"))``; without regard to case,
    and for a code with a region (``en-US``) also by what stands before it."""
    texts_key: str = "texts"
    """Pairs: key of ``{language: text, ...}``; used where ``side_keys`` is empty. ``translation`` in Hugging Face's data sets."""
    side_keys: tuple[str, ...] = ()
    """Pairs: the keys (or TSV columns) of the sides; their languages are ``languages``, in this order, or those of
    ``side_language_keys``. For TSV by default ("1", "2", ...)."""
    side_language_keys: tuple[str, ...] = ()
    """Pairs: the keys (or TSV columns) of the sides' languages."""
    pair_rule: PairRule = "pivot"
    """Pairs taken from a record in more than two languages: ``pivot`` (the first of ``languages`` with each other),
    ``all`` (each with each), or a list of pairs."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """Plain text: what is one document; a paragraph ends at a blank line."""
    tsv_header: bool = False
    """Whether the first line of a TSV names its columns; so it is anyway if one of the columns wanted is no number."""
    max_line_bytes: int = 1 << 30
    """A longer line (record) is malformed."""

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of languages that are taken, in order; empty if records decide."""
        raise NotImplementedError

    def to_tree(self) -> dict[str, Any]:
        """As JSON."""
        raise NotImplementedError

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Fields:
        """From JSON."""
        raise NotImplementedError


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
    """For each piece read to its end: ``{"path", "begin", "end", "unit", "sha256"}``, the hash being of the bytes on disk
    from ``begin`` to ``end`` where ``unit`` is bytes, else of the whole file."""


@dataclass
class TextBatch:
    """Consecutive documents, column by column; N of them."""

    texts: list[str]
    """Monolingual: the texts; pairs: the first sides. [N]; may be empty strings."""
    others: list[str] | None = None
    """Pairs: the second sides. [N]"""
    language: str | None = None
    """Language of all ``texts`` if it is one; None where ``languages`` says."""
    other_language: str | None = None
    """Language of all ``others`` if it is one."""
    languages: list[str] | None = None
    """Language of each of ``texts``. [N]; None where ``language`` says."""
    other_languages: list[str] | None = None
    """Language of each of ``others``. [N]"""
    ids: list[str] | None = None
    """Pairs: the id of each, which does not depend on how files are cut into parts. [N]"""

    def where(self, index: int) -> str:
        """``FILE:LINE`` of a document (for parquet ``FILE: row N``)."""
        raise NotImplementedError


def find_inputs(
    arguments: Sequence[str | Path],
    *,
    format: InputFormat | Literal["auto"] = "auto",
    fields: Fields | None = None,
) -> list[InputFile]:
    """The files that arguments name, in an order that depends on the arguments and names alone.

    Args:
        arguments: files, folders (searched through, in order of name), glob patterns (``**`` too), each of them also
            as ``LANGUAGE=...``.
        format: of all of them; ``auto`` goes by the ends of names (``.jsonl .ndjson .json .parquet .txt .tsv .tmx``,
            plus ``.gz`` or ``.zst``).
        fields: for Moses, the languages that ends of names may mean.

    Raises:
        CorpusError: nothing is there, a file is named twice, or its format cannot be told.
    """
    raise NotImplementedError


def plan_parts(inputs: Sequence[InputFile], fields: Fields, part_bytes: int = 64 << 20) -> list[Part]:
    """Cut inputs into parts, in document order; by inputs, fields and ``part_bytes`` alone.

    Plain jsonl, text and TSV are cut by bytes without being read, parquet by row groups, aligned plain files by lines
    after counting them; compressed files and TMX are whole. Small neighbours share a part.

    Raises:
        ConfigError: fields and formats do not fit together.
        CorpusError: aligned files differ in lines; a file is missing, in UTF-16, or has not the columns.
    """
    raise NotImplementedError


def languages_of(inputs: Sequence[InputFile], fields: Fields) -> tuple[str, ...] | None:
    """The languages that documents may have, in a fixed order; None if only the records tell."""
    raise NotImplementedError


def read_part(
    part: Part, fields: Fields, *, on_error: OnError = "raise", reading: Reading | None = None, batch_bytes: int = 2 << 20
) -> Iterator[TextBatch]:
    """Read the documents of a part, in order.

    Args:
        part: of ``plan_parts``.
        fields: how records are read.
        on_error: ``raise`` at the first malformed line, or ``skip`` it and count it in ``reading``. A damaged archive,
            an XML error or a file changed since it was found is an error anyway.
        reading: filled in while reading.
        batch_bytes: text in a batch, about; a longer line is a batch of its own.

    Raises:
        CorpusError: with file, line and reason.
    """
    raise NotImplementedError
