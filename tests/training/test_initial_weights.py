"""Initial weights: a function of seed, name and row, whatever is asked for together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_xalign.training.initial_weights import ROWS_PER_DRAW, normal_rows, truncated


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 5), (60, 10), (63, 2), (64, 64), (100, 200), (299, 1)])
def test_a_row_is_the_same_whatever_rows_are_asked_for_with_it(first: int, count: int) -> None:
    everything = normal_rows(5, "decoder.x.weight", 0, 300, 7)
    assert everything.shape == (300, 7)
    assert torch.equal(normal_rows(5, "decoder.x.weight", first, count, 7), everything[first : first + count])


def test_shards_of_any_number_of_ranks_make_up_the_same_matrix() -> None:
    whole = normal_rows(1, "w", 0, 96, 5)
    for ranks in (2, 3, 4):
        rows = 96 // ranks
        assert torch.equal(torch.cat([normal_rows(1, "w", rank * rows, rows, 5) for rank in range(ranks)]), whole)


def test_rows_of_the_vocabulary_do_not_depend_on_its_padding() -> None:
    assert torch.equal(normal_rows(1, "embedding", 0, 1024, 8)[:1000], normal_rows(1, "embedding", 0, 1000, 8))


def test_another_seed_or_name_gives_unrelated_weights() -> None:
    drawn = [normal_rows(seed, name, 0, 200, 50).flatten() for seed, name in ((1, "a"), (2, "a"), (1, "b"))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # 10,000 pairs: a correlation of unrelated numbers has deviation 0.01.
        assert abs(np.corrcoef(drawn[one], drawn[other])[0, 1]) < 0.05


def test_rows_are_standard_normal_and_differ_between_draws() -> None:
    values = normal_rows(9, "w", 0, 50 * ROWS_PER_DRAW, 20)
    assert values.mean().item() == pytest.approx(0.0, abs=0.02)
    assert values.std().item() == pytest.approx(1.0, abs=0.02)
    assert values.pow(4).mean().item() == pytest.approx(3.0, abs=0.15)
    assert len(np.unique(values.numpy(), axis=0)) == len(values)


def test_numbers_of_a_cut_distribution_are_its_quantiles() -> None:
    from scipy.stats import norm, truncnorm

    drawn = normal_rows(3, "w", 0, 200, 50)
    expected = truncnorm.ppf(norm.cdf(drawn.double().numpy()), -3, 3)
    np.testing.assert_allclose(truncated(drawn, 3.0).numpy(), expected, atol=2e-6)
