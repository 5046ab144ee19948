"""Controls for the effect of alignment: pairs with the translation elsewhere, the same tokens in all.

``aligned``
    What a job makes of pairs: each translation beside its source.
``shuffled``
    The second side of each pair (the one in the language that comes later in the file's list) changes places with that
    of another pair of the same two languages and of about the same length. Documents, directions and templates stay.
``separated``
    Each side is a document of its own: first all sides in the file's first language, in the order of the pairs, then
    all in the next. No template.

In all three, each language has the same tokens in the same texts, so runs on them differ in nothing else.
"""

# D documents, S spans, T tokens

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_xalign.data.assembly import Documents, gather, monolingual_documents
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.token_file import TokenFile, TokenFileWriter, companion, read_token_file
from megatron_xalign.formats.token_file_layout import ColumnReader, read_spans_layout
from megatron_xalign.formats.token_file_structure import SpanWalk
from megatron_xalign.progress import progress_bar

_LOG = logging.getLogger(__name__)

# Pairs change places among so many that follow one another, so that memory does not grow with the corpus.
_CHUNK_DOCUMENTS = 1 << 18
_WRITTEN_DOCUMENTS = 1 << 14
_FEWEST_ALIKE, _MOST_ALIKE = 4, 1024
_CARRIED = (
    "template", "direction", "seed", "append_eod", "inputs", "counts", "examples_of_skipped", "not_checked", "recipe",
    "engine", "versions",
)


def write_pairing(
    aligned: str | Path, out: str | Path, pairing: Literal["shuffled", "separated"], *, seed: int
) -> dict[str, Any]:
    """Make a control of a token file of aligned pairs; the text is not tokenised again.

    Args:
        aligned: prefix of the file of pairs.
        out: prefix to write; one already there is replaced when the new one is whole.
        pairing: which control.
        seed: of ``shuffled``.

    Returns:
        The manifest; its ``pairing`` names the control, and ``pairing_facts`` says of ``shuffled`` how many pairs kept
        their own second side for want of another (``unmatched``), how many got another of the same text, and how far
        lengths are apart.

    Raises:
        ConfigError: the file does not hold aligned pairs, or is the one to write.
        CorpusError: no pair has another to change places with.
        FormatError: the file is damaged, or the new one cannot be written.
    """
    if pairing not in ("shuffled", "separated"):
        raise ValueError(f"pairing={pairing!r} is neither 'shuffled' nor 'separated'.")
    file = read_token_file(aligned, check="sizes")
    manifest = file.manifest
    if file.origin != "parallel" or manifest.get("pairing", "aligned") != "aligned":
        raise ConfigError(
            f"{aligned} does not hold aligned pairs ({file.origin}, pairing={manifest.get('pairing')}); controls are "
            "made of those."
        )
    if companion(aligned, "bin").resolve() == companion(out, "bin").resolve():
        raise ConfigError(f"{out} is the file of aligned pairs itself; give the control another name.")
    if pairing == "separated" and manifest.get("append_eod") is False:
        raise ConfigError(f"{aligned} has no end-of-document tokens; separated sides need them.")
    tokenizer: Any = SimpleNamespace(**{name: manifest["tokenizer"][name] for name in ("sha256", "vocab_size", "eod")})
    facts: Counter[str] = Counter()
    num_documents = len(file) * (2 if pairing == "separated" else 1)
    with (
        progress_bar(num_documents, f"{pairing} pairs", " docs") as bar,
        TokenFileWriter(out, tokenizer=tokenizer, origin="parallel", languages=file.languages) as writer,
    ):
        for documents in _shuffled(file, seed, facts) if pairing == "shuffled" else _separated(file):
            writer.add_documents(*documents)
            bar.update(documents.lengths_D.size)
        found = dict(zip(file.languages, writer.tally.tokens_by_language_K.tolist(), strict=True))
        if found != manifest["tokens_by_language"]:
            raise FormatError(f"{aligned} is damaged: it has {found} tokens by language, not what its manifest says.")
        details = {name: manifest[name] for name in _CARRIED if name in manifest}
        if isinstance(details.get("recipe"), dict):
            details["recipe"] = {**details["recipe"], "pairing": pairing}
            if pairing == "shuffled":
                details["recipe"]["seed"] = seed
        if pairing == "shuffled":
            details["pairing_facts"] = _shuffle_facts(aligned, len(file), facts)
        return writer.finish(
            **details, pairing=pairing, pairs=len(file),
            made_from={"name": manifest["name"], "sha256": manifest["files"]["bin"]["sha256"]},
        )


def _shuffle_facts(aligned: str | Path, num_pairs: int, facts: Counter[str]) -> dict[str, Any]:
    if facts["unmatched"] == num_pairs:
        raise CorpusError(
            f"{aligned}: no pair has another of the same two languages to change places with ({num_pairs:,} pairs)."
        )
    if facts["unmatched"]:
        _LOG.warning(
            "%d of %d pairs keep their own second side: no other near them is in the same two languages.",
            facts["unmatched"], num_pairs,
        )
    apart = facts["tokens apart"] / max(facts["tokens"], 1)
    return {
        "unmatched": facts["unmatched"], "same_text": facts["same text"],
        # Of the length of a second side, on average.
        "relative_length_difference": round(apart, 6),
    }


@dataclass(frozen=True)
class _Pairs:
    """Consecutive documents of a file of pairs, and their spans."""

    begins_S: NDArray[np.int64]
    sizes_S: NDArray[np.int64]
    languages_S: NDArray[np.int64]
    first_D: NDArray[np.int64]
    """Which span is the side in the language that comes earlier in the file's list."""
    second_D: NDArray[np.int64]
    """Which span is the other side."""
    spans_D: NDArray[np.int64]
    """Spans of each document."""
    number: int
    """Number of the first document."""


def _pairs(file: TokenFile) -> Iterator[_Pairs]:
    """All pairs of a file, in chunks of about the same size."""
    spans = read_spans_layout(file.prefix)
    num_chunks = max(1, round(len(file) / _CHUNK_DOCUMENTS))
    cuts = [len(file) * chunk // num_chunks for chunk in range(num_chunks + 1)]
    with ColumnReader(spans.path) as reader:
        walk = SpanWalk(reader, spans)
        for begin, end in itertools.pairwise(cuts):
            pieces = list(walk.of_documents(file.document_offsets(begin, end)))
            sizes = np.concatenate([piece.sizes for piece in pieces])
            languages = np.concatenate([piece.languages for piece in pieces]).astype(np.int64)
            documents = np.concatenate([piece.documents for piece in pieces])
            sides = np.flatnonzero(languages >= 0)
            num = end - begin
            if not np.array_equal(documents[sides], np.repeat(np.arange(num), 2)):
                wrong = int(np.flatnonzero(np.bincount(documents[sides], minlength=num) != 2)[0])
                raise ConfigError(f"{file.prefix}: document {begin + wrong:,} is no pair; it has not two sides.")
            one, other = sides[0::2], sides[1::2]
            is_ordered = languages[one] < languages[other]
            if np.any(languages[one] == languages[other]):
                wrong = int(np.argmax(languages[one] == languages[other]))
                raise ConfigError(f"{file.prefix}: both sides of document {begin + wrong:,} are in one language.")
            yield _Pairs(
                np.concatenate([piece.ends for piece in pieces]) - sizes, sizes, languages,
                np.where(is_ordered, one, other), np.where(is_ordered, other, one),
                np.bincount(documents, minlength=num), begin,
            )
        walk.finish()


def _shuffled(file: TokenFile, seed: int, facts: Counter[str]) -> Iterator[Documents]:
    for pairs in _pairs(file):
        num = pairs.first_D.size
        lengths_D = pairs.sizes_S[pairs.second_D]
        partner_D = _partners(
            pairs.languages_S[pairs.first_D] * len(file.languages) + pairs.languages_S[pairs.second_D], lengths_D,
            _mixed(np.arange(pairs.number, pairs.number + num), seed),
        )
        theirs_D = pairs.second_D[partner_D]
        _count(file, pairs, theirs_D, lengths_D, partner_D, facts)
        begins_S, sizes_S = pairs.begins_S.copy(), pairs.sizes_S.copy()
        begins_S[pairs.second_D], sizes_S[pairs.second_D] = pairs.begins_S[theirs_D], pairs.sizes_S[theirs_D]
        ends_D = np.cumsum(pairs.spans_D)
        for begin in range(0, num, _WRITTEN_DOCUMENTS):
            spans_D = pairs.spans_D[begin : begin + _WRITTEN_DOCUMENTS]
            low, high = ends_D[begin] - spans_D[0], ends_D[begin + len(spans_D) - 1]
            sizes = sizes_S[low:high]
            lengths = np.add.reduceat(sizes, np.cumsum(spans_D) - spans_D)
            yield Documents(
                gather(file.tokens, begins_S[low:high], sizes), lengths, np.cumsum(sizes), pairs.languages_S[low:high]
            )


def _partners(
    groups_D: NDArray[np.int64], lengths_D: NDArray[np.int64], mixed_D: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """For each document another of its group and of about its length; each is the other of exactly one.

    Within a group, documents are sorted by length and cut into blocks; in each, in a random order, everyone takes the
    next one's.
    """
    partner_D = np.arange(groups_D.size)
    order = np.lexsort((mixed_D, lengths_D, groups_D))
    starts = np.flatnonzero(np.diff(groups_D[order], prepend=-1))
    for begin, end in zip(starts, [*starts[1:], groups_D.size], strict=True):
        members, size = order[begin:end], end - begin
        alike = min(max(size // 64, _FEWEST_ALIKE), _MOST_ALIKE)
        num_blocks = max(1, size // alike)
        blocks = np.arange(size) * num_blocks // size
        members = members[np.lexsort((mixed_D[members], blocks))]
        takes = np.roll(members, -1)
        lasts = np.flatnonzero(np.diff(blocks, append=num_blocks))
        firsts = np.concatenate([[0], lasts[:-1] + 1])
        takes[lasts] = members[firsts]
        partner_D[members] = takes
    return partner_D


def _mixed(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A random-looking number for each of some numbers, the same on every machine and with every NumPy (splitmix64)."""
    mixed = numbers.astype(np.uint64)
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = mixed + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _count(
    file: TokenFile, pairs: _Pairs, theirs_D: NDArray[np.int64], lengths_D: NDArray[np.int64],
    partner_D: NDArray[np.int64], facts: Counter[str],
) -> None:
    moved = np.flatnonzero(partner_D != np.arange(partner_D.size))
    facts["unmatched"] += partner_D.size - moved.size
    their_lengths_D = pairs.sizes_S[theirs_D]
    facts["tokens"] += int(lengths_D.sum())
    facts["tokens apart"] += int(np.abs(their_lengths_D - lengths_D).sum())
    alike = moved[their_lengths_D[moved] == lengths_D[moved]]
    for begin in range(0, alike.size, _WRITTEN_DOCUMENTS):
        chosen = alike[begin : begin + _WRITTEN_DOCUMENTS]
        sizes = lengths_D[chosen]
        own = gather(file.tokens, pairs.begins_S[pairs.second_D[chosen]], sizes)
        new = gather(file.tokens, pairs.begins_S[theirs_D[chosen]], sizes)
        facts["same text"] += int(np.count_nonzero(np.logical_and.reduceat(own == new, np.cumsum(sizes) - sizes)))


def _separated(file: TokenFile) -> Iterator[Documents]:
    for language in range(len(file.languages)):
        for pairs in _pairs(file):
            sides = np.flatnonzero(pairs.languages_S == language)
            for begin in range(0, sides.size, _WRITTEN_DOCUMENTS):
                chosen = sides[begin : begin + _WRITTEN_DOCUMENTS]
                sizes = pairs.sizes_S[chosen]
                ids = gather(file.tokens, pairs.begins_S[chosen], sizes)
                yield monolingual_documents(ids, sizes, language, file.eod)
