"""N-grams counted by hand, and the choice of a strength."""

from __future__ import annotations

import math

import pytest

from megatron_xalign.analysis import generation


def test_ngrams_are_counted_over_all_texts_or_by_text() -> None:
    assert generation.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert generation.distinct_n([[1]], 2) == 0.0
    looped, fresh = [1, 2, 3, 4] * 3, list(range(9))
    assert generation.repeated_ngram_rate([looped]) == pytest.approx(1 - 4 / 9)
    assert generation.repeated_ngram_rate([looped, fresh, [1, 2]]) == pytest.approx((1 - 4 / 9) / 2)
    with pytest.raises(ValueError, match="n=0"):
        generation.distinct_n([[1]], 0)


def test_the_harmonic_mean_lets_nothing_make_up_for_nothing() -> None:
    assert generation.harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3)
    assert generation.harmonic_mean([0.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        generation.harmonic_mean([1.2])


def test_the_strength_that_is_both_in_the_language_and_text_is_chosen() -> None:
    def score(rate: float, loss: float, repeated: float = 0.0) -> generation.SteeringScore:
        return generation.SteeringScore(rate, loss, repeated, 2.0)

    assert score(1.0, 3.0, 0.5).fluency == pytest.approx(math.exp(-1) / 2)
    assert score(1.0, 1.0).value == 1.0
    scores = {0.0: score(0.0, 2.0), 1.0: score(0.8, 2.2), 4.0: score(1.0, 7.0), -1.0: score(0.8, 2.2)}
    assert generation.choose_strength(scores) == 1.0
    assert generation.choose_strength({-2.0: score(0.5, 2.0), 1.0: score(0.5, 2.0)}) == 1.0
    with pytest.raises(ValueError, match="no strength"):
        generation.choose_strength({})
