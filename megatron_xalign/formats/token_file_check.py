"""Reading a whole token file to say whether it is what it says it is, and if not, everything that is wrong."""

# T tokens, D documents

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import cannot_read
from megatron_xalign.formats.token_file_layout import (
    CHUNK,
    ColumnReader,
    IndexLayout,
    SpansLayout,
    chunks,
    read_index_layout,
    read_spans_layout,
)
from megatron_xalign.formats.token_file_manifest import (
    TokenizerIdentity,
    check_same_tokenizer,
    companion,
    read_manifest,
    size_of,
)
from megatron_xalign.formats.token_file_reader import (
    TokenFile,
    disagreements,
    has_companions,
    open_by_sizes,
    span_disagreements,
)
from megatron_xalign.formats.token_file_structure import SpanWalk, Tally, byte_bar, index_problems, read_offsets

_HASHED_BYTES = 1 << 22


@dataclass(frozen=True)
class Problem:
    """Something wrong with a token file."""

    check: str
    """What was being checked: ``sizes``, ``index``, ``checksums``, ``token ids``, ..."""
    message: str
    """What is wrong, where first."""
    count: int = 1
    """How many documents, tokens, ... it is wrong with."""


@dataclass
class TokenFileReport:
    """What a token file holds and what is wrong with it."""

    prefix: str
    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts, as :func:`verify_token_file` returns them; without what could not be read."""
    sample: list[dict[str, Any]] = field(default_factory=list)
    """Some documents, as of :func:`sample_documents`; none if the file cannot be read."""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_tree(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**self.facts, "good": self.good, "problems": list(map(asdict, self.problems)), "sample": self.sample}


def verify_token_file(
    prefix: str | Path,
    tokenizer: TokenizerIdentity | None = None,
    *,
    language: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Read a whole token file and check everything that can be checked; an exception if anything is wrong.

    Args:
        prefix: path without extension.
        tokenizer: checked against the manifest; supplies vocabulary and end-of-document id where there is none.
        language: what to call the language of a file without companions.
        progress: whether to show a bar.

    Returns:
        ``prefix, companions, origin, documents, sequences, tokens, content_tokens, tokens_by_language,
        documents_by_language, dtype, shortest, longest, largest_id, checked`` (a list of what was checked), ``sample``
        (some documents, see :func:`sample_documents`); JSON-able.

    Raises:
        FormatError: the first problem found, and how many more there are; :func:`check_token_file` lists them.
    """
    report = check_token_file(prefix, tokenizer, language=language, progress=progress)
    if report.problems:
        first, *more = report.problems
        also = f" {len(more)} more found: {', '.join(dict.fromkeys(item.check for item in more))}." if more else ""
        raise FormatError(first.message + also)
    return {**report.facts, "sample": report.sample}


def check_token_file(
    prefix: str | Path,
    tokenizer: TokenizerIdentity | None = None,
    *,
    language: str | None = None,
    progress: bool = True,
    samples: int = 3,
) -> TokenFileReport:
    """Read a whole token file and check everything that can be checked.

    Headers and sizes; checksums; lengths, pointers and document indices; that spans divide every document; token ids
    against the vocabulary; an end-of-document token of no language at the end of every document; and every count of
    the manifest. Of a file without companions: the index, and with a ``tokenizer`` ids and end-of-document tokens.
    Every file is gone through once, in pieces, whatever its size; the index and the spans twice.

    Args:
        prefix: path without extension.
        tokenizer: checked against the manifest; supplies vocabulary and end-of-document id where there is none.
        language: what to call the language of a file without companions (``und`` if left out).
        progress: whether to show a bar.
        samples: documents to show.

    Returns:
        What was found, with all problems; a damaged file is no exception here.
    """
    job = _Check(Path(prefix), tokenizer, language or "und")
    try:
        sizes = {kind: size_of(companion(prefix, kind)) for kind in job.present()}
    except FormatError as error:
        job.problem("files", str(error))
        return job.report
    with byte_bar(progress, sum(sizes.values()), f"verify {Path(prefix).name}") as bar:
        job.run(bar)
    if job.report.good:
        file = open_by_sizes(Path(prefix), job.language, job.eod, "sizes")
        job.report.sample = sample_documents(file, samples)
    return job.report


def sample_documents(file: TokenFile, count: int = 3, most_tokens: int = 64) -> list[dict[str, Any]]:
    """Some documents of a file, evenly spread over it, to be decoded and looked at.

    Args:
        file: an open token file.
        count: how many documents; fewer if there are not so many.
        most_tokens: of each document no more than its first so many.

    Returns:
        For each ``document`` (its number), ``tokens`` (its length), ``ids`` and ``languages`` (the code of each id's
        language, None for none); JSON-able.
    """
    shown = []
    for number in sorted(set(np.linspace(0, len(file) - 1, count).astype(np.int64).tolist())) if len(file) else []:
        start, stop = file.document_offsets(number, number + 1).tolist()
        until = min(stop, start + most_tokens)
        codes = [*file.languages, None]
        shown.append(
            {
                "document": number,
                "tokens": stop - start,
                "ids": file.tokens[start:until].tolist(),
                "languages": [codes[index] for index in file.language_ids_flat(start, until).tolist()],
            }
        )
    return shown


class _Check:
    """One check of one file; problems collect in ``report``."""

    def __init__(self, prefix: Path, tokenizer: TokenizerIdentity | None, language: str) -> None:
        self.prefix = prefix
        self.tokenizer = tokenizer
        self.report = TokenFileReport(str(prefix))
        self.ours = False
        self.manifest: dict[str, Any] = {}
        self.language: str | None = language
        self.vocab_size: int | None = None
        self.eod: int | None = None
        self._hashed: dict[str, str] = {}

    def problem(self, check: str, message: str, count: int = 1) -> None:
        self.report.problems.append(Problem(check, message, count))

    def present(self) -> tuple[str, ...]:
        """Which files there have to be."""
        self.ours = has_companions(self.prefix)
        return ("bin", "idx", "spans") if self.ours else ("bin", "idx")

    def run(self, bar: tqdm) -> None:
        index = spans = None
        if self.ours:
            self.language = None
            try:
                self.manifest = read_manifest(self.prefix)
            except FormatError as error:
                self.problem("manifest", str(error))
            try:
                spans = read_spans_layout(self.prefix)
            except FormatError as error:
                self.problem("spans", str(error))
        try:
            index = read_index_layout(self.prefix)
        except FormatError as error:
            self.problem("sizes", str(error))
        self._name_tokenizer()
        if self.manifest and index is not None:
            for problem in disagreements(self.prefix, self.manifest, index):
                self.problem("sizes", problem)
            if spans is not None:
                for problem in span_disagreements(self.manifest, index, spans):
                    self.problem("spans", problem)
        # What could not be told apart is only hashed, to say whether it changed since it was made.
        kinds = ["idx", *(["spans"] if self.ours else []), *(["bin"] if index is None else [])]
        try:
            for kind in kinds if self.manifest else ():
                self._hash(kind, bar)
            if index is not None:
                self._go_through(index, spans, bar)
        except FormatError as error:
            self.problem("reading", str(error))
        self._compare_hashes(index)

    def _name_tokenizer(self) -> None:
        known: Any = self.tokenizer
        if self.manifest:
            stated = self.manifest["tokenizer"]
            self.vocab_size = stated["vocab_size"]
            # Documents may have been written without an end, as Megatron-LM's tool does unless told otherwise.
            self.eod = None if self.manifest.get("append_eod") is False else stated["eod"]
            if known is not None:
                try:
                    check_same_tokenizer(self.manifest, known)
                except FormatError as error:
                    self.problem("tokenizer", str(error))
        elif known is not None:
            self.vocab_size, self.eod = known.vocab_size, known.eod

    def _hash(self, kind: str, bar: tqdm) -> None:
        path, digest = companion(self.prefix, kind), hashlib.sha256()
        try:
            with path.open("rb") as file:
                while piece := file.read(_HASHED_BYTES):
                    digest.update(piece)
                    bar.update(len(piece))
        except OSError as error:
            raise cannot_read(path, error) from None
        self._hashed[kind] = digest.hexdigest()

    def _compare_hashes(self, index: IndexLayout | None) -> None:
        for kind, found in self._hashed.items():
            if not self.manifest:
                return
            stated = self.manifest["files"][kind]["sha256"]
            if found != stated:
                where = _damaged_shards(self.manifest, index) if kind == "bin" and index is not None else ""
                # First of all: whatever else is wrong follows from it.
                self.report.problems.insert(
                    0,
                    Problem(
                        "checksums",
                        f"{companion(self.prefix, kind)} has SHA-256 {found}; its manifest says {stated}. It was "
                        f"changed or damaged after it was made.{where}",
                    ),
                )

    def _go_through(self, index: IndexLayout, spans: SpansLayout | None, bar: tqdm) -> None:
        """Index, spans and tokens side by side."""
        for message in index_problems(index):
            self.problem("index", message)
        languages = spans.languages if spans is not None else [self.language or "und"]
        tally = Tally(len(languages))
        tokens = _Tokens(index, self.vocab_size, self.eod)
        ends_with_language = 0
        with ColumnReader(index.path) as index_reader, ColumnReader(index.bin_path) as bin_reader:
            spans_reader = None if spans is None else ColumnReader(spans.path)
            try:
                walk = None if spans is None or spans_reader is None else SpanWalk(spans_reader, spans)
                for begin, end in chunks(index.num_documents):
                    try:
                        offsets = read_offsets(index_reader, index, begin, end)
                    except FormatError:
                        # Said above.
                        walk = None
                        break
                    tally.add_documents(np.diff(offsets))
                    if walk is not None:
                        try:
                            for piece in walk.of_documents(offsets):
                                tally.add_spans(piece.sizes, piece.languages, piece.is_last)
                                ends_with_language += int(np.count_nonzero(piece.languages[piece.is_last] >= 0))
                        except FormatError as error:
                            self.problem("spans", str(error))
                            walk = None
                    tokens.read(bin_reader, int(offsets[-1]), offsets, bar)
                if walk is not None:
                    try:
                        walk.finish()
                    except FormatError as error:
                        self.problem("spans", str(error))
                        walk = None
                tokens.read(bin_reader, index.num_tokens, None, bar)
            finally:
                if spans_reader is not None:
                    spans_reader.__exit__(None, None, None)
        self._hashed["bin"] = tokens.digest.hexdigest()
        for check, message, count in tokens.problems():
            self.problem(check, message, count)
        if ends_with_language and self.manifest and self.eod is not None:
            self.problem(
                "end of document",
                f"{companion(self.prefix, 'spans')} gives an end-of-document token a language "
                f"({ends_with_language:,} documents).",
                ends_with_language,
            )
        if spans is None and not self.ours:
            tally.tokens_by_language_K[0] = index.num_tokens - tokens.ends
            tally.documents_by_language_K[0] = tally.documents
        if not self.ours or walk is not None:
            self._compare_counts(tally, languages)
        self._state(index, tally, languages, tokens)

    def _compare_counts(self, tally: Tally, languages: list[str]) -> None:
        found = tally.facts(languages)
        for name, value in found.items():
            stated = self.manifest.get(name, value)
            if stated != value:
                self.problem("manifest", f"{self.prefix} has {name} {value}; its manifest says {stated}.")
        shards = self.manifest.get("shards")
        if shards:
            for name in ("documents", "tokens"):
                total = sum(shard[name] for shard in shards)
                if total != found[name]:
                    self.problem(
                        "manifest", f"{self.prefix} has {found[name]:,} {name}, the shards of its manifest {total:,}."
                    )

    def _state(self, index: IndexLayout, tally: Tally, languages: list[str], tokens: _Tokens) -> None:
        found: dict[str, Any] = tally.facts(languages)
        checked = ["sizes", "index"]
        checked += ["checksums", "manifest", "spans"] if self.ours else []
        checked += ["token ids"] if self.vocab_size is not None else []
        checked += ["end of document"] if self.eod is not None else []
        checked += ["tokenizer"] if self.tokenizer is not None and self.manifest else []
        self.report.facts = {
            "prefix": str(self.prefix),
            "companions": self.ours,
            "origin": self.manifest.get("origin", "monolingual"),
            "documents": index.num_documents,
            "sequences": index.num_sequences,
            "tokens": index.num_tokens,
            "content_tokens": found["content_tokens"],
            "tokens_by_language": found["tokens_by_language"],
            "documents_by_language": found["documents_by_language"],
            "dtype": index.dtype.name,
            "shortest": tally.shortest,
            "longest": tally.longest,
            "largest_id": tokens.largest,
            "checked": checked,
        }


class _Tokens:
    """Goes through a ``.bin`` once: its hash, its ids, the ends of its documents."""

    def __init__(self, index: IndexLayout, vocab_size: int | None, eod: int | None) -> None:
        self.digest = hashlib.sha256()
        self.largest = -1
        self.ends = 0
        """Tokens that are the end-of-document token."""
        self._index = index
        self._limit = vocab_size
        self._eod = eod
        self._at = 0
        self._documents = 0
        self._buffer = np.empty(CHUNK, dtype=index.dtype)
        self._bad_ids = 0
        self._first_bad_id: tuple[int, int, int] | None = None
        self._bad_ends = 0
        self._first_bad_end = 0

    def read(self, reader: ColumnReader, until: int, offsets: np.ndarray | None, bar: tqdm) -> None:
        """Read on to a token; ``offsets`` [n + 1] of the documents up to there, if it is known where they lie."""
        if offsets is not None and self._eod is not None:
            empty = offsets[1:] == offsets[:-1]
            if empty.any():
                self._add_bad_ends(np.flatnonzero(empty))
        for begin, end in chunks(until, begin=self._at):
            piece = reader.read(self._index.tokens, begin, end, self._buffer)
            self.digest.update(piece.data)
            self._check_ids(piece, begin, offsets)
            if self._eod is not None:
                is_end = piece == self._eod
                self.ends += int(np.count_nonzero(is_end))
                if offsets is not None:
                    first, last = np.searchsorted(offsets[1:], (begin, end), side="right")
                    last_tokens = offsets[1:][first:last] - 1 - begin
                    # Ends of documents before this piece's first token are of documents without tokens.
                    good = is_end[last_tokens] | (offsets[1:][first:last] == offsets[:-1][first:last])
                    self._add_bad_ends(first + np.flatnonzero(~good))
            bar.update(piece.nbytes)
        self._at = until
        self._documents += 0 if offsets is None else len(offsets) - 1

    def problems(self) -> Iterable[tuple[str, str, int]]:
        if self._first_bad_id is not None:
            token, document, value = self._first_bad_id
            where = f" (document {document})" if document >= 0 else ""
            limit = "of no tokenizer" if self._limit is None else f"outside the vocabulary of {self._limit}"
            more = f"; {self._bad_ids:,} ids are" if self._bad_ids > 1 else ""
            yield (
                "token ids", f"{self._index.bin_path}: token {token}{where} is {value}, {limit}{more}.", self._bad_ids
            )
        if self._bad_ends:
            more = f"; {self._bad_ends:,} documents do not" if self._bad_ends > 1 else ""
            yield (
                "end of document",
                f"{self._index.path.with_suffix('')}: document {self._first_bad_end} does not end in the "
                f"end-of-document token ({self._eod}){more}.",
                self._bad_ends,
            )

    def _check_ids(self, piece: np.ndarray, begin: int, offsets: np.ndarray | None) -> None:
        largest, smallest = int(piece.max()), int(piece.min())
        self.largest = max(self.largest, largest)
        if smallest >= 0 and (self._limit is None or largest < self._limit):
            return
        wrong = piece < 0
        if self._limit is not None and largest >= self._limit:
            wrong |= piece >= self._limit
        first = int(np.argmax(wrong))
        if self._first_bad_id is None:
            document = -1
            if offsets is not None:
                document = self._documents + int(np.searchsorted(offsets, begin + first, side="right")) - 1
            self._first_bad_id = (begin + first, document, int(piece[first]))
        self._bad_ids += int(np.count_nonzero(wrong))

    def _add_bad_ends(self, documents: np.ndarray) -> None:
        if documents.size and not self._bad_ends:
            self._first_bad_end = self._documents + int(documents[0])
        self._bad_ends += int(documents.size)


def _damaged_shards(manifest: dict[str, Any], index: IndexLayout) -> str:
    """Which of the shards a merged file was made of are not what they were."""
    shards = manifest.get("shards", [])
    if not shards or sum(shard["tokens"] for shard in shards) != index.num_tokens:
        return ""
    at, damaged = 0, []
    try:
        with ColumnReader(index.bin_path) as reader:
            for shard in shards:
                digest = hashlib.sha256()
                for begin, end in chunks(at + shard["tokens"], begin=at):
                    digest.update(reader.read(index.tokens, begin, end).data)
                at += shard["tokens"]
                if digest.hexdigest() != shard["sha256"]:
                    damaged.append(ascii(shard["name"]))
    except FormatError:
        return ""
    return f" The damage is in what came from {', '.join(damaged[:5])}{' and others' * (len(damaged) > 5)}."
