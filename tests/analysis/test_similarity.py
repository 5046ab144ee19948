"""Cosine against all pairs, CCA against other routes to the same number, CKA against Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_xalign.analysis import resampling, similarity
from megatron_xalign.analysis.moments import PairMoments


def related(
    seed: int, num: int = 120, width_a: int = 12, width_b: int = 12, shared: int = 5, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two representations that share some directions."""
    generator = np.random.default_rng(seed)
    latent = generator.normal(size=(num, shared))
    acts_a = latent @ generator.normal(size=(shared, width_a)) + generator.normal(size=(num, width_a))
    acts_b = latent @ generator.normal(size=(shared, width_b)) + generator.normal(size=(num, width_b))
    return acts_a + shift * generator.normal(size=width_a), acts_b + shift * generator.normal(size=width_b)


def rotation(seed: int, width: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


# --- cosine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_the_closed_form_is_the_mean_over_all_pairs(centred: bool) -> None:
    acts_a, acts_b = related(0, num=17, shift=3.0)
    found = similarity.cosine(acts_a, acts_b, centred=centred)
    if centred:
        acts_a, acts_b = acts_a - acts_a.mean(0), acts_b - acts_b.mean(0)
    pairs = np.array(
        [[x @ y / np.sqrt(x @ x) / np.sqrt(y @ y) for y in acts_b] for x in acts_a]
    )
    off_diagonal = pairs[~np.eye(17, dtype=bool)]
    assert found.translation == pytest.approx(np.diag(pairs).mean(), abs=1e-14)
    assert found.random == pytest.approx(pairs.mean(), abs=1e-14)
    assert found.random_derangement == pytest.approx(off_diagonal.mean(), abs=1e-14)
    assert found.gap == pytest.approx(np.diag(pairs).mean() - pairs.mean(), abs=1e-14)


def test_a_zero_vector_has_cosine_zero_and_tiny_ones_what_torch_says() -> None:
    acts_a = np.array([[0.0, 0.0], [3e-9, 4e-9], [1.0, 2.0]])
    acts_b = np.array([[1.0, 2.0], [3e-9, 4e-9], [-2.0, 5.0]])
    found = similarity.cosine(acts_a, acts_b)
    expected = torch.cosine_similarity(torch.tensor(acts_a), torch.tensor(acts_b), dim=1).numpy()
    np.testing.assert_allclose(found.translation_D, expected, rtol=1e-12)
    assert found.translation_D[0] == 0.0


def test_a_resampled_gap_is_the_gap_of_the_drawn_sentences() -> None:
    acts_a, acts_b = related(1, num=15, shift=1.0)
    counts = resampling.resample_counts(15, 4, seed=3)
    gaps = similarity.resampled_cosine_gap(acts_a, acts_b, counts)
    for gap, count in zip(gaps, counts.astype(int), strict=True):
        drawn = np.repeat(np.arange(15), count)
        assert gap == pytest.approx(similarity.cosine(acts_a[drawn], acts_b[drawn]).gap, abs=1e-13)
    with pytest.raises(ValueError, match="counts_RD"):
        similarity.resampled_cosine_gap(acts_a, acts_b, counts[:, :-1])


# --- PWCCA ---------------------------------------------------------------------------------------------------------


def pwcca_by_inverse_roots(acts_a: np.ndarray, acts_b: np.ndarray) -> float:
    """Morcos et al. as printed: h_i = u_i' Sxx^-1/2 (X - mean), w_i = sum_j |<h_i, x_j>|; full rank only."""
    centred_a, centred_b = acts_a - acts_a.mean(0), acts_b - acts_b.mean(0)

    def inverse_root(matrix: np.ndarray) -> np.ndarray:
        values, axes = np.linalg.eigh(matrix)
        return axes @ np.diag(values**-0.5) @ axes.T

    root_a, root_b = inverse_root(centred_a.T @ centred_a), inverse_root(centred_b.T @ centred_b)
    left, rho, _ = np.linalg.svd(root_a @ centred_a.T @ centred_b @ root_b, full_matrices=False)
    total = weighted = 0.0
    for i in range(len(rho)):
        direction = centred_a @ root_a @ left[:, i]
        weight = sum(abs(direction @ centred_a[:, j]) for j in range(centred_a.shape[1]))
        total, weighted = total + weight, weighted + weight * rho[i]
    return weighted / total


def pwcca_by_the_reference_recipe(acts_a: np.ndarray, acts_b: np.ndarray, epsilon: float = 0.0) -> float:
    """google/svcca step by step, [neurons, sentences] as there, the directions and their QR written out."""
    x, y = acts_a.T.astype(float), acts_b.T.astype(float)
    covariance = np.cov(x, y)
    n_x = len(x)
    sxx, sxy, syy = covariance[:n_x, :n_x], covariance[:n_x, n_x:], covariance[n_x:, n_x:]
    x_max, y_max = abs(sxx).max(), abs(syy).max()
    sxx, syy, sxy = sxx / x_max, syy / y_max, sxy / np.sqrt(x_max * y_max)
    x_kept, y_kept = abs(np.diagonal(sxx)) >= epsilon, abs(np.diagonal(syy)) >= epsilon
    sxx, sxy, syy = sxx[x_kept][:, x_kept], sxy[x_kept][:, y_kept], syy[y_kept][:, y_kept]

    def root_of_inverse(s: np.ndarray) -> np.ndarray:
        w, v = np.linalg.eigh(np.linalg.pinv(s + epsilon * np.eye(len(s))))
        return v.dot(np.diag(np.sqrt(w))).dot(v.T)

    u, rho, v = np.linalg.svd(root_of_inverse(sxx).dot(sxy).dot(root_of_inverse(syy)))
    kept, coefficients = (x[x_kept], u.T) if x_kept.sum() <= y_kept.sum() else (y[y_kept], v)
    mu = kept.mean(axis=1, keepdims=True)
    directions = coefficients.dot(kept - mu) + mu
    q, _ = np.linalg.qr(directions.T)
    weights = np.array([sum(abs(q[:, i].dot(neuron)) for neuron in kept) for i in range(q.shape[1])])
    return float((weights / weights.sum()).dot(rho))


@pytest.mark.parametrize(("width_a", "width_b"), [(12, 12), (8, 15), (15, 8)])
def test_definition_is_the_published_formula(width_a: int, width_b: int) -> None:
    acts_a, acts_b = related(2, width_a=width_a, width_b=width_b, shift=2.0)
    found = similarity.pwcca(acts_a, acts_b)
    assert found.value == pytest.approx(pwcca_by_inverse_roots(acts_a, acts_b), abs=1e-12)
    assert found.weights.sum() == pytest.approx(1)
    assert (found.rank_a, found.rank_b) == (width_a, width_b)
    assert len(found.coefficients) == min(width_a, width_b)


@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0])
@pytest.mark.parametrize(("width_a", "width_b", "epsilon"), [(12, 12, 0.0), (8, 15, 0.0), (15, 8, 0.0), (12, 12, 1e-3)])
def test_svcca_mode_is_the_reference_recipe(shift: float, width_a: int, width_b: int, epsilon: float) -> None:
    acts_a, acts_b = related(3, width_a=width_a, width_b=width_b, shift=shift)
    acts_a[:, 2] *= 1e-3  # below the epsilon of the last case, so it is dropped there
    found = similarity.pwcca(acts_a, acts_b, mode="svcca", epsilon=epsilon)
    assert found.value == pytest.approx(pwcca_by_the_reference_recipe(acts_a, acts_b, epsilon), abs=1e-9)
    assert found.rank_a == width_a - (epsilon > 0)


def test_a_common_vector_moves_the_reference_but_not_the_definition() -> None:
    acts_a, acts_b = related(4)
    common = 100 * np.random.default_rng(0).normal(size=12)
    plain, shifted = similarity.pwcca(acts_a, acts_b), similarity.pwcca(acts_a + common, acts_b + common)
    assert shifted.value == pytest.approx(plain.value, abs=1e-9)
    reference, moved = (
        similarity.pwcca(acts_a + by, acts_b + by, mode="svcca").value for by in (np.zeros(12), common)
    )
    assert moved > reference + 0.05


def test_canonical_correlations_do_not_depend_on_linear_maps_and_the_value_not_on_scale() -> None:
    acts_a, acts_b = related(5)
    generator = np.random.default_rng(8)
    plain = similarity.pwcca(acts_a, acts_b)
    mapped = similarity.pwcca(acts_a @ generator.normal(size=(12, 12)), acts_b @ generator.normal(size=(12, 12)))
    np.testing.assert_allclose(mapped.coefficients, plain.coefficients, atol=1e-9)
    # The weights see features of the first representation, so only maps of the second leave them alone.
    turned = similarity.pwcca(7 * acts_a, acts_b @ rotation(1, 12))
    assert turned.value == pytest.approx(plain.value, abs=1e-12)


def test_a_repeated_feature_and_a_constant_one_change_the_rank_and_not_the_correlations() -> None:
    acts_a, acts_b = related(6)
    plain = similarity.pwcca(acts_a, acts_b)
    wider = np.hstack([acts_a, acts_a[:, :3], np.full((120, 1), 4.0)])
    deficient = similarity.pwcca(wider, acts_b)
    assert (deficient.rank_a, deficient.rank_b) == (12, 12)
    np.testing.assert_allclose(deficient.coefficients, plain.coefficients, atol=1e-9)
    assert deficient.rank_deficient and not plain.rank_deficient
    for sides in ((wider, acts_b), (acts_b, wider), (wider, wider)):
        reported = similarity.pwcca(*sides, mode="svcca")
        assert 0 < reported.value <= 1 + 1e-9 and reported.rank_deficient
        assert (reported.rank_a, reported.rank_b) == (12, 12)
        assert len(reported.coefficients) == len(reported.weights) == 12
    np.testing.assert_allclose(
        similarity.pwcca(wider, acts_b, mode="svcca").coefficients, plain.coefficients, atol=1e-6
    )
    assert 0 < similarity.pwcca(wider, acts_b, mode="svcca", epsilon=1e-5).value < 1


def test_fewer_sentences_than_features_correlate_perfectly_by_definition_and_not_on_held_out_ones() -> None:
    generator = np.random.default_rng(10)
    acts_a, acts_b = generator.normal(size=(2, 40, 60))
    found = similarity.pwcca(acts_a, acts_b)
    assert found.value == pytest.approx(1) and found.rank_a == 39
    assert abs(similarity.pwcca(acts_a, acts_b, mode="split").value) < 0.3
    with pytest.raises(ValueError, match="more sentences than features"):
        similarity.pwcca(acts_a, acts_b, mode="svcca")


def test_split_refuses_a_half_that_never_changes() -> None:
    acts_a, acts_b = related(29)
    acts_b[::2] = 1.0
    with pytest.raises(ValueError, match="every other sentence of acts_b_DH is the same for all 60"):
        similarity.pwcca(acts_a, acts_b, mode="split")


def test_split_has_no_chance_floor_where_the_other_modes_have_one() -> None:
    generator = np.random.default_rng(11)
    acts_a, acts_b = generator.normal(size=(2, 300, 30))
    assert similarity.pwcca(acts_a, acts_b).value > 0.2
    assert abs(similarity.pwcca(acts_a, acts_b, mode="split").value) < 0.05
    assert similarity.pwcca(acts_a, acts_a @ rotation(2, 30), mode="split").value == pytest.approx(1)


def test_the_baseline_report_holds_both_directions_and_the_floor() -> None:
    acts_a, acts_b = related(12, num=200, width_a=20, width_b=20)
    report = similarity.pwcca_with_baseline(acts_a, acts_b, num_permutations=3, seed=1)
    assert report.forward == pytest.approx(similarity.pwcca(acts_a, acts_b).value, abs=1e-12)
    assert report.backward == pytest.approx(similarity.pwcca(acts_b, acts_a).value, abs=1e-12)
    assert report.mean == (report.forward + report.backward) / 2
    generator = np.random.default_rng(1)
    shuffled = []
    for _ in range(3):
        other = acts_b[generator.permutation(200)]
        shuffled += [similarity.pwcca(acts_a, other).value, similarity.pwcca(other, acts_a).value]
    assert report.permuted == pytest.approx(np.mean(shuffled), abs=1e-12)
    assert report.permuted < report.mean


@pytest.mark.parametrize("width", [40, 600])
def test_a_large_representation_has_the_value_of_the_published_formula(width: int) -> None:
    # Beyond 512 features another route is taken.
    acts_a, acts_b = related(22, num=3 * width, width_a=width, width_b=width, shared=width // 2, shift=20.0)
    found = similarity.pwcca(acts_a, acts_b)
    left_a, size_a, axes_a = np.linalg.svd(acts_a - acts_a.mean(0), full_matrices=False)
    left_b = np.linalg.svd(acts_b - acts_b.mean(0), full_matrices=False)[0]
    turned, rho, _ = np.linalg.svd(left_a.T @ left_b)
    weights = np.abs((turned.T * size_a) @ axes_a).sum(1)
    assert found.value == pytest.approx(weights @ rho / weights.sum(), abs=1e-9)
    np.testing.assert_allclose(found.coefficients, rho, atol=1e-7)


def test_moments_of_blocks_and_of_processes_add_up_to_the_value_of_all_sentences() -> None:
    acts_a, acts_b = related(23, num=400, width_a=9, width_b=14, shift=50.0)
    whole = PairMoments(9, 14)
    whole.update(acts_a, acts_b)
    parts = [PairMoments(9, 14) for _ in range(3)]
    for start in range(0, 400, 37):
        parts[start % 3].update(acts_a[start : start + 37].astype(np.float64), acts_b[start : start + 37])
    total = PairMoments(9, 14)
    for part in parts:
        total.merge(PairMoments.from_state(part.state()))
    assert total.num_sentences == 400
    for mode in ("definition", "svcca"):
        expected = similarity.pwcca(acts_a, acts_b, mode=mode)
        for moments in (whole, total):
            found = similarity.pwcca_from_moments(moments, mode)
            assert found.value == pytest.approx(expected.value, abs=1e-9)
            assert (found.rank_a, found.rank_b) == (expected.rank_a, expected.rank_b)
    assert similarity.cka_from_moments(total) == pytest.approx(similarity.linear_cka(acts_a, acts_b), abs=1e-12)
    consumed = similarity.pwcca_from_moments(whole, consume=True)
    assert consumed.value == pytest.approx(similarity.pwcca(acts_a, acts_b).value, abs=1e-12)


def test_a_large_common_vector_costs_the_moments_no_digits() -> None:
    acts_a, acts_b = related(24, num=300)
    plain = similarity.pwcca(acts_a, acts_b).value
    moments = PairMoments(12, 12)
    for start in range(0, 300, 50):
        moments.update(acts_a[start : start + 50] + 1e6, acts_b[start : start + 50] - 1e6)
    assert similarity.pwcca_from_moments(moments).value == pytest.approx(plain, abs=1e-8)


def test_moments_refuse_what_does_not_fit_and_keep_what_they_have() -> None:
    acts_a, acts_b = related(25)
    moments = PairMoments(12, 12)
    moments.update(acts_a, acts_b)
    with pytest.raises(ValueError, match="acts_b_DH has 11 features"):
        moments.update(acts_a, acts_b[:, 1:])
    with pytest.raises(ValueError, match="119 sentences"):
        moments.update(acts_a[1:], acts_b)
    broken = acts_a.copy()
    broken[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        moments.update(broken, acts_b)
    with pytest.raises(ValueError, match="do not add"):
        moments.merge(PairMoments(12, 13))
    assert similarity.pwcca_from_moments(moments).value == similarity.pwcca(acts_a, acts_b).value
    with pytest.raises(ValueError, match="two are needed"):
        similarity.pwcca_from_moments(PairMoments(3, 3))
    constant = PairMoments(2, 2)
    constant.update(np.ones((5, 2)), np.ones((5, 2)))
    with pytest.raises(ValueError, match="same for all 5"):
        similarity.pwcca_from_moments(constant)
    with pytest.raises(ValueError, match="split needs the sentences"):
        similarity.pwcca_from_moments(moments, "split")  # type: ignore[arg-type]


def test_moments_made_by_torch_are_those_of_blas() -> None:
    acts_a, acts_b = related(26, width_b=7)
    blas, other = PairMoments(12, 7, "cpu"), PairMoments(12, 7, "cpu:0")
    for moments in (blas, other):
        moments.update(acts_a, acts_b)
    expected, found = blas.scatter(), other.scatter()
    np.testing.assert_allclose(np.tril(found.aa_HH), expected.aa_HH, atol=1e-10)
    np.testing.assert_allclose(found.ab_HH, expected.ab_HH, atol=1e-10)
    assert similarity.pwcca_from_moments(other).value == pytest.approx(similarity.pwcca_from_moments(blas).value)


# --- SVCCA ---------------------------------------------------------------------------------------------------------


def test_svcca_is_cca_of_the_principal_components() -> None:
    acts_a, acts_b = related(13, shift=5.0)
    found = similarity.svcca(acts_a, acts_b, num_directions=4)

    def leading(acts: np.ndarray, count: int) -> np.ndarray:
        centred = acts - acts.mean(0)
        _, axes = np.linalg.eigh(centred.T @ centred)
        return centred @ axes[:, ::-1][:, :count]

    block = np.cov(leading(acts_a, 4).T, leading(acts_b, 4).T)
    squared = np.linalg.inv(block[:4, :4]) @ block[:4, 4:] @ np.linalg.inv(block[4:, 4:]) @ block[4:, :4]
    rho = np.sort(np.sqrt(np.linalg.eigvals(squared).real))[::-1]
    np.testing.assert_allclose(found.coefficients, rho, atol=1e-7)
    assert found.value == pytest.approx(rho.mean(), abs=1e-7)


def test_svcca_keeps_the_fewest_directions_that_reach_the_variance() -> None:
    generator = np.random.default_rng(14)
    scale = np.array([10.0, 3.0, 1.0, 0.01])
    acts = (generator.normal(size=(500, 4)) * scale) @ rotation(3, 4)
    found = similarity.svcca(acts, acts, variance=0.95)
    share = np.cumsum(np.linalg.eigvalsh(np.cov(acts.T))[::-1]) / np.trace(np.cov(acts.T))
    assert found.num_directions_a == found.num_directions_b == int(np.argmax(share >= 0.95)) + 1
    assert found.value == pytest.approx(1)
    assert similarity.svcca(acts, acts, variance=1.0).num_directions_a == 4
    with pytest.raises(ValueError, match="num_directions=5"):
        similarity.svcca(acts, acts, num_directions=5)


# --- CKA -----------------------------------------------------------------------------------------------------------


def hsic_1(gram_x: np.ndarray, gram_y: np.ndarray) -> float:
    """Unbiased HSIC of Song et al., from Gram matrices without their diagonals."""
    n = len(gram_x)
    k, m = gram_x - np.diag(np.diag(gram_x)), gram_y - np.diag(np.diag(gram_y))
    one = np.ones(n)
    return (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


@pytest.mark.parametrize(("num", "width_a", "width_b"), [(120, 12, 7), (9, 12, 20), (4, 3, 3)])
def test_cka_is_that_of_explicit_gram_matrices(num: int, width_a: int, width_b: int) -> None:
    acts_a, acts_b = related(15, num=num, width_a=width_a, width_b=width_b, shift=1.0)
    gram_a, gram_b = acts_a @ acts_a.T, acts_b @ acts_b.T
    centring = np.eye(num) - 1 / num
    plain = np.trace(gram_a @ centring @ gram_b @ centring) / np.sqrt(
        np.trace(gram_a @ centring @ gram_a @ centring) * np.trace(gram_b @ centring @ gram_b @ centring)
    )
    assert similarity.linear_cka(acts_a, acts_b) == pytest.approx(plain, abs=1e-12)
    unbiased = hsic_1(gram_a, gram_b) / np.sqrt(hsic_1(gram_a, gram_a) * hsic_1(gram_b, gram_b))
    assert similarity.linear_cka(acts_a, acts_b, debiased=True) == pytest.approx(unbiased, abs=1e-10)


def test_debiased_cka_of_unrelated_representations_is_zero_on_average() -> None:
    generator = np.random.default_rng(16)
    draws = [generator.normal(size=(2, 30, 40)) for _ in range(40)]
    plain = np.array([similarity.linear_cka(*draw) for draw in draws])
    debiased = np.array([similarity.linear_cka(*draw, debiased=True) for draw in draws])
    assert plain.min() > 0.4
    assert abs(debiased.mean()) < 3 * debiased.std() / np.sqrt(40)
    assert debiased.min() < 0


def test_cka_ignores_rotation_scale_and_shift() -> None:
    acts_a, acts_b = related(17)
    for debiased in (False, True):
        plain = similarity.linear_cka(acts_a, acts_b, debiased)
        moved = similarity.linear_cka(1e6 * acts_a @ rotation(4, 12) + 5, 1e-6 * acts_b, debiased)
        assert moved == pytest.approx(plain, abs=1e-9)
        assert similarity.linear_cka(acts_a, acts_a, debiased) == pytest.approx(1)


def test_minibatch_cka_averages_unbiased_hsic_and_not_the_ratio() -> None:
    acts_a, acts_b = related(27, num=90, width_a=12, width_b=7)
    cka, sums = similarity.MinibatchCka(), np.zeros(3)
    for start in range(0, 90, 30):
        one, two = acts_a[start : start + 30], acts_b[start : start + 30]
        cka.update(one, two)
        grams = one @ one.T, two @ two.T
        sums += [hsic_1(*grams), hsic_1(grams[0], grams[0]), hsic_1(grams[1], grams[1])]
    assert cka.value == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]), abs=1e-10)
    single = similarity.MinibatchCka()
    single.update(acts_a, acts_b)
    assert single.value == pytest.approx(similarity.linear_cka(acts_a, acts_b, debiased=True), abs=1e-10)
    single.merge(cka)
    assert single.num_batches == 4
    with pytest.raises(ValueError, match="0 batches"):
        similarity.MinibatchCka().value  # noqa: B018


def test_sentence_gaps_average_to_the_gap_and_percentiles_are_of_the_translations() -> None:
    acts_a, acts_b = related(28, shift=2.0)
    for centred in (False, True):
        found = similarity.cosine(acts_a, acts_b, centred)
        gaps = similarity.sentence_gaps(acts_a, acts_b, centred)
        assert gaps.mean() == pytest.approx(found.gap, abs=1e-13)
    cosines = np.array([x @ y / np.sqrt(x @ x * (y @ y)) for x, y in zip(acts_a, acts_b, strict=True)])
    np.testing.assert_allclose(similarity.cosine(acts_a, acts_b).percentiles([0, 0.5]), np.quantile(cosines, [0, 0.5]))


def test_permuted_cka_is_the_mean_over_shuffled_pairs() -> None:
    acts_a, acts_b = related(18)
    generator = np.random.default_rng(2)
    expected = np.mean([similarity.linear_cka(acts_a, acts_b[generator.permutation(120)]) for _ in range(3)])
    assert similarity.permuted_cka(acts_a, acts_b, num_permutations=3, seed=2) == pytest.approx(expected)


# --- bad input -----------------------------------------------------------------------------------------------------

MEASURES = [
    similarity.cosine,
    similarity.pwcca,
    lambda a, b: similarity.pwcca(a, b, mode="svcca"),
    lambda a, b: similarity.pwcca(a, b, mode="split"),
    similarity.svcca,
    similarity.linear_cka,
    lambda a, b: similarity.linear_cka(a, b, debiased=True),
]


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_representations_are_refused(measure) -> None:  # type: ignore[no-untyped-def]
    acts_a, acts_b = related(19)
    with pytest.raises(ValueError, match="acts_a_DH has 119 sentences and acts_b_DH 120"):
        measure(acts_a[1:], acts_b)
    for bad in (np.nan, np.inf):
        broken = acts_b.copy()
        broken[7, 3] = bad
        with pytest.raises(ValueError, match=r"acts_b_DH holds NaN or infinity in 1 of 120 sentences.*number 7"):
            measure(acts_a, broken)
    with pytest.raises(ValueError, match=r"at least \d sentence"):
        measure(acts_a[:1], acts_b[:1])
    with pytest.raises(ValueError, match=r"\[sentences, features\]"):
        measure(acts_a[0], acts_b[0])


@pytest.mark.parametrize("measure", MEASURES[1:])
def test_a_representation_that_never_changes_is_refused(measure) -> None:  # type: ignore[no-untyped-def]
    acts_a, _ = related(20)
    with pytest.raises(ValueError, match="same for all"):
        measure(acts_a, np.full((120, 12), 0.1))


@pytest.mark.parametrize("measure", MEASURES)
def test_type_and_memory_layout_do_not_matter(measure) -> None:  # type: ignore[no-untyped-def]
    acts_a, acts_b = (acts.astype(np.float16) for acts in related(21))
    expected = measure(acts_a.astype(np.float64), acts_b.astype(np.float64))
    for kind in (np.float16, np.float32):
        strided = np.zeros((240, 12), kind)[::2]
        strided[:] = acts_b
        found = measure(np.asfortranarray(acts_a.astype(kind)), strided)
        for name, value in getattr(expected, "__dict__", {}).items():
            np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=1e-12)
        if isinstance(expected, float):
            assert found == pytest.approx(expected, abs=1e-12)
