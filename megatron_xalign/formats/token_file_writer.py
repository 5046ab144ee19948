"""Writing a token file as a stream: four files that appear together, in memory that does not grow with the corpus."""

# T tokens, D documents, Q sequences, S spans, K languages

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_xalign import __version__
from megatron_xalign.errors import CorpusError
from megatron_xalign.formats.token_file_columns import TokenFileColumns
from megatron_xalign.formats.token_file_manifest import (
    LONGEST_DOCUMENT_TOKENS,
    MANIFEST_FIELDS,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    MOST_LANGUAGES,
    NO_LANGUAGE,
    Origin,
    TokenizerIdentity,
    is_language_code,
    token_dtype,
)
from megatron_xalign.formats.token_file_structure import Tally


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
            languages: codes that language indices point into, at most 127; see :meth:`language_index` for those that
                are not known yet.
        """
        if origin not in ("monolingual", "parallel"):
            raise ValueError(f"origin={origin!r} is neither 'monolingual' nor 'parallel'.")
        good = len(set(languages)) == len(languages) <= MOST_LANGUAGES
        if not good or not all(map(is_language_code, languages)):
            raise ValueError(f"languages={list(languages)} must be up to {MOST_LANGUAGES} different printable codes.")
        self.prefix = Path(prefix)
        self.origin = origin
        self.languages = list(languages)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.tokenizer: dict[str, Any] = {
            "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod,
        }
        self.tally = Tally(len(languages))
        """What is written so far."""
        self.columns = TokenFileColumns(self.prefix, self.dtype)
        """Where it goes; whoever puts something there directly keeps ``tally`` in step."""

    def __enter__(self) -> Self:
        self.columns.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.columns.__exit__(kind, error, trace)

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self.tally.documents

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self.tally.tokens

    @property
    def spans(self) -> int:
        """Spans so far."""
        return self.tally.spans

    @property
    def sequences(self) -> int:
        """Megatron's sequences so far."""
        return self.columns.num_sequences

    def language_index(self, code: str) -> int:
        """The index of a language; it is added to the list if it is new.

        Raises:
            CorpusError: it is no code, or one too many.
        """
        if code not in self.languages:
            if not is_language_code(code):
                raise CorpusError(f"{code!r} is no language code; a code is printable text such as fin_Latn.")
            if len(self.languages) == MOST_LANGUAGES:
                raise CorpusError(
                    f"{self.prefix} has documents in more than {MOST_LANGUAGES} languages, {code} is one more; name "
                    "the languages you want, or write a token file for each."
                )
            self.languages.append(code)
            self.tally.add_language()
        return self.languages.index(code)

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
        self,
        tokens_T: np.ndarray,
        lengths_D: np.ndarray,
        span_ends_S: np.ndarray,
        span_languages_S: np.ndarray,
        sentence_lengths: np.ndarray | None = None,
    ) -> None:
        """Append many documents at once.

        Args:
            tokens_T: integers [T] of any width, the documents' tokens one after the other.
            lengths_D: integers [D], tokens of each document, all positive, adding up to T.
            span_ends_S: integers [S], end of each span in this batch, strictly increasing, one at each document's end.
            span_languages_S: integers [S], language index of each span or ``NO_LANGUAGE``.
            sentence_lengths: integers [Q], where documents are stored as several of Megatron's sequences (its
                ``--split-sentences``): tokens of each sequence of the batch, all positive, one ending at each
                document's end. Left out, every document is one sequence.

        Raises:
            ValueError: the arrays contradict one another or an id is outside the vocabulary. Nothing is added.
            CorpusError: a document has more than 2**31 - 1 tokens.
            FormatError: the disk is full or the like. The block cannot go on.
        """
        tokens_T = np.asarray(tokens_T)
        lengths = _integers(lengths_D, "lengths_D")
        ends = _integers(span_ends_S, "span_ends_S")
        languages = _integers(span_languages_S, "span_languages_S")
        if lengths.size == tokens_T.size == ends.size == 0:
            return
        if lengths.size == 0 or lengths.min() <= 0 or lengths.sum() != tokens_T.size:
            raise ValueError(f"document lengths must be positive and add up to {tokens_T.size} tokens.")
        if lengths.max() > LONGEST_DOCUMENT_TOKENS:
            raise CorpusError(
                f"document {self.documents + int(lengths.argmax()):,} of {self.prefix} has {lengths.max():,} tokens; "
                f"Megatron's index holds up to {LONGEST_DOCUMENT_TOKENS:,}. Cut it into several documents."
            )
        self._check_ids(tokens_T)
        if languages.size != ends.size:
            raise ValueError(f"{ends.size} spans have {languages.size} languages.")
        document_ends = np.cumsum(lengths)
        last = _last_of_each(ends, document_ends)
        if last is None:
            raise ValueError("spans do not divide each document into pieces.")
        if languages.min() < NO_LANGUAGE or languages.max() >= len(self.languages):
            raise ValueError(f"language indices {languages.min()}..{languages.max()} leave {self.languages}.")
        sequences, sequence_lengths = None, lengths
        if sentence_lengths is not None:
            sequence_lengths = _integers(sentence_lengths, "sentence_lengths")
            last_sequences = _last_of_each(np.cumsum(sequence_lengths), document_ends)
            if last_sequences is None:
                raise ValueError("sentence lengths do not divide each document into pieces.")
            sequences = np.diff(last_sequences, prepend=-1)
        is_last = np.zeros(ends.size, dtype=bool)
        is_last[last] = True
        self.columns.put_tokens(tokens_T)
        self.columns.put_sequences(sequence_lengths)
        self.columns.put_documents(lengths.size, sequences)
        self.columns.put_spans(ends + self.tokens, languages)
        self.tally.add_documents(lengths)
        self.tally.add_spans(np.diff(ends, prepend=0), languages, is_last)

    def _check_ids(self, tokens_T: np.ndarray) -> None:
        if tokens_T.ndim != 1 or tokens_T.dtype.kind not in "iu":
            raise ValueError(f"tokens_T is {tokens_T.dtype} {list(tokens_T.shape)}; token ids are integers [T].")
        # One pass instead of two: as unsigned numbers, negative ids are the largest.
        limit = min(self.tokenizer["vocab_size"], int(np.iinfo(tokens_T.dtype).max) + 1)
        unsigned = tokens_T.view(tokens_T.dtype.str.replace("i", "u"))
        if int(unsigned.max()) >= limit:
            raise ValueError(
                f"token ids {tokens_T.min()}..{tokens_T.max()} leave the vocabulary of {self.tokenizer['vocab_size']}."
            )

    def finish(self, *, allow_empty: bool = False, **details: Any) -> dict[str, Any]:
        """Write index, spans and manifest, and let all four files appear.

        Args:
            allow_empty: a file without documents is one too (a part of a corpus of which nothing was kept).
            details: further fields of the manifest: ``inputs``, ``counts``, ``recipe``, ``template``, ... JSON-able.

        Returns:
            The manifest.

        Raises:
            CorpusError: no document was added.
            FormatError: the disk is full or the like. Nothing is left behind.
        """
        if taken := MANIFEST_FIELDS & details.keys():
            raise ValueError(f"{', '.join(sorted(taken))} of a manifest is counted, not given.")
        if self.documents and not self.languages:
            raise ValueError("documents without a language; their tokens would be nobody's.")
        if not self.documents and not allow_empty:
            raise CorpusError(f"{self.prefix}: there is no document to write; every input text was empty or left out.")
        return self.columns.finish(self.languages, lambda files: self._manifest(files, details))

    def _manifest(self, files: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "name": self.prefix.name,
            "origin": self.origin,
            "languages": self.languages,
            "sequences": self.sequences,
            **self.tally.facts(self.languages),
            "dtype": self.dtype.name,
            "tokenizer": self.tokenizer,
            "files": dict(files),
            "package_version": __version__,
            **details,
        }


def _integers(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not integers in one dimension.")
    return array.astype(np.int64, copy=False)


def _last_of_each(ends_S: np.ndarray, document_ends_D: np.ndarray) -> np.ndarray | None:
    """int64 [D]: which of some pieces ends each document; None if pieces are empty or do not divide each document."""
    if ends_S.size == 0 or ends_S[0] <= 0 or np.any(ends_S[1:] <= ends_S[:-1]) or ends_S[-1] != document_ends_D[-1]:
        return None
    last = np.searchsorted(ends_S, document_ends_D)
    return last if np.array_equal(ends_S[last], document_ends_D) else None
