"""Joining token files in order, in memory that does not grow with them, into what one writer would have made."""

# T tokens, D documents, Q sequences, S spans

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from megatron_xalign.errors import ConfigError, FormatError
from megatron_xalign.formats.atomic import sha256_of
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
    MANIFEST_FIELDS,
    MOST_LANGUAGES,
    NO_LANGUAGE,
    Origin,
    TokenizerIdentity,
    companion,
    token_dtype,
)
from megatron_xalign.formats.token_file_reader import files_present, open_by_sizes
from megatron_xalign.formats.token_file_structure import (
    SpanWalk,
    byte_bar,
    index_problems,
    read_first_sequences,
    read_offsets,
)
from megatron_xalign.formats.token_file_writer import TokenFileWriter

if TYPE_CHECKING:
    from hashlib import _Hash

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Identity:
    """A tokenizer as manifests know it."""

    sha256: str
    vocab_size: int
    eod: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> _Identity:
        stated = manifest["tokenizer"]
        return cls(stated["sha256"], stated["vocab_size"], stated["eod"])


@dataclass(frozen=True)
class _Input:
    prefix: Path
    index: IndexLayout
    spans: SpansLayout | None
    manifest: dict[str, Any]
    languages: list[str]


def merge_token_files(
    prefixes: Sequence[str | Path],
    out: str | Path,
    *,
    drop: Sequence[np.ndarray | None] | None = None,
    details: Mapping[str, Any] | None = None,
    replace: bool = False,
    language: str | None = None,
    origin: Origin = "monolingual",
    tokenizer: TokenizerIdentity | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Join token files, documents in the order given.

    ``.bin``, ``.idx`` and ``.spans`` are byte for byte what one writer given all documents would have made, and
    ``.bin`` and ``.idx`` what Megatron's ``IndexedDatasetBuilder.add_index`` makes. Checksums of the inputs are checked
    on the way. The result appears whole or not at all.

    Args:
        prefixes: token files of one tokenizer and one origin, ours or Megatron's own. Their languages are united in
            order of appearance.
        out: prefix of the result; refused if there is a token file, unless it is an unfinished one of ours.
        drop: for each prefix bool [D], true for documents to leave out, or None to keep all. Asked for one by one, so
            that a sequence that reads them from a disk keeps memory small.
        details: further fields of the manifest. Left out, those of the inputs are joined: fields equal in all stay,
            ``inputs`` are put in one list, numbers in ``counts`` added up, and the rest is left out, ``recipe`` too.
        replace: overwrite a token file that is there.
        language: code of the files without companions.
        origin: of the result, if no input has companions.
        tokenizer: must be the inputs' own; needed if no input has companions.
        progress: whether to show a bar.

    Returns:
        The manifest. Its ``shards`` name for each input what it gave: ``name, documents, tokens, sha256`` (of its
        stretch of the ``.bin``; the input's own where nothing was dropped). Documents and sequences without tokens,
        which only Megatron's own files have, are left out and counted as ``left_out_empty_documents``.

    Raises:
        ConfigError: the same input twice, ``out`` is there or is an input, or a language or tokenizer is missing.
        FormatError: an input is damaged, or they do not belong together; or ``out`` cannot be written.
        CorpusError: nothing is left to write.
    """
    paths, out = [Path(prefix) for prefix in prefixes], Path(out)
    if not paths:
        raise ValueError("prefixes is empty.")
    if drop is not None and len(drop) != len(paths):
        raise ValueError(f"{len(drop)} drop lists for {len(paths)} prefixes.")
    _check_names(paths, out, replace)
    inputs = [_open(path, language) for path in paths]
    identity, origin = _check_same(inputs, origin, tokenizer)
    languages = list(dict.fromkeys(code for item in inputs for code in item.languages))
    if len(languages) > MOST_LANGUAGES:
        raise FormatError(f"the inputs have {len(languages)} languages; a token file holds up to {MOST_LANGUAGES}.")
    writer = TokenFileWriter(out, tokenizer=identity, origin=origin, languages=languages)
    total = sum(item.index.num_tokens * item.index.dtype.itemsize for item in inputs)
    with (
        byte_bar(progress, total, f"merge into {out.name}") as bar,
        ThreadPoolExecutor(3) as threads,
        writer,
    ):
        shards, empty = [], 0
        for number, item in enumerate(inputs):
            _LOG.debug("merging %s: %d documents", item.prefix, item.index.num_documents)
            copy = _Copy(item, None if drop is None else drop[number], writer, threads, bar)
            shards.append(copy.run())
            empty += copy.empty
        further = dict(details) if details is not None else _joined([item.manifest for item in inputs])
        if empty:
            further["left_out_empty_documents"] = empty
        return writer.finish(
            allow_empty=all(not item.index.num_documents for item in inputs), shards=shards, **further
        )


def _check_names(paths: Sequence[Path], out: Path, replace: bool) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        real = companion(path, "bin").resolve()
        if real in seen:
            raise ConfigError(f"{path} is named twice (also as {seen[real]}); its documents would be doubled.")
        seen[real] = path
    if companion(out, "bin").resolve() in seen:
        raise ConfigError(f"{out} is the result and an input; give the result another name.")
    there = files_present(out)
    # .spans without a manifest is what a killed job left; no reader takes it for a token file.
    if there and not replace and not ("spans" in there and "manifest.json" not in there):
        raise ConfigError(f"{out} is there already ({', '.join(sorted(there))}); remove it or name another result.")


def _open(path: Path, language: str | None) -> _Input:
    ours = "manifest.json" in files_present(path)
    file = open_by_sizes(path, None if ours else language, None, "sizes")
    spans = read_spans_layout(path) if ours else None
    return _Input(path, read_index_layout(path), spans, file.manifest, file.languages)


def _check_same(
    inputs: Sequence[_Input], origin: Origin, tokenizer: TokenizerIdentity | None
) -> tuple[_Identity, Origin]:
    """The tokenizer and origin all inputs share."""
    ours = [item for item in inputs if item.manifest]
    if tokenizer is not None:
        identity, named = _Identity(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod), "the one named"
    elif ours:
        identity, named = _Identity.of(ours[0].manifest), f"that of {ours[0].prefix}"
    else:
        raise ConfigError(
            "none of the inputs has a manifest, so nothing says which tokenizer made them; name it, as the result has "
            "one that does."
        )
    for item in ours:
        stated = _Identity.of(item.manifest)
        if stated != identity:
            raise FormatError(
                f"{item.prefix} was made with tokenizer {ascii(stated.sha256)[1:13]} ({stated.vocab_size:,} ids, end "
                f"{stated.eod}), not with {named}, {identity.sha256[:12]} ({identity.vocab_size:,} ids, end "
                f"{identity.eod}); preprocess its text again."
            )
        if item.manifest["origin"] != ours[0].manifest["origin"]:
            raise FormatError(
                f"{item.prefix} is {item.manifest['origin']}, {ours[0].prefix} {ours[0].manifest['origin']}; a token "
                "file is one or the other. Merge them apart."
            )
    wanted = token_dtype(identity.vocab_size)
    for item in inputs:
        if item.index.dtype != wanted:
            raise FormatError(
                f"{item.prefix} has {item.index.dtype.name} tokens; with {identity.vocab_size:,} ids they are "
                f"{wanted.name}. Preprocess its text again."
            )
    return identity, ours[0].manifest["origin"] if ours else origin


def _joined(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The further fields of several manifests as those of one."""
    of_one_file = MANIFEST_FIELDS | {"shards"}
    names = dict.fromkeys(name for manifest in manifests for name in manifest if name not in of_one_file)
    joined: dict[str, Any] = {}
    for name in names:
        values = [manifest.get(name) for manifest in manifests]
        if name == "inputs" and all(isinstance(value, list) for value in values):
            joined[name] = [item for value in values for item in value or ()]
        elif name == "counts" and all(isinstance(value, dict) for value in values):
            joined[name] = _added([value for value in values if value is not None])
        elif name != "recipe" and all(value == values[0] for value in values):
            joined[name] = values[0]
    return joined


def _added(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the same name added up, at any depth; what is no number stays if it is the same in all."""
    total: dict[str, Any] = {}
    for name in dict.fromkeys(name for count in counts for name in count):
        values = [count[name] for count in counts if name in count]
        if all(isinstance(value, dict) for value in values):
            total[name] = _added(values)
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            total[name] = sum(values)
        elif all(value == values[0] for value in values):
            total[name] = values[0]
    return total


class _Copy:
    """Copies one input into the writer: all of it, or the documents that are kept."""

    def __init__(
        self, item: _Input, drop: np.ndarray | None, writer: TokenFileWriter, threads: Executor, bar: tqdm
    ) -> None:
        num_documents = item.index.num_documents
        if drop is not None and (drop.dtype != np.bool_ or drop.shape != (num_documents,)):
            raise ValueError(
                f"the drop list of {item.prefix} is {drop.dtype} {list(drop.shape)}, not bool [{num_documents}]."
            )
        self.empty = 0
        """Documents left out because they have no tokens."""
        self._item = item
        self._drop = drop
        self._writer = writer
        self._threads = threads
        self._bar = bar
        self._language_of = np.array(
            [*(writer.languages.index(code) for code in item.languages), NO_LANGUAGE], dtype=np.int8
        )
        self._buffer = np.empty(CHUNK, dtype=item.index.dtype)
        self._given: _Hash = hashlib.sha256()
        # Without a drop list, what is given is the whole.
        self._checks_whole = bool(item.manifest) and drop is not None
        self._whole: _Hash = hashlib.sha256() if self._checks_whole else self._given
        self._plain_spans = _SpansOfTokens(writer)

    def run(self) -> dict[str, Any]:
        """Copy; return the input's entry in ``shards``."""
        item, index, writer = self._item, self._item.index, self._writer
        for problem in index_problems(index):
            raise FormatError(problem)
        self._check_hash("idx", None)
        self._check_hash("spans", None)
        documents, tokens = writer.documents, writer.tokens
        with ExitStack() as stack:
            reader = stack.enter_context(ColumnReader(index.path))
            bin_reader = stack.enter_context(ColumnReader(index.bin_path))
            walk = None
            if item.spans is not None:
                walk = SpanWalk(stack.enter_context(ColumnReader(item.spans.path)), item.spans)
            for begin, end in chunks(index.num_documents):
                offsets = read_offsets(reader, index, begin, end)
                lengths = np.diff(offsets)
                kept = lengths > 0
                self.empty += int(np.count_nonzero(~kept))
                if self._drop is not None:
                    kept &= ~self._drop[begin:end]
                self._copy_index(reader, begin, end, kept)
                # How far the documents of this piece move towards the beginning of the file.
                dropped_before = np.cumsum(np.where(kept, 0, lengths)) - np.where(kept, 0, lengths)
                shift = writer.columns.num_tokens - int(offsets[0]) - dropped_before
                if walk is not None:
                    self._copy_spans(walk, offsets, kept, shift)
                self._copy_tokens(bin_reader, offsets, kept)
                writer.tally.add_documents(lengths[kept])
            if walk is not None:
                walk.finish()
            self._plain_spans.finish()
        self._check_hash("bin", self._whole)
        return {
            "name": item.prefix.name,
            "documents": writer.documents - documents,
            "tokens": writer.tokens - tokens,
            "sha256": self._given.hexdigest(),
        }

    def _check_hash(self, kind: str, found: _Hash | None) -> None:
        if not self._item.manifest:
            return
        path, stated = companion(self._item.prefix, kind), self._item.manifest["files"][kind]["sha256"]
        digest = sha256_of(path) if found is None else found.hexdigest()
        if digest != stated:
            raise FormatError(
                f"{path} has SHA-256 {digest}; its manifest says {stated}. It was changed or damaged after it was "
                "made: make it again."
            )

    def _copy_index(self, reader: ColumnReader, begin: int, end: int, kept: np.ndarray) -> None:
        index, columns = self._item.index, self._writer.columns
        firsts = read_first_sequences(reader, index, begin, end)
        counts = np.zeros(end - begin, dtype=np.int64)
        for low, high in chunks(int(firsts[-1]), begin=int(firsts[0])):
            lengths = reader.read(index.lengths, low, high)
            document = np.searchsorted(firsts, np.arange(low, high), side="right") - 1
            wanted = kept[document] & (lengths > 0)
            columns.put_sequences(lengths[wanted])
            counts += np.bincount(document[wanted], minlength=end - begin)
        columns.put_documents(int(np.count_nonzero(kept)), counts[kept])

    def _copy_spans(self, walk: SpanWalk, offsets: np.ndarray, kept: np.ndarray, shift: np.ndarray) -> None:
        for piece in walk.of_documents(offsets):
            wanted = kept[piece.documents]
            languages = self._language_of[piece.languages[wanted]]
            self._writer.columns.put_spans((piece.ends + shift[piece.documents])[wanted], languages)
            self._writer.tally.add_spans(piece.sizes[wanted], languages, piece.is_last[wanted])

    def _copy_tokens(self, reader: ColumnReader, offsets: np.ndarray, kept: np.ndarray) -> None:
        for low, high in chunks(int(offsets[-1]), begin=int(offsets[0])):
            piece = reader.read(self._item.index.tokens, low, high, self._buffer)
            first, last = np.searchsorted(offsets, low, side="right") - 1, np.searchsorted(offsets, high)
            sizes = np.diff(np.clip(offsets[first : last + 1], low, high))
            wanted = kept[first:last]
            # Documents without tokens are never kept, and nothing of them has to be cut out.
            given = piece if wanted[sizes > 0].all() else piece[np.repeat(wanted, sizes)]
            if self._item.spans is None:
                self._check_ids(piece, low)
            if self._item.spans is None and given.size:
                ends = np.cumsum(sizes * wanted)[wanted & (offsets[first + 1 : last + 1] <= high)]
                self._plain_spans.add(given, ends, int(self._language_of[0]))
            hashing = [self._threads.submit(self._whole.update, piece.data)] if self._checks_whole else []
            if given.size:
                self._writer.columns.put_token_bytes(given.data.cast("B"), [self._given], self._threads)
            for future in hashing:
                future.result()
            self._bar.update(piece.nbytes)

    def _check_ids(self, piece: np.ndarray, begin: int) -> None:
        vocab_size = self._writer.tokenizer["vocab_size"]
        if piece.min() < 0 or piece.max() >= vocab_size:
            wrong = int(np.argmax((piece < 0) | (piece >= vocab_size)))
            raise FormatError(
                f"{self._item.index.bin_path}: token {begin + wrong} is {piece[wrong]}, outside the vocabulary of "
                f"{vocab_size}; it was made with another tokenizer."
            )


class _SpansOfTokens:
    """Makes the spans of files that have none: end-of-document tokens have no language, all others have one."""

    def __init__(self, writer: TokenFileWriter) -> None:
        self._writer = writer
        self._open = 0
        """Tokens of the span that has not ended yet."""
        self._open_language = NO_LANGUAGE

    def add(self, piece: np.ndarray, document_ends: np.ndarray, language: int) -> None:
        """The next tokens, and which documents end among them (1 .. len(piece))."""
        languages = np.where(piece == self._writer.tokenizer["eod"], NO_LANGUAGE, language).astype(np.int8)
        if self._open and languages[0] != self._open_language:
            self.finish()
        is_last = np.zeros(len(piece) + 1, dtype=bool)
        is_last[document_ends] = True
        is_end = is_last.copy()
        is_end[1:-1] |= languages[1:] != languages[:-1]
        ends = np.flatnonzero(is_end[1:]) + 1
        before = self._writer.columns.num_tokens
        self._put(ends + before, np.diff(ends, prepend=-self._open), languages[ends - 1], is_last[ends])
        done = int(ends[-1]) if ends.size else -self._open
        self._open, self._open_language = len(piece) - done, int(languages[-1])

    def finish(self) -> None:
        """End the open span, inside a document."""
        if self._open:
            self._put(
                np.array([self._writer.columns.num_tokens]), np.array([self._open]),
                np.array([self._open_language]), np.array([False]),
            )
            self._open = 0

    def _put(self, ends: np.ndarray, sizes: np.ndarray, languages: np.ndarray, is_last: np.ndarray) -> None:
        if ends.size:
            self._writer.columns.put_spans(ends, languages)
            self._writer.tally.add_spans(sizes, languages, is_last)
