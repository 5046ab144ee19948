"""Whether a sentence's nearest neighbour in the other language is its translation."""

# D sentences, H features



from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_xalign.analysis.representations import as_pair, centre, unit_rows

TIE = 1e-12
"""Similarities this close are equal: a matrix product may give two copies of one sentence values one rounding apart."""

_BLOCK_SIMILARITIES = 1 << 22


@dataclass(frozen=True)
class BitextAccuracy:
    """Top-1 retrieval of translations; chance is one over the number of sentences."""

    forward_hit_D: np.ndarray
    """bool [D]: sentence i of a has its translation as its only nearest neighbour in b."""
    backward_hit_D: np.ndarray
    """bool [D]: the same from b to a."""

    @property
    def forward(self) -> float:
        """Share of hits from a to b."""
        return float(self.forward_hit_D.mean())

    @property
    def backward(self) -> float:
        """Share of hits from b to a."""
        return float(self.backward_hit_D.mean())

    @property
    def mean(self) -> float:
        """Mean of both directions."""
        return (self.forward + self.backward) / 2


def bitext_accuracy(
    acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, centred: bool = False, csls_neighbours: int = 0
) -> BitextAccuracy:
    """Retrieve every sentence's translation by highest cosine, in both directions.

    A hit is strictly more similar than every wrong sentence; a tie is a miss, so collapsed representations score 0.

    Args:
        acts_a_DH: float [D, H]. Sentences of one language.
        acts_b_DH: float [D, H]. Their translations, row by row.
        centred: subtract each language's mean first, which removes what is common to the language.
        csls_neighbours: if above 0, penalise hubs: 2 cos minus the mean cosine of either side to that many nearest
            neighbours in the other language (Lample et al. 2018, arXiv:1710.04087; they use 10).

    Raises:
        ValueError: shapes differ, fewer than two sentences, a value is not finite, or more neighbours than sentences.
    """
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH)
    if not 0 <= csls_neighbours <= len(acts_a):
        raise ValueError(f"csls_neighbours={csls_neighbours} is outside [0, {len(acts_a)}], the number of sentences.")
    if centred:
        acts_a, acts_b = centre(acts_a), centre(acts_b)
    unit_a, unit_b = unit_rows(acts_a), unit_rows(acts_b)
    if csls_neighbours:
        hub_a, hub_b = _nearness(unit_a, unit_b, csls_neighbours), _nearness(unit_b, unit_a, csls_neighbours)
        # One extra feature of the product subtracts half the hubness of the other side; a sentence's own is the same
        # for all its candidates and cannot change their order.
        one_D = np.ones((len(unit_a), 1))
        return BitextAccuracy(
            _hits(np.hstack([unit_a, one_D]), np.hstack([unit_b, -hub_b[:, None] / 2])),
            _hits(np.hstack([unit_b, one_D]), np.hstack([unit_a, -hub_a[:, None] / 2])),
        )
    return BitextAccuracy(_hits(unit_a, unit_b), _hits(unit_b, unit_a))


def mexa(pivot_DH: np.ndarray, other_DH: np.ndarray) -> float:
    """Share of translations more similar to each other than either is to any other sentence of the other language.

    Args:
        pivot_DH: float [D, H]. Sentences of the pivot language (English in the paper).
        other_DH: float [D, H]. Their translations, row by row.

    Raises:
        ValueError: shapes differ, fewer than two sentences, or a value is not finite.

    Source: Kargaran et al. 2024, arXiv:2410.05873: cos(p_i, o_i) strictly above the rest of row i and column i.
    """
    both = bitext_accuracy(pivot_DH, other_DH)
    return float((both.forward_hit_D & both.backward_hit_D).mean())


def cosine_auc(acts_a_DH: np.ndarray, acts_b_DH: np.ndarray) -> float:
    """Probability that a translation is more similar than a random other sentence, both directions averaged.

    0.5 is chance, ties count half. Unlike a difference of cosines it does not depend on their scale, so it can be
    compared between layers and models of different anisotropy.

    Raises:
        ValueError: shapes differ, fewer than two sentences, or a value is not finite.
    """
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH)
    unit_a, unit_b = unit_rows(acts_a), unit_rows(acts_b)
    above = 0.0
    for first, second in ((unit_a, unit_b), (unit_b, unit_a)):
        for own, difference in _margins(first, second):
            above += np.count_nonzero(difference > TIE) + 0.5 * np.count_nonzero(np.abs(difference) <= TIE)
            above -= 0.5 * len(own)  # a sentence ties with itself
    return float(above / (2 * len(unit_a) * (len(unit_a) - 1)))


def _margins(unit_a: np.ndarray, unit_b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of rows: (row numbers [m], similarity of the translation minus that of every sentence [m, D])."""
    block = max(1, _BLOCK_SIMILARITIES // len(unit_b))
    for start in range(0, len(unit_a), block):
        own = np.arange(start, min(start + block, len(unit_a)))
        similarity = unit_a[own] @ unit_b.T
        yield own, similarity[own - start, own][:, None] - similarity


def _hits(unit_a: np.ndarray, unit_b: np.ndarray) -> np.ndarray:
    hit_D = np.empty(len(unit_a), np.bool_)
    for own, difference in _margins(unit_a, unit_b):
        difference[own - own[0], own] = np.inf
        hit_D[own] = (difference > TIE).all(axis=1)
    return hit_D


def _nearness(unit_a: np.ndarray, unit_b: np.ndarray, neighbours: int) -> np.ndarray:
    """Mean cosine of each a to its nearest neighbours among b: float64 [D]."""
    mean_D = np.empty(len(unit_a))
    block = max(1, _BLOCK_SIMILARITIES // len(unit_b))
    for start in range(0, len(unit_a), block):
        similarity = unit_a[start : start + block] @ unit_b.T
        mean_D[start : start + block] = np.partition(similarity, -neighbours, axis=1)[:, -neighbours:].mean(axis=1)
    return mean_D
