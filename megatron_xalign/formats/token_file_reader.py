"""Opening a token file: at once whatever its size, or with its index checked."""

# T tokens, D documents, Q sequences, M document indices, S spans

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import cannot_read
from megatron_xalign.formats.token_file_layout import (
    ColumnReader,
    IndexLayout,
    SpansLayout,
    chunks,
    read_index_layout,
    read_spans_layout,
)
from megatron_xalign.formats.token_file_manifest import (
    COMPANIONS,
    NO_LANGUAGE,
    Origin,
    companion,
    is_language_code,
    read_manifest,
    size_of,
)
from megatron_xalign.formats.token_file_structure import (
    SpanWalk,
    Tally,
    check_first_sequences,
    offsets_of_pointers,
    read_offsets,
    sequence_problems,
)

Check = Literal["index", "sizes"]


class TokenFile:
    """A token file opened for reading; made by :func:`read_token_file`.

    Its arrays are memory maps, made when first asked for. What ``check="sizes"`` has not looked at (the inside of
    lengths, pointers, document indices and spans) is held against its bounds by every method here where it is used
    (FormatError); whoever takes the arrays themselves has to do the same. A damaged number that lies inside its bounds
    is for ``check="index"`` and :func:`verify_token_file` to find. Arrays of the ``.idx`` are not aligned: its header
    has 34 bytes. A file must not be cut short or overwritten in place while it is open: memory maps end the process
    then. Writers of this package never do that; they rename a new file over the old one.
    """

    def __init__(
        self,
        prefix: Path,
        index: IndexLayout,
        languages: list[str],
        manifest: dict[str, Any],
        spans: SpansLayout | None,
        eod: int | None,
        check: Check,
    ) -> None:
        self.prefix = prefix
        self.languages = languages
        """Codes that language ids point into."""
        self.manifest = manifest
        """The manifest; ``{}`` for Megatron's own files."""
        self.eod = eod
        """The end-of-document id, if it is known."""
        self.dtype = index.dtype
        """Of the tokens."""
        self.num_tokens = index.num_tokens
        self.num_sequences = index.num_sequences
        self.num_spans = 0 if spans is None else spans.num_spans
        self._index = index
        self._spans = spans
        self._check: Check = check

    def __len__(self) -> int:
        return self._index.num_documents

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = self._range(index)
        return self.tokens[start:stop]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"TokenFile({str(self.prefix)!r}, {len(self):,} documents, {self.num_tokens:,} tokens)"

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the whole corpus to the other process; it opens the file itself.
        language = None if self._spans is not None else self.languages[0]
        return read_token_file, (str(self.prefix), language, self.eod, self._check)

    @property
    def origin(self) -> Origin:
        """``monolingual`` or ``parallel``."""
        return self.manifest.get("origin", "monolingual")

    @property
    def content_is_regular(self) -> bool:
        """Whether every document is text of the one language and then one token of none, by the manifest.

        Then the content of any stretch of documents is its tokens less its documents, and no span need be read.
        """
        return (
            self.manifest.get("content_is_regular", False)
            and len(self.languages) == 1
            and self.num_spans == 2 * len(self)
            and self.manifest["content_tokens"] == self.num_tokens - len(self)
        )

    @cached_property
    def tokens(self) -> np.ndarray:
        """[T]: all tokens, in the width of the file."""
        return self._index.tokens.map()

    @cached_property
    def sequence_lengths_Q(self) -> np.ndarray:
        """int32 [Q]: tokens of each of Megatron's sequences."""
        return self._index.lengths.map()

    @cached_property
    def sequence_pointers_Q(self) -> np.ndarray:
        """int64 [Q]: where each sequence begins, in bytes."""
        return self._index.pointers.map()

    @cached_property
    def document_indices_M(self) -> np.ndarray:
        """int64 [D + 1]: first sequence of each document and, last, the number of sequences."""
        return self._index.documents.map()

    @cached_property
    def span_ends(self) -> np.ndarray | None:
        """int64 [S]: end of each span, exclusive, in tokens; aligned. None for Megatron's own files."""
        return None if self._spans is None else self._spans.ends.map()

    @cached_property
    def span_languages(self) -> np.ndarray | None:
        """int8 [S]: language of each span, -1 for none. None for Megatron's own files."""
        return None if self._spans is None else self._spans.span_languages.map()

    @cached_property
    def one_sequence_per_document(self) -> bool:
        """Whether sequences are documents. Megatron's own files are gone through once to know."""
        if len(self) != self.num_sequences:
            return False
        # Our writer makes no document without a sequence.
        return self._spans is not None or all(
            np.array_equal(self.document_indices_M[begin:end], np.arange(begin, end))
            for begin, end in chunks(len(self) + 1)
        )

    @property
    def lengths_D(self) -> np.ndarray | None:
        """int32 [D]: tokens of each document, mapped; None where documents have several sequences, or none."""
        return self.sequence_lengths_Q if self.one_sequence_per_document else None

    @cached_property
    def pointers_D(self) -> np.ndarray:
        """int64 [D]: where each document begins, in bytes; mapped where documents have one sequence each."""
        if self.one_sequence_per_document:
            return self.sequence_pointers_Q
        return self.document_offsets(0, len(self))[:-1] * self.dtype.itemsize

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [D+1]: first token of each document and, last, the number of tokens.

        In memory: 8 bytes a document. After ``check="sizes"`` the index is checked when they are first asked for.

        Raises:
            FormatError: the index contradicts itself.
        """
        offsets = np.zeros(len(self) + 1, dtype=np.int64)
        with ColumnReader(self._index.path) as reader:
            for problem in sequence_problems(reader, self._index):
                raise FormatError(problem)
            for begin, end in chunks(len(self)):
                offsets[begin : end + 1] = read_offsets(reader, self._index, begin, end)
        return offsets

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [D]: tokens of each document."""
        return np.diff(self.offsets).astype(np.int32)

    def document_offsets(self, begin: int, end: int) -> np.ndarray:
        """Where a range of documents lies; takes time and memory for those only.

        Args:
            begin: first document.
            end: one past the last.

        Returns:
            int64 [end - begin + 1], in tokens: the first of each and the end of the last.

        Raises:
            FormatError: the index contradicts itself there.
        """
        if not 0 <= begin <= end <= len(self):
            raise ValueError(f"documents {begin}..{end} are outside 0..{len(self)}.")
        if "offsets" in self.__dict__:
            return self.offsets[begin : end + 1]
        pointers = np.full(end - begin + 1, self.num_tokens * self.dtype.itemsize, dtype=np.int64)
        if self.one_sequence_per_document:
            inside = self.sequence_pointers_Q[begin : end + 1]
        else:
            firsts = np.array(self.document_indices_M[begin : end + 1])
            check_first_sequences(self._index, firsts)
            inside = self.sequence_pointers_Q[firsts[: np.searchsorted(firsts, self.num_sequences)]]
        pointers[: len(inside)] = inside
        return offsets_of_pointers(self._index, pointers)

    def language_ids(self, index: int) -> np.ndarray:
        """int8 [T_i]: the language of each token of document ``index``, -1 for none."""
        return self.language_ids_flat(*self._range(index))

    def language_ids_flat(self, start: int, stop: int) -> np.ndarray:
        """The language of each token of a range of ``tokens``.

        Args:
            start: first token.
            stop: one past the last.

        Returns:
            int8 [stop - start], indices into ``languages``; -1 for end-of-document and template tokens.

        Raises:
            FormatError: spans do not cover the range, or name a language that is not there.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"tokens {start}..{stop} are outside 0..{self.num_tokens}.")
        if self.span_ends is None or self.span_languages is None:
            ids = np.zeros(stop - start, dtype=np.int8)
            if self.eod is not None:
                ids[self.tokens[start:stop] == self.eod] = NO_LANGUAGE
            return ids
        if start == stop:
            return np.zeros(0, dtype=np.int8)
        first, last = np.searchsorted(self.span_ends, (start, stop - 1), side="right")
        ends = np.minimum(self.span_ends[first : last + 1], stop)
        sizes = np.diff(ends, prepend=start)
        languages = self.span_languages[first : last + 1]
        if (
            ends.size == 0
            # Ends that do not rise lead the search astray.
            or (first and self.span_ends[first - 1] > start)
            or ends[-1] != stop
            or sizes.min() <= 0
            or languages.min() < NO_LANGUAGE
            or languages.max() >= len(self.languages)
        ):
            raise FormatError(f"{companion(self.prefix, 'spans')} is damaged near token {start:,}; verify the file.")
        return np.repeat(languages, sizes)

    def _range(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        start, stop = self.document_offsets(index, index + 1)
        return int(start), int(stop)

    def check_inside(self) -> None:
        """Check the inside of index and spans, which :func:`read_token_file` does unless told not to.

        Raises:
            FormatError: they contradict themselves or one another.
        """
        offsets = self.offsets
        if self._spans is None:
            return
        tally = Tally(1) if self.content_is_regular else None
        with ColumnReader(self._spans.path) as reader:
            walk = SpanWalk(reader, self._spans)
            for begin, end in chunks(len(self)):
                for piece in walk.of_documents(offsets[begin : end + 1]):
                    if tally is not None:
                        tally.add_spans(piece.sizes, piece.languages, piece.is_last)
            walk.finish()
        if tally is not None and not tally.spans_are_regular:
            raise FormatError(
                f"{companion(self.prefix, 'manifest.json')} says every document is text and one token of no language; "
                ".spans says otherwise."
            )


def read_token_file(
    prefix: str | Path, language: str | None = None, eod: int | None = None, check: Check = "index"
) -> TokenFile:
    """Open a token file of ours, or one that Megatron wrote.

    Counts are checked against file sizes before anything is read, and with ``check="index"`` index and spans against
    each other, so that a truncated or corrupted file is an error here and not a crash later. Token ids and checksums
    are left to :func:`verify_token_file`, which reads everything.

    Args:
        prefix: path without ``.bin``/``.idx``.
        language: code of a file without companions; for one of ours it may be left out and must agree if given.
        eod: end-of-document id of a file without companions; its tokens then have no language.
        check: ``index`` reads index and spans once (20 and 9 bytes for each of them) and keeps the offsets of all
            documents in memory. ``sizes`` reads headers and manifest only: any size opens at once, and what
            leaves its bounds inside is met where it is read.

    Returns:
        The open file.

    Raises:
        FormatError: a file is missing, unfinished, truncated, corrupted or of another version.
    """
    if check not in ("index", "sizes"):
        raise ValueError(f"check={check!r} is neither 'index' nor 'sizes'.")
    prefix = Path(prefix)
    file = open_by_sizes(prefix, language, eod, check)
    if check == "index":
        file.check_inside()
    return file


def has_companions(prefix: Path) -> bool:
    """Whether a prefix is one of our token files, rather than Megatron's own.

    Raises:
        FormatError: it is an unfinished one of ours.
    """
    present = files_present(prefix)
    if "spans" in present and "manifest.json" not in present:
        raise FormatError(
            f"{prefix} is unfinished: it has .spans but no .manifest.json, which is written last; make it again."
        )
    for kind in ("bin", "idx", *(("spans",) if "manifest.json" in present else ())):
        if kind not in present:
            raise FormatError(f"{companion(prefix, kind)} does not exist; a token file needs it.")
    return "manifest.json" in present


def files_present(prefix: str | Path) -> set[str]:
    """Which of the four files of a prefix are there.

    Raises:
        FormatError: it cannot be found out.
    """
    try:
        return {kind for kind in (*COMPANIONS, "manifest.json") if companion(prefix, kind).exists()}
    except OSError as error:
        raise cannot_read(prefix, error) from None


def open_by_sizes(prefix: Path, language: str | None, eod: int | None, check: Check) -> TokenFile:
    """Open a file by headers, sizes and manifest; see :func:`read_token_file`."""
    ours = has_companions(prefix)
    index = read_index_layout(prefix)
    if not ours:
        if not language:
            raise FormatError(
                f"{prefix} has no .manifest.json that names its language; pass it, such as language='fin_Latn', or "
                "'und' if it does not matter."
            )
        if not is_language_code(language):
            raise ValueError(f"language={language!r} is not a printable code.")
        return TokenFile(prefix, index, [language], {}, None, eod, check)
    manifest = read_manifest(prefix)
    languages = list(manifest["languages"])
    for problem in disagreements(prefix, manifest, index):
        raise FormatError(problem)
    if language is not None and languages != [language]:
        raise FormatError(f"{prefix} holds {', '.join(languages)} by its manifest, not {language}.")
    spans = read_spans_layout(prefix)
    for problem in span_disagreements(manifest, index, spans):
        raise FormatError(problem)
    return TokenFile(prefix, index, languages, manifest, spans, manifest["tokenizer"]["eod"], check)


def disagreements(prefix: Path, manifest: dict[str, Any], index: IndexLayout) -> Iterator[str]:
    """What sizes and header say against the manifest."""
    for kind, stated in manifest["files"].items():
        size = size_of(companion(prefix, kind))
        if size != stated["bytes"]:
            yield f"{companion(prefix, kind)} has {size:,} bytes; its manifest says {stated['bytes']:,}."
    for name, found in (
        ("documents", index.num_documents),
        ("sequences", index.num_sequences),
        ("tokens", index.num_tokens),
        ("dtype", index.dtype.name),
    ):
        if manifest.get(name, found) != found:
            yield f"{prefix} has {name} {found}; its manifest says {manifest[name]}."


def span_disagreements(manifest: dict[str, Any], index: IndexLayout, spans: SpansLayout) -> Iterator[str]:
    """What the header of the spans says against the manifest and the index."""
    if spans.languages != manifest["languages"]:
        yield f"{spans.path} lists the languages {spans.languages}; its manifest says {manifest['languages']}."
    if manifest.get("spans", spans.num_spans) != spans.num_spans:
        yield f"{spans.path} has {spans.num_spans:,} spans; its manifest says {manifest['spans']:,}."
    if (spans.num_documents, spans.num_tokens) != (index.num_documents, index.num_tokens):
        yield (
            f"{spans.path} is of {spans.num_documents:,} documents, {spans.num_tokens:,} tokens; the index has "
            f"{index.num_documents:,}, {index.num_tokens:,}."
        )
