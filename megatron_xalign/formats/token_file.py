"""Token files: Megatron's ``PREFIX.bin``/``PREFIX.idx`` with two companions that say which language a token is.

``PREFIX.bin``
    The tokens of all documents, one after the other, little-endian ``uint16`` or ``int32``.
``PREFIX.idx``
    Megatron's index, byte for byte: ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code, uint64 sequences N, uint64
    document indices M, int32 [N] lengths in tokens, int64 [N] byte pointers, int64 [M] first sequence of each document
    and, last, N. We write one sequence per document; several are read.
``PREFIX.spans``
    The language of every token, as a partition of the tokens into spans. ``XASPANS\\0``, uint32 version 1, uint32
    header bytes H, uint64 documents, uint64 tokens, uint64 spans S, a JSON list of language codes padded with spaces to
    H (a multiple of 8), int64 [S] end of each span (exclusive, counted in tokens from the start of the file, strictly
    increasing, one at the end of every document), int8 [S] language (an index into the list; -1 for tokens of no
    language: end of document, template).
``PREFIX.manifest.json``
    What the file is and was made from, and the SHA-256 of the other three. Written last: a prefix that has ``.spans``
    but no manifest is an unfinished file and is not read.

Everything is little-endian. Megatron's ``IndexedDataset`` opens our files, and we open Megatron's (without companions:
one language per file).
"""

# T tokens, D documents, S spans, K languages

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

import numpy as np

from megatron_xalign import __version__
from megatron_xalign.errors import CorpusError, FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, whole_file, write_json

Origin = Literal["monolingual", "parallel"]

NO_LANGUAGE = -1
"""Language index of end-of-document and template tokens."""
MANIFEST_FORMAT = "megatron-xalign token file"
MANIFEST_VERSION = 1

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_HEADER = struct.Struct("<9sQBQQ")
_SPANS_MAGIC = b"XASPANS\x00"
_SPANS_HEADER = struct.Struct("<8sIIQQQ")
_SPANS_VERSION = 1
# Megatron's codes; 6 and 7 are floating point and hold no tokens.
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODE_OF = {"uint16": 8, "int32": 4}
_COMPANIONS = ("bin", "idx", "spans")
# Whole-array checks go through the file in pieces of this many items, so that memory stays small.
_CHUNK = 1 << 20


class TokenizerIdentity(Protocol):
    """What of a tokenizer a token file depends on."""

    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The width tokens are stored in: uint16 up to 65,536 ids, int32 above.

    Args:
        vocab_size: number of token ids.

    Returns:
        ``uint16`` or ``int32``.
    """
    # Megatron's writer turns to int32 at 65,500 ids; but its fast index path and datatrove never look at the header and
    # take uint16 up to 65,536. Between the two limits uint16 is the one width that all of them read right: those
    # that read the header find it there, the others assume it.
    if vocab_size <= 0:
        raise ValueError(f"vocab_size={vocab_size} must be positive.")
    return np.dtype("uint16") if vocab_size <= 1 << 16 else np.dtype("int32")


def companion(prefix: str | Path, kind: str) -> Path:
    """Path of one file of a prefix; ``kind`` is ``bin``, ``idx``, ``spans`` or ``manifest.json``."""
    return Path(f"{prefix}.{kind}")


class TokenFileWriter:
    """Writes one token file as a stream; memory does not grow with the corpus.

    The four files appear together in :meth:`finish`, the manifest last; a block left without it leaves nothing::

        with TokenFileWriter(prefix, tokenizer=tokenizer, origin="monolingual", languages=["fin_Latn"]) as writer:
            writer.add_document([(ids, 0), ([tokenizer.eod], NO_LANGUAGE)])
            manifest = writer.finish()
    """

    def __init__(
        self, prefix: str | Path, *, tokenizer: TokenizerIdentity, origin: Origin, languages: Sequence[str]
    ) -> None:
        """Nothing is opened before the ``with`` block.

        Args:
            prefix: path without extension; its folder is made if missing.
            tokenizer: decides the token width; its hash goes into the manifest.
            origin: ``monolingual`` or ``parallel``.
            languages: codes that language indices point into, at most 127.
        """
        if origin not in ("monolingual", "parallel"):
            raise ValueError(f"origin={origin!r} is neither 'monolingual' nor 'parallel'.")
        if not languages or len(set(languages)) != len(languages) or len(languages) > 127:
            raise ValueError(f"languages={list(languages)} must be 1 to 127 different codes.")
        self.prefix = Path(prefix)
        self.origin = origin
        self.languages = list(languages)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.tokenizer = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}
        self.documents = 0
        self.tokens = 0
        self.spans = 0
        self._tokens_by_language_K = np.zeros(len(languages), dtype=np.int64)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            # Renamed in the opposite order: spans, bin, idx. So at no moment is there a new .bin with an .idx but
            # without the .spans that tells a reader to insist on a manifest.
            self._idx = _HashedFile(stack.enter_context(whole_file(companion(self.prefix, "idx"))))
            self._bin = _HashedFile(stack.enter_context(whole_file(companion(self.prefix, "bin"))))
            self._spans = _HashedFile(stack.enter_context(whole_file(companion(self.prefix, "spans"))))
            self._lengths, self._ends, self._span_languages = (
                stack.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent)) for _ in range(3)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            kind, error = _UnfinishedError, _UnfinishedError()
        # After finish() the stack is empty and this does nothing.
        with suppress(_UnfinishedError):
            self._stack.__exit__(kind, error, trace)

    def add_document(self, parts: Sequence[tuple[Sequence[int] | np.ndarray, int]]) -> None:
        """Append one document given as its pieces in order.

        Args:
            parts: (token ids, language index or ``NO_LANGUAGE``); empty pieces are allowed, an empty document is not.
        """
        pieces = [(np.asarray(ids, dtype=np.int64), language) for ids, language in parts]
        pieces = [(ids, language) for ids, language in pieces if ids.size]
        if not pieces:
            raise ValueError("a document without tokens; it would have no place in a sample.")
        sizes = [ids.size for ids, _ in pieces]
        self.add_documents(
            np.concatenate([ids for ids, _ in pieces]),
            np.array([sum(sizes)]),
            np.cumsum(sizes),
            np.array([language for _, language in pieces]),
        )

    def add_documents(
        self, tokens_T: np.ndarray, lengths_D: np.ndarray, span_ends_S: np.ndarray, span_languages_S: np.ndarray
    ) -> None:
        """Append many documents at once.

        Args:
            tokens_T: integers [T], the documents' tokens one after the other.
            lengths_D: integers [D], tokens of each document, all positive, adding up to T.
            span_ends_S: integers [S], end of each span in this batch, strictly increasing, one at each document's end.
            span_languages_S: integers [S], language index of each span or ``NO_LANGUAGE``.

        Raises:
            ValueError: the arrays contradict one another or an id is outside the vocabulary.
        """
        ends = np.asarray(span_ends_S, dtype=np.int64)
        languages = np.asarray(span_languages_S, dtype=np.int64)
        lengths = np.asarray(lengths_D, dtype=np.int64)
        document_ends = np.cumsum(lengths)
        vocab_size = self.tokenizer["vocab_size"]
        if lengths.size == 0:
            return
        if lengths.min() <= 0 or lengths.max() > np.iinfo(np.int32).max or document_ends[-1] != tokens_T.size:
            raise ValueError(f"document lengths must be positive int32 and add up to {tokens_T.size} tokens.")
        if tokens_T.min() < 0 or tokens_T.max() >= vocab_size:
            raise ValueError(f"token ids {tokens_T.min()}..{tokens_T.max()} leave the vocabulary of {vocab_size}.")
        if ends.size != languages.size or not _partitions(ends, document_ends):
            raise ValueError("spans do not divide each document into pieces.")
        if languages.min() < NO_LANGUAGE or languages.max() >= len(self.languages):
            raise ValueError(f"language indices {languages.min()}..{languages.max()} leave {self.languages}.")
        sizes = np.diff(ends, prepend=0)
        for index in range(len(self.languages)):
            self._tokens_by_language_K[index] += sizes[languages == index].sum()
        self._bin.write(tokens_T.astype(self.dtype.newbyteorder("<")).tobytes())
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._ends.write((ends + self.tokens).astype("<i8").tobytes())
        self._span_languages.write(languages.astype("i1").tobytes())
        self.documents += int(lengths.size)
        self.tokens += int(tokens_T.size)
        self.spans += int(ends.size)

    def finish(self, **details: Any) -> dict[str, Any]:
        """Write index, spans and manifest, and let all four files appear.

        Args:
            details: further fields of the manifest: ``inputs``, ``counts``, ``recipe``, ``template``, ...

        Returns:
            The manifest.

        Raises:
            CorpusError: no document was added.
        """
        if not self.documents:
            raise CorpusError(f"{self.prefix}: there is no document to write; every input text was empty or left out.")
        self._write_idx()
        self._write_spans()
        manifest = self._manifest(details)
        # From here to the last rename the prefix is unfinished for every reader: without .idx for Megatron's, without
        # a manifest for ours.
        companion(self.prefix, "manifest.json").unlink(missing_ok=True)
        companion(self.prefix, "idx").unlink(missing_ok=True)
        self._stack.close()
        write_json(companion(self.prefix, "manifest.json"), manifest)
        return manifest

    def _write_idx(self) -> None:
        code = _CODE_OF[self.dtype.name]
        self._idx.write(_IDX_HEADER.pack(_IDX_MAGIC, 1, code, self.documents, self.documents + 1))
        self._idx.copy(self._lengths)
        self._lengths.seek(0)
        first = 0
        while piece := self._lengths.read(4 * _CHUNK):
            lengths = np.frombuffer(piece, dtype="<i4").astype(np.int64)
            starts = first + np.cumsum(lengths) - lengths
            self._idx.write((starts * self.dtype.itemsize).astype("<i8").tobytes())
            first += int(lengths.sum())
        for begin, end in _chunks(self.documents + 1):
            self._idx.write(np.arange(begin, end, dtype="<i8").tobytes())

    def _write_spans(self) -> None:
        codes = json.dumps(self.languages, ensure_ascii=False).encode("utf-8")
        codes += b" " * (-len(codes) % 8)
        self._spans.write(
            _SPANS_HEADER.pack(
                _SPANS_MAGIC, _SPANS_VERSION, _SPANS_HEADER.size + len(codes), self.documents, self.tokens, self.spans
            )
        )
        self._spans.write(codes)
        self._spans.copy(self._ends)
        self._spans.copy(self._span_languages)

    def _manifest(self, details: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "name": self.prefix.name,
            "origin": self.origin,
            "languages": self.languages,
            "documents": self.documents,
            "tokens": self.tokens,
            "content_tokens": int(self._tokens_by_language_K.sum()),
            "tokens_by_language": dict(zip(self.languages, self._tokens_by_language_K.tolist(), strict=True)),
            "dtype": self.dtype.name,
            "tokenizer": self.tokenizer,
            "files": {
                kind: {"bytes": file.num_bytes, "sha256": file.sha256.hexdigest()}
                for kind, file in zip(_COMPANIONS, (self._bin, self._idx, self._spans), strict=True)
            },
            "package_version": __version__,
            **details,
        }


class TokenFile:
    """A token file opened for reading; made by :func:`read_token_file`. Nothing large is held in memory but offsets."""

    def __init__(
        self,
        prefix: Path,
        tokens: np.ndarray,
        offsets: np.ndarray,
        languages: list[str],
        manifest: dict[str, Any],
        spans: tuple[np.ndarray, np.ndarray] | None,
        eod: int | None,
    ) -> None:
        self.prefix = prefix
        self.tokens = tokens
        """[T], memory-mapped: all tokens, in the width of the file."""
        self.offsets = offsets
        """int64 [D+1]: first token of each document and, last, the number of tokens."""
        self.languages = languages
        """Codes that language ids point into."""
        self.manifest = manifest
        """The manifest; ``{}`` for Megatron's own files."""
        self._spans = spans
        self._eod = eod

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        start, stop = self._range(index)
        return self.tokens[start:stop]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"TokenFile({str(self.prefix)!r}, {len(self):,} documents, {len(self.tokens):,} tokens)"

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the whole corpus to the other process; it opens the file itself.
        language = None if self._spans is not None else self.languages[0]
        return read_token_file, (str(self.prefix), language, self._eod)

    @property
    def origin(self) -> Origin:
        """``monolingual`` or ``parallel``."""
        return self.manifest.get("origin", "monolingual")

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [D]: tokens of each document."""
        return np.diff(self.offsets).astype(np.int32)

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
        """
        if not 0 <= start <= stop <= len(self.tokens):
            raise ValueError(f"tokens {start}..{stop} are outside 0..{len(self.tokens)}.")
        if self._spans is None:
            ids = np.zeros(stop - start, dtype=np.int8)
            if self._eod is not None:
                ids[self.tokens[start:stop] == self._eod] = NO_LANGUAGE
            return ids
        if start == stop:
            return np.zeros(0, dtype=np.int8)
        ends, languages = self._spans
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        inside = np.minimum(ends[first : last + 1], stop)
        return np.repeat(languages[first : last + 1], np.diff(inside, prepend=start))

    def _range(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return int(self.offsets[index]), int(self.offsets[index + 1])


def read_token_file(prefix: str | Path, language: str | None = None, eod: int | None = None) -> TokenFile:
    """Open a token file of ours, or one that Megatron wrote.

    Counts are checked against file sizes before anything is read, and index and spans against each other, so that a
    truncated or corrupted file is an error here and not a crash later. Token ids and checksums are left to
    :func:`verify_token_file`, which reads everything.

    Args:
        prefix: path without ``.bin``/``.idx``.
        language: code of a file without companions; for one of ours it may be left out and must agree if given.
        eod: end-of-document id of a file without companions; its tokens then have no language.

    Returns:
        The open file; tokens are memory-mapped.

    Raises:
        FormatError: a file is missing, unfinished, truncated, corrupted or of another version.
    """
    prefix = Path(prefix)
    present = {kind for kind in (*_COMPANIONS, "manifest.json") if companion(prefix, kind).exists()}
    if "spans" in present and "manifest.json" not in present:
        raise FormatError(
            f"{prefix} is unfinished: it has .spans but no .manifest.json, which is written last; make it again."
        )
    for kind in ("bin", "idx", *(("spans",) if "manifest.json" in present else ())):
        if kind not in present:
            raise FormatError(f"{companion(prefix, kind)} does not exist; a token file needs it.")
    tokens, offsets = _read_megatron(prefix)
    if "manifest.json" not in present:
        if not language:
            raise FormatError(
                f"{prefix} has no .manifest.json that names its language; pass it, such as language='fin_Latn', or "
                "'und' if it does not matter."
            )
        return TokenFile(prefix, tokens, offsets, [language], {}, None, eod)
    manifest = read_manifest(prefix)
    for kind, stated in manifest["files"].items():
        size = companion(prefix, kind).stat().st_size
        if size != stated["bytes"]:
            raise FormatError(f"{companion(prefix, kind)} has {size:,} bytes; its manifest says {stated['bytes']:,}.")
    languages = list(manifest["languages"])
    if language is not None and languages != [language]:
        raise FormatError(f"{prefix} holds {', '.join(languages)} by its manifest, not {language}.")
    spans = _read_spans(prefix, offsets, languages)
    for name, found in (("documents", len(offsets) - 1), ("tokens", len(tokens)), ("dtype", tokens.dtype.name)):
        if manifest[name] != found:
            raise FormatError(f"{prefix} has {name} {found}; its manifest says {manifest[name]}.")
    return TokenFile(prefix, tokens, offsets, languages, manifest, spans, manifest["tokenizer"]["eod"])


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """Read ``PREFIX.manifest.json`` and check that every field readers rely on is there and of its type.

    Raises:
        FormatError: it is missing, not ours, of another version, or a field is missing or malformed.
    """
    path = companion(prefix, "manifest.json")
    manifest: Any = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise FormatError(f"{path} is not the manifest of a token file.")
    if manifest.get("version") != MANIFEST_VERSION:
        raise FormatError(
            f"{path} is of version {manifest.get('version')}; this package reads version {MANIFEST_VERSION}."
        )

    def check(good: bool, field: str) -> None:
        if not good:
            raise FormatError(f"{path}: {field} is missing or malformed.")

    check(manifest.get("origin") in ("monolingual", "parallel"), "origin")
    languages, shares = manifest.get("languages"), manifest.get("tokens_by_language")
    good = isinstance(languages, list) and bool(languages) and all(isinstance(code, str) for code in languages)
    check(good, "languages")
    for name in ("documents", "tokens", "content_tokens"):
        check(_is_count(manifest.get(name)), name)
    good = isinstance(shares, dict) and list(shares) == languages and all(map(_is_count, shares.values()))
    check(good, "tokens_by_language")
    check(manifest.get("dtype") in _CODE_OF, "dtype")
    tokenizer: Any = manifest.get("tokenizer")
    check(isinstance(tokenizer, dict), "tokenizer")
    good = all(_is_count(tokenizer.get(name)) for name in ("vocab_size", "eod"))
    check(good and isinstance(tokenizer.get("sha256"), str), "tokenizer")
    files: Any = manifest.get("files")
    check(isinstance(files, dict) and sorted(files) == sorted(_COMPANIONS), "files")
    for stated in files.values():
        good = isinstance(stated, dict) and isinstance(stated.get("sha256"), str)
        check(good and _is_count(stated.get("bytes")), "files")
    return manifest


def check_same_tokenizer(manifest: Mapping[str, Any], tokenizer: TokenizerIdentity) -> None:
    """Refuse a token file that another tokenizer made.

    Args:
        manifest: a token file's manifest; ``{}`` (Megatron's own files) says nothing and passes.
        tokenizer: the tokenizer it is to be used with.

    Raises:
        FormatError: the hashes differ.
    """
    if manifest and manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise FormatError(
            f"{manifest.get('name', 'the token file')} was made with tokenizer {manifest['tokenizer']['sha256'][:12]} "
            f"({manifest['tokenizer']['vocab_size']:,} ids), not with {tokenizer.sha256[:12]} "
            f"({tokenizer.vocab_size:,} ids); preprocess the text again or name the tokenizer it was made with."
        )


def verify_token_file(prefix: str | Path, tokenizer: TokenizerIdentity | None = None) -> dict[str, Any]:
    """Read a whole token file and check everything that can be checked.

    Sizes, checksums, ids in range, end-of-document tokens, spans, and the manifest's counts. Of a file without
    companions: the index, and with a ``tokenizer`` ids and end-of-document tokens.

    Args:
        prefix: path without extension.
        tokenizer: checked against the manifest; supplies vocabulary and end-of-document id where there is none.

    Returns:
        ``prefix, companions, documents, tokens, content_tokens, tokens_by_language, dtype, shortest, longest,
        largest_id, checked`` (a list of what was checked); JSON-able.

    Raises:
        FormatError: the first problem found.
    """
    prefix = Path(prefix)
    ours = companion(prefix, "manifest.json").exists() or companion(prefix, "spans").exists()
    file = read_token_file(prefix, None if ours else "und", tokenizer.eod if tokenizer else None)
    checked = ["sizes", "index"]
    vocab_size, eod = None, None
    if tokenizer is not None:
        check_same_tokenizer(file.manifest, tokenizer)
        vocab_size, eod = tokenizer.vocab_size, tokenizer.eod
    if file.manifest:
        vocab_size, eod = file.manifest["tokenizer"]["vocab_size"], file.manifest["tokenizer"]["eod"]
        for kind, stated in file.manifest["files"].items():
            found = sha256_of(companion(prefix, kind))
            if found != stated["sha256"]:
                raise FormatError(
                    f"{companion(prefix, kind)} has SHA-256 {found}; its manifest says {stated['sha256']}. It was "
                    "changed or damaged after it was made."
                )
        checked += ["checksums", "manifest", "spans"]
    largest = _check_ids(file, vocab_size)
    if vocab_size is not None:
        checked.append("token ids")
    if eod is not None:
        _check_ends(file, eod)
        checked.append("end of document")
    counts = _count_by_language(file)
    content = sum(counts.values())
    if file.manifest and (file.manifest["tokens_by_language"] != counts or file.manifest["content_tokens"] != content):
        raise FormatError(
            f"{prefix} has {counts} tokens by language; its manifest says {file.manifest['tokens_by_language']}, "
            f"{file.manifest['content_tokens']} in all."
        )
    lengths = file.sequence_lengths
    return {
        "prefix": str(prefix),
        "companions": bool(file.manifest),
        "origin": file.origin,
        "documents": len(file),
        "tokens": len(file.tokens),
        "content_tokens": content,
        "tokens_by_language": counts,
        "dtype": file.tokens.dtype.name,
        "shortest": int(lengths.min()) if len(file) else 0,
        "longest": int(lengths.max()) if len(file) else 0,
        "largest_id": largest,
        "checked": checked,
    }


class _UnfinishedError(Exception):
    """A writer's block ended without ``finish``; makes the partial files go away."""


class _HashedFile:
    """A file being written, its size and its SHA-256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self._file = file

    def write(self, piece: bytes) -> int:
        self.sha256.update(piece)
        self.num_bytes += len(piece)
        return self._file.write(piece)

    def copy(self, source: IO[bytes]) -> None:
        source.seek(0)
        shutil.copyfileobj(source, self, 8 * _CHUNK)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, total, _CHUNK):
        yield begin, min(begin + _CHUNK, total)


def _partitions(ends_S: np.ndarray, document_ends_D: np.ndarray) -> bool:
    """Whether spans with these ends are non-empty and cut every document at its end (both int64, from 0)."""
    previous = 0
    for begin, stop in _chunks(len(ends_S)):
        piece = ends_S[begin:stop]
        if piece[0] <= previous or not np.all(piece[1:] > piece[:-1]):
            return False
        previous = piece[-1]
    if len(document_ends_D) == 0 or len(ends_S) == 0:
        return len(document_ends_D) == len(ends_S)
    if ends_S[-1] != document_ends_D[-1]:
        return False
    for begin, stop in _chunks(len(document_ends_D)):
        piece = document_ends_D[begin:stop]
        found = np.searchsorted(ends_S, piece)
        if found[-1] >= len(ends_S) or not np.array_equal(ends_S[found], piece):
            return False
    return True


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    """A read-only memory map as a plain array (slices of ``np.memmap`` are several times slower)."""
    if count == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def _read_megatron(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (memory-mapped) and int64 [D+1] document offsets of a ``.bin``/``.idx``, checked against each other."""
    path = companion(prefix, "idx")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_IDX_HEADER.size)
    if len(header) < _IDX_HEADER.size or not header.startswith(_IDX_MAGIC):
        raise FormatError(f"{path} is not a Megatron index: it does not begin with MMIDIDX.")
    _, version, code, sequences, indices = _IDX_HEADER.unpack(header)
    if version != 1:
        raise FormatError(f"{path} is a Megatron index of version {version}; version 1 is the one there is.")
    if code not in _DTYPES:
        raise FormatError(f"{path} has dtype code {code}, which holds no tokens; integers are {sorted(_DTYPES)}.")
    expected = _IDX_HEADER.size + 12 * sequences + 8 * indices
    if size == expected + sequences > expected:
        raise FormatError(f"{path} has a mode for every sequence (a multimodal index); only text is read.")
    if size != expected:
        raise FormatError(
            f"{path} has {size:,} bytes; its header promises {sequences:,} sequences and {indices:,} document indices, "
            f"{expected:,} bytes. It is truncated or damaged."
        )
    at = _IDX_HEADER.size
    lengths = _map(path, "<i4", at, sequences)
    pointers = _map(path, "<i8", at + 4 * sequences, sequences)
    documents = _map(path, "<i8", at + 12 * sequences, indices)
    dtype = np.dtype(_DTYPES[code])
    starts = np.zeros(sequences + 1, dtype=np.int64)
    if sequences and lengths.min() < 0:
        raise FormatError(f"{path} has a sequence of {lengths.min()} tokens; it is damaged.")
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    for begin, end in _chunks(sequences):
        if not np.array_equal(pointers[begin:end], starts[begin:end] * dtype.itemsize):
            raise FormatError(f"{path}: pointers and lengths of sequences disagree; it is damaged.")
    if indices == 0 or documents[0] != 0 or documents[-1] != sequences or np.any(documents[1:] < documents[:-1]):
        raise FormatError(f"{path}: document indices do not rise from 0 to {sequences:,} sequences; it is damaged.")
    bin_path = companion(prefix, "bin")
    tokens = int(starts[-1])
    if bin_path.stat().st_size != tokens * dtype.itemsize:
        raise FormatError(
            f"{bin_path} has {bin_path.stat().st_size:,} bytes; its index says {tokens:,} tokens of {dtype.itemsize} "
            "bytes. It is truncated, or of another index."
        )
    offsets = starts if indices == sequences + 1 and np.all(np.diff(documents) == 1) else starts[documents]
    if len(offsets) > 1 and np.diff(offsets).max() > np.iinfo(np.int32).max:
        raise FormatError(f"{path} has a document of more than 2,147,483,647 tokens.")
    return _map(bin_path, dtype.str, 0, tokens), offsets


def _read_spans(prefix: Path, offsets: np.ndarray, languages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Span ends (int64 [S]) and languages (int8 [S]), memory-mapped and checked against the documents."""
    path = companion(prefix, "spans")
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_SPANS_HEADER.size)
        if len(header) < _SPANS_HEADER.size or not header.startswith(_SPANS_MAGIC):
            raise FormatError(f"{path} does not begin with XASPANS; it is not a spans file.")
        _, version, at, documents, tokens, spans = _SPANS_HEADER.unpack(header)
        if version != _SPANS_VERSION:
            raise FormatError(f"{path} is of version {version}; this package reads version {_SPANS_VERSION}.")
        if at % 8 or at < _SPANS_HEADER.size or size != at + 9 * spans:
            raise FormatError(f"{path} has {size:,} bytes, not what its header promises; it is truncated or damaged.")
        codes = file.read(at - _SPANS_HEADER.size)
    try:
        stated = json.loads(codes)
    except ValueError:
        raise FormatError(f"{path}: its list of languages is not JSON; it is damaged.") from None
    if stated != languages:
        raise FormatError(f"{path} lists the languages {stated}; its manifest says {languages}.")
    if documents != len(offsets) - 1 or tokens != offsets[-1]:
        raise FormatError(f"{path} is of {documents:,} documents, {tokens:,} tokens; the index says otherwise.")
    ends = _map(path, "<i8", at, spans)
    span_languages = _map(path, "i1", at + 8 * spans, spans)
    if not _partitions(ends, offsets[1:]):
        raise FormatError(f"{path}: its spans do not divide every document into pieces; it is damaged.")
    if spans and (span_languages.min() < NO_LANGUAGE or span_languages.max() >= len(languages)):
        raise FormatError(f"{path} names a language outside its list of {len(languages)}; it is damaged.")
    return ends, span_languages


def _check_ids(file: TokenFile, vocab_size: int | None) -> int:
    """The largest id; FormatError if one is negative or not below ``vocab_size``."""
    largest = -1
    for begin, end in _chunks(len(file.tokens)):
        piece = file.tokens[begin:end]
        largest = max(largest, int(piece.max()))
        if piece.min() < 0 or (vocab_size is not None and piece.max() >= vocab_size):
            wrong = begin + int(np.argmax((piece < 0) | (piece >= (vocab_size if vocab_size is not None else 1 << 62))))
            document = int(np.searchsorted(file.offsets, wrong, side="right")) - 1
            raise FormatError(
                f"{companion(file.prefix, 'bin')}: token {wrong} (document {document}) is {file.tokens[wrong]}, "
                f"outside the vocabulary of {vocab_size}."
            )
    return largest


def _check_ends(file: TokenFile, eod: int) -> None:
    for begin, end in _chunks(len(file)):
        ends = file.offsets[begin + 1 : end + 1]
        wrong = (ends == file.offsets[begin:end]) | (file.tokens[np.maximum(ends, 1) - 1] != eod)
        if wrong.any():
            raise FormatError(
                f"{file.prefix}: document {begin + int(np.argmax(wrong))} does not end in the end-of-document token "
                f"({eod})."
            )
        if file.manifest:
            ends_of_spans, languages = file._spans  # type: ignore[misc]
            if np.any(languages[np.searchsorted(ends_of_spans, ends)] != NO_LANGUAGE):
                raise FormatError(f"{companion(file.prefix, 'spans')} gives an end-of-document token a language.")


def _count_by_language(file: TokenFile) -> dict[str, int]:
    counts_K = np.zeros(len(file.languages), dtype=np.int64)
    if file._spans is None:
        for begin, end in _chunks(len(file.tokens)):
            counts_K[0] += np.count_nonzero(file.language_ids_flat(begin, end) == 0)
    else:
        ends, languages = file._spans
        previous = 0
        for begin, end in _chunks(len(ends)):
            sizes = np.diff(ends[begin:end], prepend=previous)
            previous = int(ends[end - 1])
            for index in range(len(counts_K)):
                counts_K[index] += sizes[languages[begin:end] == index].sum()
    return dict(zip(file.languages, counts_K.tolist(), strict=True))
