"""Token ids of many texts to the arrays of a token file, without a loop over documents."""

# N documents, T tokens, S spans, Q sentences

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_xalign.formats.token_file import NO_LANGUAGE


class Documents(NamedTuple):
    """What ``TokenFileWriter.add_documents`` takes."""

    tokens_T: NDArray[np.integer]
    lengths_D: NDArray[np.int64]
    span_ends_S: NDArray[np.int64]
    span_languages_S: NDArray[np.int64]
    sentence_lengths: NDArray[np.int64] | None = None


def monolingual_documents(
    ids_T: NDArray[np.integer],
    lengths_N: NDArray[np.int64],
    language: int | NDArray[np.integer],
    eod: int | None,
    sentences: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> Documents:
    """Documents of one language each, the end-of-document token behind each.

    Args:
        ids_T: tokens of all documents, one after the other.
        lengths_N: tokens of each document, all positive.
        language: index of the language of all, or of each.
        eod: the end-of-document token; None for none.
        sentences: (tokens of each sentence [Q], all positive; sentences of each document [N]), for documents stored as
            several sequences; the end-of-document token belongs to the last sentence.
    """
    ends_N = np.cumsum(lengths_N)
    sentence_lengths = None
    if sentences is not None:
        sentence_lengths = sentences[0].copy()
        if eod is not None:
            sentence_lengths[np.cumsum(sentences[1]) - 1] += 1
    if eod is None:
        languages_N = np.broadcast_to(np.asarray(language, dtype=np.int64), lengths_N.shape)
        return Documents(ids_T, lengths_N, ends_N, languages_N, sentence_lengths)
    tokens = np.empty(ids_T.size + lengths_N.size, dtype=ids_T.dtype)
    # Behind document n lie n end-of-document tokens of the documents before it.
    places_N = ends_N + np.arange(lengths_N.size)
    is_text = np.ones(tokens.size, dtype=bool)
    is_text[places_N] = False
    tokens[is_text] = ids_T
    tokens[places_N] = eod
    return ended_documents(tokens, lengths_N + 1, language)._replace(sentence_lengths=sentence_lengths)


def ended_documents(
    tokens_T: NDArray[np.integer], lengths_N: NDArray[np.int64], language: int | NDArray[np.integer]
) -> Documents:
    """Documents of one language each whose last token is the end-of-document token; others as above."""
    ends_N = np.cumsum(lengths_N)
    span_ends = np.empty(2 * lengths_N.size, dtype=np.int64)
    span_ends[0::2], span_ends[1::2] = ends_N - 1, ends_N
    span_languages = np.full(2 * lengths_N.size, NO_LANGUAGE, dtype=np.int64)
    span_languages[0::2] = language
    return Documents(tokens_T, lengths_N, span_ends, span_languages)


@dataclass(frozen=True)
class Frame:
    """The tokens around the two sides of a pair: before, between and after them, and at the end of the document."""

    before: NDArray[np.int32]
    between: NDArray[np.int32]
    after: NDArray[np.int32]
    eod: int | None

    def pool(self) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
        """All its tokens in one array, and (begin, length) of its four stretches in it."""
        end = np.array([] if self.eod is None else [self.eod], dtype=np.int32)
        stretches = [self.before, self.between, self.after, end]
        sizes = [stretch.size for stretch in stretches]
        return np.concatenate(stretches), list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))


def pair_documents(
    ids_T: NDArray[np.integer],
    lengths_2N: NDArray[np.int64],
    languages_2N: NDArray[np.int64],
    swapped_N: NDArray[np.bool_],
    frame: Frame,
) -> Documents:
    """Pairs as documents: before, source, between, target, after, end of document.

    Args:
        ids_T: tokens of all first sides and then of all second sides.
        lengths_2N: tokens of each side, in that order, all positive.
        languages_2N: index of the language of each side.
        swapped_N: whether the second side is the source.
        frame: the tokens around the sides.
    """
    num = swapped_N.size
    around, stretches = frame.pool()
    begins_2N = around.size + np.cumsum(lengths_2N) - lengths_2N
    first = np.arange(num)
    source, target = np.where(swapped_N, first + num, first), np.where(swapped_N, first, first + num)
    begins = np.empty((num, 6), dtype=np.int64)
    sizes = np.empty((num, 6), dtype=np.int64)
    languages = np.full((num, 6), NO_LANGUAGE, dtype=np.int64)
    for column, (begin, size) in zip((0, 2, 4, 5), stretches, strict=True):
        begins[:, column], sizes[:, column] = begin, size
    for column, side in ((1, source), (3, target)):
        begins[:, column], sizes[:, column] = begins_2N[side], lengths_2N[side]
        languages[:, column] = languages_2N[side]
    pool = np.concatenate([around, ids_T])
    return documents_of_stretches(pool, begins, sizes, languages)


def documents_of_stretches(
    pool: NDArray[np.integer],
    begins_NP: NDArray[np.int64],
    sizes_NP: NDArray[np.int64],
    languages_NP: NDArray[np.int64],
) -> Documents:
    """Documents put together from stretches of an array of tokens; a stretch of no tokens makes no span.

    Args:
        pool: tokens.
        begins_NP: where in ``pool`` stretch p of document n begins.
        sizes_NP: its tokens.
        languages_NP: its language.
    """
    lengths_N = sizes_NP.sum(axis=1)
    is_there = sizes_NP.ravel() > 0
    begins, sizes = begins_NP.ravel()[is_there], sizes_NP.ravel()[is_there]
    return Documents(gather(pool, begins, sizes), lengths_N, np.cumsum(sizes), languages_NP.ravel()[is_there])


def gather(pool: NDArray[np.integer], begins_P: NDArray[np.int64], sizes_P: NDArray[np.int64]) -> NDArray[np.integer]:
    """Stretches of an array, one after the other; all sizes positive."""
    if not sizes_P.size:
        return pool[:0]
    ends_P = np.cumsum(sizes_P)
    # Inside a stretch the place rises by one; summing up steps is four times as fast as repeating begins.
    steps = np.ones(ends_P[-1], dtype=np.int32 if pool.size < 1 << 31 else np.int64)
    steps[0] = begins_P[0]
    steps[ends_P[:-1]] = begins_P[1:] - (begins_P[:-1] + sizes_P[:-1] - 1)
    return pool[np.cumsum(steps, out=steps)]


def without(
    ids_T: NDArray[np.integer], lengths_N: NDArray[np.int64], keep_N: NDArray[np.bool_]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Tokens and lengths of the texts to keep."""
    if keep_N.all():
        return ids_T, lengths_N
    return ids_T[np.repeat(keep_N, lengths_N)], lengths_N[keep_N]
