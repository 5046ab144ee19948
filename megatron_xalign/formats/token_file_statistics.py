"""What a token file holds, in numbers: documents, lengths, languages, sides of pairs, frequent tokens."""

# T tokens, D documents, K languages, V token ids

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.token_file_layout import CHUNK, ColumnReader, chunks, read_index_layout, read_spans_layout
from megatron_xalign.formats.token_file_manifest import NO_LANGUAGE, TokenizerIdentity, check_same_tokenizer
from megatron_xalign.formats.token_file_reader import TokenFile, files_present, open_by_sizes
from megatron_xalign.formats.token_file_structure import (
    SpanPiece,
    SpanWalk,
    Tally,
    byte_bar,
    index_problems,
    read_offsets,
)

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
# Ids are counted in an array; no vocabulary comes near this.
_MOST_IDS = 1 << 26


def token_file_statistics(
    prefix: str | Path,
    *,
    language: str | None = None,
    tokenizer: TokenizerIdentity | None = None,
    top: int = 20,
    progress: bool = True,
) -> dict[str, Any]:
    """Count what a token file holds; everything is read once, in pieces.

    Args:
        prefix: path without extension.
        language: code of a file without companions (``und`` if left out).
        tokenizer: supplies the end-of-document id of a file without companions; of one of ours it must be the one it
            was made with.
        top: how many of the most frequent ids to name.
        progress: whether to show a bar.

    Returns:
        JSON-able:

        - ``prefix, origin, dtype, documents, sequences, tokens, content_tokens``;
        - ``tokens_by_language``, ``documents_by_language`` (documents with a token of the language);
        - ``end_of_document_tokens`` and ``end_of_document_share`` of all tokens (None if the id is not known),
          ``template_tokens`` (of no language and not the end of a document);
        - ``document_tokens``: ``mean, shortest, longest, quantiles`` and ``histogram``;
        - ``sides``: for every language of a parallel file ``documents, tokens`` and the distribution of the tokens a
          document has of it, as for documents; ``length_ratio``: tokens of the longer side by those of the shorter,
          for files of two languages;
        - ``distinct_ids``, ``largest_id`` and ``frequent_ids``: ``{id, count, share}``, most frequent first.

        A quantile is the smallest length that at least so large a share of the documents does not exceed; lengths
        above 131,071 tokens (sides: 2,047) are rounded down by at most 1 in 65,536 (1,024). ``histogram`` has
        ``{from, to, documents}`` for each power of two there are documents of, ``to`` inclusive.

    Raises:
        FormatError: the file is damaged, or of another tokenizer.
    """
    prefix = Path(prefix)
    ours = "manifest.json" in files_present(prefix)
    eod = tokenizer.eod if tokenizer is not None else None
    file = open_by_sizes(prefix, None if ours else language or "und", eod, "sizes")
    if tokenizer is not None:
        check_same_tokenizer(file.manifest, tokenizer)
    count = _Count(prefix, file)
    with byte_bar(progress, file.num_tokens * file.dtype.itemsize, f"count {prefix.name}") as bar:
        count.run(bar.update)
    return {
        "prefix": str(prefix),
        "origin": file.origin,
        "dtype": file.dtype.name,
        "sequences": file.num_sequences,
        **count.facts(top),
    }


class LengthCounts:
    """How many documents there are of each length; exact for short ones, in small memory for long ones."""

    def __init__(self, precision_bits: int) -> None:
        """Nothing counted yet.

        Args:
            precision_bits: lengths below ``2 ** (precision_bits + 1)`` are counted one by one, longer ones in steps of
                at most ``1 / 2 ** precision_bits`` of their size.
        """
        self.number = 0
        self.total = 0
        self._bits = precision_bits
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, lengths: np.ndarray) -> None:
        """Count some lengths (integers, not negative, below 2**31)."""
        if lengths.size == 0:
            return
        self.number += int(lengths.size)
        self.total += int(lengths.sum())
        # The exponent frexp gives is the number of bits.
        shift = np.maximum(np.frexp(lengths.astype(np.float64))[1] - self._bits - 1, 0)
        found = np.bincount((shift.astype(np.int64) << self._bits) + (lengths >> shift))
        if len(found) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(found) - len(self._counts), dtype=np.int64)])
        self._counts[: len(found)] += found

    def facts(self) -> dict[str, Any]:
        """``mean, shortest, longest, quantiles, histogram`` of what was counted (the longest is rounded down too)."""
        places = np.flatnonzero(self._counts)
        if not places.size:
            return {"mean": None, "shortest": None, "longest": None, "quantiles": {}, "histogram": []}
        counts = self._counts[places]
        shift = np.maximum((places >> self._bits) - 1, 0)
        lengths = (places - (shift << self._bits)) << shift
        below = np.cumsum(counts)
        # The rank is rounded up from a product of doubles; a hair is taken off, so that 0.1 of 10 is the first.
        ranks = [max(int(np.ceil(share * self.number - 1e-9)), 1) for share in QUANTILES]
        powers = np.frexp(lengths.astype(np.float64))[1]
        return {
            "mean": self.total / self.number,
            "shortest": int(lengths[0]),
            "longest": int(lengths[-1]),
            "quantiles": {
                f"{share:g}": int(lengths[np.searchsorted(below, rank)])
                for share, rank in zip(QUANTILES, ranks, strict=True)
            },
            "histogram": [
                {
                    "from": 1 << (power - 1) if power else 0,
                    "to": (1 << power) - 1,
                    "documents": int(counts[powers == power].sum()),
                }
                for power in np.unique(powers).tolist()
            ],
        }


class _Count:
    """One reading of one file."""

    def __init__(self, prefix: Path, file: TokenFile) -> None:
        self._index = read_index_layout(prefix)
        self._spans = read_spans_layout(prefix) if file.manifest else None
        self._languages = languages = file.languages
        self._eod = file.eod
        self._parallel = file.origin == "parallel"
        self._tally = Tally(len(languages))
        self._lengths = LengthCounts(16)
        self._sides = [LengthCounts(10) for _ in languages]
        self._ratios = LengthCounts(10)
        self._frequencies = np.zeros(0, dtype=np.int64)
        self._ends_of_no_language = 0
        # Tokens of none and of each language of a document that goes on in the next piece of spans.
        self._carried = np.zeros(len(languages) + 1, dtype=np.int64)
        self._buffer = np.empty(CHUNK, dtype=self._index.dtype)

    def run(self, advance: Callable[[int], object]) -> None:
        """Read the file; ``advance`` is told the bytes."""
        index = self._index
        for problem in index_problems(index):
            raise FormatError(problem)
        with ExitStack() as stack:
            reader = stack.enter_context(ColumnReader(index.path))
            bin_reader = stack.enter_context(ColumnReader(index.bin_path))
            walk = None
            if self._spans is not None:
                walk = SpanWalk(stack.enter_context(ColumnReader(self._spans.path)), self._spans)
            for begin, end in chunks(index.num_documents):
                offsets = read_offsets(reader, index, begin, end)
                self._tally.add_documents(np.diff(offsets))
                self._lengths.add(np.diff(offsets))
                at = int(offsets[0])
                for piece in walk.of_documents(offsets) if walk is not None else ():
                    self._tally.add_spans(piece.sizes, piece.languages, piece.is_last)
                    if self._parallel:
                        self._add_sides(piece)
                    advance(self._add_tokens(bin_reader, at, int(piece.ends[-1]), piece))
                    at = int(piece.ends[-1])
                advance(self._add_tokens(bin_reader, at, int(offsets[-1]), None))
            if walk is not None:
                walk.finish()
        if self._spans is None:
            self._tally.tokens_by_language_K[0] = self._tally.tokens - self._ends_of_no_language
            self._tally.documents_by_language_K[0] = self._tally.documents

    def facts(self, top: int) -> dict[str, Any]:
        tally = self._tally
        ends = None
        if self._eod is not None:
            ends = int(self._frequencies[self._eod]) if 0 <= self._eod < len(self._frequencies) else 0
        content = int(tally.tokens_by_language_K.sum())
        frequent = np.argsort(-self._frequencies, kind="stable")[:top]
        found: dict[str, Any] = {
            "documents": tally.documents,
            "tokens": tally.tokens,
            "content_tokens": content,
            "tokens_by_language": dict(zip(self._languages, tally.tokens_by_language_K.tolist(), strict=True)),
            "documents_by_language": dict(zip(self._languages, tally.documents_by_language_K.tolist(), strict=True)),
            "end_of_document_tokens": ends,
            "end_of_document_share": None if ends is None or not tally.tokens else ends / tally.tokens,
            "template_tokens": tally.tokens - content - self._ends_of_no_language,
            "document_tokens": {
                **self._lengths.facts(),
                "shortest": tally.shortest if tally.documents else None,
                "longest": tally.longest if tally.documents else None,
            },
            "distinct_ids": int(np.count_nonzero(self._frequencies)),
            "largest_id": len(self._frequencies) - 1,
            "frequent_ids": [
                {
                    "id": int(token),
                    "count": int(self._frequencies[token]),
                    "share": int(self._frequencies[token]) / tally.tokens,
                }
                for token in frequent
                if self._frequencies[token]
            ],
        }
        if self._parallel:
            found["sides"] = {
                code: {
                    "documents": side.number,
                    "tokens": int(tally.tokens_by_language_K[language]),
                    "document_tokens": side.facts(),
                }
                for language, (code, side) in enumerate(zip(self._languages, self._sides, strict=True))
            }
            if len(self._languages) == 2:
                found["length_ratio"] = self._ratio_facts()
        return found

    def _ratio_facts(self) -> dict[str, Any]:
        """Quantiles of longer by shorter side; counted in thousandths."""
        facts = self._ratios.facts()
        return {
            "pairs": self._ratios.number,
            "mean": None if facts["mean"] is None else facts["mean"] / 1000,
            "quantiles": {share: value / 1000 for share, value in facts["quantiles"].items()},
        }

    def _add_sides(self, piece: SpanPiece) -> None:
        """Tokens by language of every document that ends in a piece of spans."""
        columns = len(self._carried)
        documents = np.cumsum(piece.is_last) - piece.is_last
        for begin, end in chunks(len(documents), max(CHUNK * 4 // columns, 1)):
            rows = documents[begin:end] - documents[begin]
            sums = np.bincount(
                rows * columns + piece.languages[begin:end] + 1,
                weights=piece.sizes[begin:end],
                minlength=(int(rows[-1]) + 1) * columns,
            )
            counts = sums.astype(np.int64).reshape(-1, columns)
            counts[0] += self._carried
            if piece.is_last[end - 1]:
                self._carried[:] = 0
            else:
                self._carried, counts = counts[-1], counts[:-1]
            for language, side in enumerate(self._sides):
                of_language = counts[:, language + 1]
                side.add(of_language[of_language > 0])
            if len(self._sides) == 2:
                pairs = counts[(counts[:, 1:] > 0).all(axis=1), 1:]
                self._ratios.add(pairs.max(axis=1) * 1000 // np.maximum(pairs.min(axis=1), 1))

    def _add_tokens(self, reader: ColumnReader, begin: int, end: int, spans: SpanPiece | None) -> int:
        """Count ids, and those that end a document and have no language; return the bytes read."""
        for low, high in chunks(end, begin=begin):
            ids = reader.read(self._index.tokens, low, high, self._buffer)
            if ids.min() < 0 or ids.max() >= _MOST_IDS:
                raise FormatError(
                    f"{self._index.bin_path} has ids {ids.min():,}..{ids.max():,}, which no vocabulary has; it is "
                    "damaged, or of another width than its index says."
                )
            found = np.bincount(ids)
            if len(found) > len(self._frequencies):
                found[: len(self._frequencies)] += self._frequencies
                self._frequencies = found
            else:
                self._frequencies[: len(found)] += found
            if self._eod is not None:
                at = np.flatnonzero(ids == self._eod) + low
                if spans is not None:
                    at = at[spans.languages[np.searchsorted(spans.ends, at, side="right")] == NO_LANGUAGE]
                self._ends_of_no_language += len(at)
        return (end - begin) * self._index.dtype.itemsize
