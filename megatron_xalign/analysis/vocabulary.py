"""What two languages share before any layer: tokens. It confounds alignment of early layers."""

# V vocabulary

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VocabularyOverlap:
    """Shared tokens of two languages."""

    jaccard: float
    """Of the sets of tokens that occur."""
    mass: float
    """sum_v min(p_v, q_v) of the two unigram distributions: 1 for the same use, 0 for no shared token."""


def vocabulary_overlap(count_a_V: np.ndarray, count_b_V: np.ndarray) -> VocabularyOverlap:
    """Compare how often two languages use each token.

    Raises:
        ValueError: shapes differ, a count is negative, or a language has no token.
    """
    a, b = np.asarray(count_a_V, np.float64), np.asarray(count_b_V, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"counts of shapes {a.shape} and {b.shape} are not of one vocabulary.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or min(a.min(), b.min()) < 0 or not (a.any() and b.any()):
        raise ValueError("counts must not be negative, and each language needs a token.")
    union = np.count_nonzero((a > 0) | (b > 0))
    return VocabularyOverlap(
        np.count_nonzero((a > 0) & (b > 0)) / union, float(np.minimum(a / a.sum(), b / b.sum()).sum())
    )


@dataclass(frozen=True)
class ProbeTokens:
    """The probe's sentences as the model reads them."""

    by_document: Sequence[Sequence[int]]
    """Token ids of every sentence, in the order of the statistics' documents."""
    vocab_size: int
    """Ids there are."""
    wordless: Collection[int] = ()
    """Tokens without a letter or digit. Nearly every pair shares a full stop, which says nothing."""


def shares_tokens(
    tokens_a: Sequence[Sequence[int]], tokens_b: Sequence[Sequence[int]], ignored: Collection[int] = ()
) -> np.ndarray:
    """bool [pairs]: whether two sides of a pair have a token in common; the others are a control for early layers.

    ``ignored`` tokens count as shared by none.

    Raises:
        ValueError: numbers of sentences differ.
    """
    if len(tokens_a) != len(tokens_b):
        raise ValueError(f"{len(tokens_a)} sentences and {len(tokens_b)} translations.")
    left_out = set(ignored)
    return np.array([not (set(a) - left_out).isdisjoint(b) for a, b in zip(tokens_a, tokens_b, strict=True)], np.bool_)


def identical_pairs(tokens_a: Sequence[Sequence[int]], tokens_b: Sequence[Sequence[int]]) -> np.ndarray:
    """bool [pairs]: whether both sides are the same tokens, so that they tell nothing of translation."""
    if len(tokens_a) != len(tokens_b):
        raise ValueError(f"{len(tokens_a)} sentences and {len(tokens_b)} translations.")
    return np.array([list(a) == list(b) for a, b in zip(tokens_a, tokens_b, strict=True)], np.bool_)
