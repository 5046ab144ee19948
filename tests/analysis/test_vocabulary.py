"""Shared tokens, counted by Python's sets."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_xalign.analysis import vocabulary


def test_overlap_of_tokens_and_of_their_use() -> None:
    found = vocabulary.vocabulary_overlap(np.array([2, 2, 0, 0]), np.array([0, 3, 1, 0]))
    assert found.jaccard == 1 / 3
    assert found.mass == pytest.approx(min(2 / 4, 3 / 4))
    same = vocabulary.vocabulary_overlap(np.array([1, 5]), np.array([2, 10]))
    assert same.jaccard == same.mass == 1.0
    for bad in ([0, 0], [-1, 2], [np.nan, 1]):
        with pytest.raises(ValueError, match="token"):
            vocabulary.vocabulary_overlap(np.array(bad), np.array([1, 1]))
    with pytest.raises(ValueError, match="one vocabulary"):
        vocabulary.vocabulary_overlap(np.ones(2), np.ones(3))


def test_pairs_with_shared_and_with_the_same_tokens_are_told() -> None:
    a, b = [[1, 2], [3], [4, 5]], [[2, 9], [8], [4, 5]]
    assert vocabulary.shares_tokens(a, b).tolist() == [True, False, True]
    assert vocabulary.shares_tokens(a, b, ignored=[2]).tolist() == [False, False, True]
    assert vocabulary.identical_pairs(a, b).tolist() == [False, False, True]
    with pytest.raises(ValueError, match="3 sentences and 2"):
        vocabulary.shares_tokens(a, b[:2])
