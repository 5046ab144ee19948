"""Bootstrap intervals against what statistics says they should be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from megatron_xalign.analysis import resampling


def test_counts_are_draws_with_replacement_and_the_seed_decides_them() -> None:
    counts = resampling.resample_counts(50, 2000, seed=1)
    assert counts.shape == (2000, 50)
    np.testing.assert_array_equal(counts.sum(axis=1), 50)
    assert abs((counts == 0).mean() - (1 - 1 / 50) ** 50) < 0.01
    np.testing.assert_array_equal(counts, resampling.resample_counts(50, 2000, seed=1))
    assert not np.array_equal(counts, resampling.resample_counts(50, 2000, seed=2))


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=80)
    low, high = resampling.bootstrap_interval(values, num_resamples=4000, seed=3)
    theirs = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=4).confidence_interval
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.06 * width and abs(high - theirs.high) < 0.06 * width


def test_counts_and_loop_draw_the_same_resamples() -> None:
    values = np.random.default_rng(5).normal(size=30)
    counts = resampling.resample_counts(30, 200, seed=6)
    low, high = resampling.percentile_interval(counts @ values / 30)
    np.testing.assert_allclose(resampling.bootstrap_interval(values, num_resamples=200, seed=6), (low, high))


def test_any_statistic_of_whole_sentences_can_be_resampled() -> None:
    nats_and_tokens = np.array([[10.0, 5], [30.0, 10], [8.0, 8], [20.0, 4]])
    low, high = resampling.bootstrap_interval(nats_and_tokens, lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum())
    assert 1.0 <= low < 68 / 27 < high <= 5.0


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    generator = np.random.default_rng(7)
    held = 0
    for seed in range(200):
        low, high = resampling.bootstrap_interval(generator.normal(2.0, 1.0, 60), num_resamples=300, seed=seed)
        held += low <= 2.0 <= high
    assert 178 <= held <= 199


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        resampling.resample_counts(0)
    with pytest.raises(ValueError, match="finite"):
        resampling.bootstrap_interval(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="at least one"):
        resampling.bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="level=1"):
        resampling.percentile_interval(np.ones(3), level=1.0)
