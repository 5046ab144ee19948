"""Going through a token file's columns side by side, in little memory, trusting none of them.

Everything that reads a whole token file (checking, joining, counting) walks its documents in pieces, and inside a
piece its sequences, spans or tokens; what does not fit together is a :class:`FormatError` where it is met.
"""

# T tokens, D documents, Q sequences, S spans

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file_layout import CHUNK, ColumnReader, IndexLayout, SpansLayout, chunks
from megatron_xalign.formats.token_file_manifest import LONGEST_DOCUMENT_TOKENS, NO_LANGUAGE
from megatron_xalign.progress import progress_bar


def byte_bar(shown: bool, total_bytes: int, what: str) -> AbstractContextManager[tqdm]:
    """A progress bar of bytes, or one that shows nothing."""
    return progress_bar(total_bytes, what, "B") if shown else nullcontext(tqdm(disable=True))


def read_first_sequences(reader: ColumnReader, index: IndexLayout, begin: int, end: int) -> np.ndarray:
    """int64 [end - begin + 1]: the first sequence of each of some documents and of the one after them.

    Raises:
        FormatError: they do not rise, or name sequences that are not there.
    """
    firsts = reader.read(index.documents, begin, end + 1)
    check_first_sequences(index, firsts)
    return firsts


def check_first_sequences(index: IndexLayout, firsts: np.ndarray) -> None:
    """Refuse first sequences of consecutive documents that cannot be (FormatError)."""
    if firsts[0] < 0 or firsts[-1] > index.num_sequences or np.any(firsts[1:] < firsts[:-1]):
        raise FormatError(
            f"{index.path}: document indices do not rise from 0 to {index.num_sequences:,} sequences; it is damaged."
        )


def read_offsets(reader: ColumnReader, index: IndexLayout, begin: int, end: int) -> np.ndarray:
    """Where some documents begin.

    Args:
        reader: of the index.
        index: its layout.
        begin: first document.
        end: one past the last.

    Returns:
        int64 [end - begin + 1], in tokens: the first of each document and of the one after them (or the end).

    Raises:
        FormatError: the index contradicts itself there, or a document has more than 2**31 - 1 tokens.
    """
    firsts = read_first_sequences(reader, index, begin, end)
    starts = np.full(len(firsts), index.num_tokens * index.dtype.itemsize, dtype=np.int64)
    until = min(int(firsts[-1]) + 1, index.num_sequences)
    for low, high in chunks(until, begin=int(firsts[0])):
        first, last = np.searchsorted(firsts, (low, high))
        if last > first:
            starts[first:last] = reader.read(index.pointers, low, high)[firsts[first:last] - low]
    return offsets_of_pointers(index, starts)


def offsets_of_pointers(index: IndexLayout, pointers: np.ndarray) -> np.ndarray:
    """Pointers in bytes as offsets in tokens, if documents can lie so (FormatError if not)."""
    offsets, rest = np.divmod(pointers, index.dtype.itemsize)
    lengths = np.diff(offsets)
    if rest.any() or offsets[0] < 0 or offsets[-1] > index.num_tokens or np.any(lengths < 0):
        raise FormatError(f"{index.path}: pointers do not rise inside {index.bin_path.name}; it is damaged.")
    if lengths.size and lengths.max() > LONGEST_DOCUMENT_TOKENS:
        raise FormatError(f"{index.path} has a document of more than {LONGEST_DOCUMENT_TOKENS:,} tokens.")
    return offsets


def index_problems(index: IndexLayout) -> Iterator[str]:
    """What is wrong inside an index whose header and size are right; nothing if it is good."""
    with ColumnReader(index.path) as reader:
        yield from sequence_problems(reader, index)
        try:
            for begin, end in chunks(index.num_documents):
                read_offsets(reader, index, begin, end)
        except FormatError as error:
            yield str(error)


def sequence_problems(reader: ColumnReader, index: IndexLayout) -> Iterator[str]:
    """What is wrong with lengths and pointers of sequences; nothing if they are good."""
    at = 0
    for begin, end in chunks(index.num_sequences):
        lengths = reader.read(index.lengths, begin, end).astype(np.int64)
        if lengths.min() < 0:
            where = begin + int(np.argmax(lengths < 0))
            yield f"{index.path}: sequence {where:,} has {lengths.min():,} tokens; it is damaged."
            return
        ends = np.cumsum(lengths) + at
        wrong = reader.read(index.pointers, begin, end) != (ends - lengths) * index.dtype.itemsize
        at = int(ends[-1])
        # The sum is bounded before the next piece, so that it never leaves int64.
        if wrong.any() or at > index.num_tokens:
            where = begin + int(np.argmax(wrong))
            yield f"{index.path}: pointers and lengths of sequences disagree at sequence {where:,}; it is damaged."
            return
    if at != index.num_tokens:
        yield f"{index.path}: its sequences have {at:,} tokens, {index.bin_path.name} {index.num_tokens:,}; damaged."


@dataclass(frozen=True)
class SpanPiece:
    """Some consecutive spans, beside the documents they lie in."""

    ends: np.ndarray
    """int64 [n], in tokens from the start of the file."""
    sizes: np.ndarray
    """int64 [n]."""
    languages: np.ndarray
    """int8 [n]."""
    documents: np.ndarray
    """int64 [n]: which of the given documents each lies in."""
    is_last: np.ndarray
    """bool [n]: whether it ends its document."""


class SpanWalk:
    """Reads the spans of a file in step with its documents."""

    def __init__(self, reader: ColumnReader, spans: SpansLayout) -> None:
        """Starts at the first span.

        Args:
            reader: of the spans file.
            spans: its layout.
        """
        self._reader = reader
        self._spans = spans
        self._next = 0
        self._end = 0

    def of_documents(self, offsets: np.ndarray) -> Iterator[SpanPiece]:
        """The spans of the next documents, in pieces.

        Args:
            offsets: int64 [n + 1], first token of each of them and the end of the last.

        Raises:
            FormatError: spans do not divide each of them into pieces, or name a language that is not there.
        """
        spans = self._spans
        if np.any(offsets[1:] <= offsets[:-1]):
            raise FormatError(f"{spans.path}: a document has no tokens; a file with spans has none such.")
        while self._end < offsets[-1]:
            until = min(self._next + CHUNK, spans.num_spans)
            ends = self._reader.read(spans.ends, self._next, until)
            ends = ends[: np.searchsorted(ends, offsets[-1], side="right")]
            sizes = np.diff(ends, prepend=self._end)
            # Where a document without its own end would be skipped, a span begins before the document it ends in.
            documents = np.searchsorted(offsets[1:], ends)
            if (
                ends.size == 0
                or np.any(sizes <= 0)
                or ends[-1] > offsets[-1]
                or np.any(ends - sizes < offsets[documents])
            ):
                raise FormatError(f"{spans.path}: its spans do not divide every document into pieces; it is damaged.")
            languages = self._reader.read(spans.span_languages, self._next, self._next + len(ends))
            if languages.min() < NO_LANGUAGE or languages.max() >= len(spans.languages):
                raise FormatError(
                    f"{spans.path} names a language outside its list of {len(spans.languages)}; it is damaged."
                )
            self._next += len(ends)
            self._end = int(ends[-1])
            yield SpanPiece(ends, sizes, languages, documents, offsets[1:][documents] == ends)
        if self._end > offsets[-1]:
            raise FormatError(f"{spans.path}: its spans do not divide every document into pieces; it is damaged.")

    def finish(self) -> None:
        """Call it after the last document.

        Raises:
            FormatError: there are spans left.
        """
        if self._next != self._spans.num_spans:
            raise FormatError(f"{self._spans.path} has spans after its last document; it is damaged.")


class Tally:
    """What a token file holds, counted as its documents go by."""

    def __init__(self, num_languages: int) -> None:
        self.documents = 0
        self.tokens = 0
        self.spans = 0
        self.tokens_by_language_K = np.zeros(num_languages, dtype=np.int64)
        self.documents_by_language_K = np.zeros(num_languages, dtype=np.int64)
        """Documents with at least one token of the language."""
        self.shortest = 0
        self.longest = 0
        self._regular = num_languages == 1
        # Languages met so far in a document whose spans are not all counted; the first is "none".
        self._open = np.zeros(num_languages + 1, dtype=bool)

    def add_language(self) -> None:
        """One more language, with the next index; to be called between documents."""
        self.tokens_by_language_K = np.append(self.tokens_by_language_K, 0)
        self.documents_by_language_K = np.append(self.documents_by_language_K, 0)
        self._open = np.append(self._open, False)
        self._regular = len(self.tokens_by_language_K) == 1 and self.spans == 0

    @property
    def spans_are_regular(self) -> bool:
        """Whether there is one language and every document is some of it and one token of none."""
        return self._regular and self.spans > 0 and self.spans % 2 == 0

    def facts(self, languages: list[str]) -> dict[str, object]:
        """The counts as fields of a manifest."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "spans": self.spans,
            "content_tokens": int(self.tokens_by_language_K.sum()),
            "tokens_by_language": dict(zip(languages, self.tokens_by_language_K.tolist(), strict=True)),
            "documents_by_language": dict(zip(languages, self.documents_by_language_K.tolist(), strict=True)),
            "shortest_document_tokens": self.shortest,
            "longest_document_tokens": self.longest,
            "content_is_regular": self.spans_are_regular,
        }

    def add_documents(self, lengths_D: np.ndarray) -> None:
        """Count documents of these lengths."""
        if lengths_D.size == 0:
            return
        shortest = int(lengths_D.min())
        self.shortest = min(self.shortest, shortest) if self.documents else shortest
        self.longest = max(self.longest, int(lengths_D.max()))
        self.documents += int(lengths_D.size)
        self.tokens += int(lengths_D.sum())

    def add_spans(self, sizes_S: np.ndarray, languages_S: np.ndarray, is_last_S: np.ndarray) -> None:
        """Count the next spans; a document's may come in several calls.

        Args:
            sizes_S: integers [S], tokens of each.
            languages_S: integers [S], index of the language or ``NO_LANGUAGE``.
            is_last_S: bool [S], whether it ends its document.
        """
        if sizes_S.size == 0:
            return
        if self._regular and self._is_regular(sizes_S, languages_S, is_last_S):
            content = sizes_S[self.spans % 2 :: 2]
            self.tokens_by_language_K[0] += content.sum()
            self.documents_by_language_K[0] += content.size
        else:
            if self._regular and self.spans % 2:
                # Its text is counted, its end is among these spans: take it back, it is counted when it ends.
                self.documents_by_language_K[0] -= 1
                self._open[1] = True
            self._regular = False
            self._add_any(sizes_S, languages_S, is_last_S)
        self.spans += int(sizes_S.size)

    def _is_regular(self, sizes_S: np.ndarray, languages_S: np.ndarray, is_last_S: np.ndarray) -> bool:
        text, end = self.spans % 2, 1 - self.spans % 2
        return bool(
            not is_last_S[text::2].any()
            and is_last_S[end::2].all()
            and (sizes_S[end::2] == 1).all()
            and (languages_S[text::2] == 0).all()
            and (languages_S[end::2] == NO_LANGUAGE).all()
        )

    def _add_any(self, sizes_S: np.ndarray, languages_S: np.ndarray, is_last_S: np.ndarray) -> None:
        columns = len(self._open)
        # Double precision is exact: the sizes of one call are tokens held in memory, or one piece's.
        sums = np.bincount(languages_S + 1, weights=sizes_S, minlength=columns)
        self.tokens_by_language_K += sums[1:].astype(np.int64)
        for begin, end in chunks(len(sizes_S), max(CHUNK * 16 // columns, 1)):
            is_last = is_last_S[begin:end]
            documents = np.cumsum(is_last) - is_last
            met = np.zeros((int(documents[-1]) + 1, columns), dtype=bool)
            met[documents, languages_S[begin:end] + 1] = True
            met[0] |= self._open
            complete = met if is_last[-1] else met[:-1]
            self.documents_by_language_K += complete.sum(axis=0)[1:]
            self._open[:] = False if is_last[-1] else met[-1]
