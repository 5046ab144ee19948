"""The change of a loss is a ratio of sums, and its control draws as many neurons in every layer."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_xalign.analysis import ablation, resampling


def test_the_effect_is_nats_over_all_tokens() -> None:
    generator = np.random.default_rng(0)
    intact, tokens = generator.uniform(10, 50, 60), generator.integers(3, 20, 60)
    ablated = intact + 0.5 * tokens + generator.normal(0, 1, 60)
    counts = resampling.resample_counts(60, 200)
    found = ablation.ablation_effect(intact, ablated, tokens, counts)
    assert found.change == pytest.approx((sum(ablated) - sum(intact)) / sum(tokens))
    assert found.intact == pytest.approx(sum(intact) / sum(tokens))
    assert 0.3 < found.low < found.change < found.high < 0.7
    with pytest.raises(ValueError, match="same sentences"):
        ablation.ablation_effect(intact, ablated[1:], tokens, counts)
    with pytest.raises(ValueError, match="not finite"):
        ablation.ablation_effect(intact, np.full(60, np.nan), tokens, counts)


def test_the_control_is_as_many_other_neurons_of_every_layer() -> None:
    neurons = np.random.default_rng(1).random((5, 40)) < 0.2
    drawn = ablation.random_neurons_like(neurons, seed=3)
    assert not (drawn & neurons).any()
    np.testing.assert_array_equal(drawn.sum(1), neurons.sum(1))
    np.testing.assert_array_equal(drawn, ablation.random_neurons_like(neurons, seed=3))
    with pytest.raises(ValueError, match="layer 0 has 3"):
        ablation.random_neurons_like(np.array([[True, True, True, False]]), seed=0)


def test_selectivity_is_the_own_effect_above_the_others() -> None:
    np.testing.assert_allclose(ablation.selectivity(np.array([[3.0, 1, 0], [0, 2, 0], [1, 1, 1]])), [2.5, 2.0, 0.0])
    with pytest.raises(ValueError, match="square"):
        ablation.selectivity(np.ones((2, 3)))
