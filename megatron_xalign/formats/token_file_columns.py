"""The columns of a token file while it is written: each a stream of its own, joined to the four files at the end."""

# T tokens, D documents, Q sequences, S spans

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import cannot_write, json_bytes, whole_files
from megatron_xalign.formats.token_file_layout import (
    CHUNK,
    IDX_HEADER,
    IDX_MAGIC,
    SPANS_HEADER,
    SPANS_MAGIC,
    SPANS_VERSION,
    chunks,
)
from megatron_xalign.formats.token_file_manifest import CODE_OF, COMPANIONS, companion

if TYPE_CHECKING:
    from hashlib import _Hash

# Tokens are brought to the file's width in a buffer of this many, small enough to stay in the processor's cache while
# they are hashed and written.
_BUFFER_TOKENS = 1 << 17
# Of a column, before it goes to the disk.
_HELD_BYTES = 1 << 20


class TokenFileColumns:
    """Takes what a token file is made of, in step or not, and lets the four files appear in :meth:`finish`.

    What is put is not checked; an OSError is a FormatError that says what to do. A block left without ``finish``
    leaves nothing.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        """Nothing is opened before the ``with`` block.

        Args:
            prefix: path without extension; its folder is made if missing.
            dtype: of the tokens, ``uint16`` or ``int32``.
        """
        self.num_tokens = 0
        self.num_documents = 0
        self.num_sequences = 0
        self.num_spans = 0
        self._prefix = prefix
        self._dtype = dtype.newbyteorder("<")
        self._buffer = np.empty(_BUFFER_TOKENS, dtype=self._dtype)
        self._stack = ExitStack()
        self._is_open = False
        # First sequence of every document after the first; None while each document is one sequence.
        self._first_sequences: IO[bytes] | None = None

    def __enter__(self) -> Self:
        with self._writing(), ExitStack() as stack:
            # The manifest is last, so a process killed between two of them leaves .spans without a manifest, which
            # tells every reader that the file is unfinished. Megatron's look at .bin and .idx: the .idx is last of
            # the two, and an older one is taken away before.
            spans, bin_, idx, self._manifest = stack.enter_context(
                whole_files(
                    [companion(self._prefix, kind) for kind in ("spans", "bin", "idx", "manifest.json")],
                    before_naming=self._take_old_away,
                )
            )
            self._spans, self._bin, self._idx = map(_HashedFile, (spans, bin_, idx))
            self._lengths, self._ends, self._span_languages = (self._temporary(stack) for _ in range(3))
            self._stack = stack.pop_all()
            self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        if kind is None:
            kind, error = _UnfinishedError, _UnfinishedError()
        # After finish() the stack is empty and this does nothing.
        with suppress(_UnfinishedError):
            self._stack.__exit__(kind, error, trace)

    def put_tokens(self, tokens_T: np.ndarray) -> None:
        """Append tokens, of any integer width."""
        with self._writing():
            if tokens_T.dtype == self._dtype and tokens_T.flags.c_contiguous:
                self._bin.write(tokens_T.data.cast("B"))
            else:
                for begin, end in chunks(tokens_T.size, _BUFFER_TOKENS):
                    piece = self._buffer[: end - begin]
                    np.copyto(piece, tokens_T[begin:end], casting="unsafe")
                    self._bin.write(piece.data.cast("B"))
            self.num_tokens += tokens_T.size

    def put_token_bytes(self, piece: memoryview, hashes: Sequence[_Hash], threads: Executor) -> None:
        """Append tokens that are in the file's width, and hash them for others too, all at the same time."""
        with self._writing():
            self._bin.write_beside(piece, hashes, threads)
            self.num_tokens += len(piece) // self._dtype.itemsize

    def put_sequences(self, lengths_Q: np.ndarray) -> None:
        """Append the lengths of sequences, in tokens."""
        with self._writing():
            self._lengths.write(_bytes(lengths_Q, "<i4"))
            self.num_sequences += lengths_Q.size

    def put_documents(self, count: int, sequences_D: np.ndarray | None = None) -> None:
        """Append documents.

        Args:
            count: how many.
            sequences_D: integers [count], how many sequences each has; one each if left out.
        """
        with self._writing():
            if sequences_D is not None and self._first_sequences is None and np.any(sequences_D != 1):
                self._first_sequences = self._temporary(self._stack)
                for begin, end in chunks(self.num_documents):
                    self._first_sequences.write(_bytes(np.arange(begin + 1, end + 1), "<i8"))
                self._sequences_of_documents = self.num_documents
            if self._first_sequences is not None:
                ends = np.arange(1, count + 1) if sequences_D is None else np.cumsum(sequences_D, dtype=np.int64)
                self._first_sequences.write(_bytes(ends + self._sequences_of_documents, "<i8"))
                self._sequences_of_documents += int(ends[-1]) if count else 0
            self.num_documents += count

    def put_spans(self, ends_S: np.ndarray, languages_S: np.ndarray) -> None:
        """Append spans: their ends, in tokens from the start of the file, and the index of their languages."""
        with self._writing():
            self._ends.write(_bytes(ends_S, "<i8"))
            self._span_languages.write(_bytes(languages_S, "i1"))
            self.num_spans += ends_S.size

    def finish(
        self, languages: Sequence[str], manifest_of: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Write index, spans and manifest, and let all four files appear.

        Args:
            languages: codes that the indices of spans point into.
            manifest_of: sizes and checksums of the other three files to the manifest.

        Returns:
            The manifest.
        """
        with self._writing():
            self._write_idx()
            self._write_spans(languages)
            files = dict(zip(COMPANIONS, (self._bin, self._idx, self._spans), strict=True))
            manifest = manifest_of(
                {
                    kind: {"bytes": file.num_bytes, "sha256": file.sha256.hexdigest()}
                    for kind, file in files.items()
                }
            )
            self._manifest.write(json_bytes(manifest))
            self._is_open = False
            self._stack.close()
        return manifest

    def _take_old_away(self) -> None:
        # From here to the last rename the prefix is unfinished for every reader: without .idx for Megatron's, without
        # a manifest for ours.
        companion(self._prefix, "manifest.json").unlink(missing_ok=True)
        companion(self._prefix, "idx").unlink(missing_ok=True)

    def _write_idx(self) -> None:
        code = CODE_OF[self._dtype.name]
        self._idx.write(IDX_HEADER.pack(IDX_MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
        self._idx.copy(self._lengths)
        self._lengths.seek(0)
        first = 0
        while piece := self._lengths.read(4 * CHUNK):
            lengths = np.frombuffer(piece, dtype="<i4").astype(np.int64)
            starts = np.cumsum(lengths) - lengths + first
            self._idx.write(_bytes(starts * self._dtype.itemsize, "<i8"))
            first += int(lengths.sum())
        if self._first_sequences is None:
            for begin, end in chunks(self.num_documents + 1):
                self._idx.write(_bytes(np.arange(begin, end), "<i8"))
        else:
            self._idx.write(bytes(8))
            self._idx.copy(self._first_sequences)

    def _write_spans(self, languages: Sequence[str]) -> None:
        codes = json.dumps(list(languages), ensure_ascii=False).encode("utf-8")
        codes += b" " * (-len(codes) % 8)
        self._spans.write(
            SPANS_HEADER.pack(
                SPANS_MAGIC, SPANS_VERSION, SPANS_HEADER.size + len(codes),
                self.num_documents, self.num_tokens, self.num_spans,
            )
        )
        self._spans.write(codes)
        self._spans.copy(self._ends)
        self._spans.copy(self._span_languages)

    def _temporary(self, stack: ExitStack) -> IO[bytes]:
        # On the disk only once it is large: a file of its own costs more than the columns of a part take. There it has
        # no name (or loses it at once), so that a killed process leaves none behind.
        file = tempfile.SpooledTemporaryFile(_HELD_BYTES, dir=str(self._prefix.parent))  # noqa: SIM115 - the stack closes it
        stack.callback(_close, file)
        return file

    @contextmanager
    def _writing(self) -> Iterator[None]:
        entering = not hasattr(self, "_manifest")
        if not entering and not self._is_open:
            raise FormatError(f"{self._prefix} is not open for writing: it is finished, left, or failed before.")
        try:
            yield
        except OSError as error:
            self._is_open = False
            raise cannot_write(companion(self._prefix, "manifest.json" if entering else "bin"), error) from None


def _close(file: IO[bytes]) -> None:
    # What is still in memory is written now, and on a full disk that fails again: the first error is the one to tell.
    with suppress(OSError):
        file.close()


class _UnfinishedError(Exception):
    """A writer's block ended without ``finish``; makes the partial files go away."""


class _HashedFile:
    """A file being written, its size and its SHA-256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self._file = file

    def write(self, piece: bytes | memoryview) -> None:
        self.sha256.update(piece)
        self._write(piece)

    def write_beside(self, piece: memoryview, hashes: Sequence[_Hash], threads: Executor) -> None:
        """Write, and bring this and other hashes up to date, all at once (hashlib lets go of the interpreter)."""
        pending = [threads.submit(digest.update, piece) for digest in (self.sha256, *hashes)]
        try:
            self._write(piece)
        finally:
            for future in pending:
                future.result()

    def copy(self, source: IO[bytes]) -> None:
        source.seek(0)
        while piece := source.read(CHUNK):
            self.write(piece)

    def _write(self, piece: bytes | memoryview) -> None:
        self._file.write(piece)
        self.num_bytes += len(piece)


def _bytes(values: np.ndarray, dtype: str) -> memoryview:
    """Values in the file's type, as bytes; no copy if they have it already."""
    return np.ascontiguousarray(values, dtype=dtype).data.cast("B") if values.size else memoryview(b"")
