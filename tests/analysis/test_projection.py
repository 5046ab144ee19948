"""PCA and silhouette against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from megatron_xalign.analysis import projection


@pytest.mark.parametrize("shape", [(50, 8), (6, 20)])
def test_pca_is_that_of_scikit_learn_signs_included(shape: tuple[int, int]) -> None:
    acts = np.random.default_rng(0).normal(size=shape) * np.linspace(1, 3, shape[1]) + 10
    ours = projection.pca(acts, num_components=3)
    theirs = PCA(3, svd_solver="full").fit(acts)
    np.testing.assert_allclose(ours.explained_ratio_C, theirs.explained_variance_ratio_, atol=1e-12)
    np.testing.assert_allclose(ours.basis_CH, theirs.components_, atol=1e-10)
    np.testing.assert_allclose(ours.coordinates_DC, theirs.transform(acts), atol=1e-10)
    np.testing.assert_allclose(ours.project(acts[:2] + 1), theirs.transform(acts[:2] + 1), atol=1e-10)


def test_the_largest_entry_of_every_axis_is_positive() -> None:
    acts = np.random.default_rng(1).normal(size=(30, 5))
    for cloud in (acts, -acts):
        basis = projection.pca(cloud, 5).basis_CH
        assert (basis[np.arange(5), np.abs(basis).argmax(axis=1)] > 0).all()
    np.testing.assert_allclose(projection.pca(acts, 5).basis_CH, projection.pca(-acts, 5).basis_CH, atol=1e-12)


def test_points_on_a_line_need_one_axis() -> None:
    acts = np.arange(6.0)[:, None] * np.array([3.0, 0.0, 4.0]) + 7
    found = projection.pca(acts, 2)
    np.testing.assert_allclose(found.explained_ratio_C, [1, 0], atol=1e-12)
    np.testing.assert_allclose(found.coordinates_DC[:, 0], 5 * (np.arange(6) - 2.5), atol=1e-12)


def test_pca_refuses_points_without_spread_and_too_many_components() -> None:
    with pytest.raises(ValueError, match="same for all 4 sentences"):
        projection.pca(np.full((4, 3), 0.1))
    with pytest.raises(ValueError, match="num_components=4"):
        projection.pca(np.eye(3), 4)
    with pytest.raises(ValueError, match="at least 2"):
        projection.pca(np.ones((1, 3)))
    with pytest.raises(ValueError, match="the basis has 3"):
        projection.pca(np.eye(3)).project(np.ones((2, 4)))


@pytest.mark.parametrize("groups", [2, 3])
def test_silhouette_is_that_of_scikit_learn(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(groups)
    labels = generator.integers(0, groups, 60)
    points = generator.normal(size=(60, 5)) + labels[:, None] + 1000
    labels[0] = 77  # a group of one counts 0
    expected = silhouette_score(points, labels)
    assert projection.silhouette(points, labels) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(projection, "_BLOCK_DISTANCES", 60 * 7)
    assert projection.silhouette(points, labels) == pytest.approx(expected, abs=1e-9)


def test_silhouette_of_coinciding_points_is_zero_and_needs_two_groups() -> None:
    assert projection.silhouette(np.ones((6, 2)), np.arange(6) % 2) == 0.0
    with pytest.raises(ValueError, match="1 groups of 6"):
        projection.silhouette(np.eye(6), np.zeros(6, int))
    with pytest.raises(ValueError, match="6 groups of 6"):
        projection.silhouette(np.eye(6), np.arange(6))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        projection.silhouette(np.eye(6), np.arange(5))


@pytest.mark.parametrize("width", [4, 90])
def test_a_linear_probe_is_ridge_classification_on_folds_that_keep_pairs_together(width: int) -> None:
    from sklearn.linear_model import Ridge

    generator = np.random.default_rng(3)
    pair, group = np.tile(np.arange(40), 2), np.repeat([0, 1], 40)
    points = generator.normal(size=(80, width)) + 0.7 * group[:, None] * (np.arange(width) < 3)
    found = projection.linear_probe(points, group, pair, seed=2)
    fold = (np.random.default_rng(2).permutation(40) % 5)[pair]
    scaled = points - points.mean(0)
    scaled /= np.sqrt(np.square(scaled).mean())
    right = 0
    for number in range(5):
        fit = fold != number
        model = Ridge(alpha=1e-3 * fit.sum()).fit(scaled[fit], np.eye(2)[group[fit]])
        right += int((model.predict(scaled[~fit]).argmax(1) == group[~fit]).sum())
    assert found.accuracy == pytest.approx(right / 80)
    assert found.chance == 0.5 and len(found.by_fold) == 5


def test_a_linear_probe_of_noise_is_at_chance_and_of_far_groups_perfect() -> None:
    generator = np.random.default_rng(4)
    group = np.arange(300) % 3
    noise = generator.normal(size=(300, 8))
    assert abs(projection.linear_probe(noise, group).accuracy - 1 / 3) < 0.1
    assert projection.linear_probe(noise + 20 * np.eye(8)[group], group).accuracy == 1.0
    with pytest.raises(ValueError, match="leaves no sentence of group 7"):
        projection.linear_probe(noise[:10], np.array([7] + [1] * 9))
    with pytest.raises(ValueError, match="two of each"):
        projection.linear_probe(noise, np.zeros(300))
