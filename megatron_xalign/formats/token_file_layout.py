"""Where everything lies in a token file: headers and columns of numbers. Format: :mod:`.token_file`."""

# T tokens, D documents, Q sequences, M document indices, S spans, K languages

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import cannot_read
from megatron_xalign.formats.token_file_manifest import MOST_LANGUAGES, are_languages, companion, size_of

IDX_MAGIC = b"MMIDIDX\x00\x00"
IDX_HEADER = struct.Struct("<9sQBQQ")
SPANS_MAGIC = b"XASPANS\x00"
SPANS_HEADER = struct.Struct("<8sIIQQQ")
SPANS_VERSION = 1
# Megatron's codes; 6 and 7 are floating point and hold no tokens.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHUNK = 1 << 20
"""Whole files are gone through in pieces of this many items, so that memory stays small."""
_LARGEST_LANGUAGE_LIST_BYTES = 1 << 20


def chunks(total: int, size: int = CHUNK, begin: int = 0) -> Iterator[tuple[int, int]]:
    """``begin`` .. ``total`` in pieces of at most ``size``."""
    for first in range(begin, total, size):
        yield first, min(first + size, total)


# --- columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """Numbers of one type that lie one after the other in a file."""

    path: Path
    dtype: np.dtype[Any]
    """Little-endian."""
    offset: int
    """Where they begin, in bytes."""
    count: int

    def map(self) -> np.ndarray:
        """A read-only memory map; not aligned unless ``offset`` is.

        Raises:
            FormatError: the file is shorter, or cannot be mapped.
        """
        if self.count == 0:
            return np.zeros(0, dtype=self.dtype)
        try:
            mapped = np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.count,))
        except OSError as error:
            raise cannot_read(self.path, error) from None
        except (ValueError, OverflowError) as error:
            raise FormatError(f"{self.path} changed while it was opened: {error}.") from None
        # A plain array: slices of np.memmap are several times slower.
        return mapped.view(np.ndarray)


class ColumnReader:
    """Reads columns of a file piece by piece, for jobs that go through all of it.

    Unlike a memory map it grows no process, gives aligned arrays, and turns a failing disk or a file cut short
    meanwhile into a FormatError where a map would end the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise cannot_read(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, column: Column, begin: int, end: int, out: np.ndarray | None = None) -> np.ndarray:
        """Items ``begin`` .. ``end`` of a column.

        Args:
            column: of this file.
            begin: first item.
            end: one past the last.
            out: filled instead of a new array; at least as long, of the column's dtype.

        Returns:
            A new array, or a view of ``out``.

        Raises:
            FormatError: they are outside the column, or the file cannot be read.
        """
        if not 0 <= begin <= end <= column.count:
            raise FormatError(f"{self.path}: items {begin:,}..{end:,} of {column.count:,} were asked for; damaged.")
        array = np.empty(end - begin, dtype=column.dtype) if out is None else out[: end - begin]
        view = array.data.cast("B") if array.size else memoryview(b"")
        at, done = column.offset + begin * column.dtype.itemsize, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], at + done)
            except OSError as error:
                raise cannot_read(self.path, error) from None
            if count == 0:
                raise FormatError(f"{self.path} ends at byte {at + done:,}; it was cut short while it was read.")
            done += count
        return array


def _read_head(path: Path, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise cannot_read(path, error) from None


# --- .bin and .idx ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexLayout:
    """What the header of a ``.idx`` promises, checked against its size and the size of the ``.bin``."""

    path: Path
    bin_path: Path
    dtype: np.dtype[Any]
    """Of the tokens."""
    num_sequences: int
    num_indices: int
    num_tokens: int
    """By the size of the ``.bin``."""

    @property
    def num_documents(self) -> int:
        return self.num_indices - 1

    @property
    def lengths(self) -> Column:
        """int32 [Q], in tokens."""
        return Column(self.path, np.dtype("<i4"), IDX_HEADER.size, self.num_sequences)

    @property
    def pointers(self) -> Column:
        """int64 [Q], in bytes."""
        return Column(self.path, np.dtype("<i8"), IDX_HEADER.size + 4 * self.num_sequences, self.num_sequences)

    @property
    def documents(self) -> Column:
        """int64 [M]: first sequence of each document and, last, Q."""
        return Column(self.path, np.dtype("<i8"), IDX_HEADER.size + 12 * self.num_sequences, self.num_indices)

    @property
    def tokens(self) -> Column:
        """[T], of the ``.bin``."""
        return Column(self.bin_path, self.dtype, 0, self.num_tokens)


def read_index_layout(prefix: str | Path) -> IndexLayout:
    """Read the header of ``PREFIX.idx`` and hold it against the sizes of both files, and the ends of its columns.

    Nothing is allocated by a count of the file's.

    Raises:
        FormatError: one of the two is missing, or they are no token file, truncated, or not of one another.
    """
    path, bin_path = companion(prefix, "idx"), companion(prefix, "bin")
    bin_bytes, size = size_of(bin_path), size_of(path)
    header = _read_head(path, IDX_HEADER.size)
    if len(header) < IDX_HEADER.size or not header.startswith(IDX_MAGIC):
        raise FormatError(f"{path} is not a Megatron index: it does not begin with MMIDIDX.")
    _, version, code, sequences, indices = IDX_HEADER.unpack(header)
    if version != 1:
        raise FormatError(f"{path} is a Megatron index of version {version}; version 1 is the one there is.")
    if code not in _DTYPES:
        raise FormatError(f"{path} has dtype code {code}, which holds no tokens; integers are {sorted(_DTYPES)}.")
    expected = IDX_HEADER.size + 12 * sequences + 8 * indices
    if size == expected + sequences > expected:
        raise FormatError(f"{path} has a mode for every sequence (a multimodal index); only text is read.")
    if size != expected:
        raise FormatError(
            f"{path} has {size:,} bytes; its header promises {sequences:,} sequences and {indices:,} document indices, "
            f"{expected:,} bytes. It is truncated or damaged."
        )
    dtype = np.dtype(_DTYPES[code])
    tokens, rest = divmod(bin_bytes, dtype.itemsize)
    layout = IndexLayout(path, bin_path, dtype, sequences, indices, tokens)
    with ColumnReader(path) as reader:
        firsts = [] if indices == 0 else [reader.read(layout.documents, at, at + 1)[0] for at in (0, indices - 1)]
        if firsts != [0, sequences]:
            raise FormatError(f"{path}: document indices do not rise from 0 to {sequences:,} sequences; it is damaged.")
        promised = 0
        if sequences:
            last = sequences - 1
            length, pointer = (int(reader.read(of, last, sequences)[0]) for of in (layout.lengths, layout.pointers))
            promised = pointer + length * dtype.itemsize
            if length < 0 or pointer < 0 or reader.read(layout.pointers, 0, 1)[0] != 0:
                raise FormatError(f"{path}: pointers and lengths of sequences disagree; it is damaged.")
    if rest or bin_bytes != promised:
        raise FormatError(
            f"{bin_path} has {bin_bytes:,} bytes; its index says {promised // dtype.itemsize:,} tokens of "
            f"{dtype.itemsize} bytes. It is truncated, or of another index."
        )
    return layout


# --- .spans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpansLayout:
    """What the header of a ``.spans`` promises, checked against its size."""

    path: Path
    languages: list[str]
    num_documents: int
    num_tokens: int
    num_spans: int
    header_bytes: int

    @property
    def ends(self) -> Column:
        """int64 [S], exclusive, in tokens from the start of the file."""
        return Column(self.path, np.dtype("<i8"), self.header_bytes, self.num_spans)

    @property
    def span_languages(self) -> Column:
        """int8 [S]: index into ``languages`` or ``NO_LANGUAGE``."""
        return Column(self.path, np.dtype("i1"), self.header_bytes + 8 * self.num_spans, self.num_spans)


def read_spans_layout(prefix: str | Path) -> SpansLayout:
    """Read the header of ``PREFIX.spans``.

    Raises:
        FormatError: it is missing, not a spans file, of another version, truncated or damaged.
    """
    path = companion(prefix, "spans")
    size = size_of(path)
    header = _read_head(path, SPANS_HEADER.size)
    if len(header) < SPANS_HEADER.size or not header.startswith(SPANS_MAGIC):
        raise FormatError(f"{path} does not begin with XASPANS; it is not a spans file.")
    _, version, at, documents, tokens, spans = SPANS_HEADER.unpack(header)
    if version != SPANS_VERSION:
        raise FormatError(f"{path} is of version {version}; this package reads version {SPANS_VERSION}.")
    list_bytes = at - SPANS_HEADER.size
    if at % 8 or not 0 <= list_bytes <= _LARGEST_LANGUAGE_LIST_BYTES or size != at + 9 * spans:
        raise FormatError(f"{path} has {size:,} bytes, not what its header promises; it is truncated or damaged.")
    try:
        languages = json.loads(_read_head(path, at)[SPANS_HEADER.size :])
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: its list of languages is not JSON; it is damaged.") from None
    if not are_languages(languages):
        raise FormatError(f"{path}: its list of languages is not up to {MOST_LANGUAGES} different codes; damaged.")
    layout = SpansLayout(path, languages, documents, tokens, spans, at)
    with ColumnReader(path) as reader:
        last = int(reader.read(layout.ends, spans - 1, spans)[0]) if spans else 0
    if last != tokens or not documents <= spans <= tokens:
        raise FormatError(
            f"{path}: {spans:,} spans that end at {last:,} cannot divide {documents:,} documents of {tokens:,} tokens; "
            "it is damaged."
        )
    return layout
