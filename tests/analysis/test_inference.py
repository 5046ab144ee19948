"""Tests and curves against scipy and against loops over every permutation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from megatron_xalign.analysis.inference import area_under_curve, holm, sign_flip_test, steps_to_reach, trend_test


@pytest.mark.parametrize("seed", range(5))
def test_sign_flips_are_all_looked_at_where_they_are_few(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.3, 1, 11)
    values[3] = 0.0
    found = sign_flip_test(values)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert found.exact and found.statistic == pytest.approx(values.mean())
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)


def test_random_sign_flips_agree_with_a_normal_approximation() -> None:
    values = np.random.default_rng(4).normal(0.1, 1, 400)
    found = sign_flip_test(values, 20_000)
    z = values.sum() / np.sqrt((values**2).sum())
    assert not found.exact
    assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)
    assert found == sign_flip_test(values, 20_000)
    # No random flip is as extreme as all signs alike: what is left is the data themselves.
    assert sign_flip_test(np.full(400, 0.5), 999).p_value == pytest.approx(1 / 1000)


def test_no_difference_is_no_evidence() -> None:
    assert sign_flip_test(np.zeros(9)).p_value == 1.0


@pytest.mark.parametrize("doses", [[0, 0, 0.05, 0.05, 0.2, 0.2], [0, 0.01, 0.02, 0.05], [0, 0, 0, 0.5, 0.5, 0.5]])
def test_a_trend_is_ranked_over_every_order_of_the_runs(doses: list[float]) -> None:
    values = np.random.default_rng(7).normal(size=len(doses)) + np.array(doses)
    found = trend_test(doses, values)
    observed = stats.spearmanr(doses, values).statistic
    every = [abs(stats.spearmanr(order, values).statistic) for order in itertools.permutations(doses)]
    assert found.statistic == pytest.approx(observed)
    assert found.exact and found.p_value == pytest.approx(np.mean(np.array(every) >= abs(observed) - 1e-9))
    assert found.smallest_p_value == pytest.approx(np.mean(np.array(every) >= max(every) - 1e-9))


def test_a_trend_over_many_runs_is_sampled() -> None:
    doses = np.repeat([0, 0.01, 0.02, 0.05], 5)
    values = np.random.default_rng(3).normal(size=20) + 20 * doses
    found = trend_test(doses, values)
    expected = stats.spearmanr(doses, values)
    assert not found.exact
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 runs"):
        trend_test([0, 1], [1, 2])
    with pytest.raises(ValueError, match="nothing to trend over"):
        trend_test([1, 1, 1], [1, 2, 3])
    with pytest.raises(ValueError, match="finite"):
        sign_flip_test(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match=r"not all in \[0, 1\]"):
        holm([0.5, 1.5])


def test_holm_is_the_step_down_rule() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_area_is_the_mean_height() -> None:
    x = [0, 10, 20, 40]
    y = np.array([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0], [3.0, 1.0]])
    assert area_under_curve(x, y) == pytest.approx([(5 + 20 + 60) / 40, 1.0])
    assert area_under_curve(x, y, until=15) == pytest.approx([(5 + 5 * 1.5) / 15, 1.0])
    fine = np.linspace(0, 40, 40_001)
    assert area_under_curve(x, y[:, 0], until=33) == pytest.approx(
        np.interp(fine[fine <= 33], x, y[:, 0]).mean(), rel=1e-3
    )
    with pytest.raises(ValueError, match="outside"):
        area_under_curve(x, y, until=41)


def test_a_level_is_reached_between_two_probes() -> None:
    assert steps_to_reach([0, 100, 200], [0.0, 0.2, 0.6], 0.3) == pytest.approx(125)
    assert steps_to_reach([0, 100], [0.5, 0.2], 0.3) == 0
    assert steps_to_reach([0, 100], [0.1, 0.2], 0.3) is None
