"""Tests against scipy and against going through every arrangement; curves against hand-drawn ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from megatron_xalign.analysis import inference, resampling


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_sign_flips_are_those_of_scipy(alternative: inference.Alternative) -> None:
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.4, -1.0):
        differences = generator.normal(shift, size=9).round(1)
        found = inference.sign_flip_test(differences, alternative)
        expected = scipy.stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative
        )
        assert found.exact and found.num_arrangements == 512
        assert found.statistic == pytest.approx(differences.mean())
        # scipy doubles the smaller tail; with all signs the distribution is symmetric, so both are the same.
        assert found.p_value == pytest.approx(expected.pvalue)


def test_many_sentences_are_drawn_and_agree_with_the_normal_limit() -> None:
    generator = np.random.default_rng(1)
    differences = generator.normal(0.12, size=400)
    found = inference.sign_flip_test(differences, num_draws=20_000, seed=3)
    expected = scipy.stats.norm.sf(abs(differences.mean()) / np.sqrt(np.square(differences).sum()) * 400) * 2
    assert not found.exact
    assert found.p_value == pytest.approx(expected, abs=4 * np.sqrt(expected / 20_000))
    assert found == inference.sign_flip_test(differences, num_draws=20_000, seed=3)
    sure = inference.sign_flip_test(np.full(300, 0.1), num_draws=99)
    assert sure.p_value == 1 / 100


def test_layers_are_tested_with_the_same_signs() -> None:
    differences = np.random.default_rng(2).normal(size=(10, 4))
    together = inference.sign_flip_tests(differences)
    alone = [inference.sign_flip_test(column) for column in differences.T]
    assert [test.p_value for test in together] == [test.p_value for test in alone]
    assert [test.statistic for test in together] == pytest.approx([test.statistic for test in alone])
    with pytest.raises(ValueError, match="finite"):
        inference.sign_flip_tests(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="alternative"):
        inference.sign_flip_test(differences[:, 0], "up")  # type: ignore[arg-type]


def jonckheere_by_hand(values: list[float], doses: list[float]) -> float:
    total = 0.0
    for (x, dose_x), (y, dose_y) in itertools.permutations(zip(values, doses, strict=True), 2):
        if dose_x < dose_y:
            total += 1.0 if x < y else 0.5 if x == y else 0.0
    return total


def test_a_trend_over_runs_is_that_of_every_arrangement() -> None:
    values, doses = [0.3, 0.1, 0.5, 0.4, 0.4, 0.9], [0.0, 0.0, 0.01, 0.02, 0.02, 0.05]
    found = inference.trend_test(values, doses)
    every = [jonckheere_by_hand(list(order), doses) for order in itertools.permutations(values)]
    observed = jonckheere_by_hand(values, doses)
    assert found.exact and found.num_arrangements == 180 and found.statistic == observed
    assert found.p_value == pytest.approx(np.mean(np.array(every) >= observed))
    both = inference.trend_test(values, doses, alternative="two-sided")
    middle = np.mean(every)
    assert both.p_value == pytest.approx(np.mean(np.abs(np.array(every) - middle) >= abs(observed - middle)))


def test_rank_correlation_over_runs_is_that_of_scipy() -> None:
    values, doses = [0.3, 0.1, 0.5, 0.4, 0.4, 0.9], [0.0, 0.0, 0.01, 0.02, 0.02, 0.05]
    found = inference.trend_test(values, doses, "spearman")
    assert found.statistic == pytest.approx(scipy.stats.spearmanr(values, doses).statistic)
    every = [scipy.stats.spearmanr(order, doses).statistic for order in itertools.permutations(values)]
    assert found.p_value == pytest.approx(np.mean(np.array(every) >= found.statistic - 1e-12))


def test_one_run_per_fraction_cannot_be_surer_than_one_in_twenty_four() -> None:
    assert inference.trend_test([1, 2, 3, 4], [0, 1, 2, 5]).p_value == 1 / 24
    drawn = inference.trend_test(list(range(20)), list(range(20)), num_draws=500, seed=1)
    assert not drawn.exact and drawn.p_value == 1 / 501
    with pytest.raises(ValueError, match="two different doses"):
        inference.trend_test([1, 2], [3, 3])


def test_holm_is_the_step_down_rule() -> None:
    assert inference.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = np.random.default_rng(3).random(12) ** 3
    adjusted = inference.holm(p)
    for level in (0.01, 0.05, 0.3):
        rejected, left = set(), sorted(range(12), key=lambda number: p[number])
        while left and p[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert set(np.flatnonzero(adjusted <= level)) == rejected
    assert inference.holm([]).size == 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        inference.holm([0.2, np.nan])


def test_a_paired_interval_does_not_see_what_both_models_share() -> None:
    generator = np.random.default_rng(4)
    shared = generator.normal(0, 10, 200)
    a, b = shared + generator.normal(0, 0.1, 200), shared + 0.5 + generator.normal(0, 0.1, 200)
    counts = resampling.resample_counts(200, 500, seed=1)
    difference, low, high = inference.paired_difference_interval(a, b, counts)
    assert difference == pytest.approx((b - a).mean()) and 0.4 < low < difference < high < 0.6
    draws = [(np.repeat(b - a, row.astype(int))).mean() for row in counts]
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    with pytest.raises(ValueError, match="do not fit"):
        inference.paired_difference_interval(a, b[1:], counts)


def test_seeds_and_sentences_are_told_apart() -> None:
    generator = np.random.default_rng(5)
    sentence, seeds = generator.normal(0, 1.0, 400), generator.normal(0, 0.5, 40)
    values = seeds[:, None] + sentence[None, :] + generator.normal(0, 0.2, (40, 400))
    found = inference.hierarchical_interval(values, 300)
    assert found.mean == pytest.approx(values.mean()) and found.low < found.mean < found.high
    assert found.seed_deviation == pytest.approx(seeds.std(ddof=1), rel=0.05)
    assert found.sentence_error == pytest.approx(sentence.std(ddof=1) / 20, rel=0.05)
    assert found.covers == "training seeds and sentences"
    one = inference.hierarchical_interval(values[:1], 300)
    assert one.seed_deviation is None and "one seed" in one.covers
    assert one.high - one.low < found.high - found.low
    with pytest.raises(ValueError, match="seeds, sentences"):
        inference.hierarchical_interval(values[0])


def test_speed_of_learning_is_read_off_the_curve() -> None:
    steps, values = [0, 100, 300], [0.0, 1.0, 0.5]
    assert inference.area_under_curve(steps, values) == pytest.approx((50 + 150) / 300)
    assert inference.steps_to_reach(steps, values, 0.25) == pytest.approx(25)
    assert inference.steps_to_reach(steps, values, 0.0) == 0
    assert inference.steps_to_reach(steps, values, 1.01) is None
    for bad in ([0, 0, 1], [0, 2, 1]):
        with pytest.raises(ValueError, match="ascend"):
            inference.steps_to_reach(bad, values, 0.5)
    with pytest.raises(ValueError, match="one step"):
        inference.area_under_curve([3], [1.0])
