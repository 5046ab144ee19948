"""How alike two representations of the same sentences are: cosine, PWCCA, SVCCA, linear CKA."""

# D sentences, H features, R resamples



from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_xalign.analysis import canonical
from megatron_xalign.analysis.canonical import RANK_TOLERANCE
from megatron_xalign.analysis.moments import PairMoments, Scatter
from megatron_xalign.analysis.representations import as_pair, centre, check_varies, unit_rows

__all__ = [
    "RANK_TOLERANCE",
    "SVCCA_EPSILON",
    "CosineSimilarity",
    "MinibatchCka",
    "Pwcca",
    "PwccaWithBaseline",
    "Svcca",
    "cka_from_moments",
    "cosine",
    "linear_cka",
    "permuted_cka",
    "pwcca",
    "pwcca_from_moments",
    "pwcca_with_baseline",
    "resampled_cosine_gap",
    "sentence_gaps",
    "svcca",
]  # fmt: skip

SVCCA_EPSILON = 1e-10
"""Ridge of the SVCCA tutorial, relative to the largest variance."""


@dataclass(frozen=True)
class CosineSimilarity:
    """Cosine of translations against that of random pairs."""

    translation_D: np.ndarray
    """float64 [D]: cosine of each sentence and its translation."""
    random: float
    """Mean cosine over all pairs of a sentence of a and one of b, translations included."""

    @property
    def translation(self) -> float:
        """Mean cosine of translations."""
        return float(self.translation_D.mean())

    @property
    def random_derangement(self) -> float:
        """Mean cosine over all pairs that are not translations."""
        num = len(self.translation_D)
        return (num * self.random - self.translation) / (num - 1)

    @property
    def gap(self) -> float:
        """``translation - random``: how much closer translations are."""
        return self.translation - self.random

    def percentiles(self, shares: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> np.ndarray:
        """Quantiles of the cosines of translations: a mean hides whether all or some of them are close."""
        return np.quantile(self.translation_D, shares)


def cosine(acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, centred: bool = False) -> CosineSimilarity:
    """Compare translations with random pairs by cosine, without drawing random pairs.

    The mean over all pairs is the product of the two mean unit vectors, which takes O(D H) and no seed.

    Args:
        acts_a_DH: float [D, H]. Sentences of one language.
        acts_b_DH: float [D, H]. Their translations, row by row.
        centred: subtract each language's mean first; vectors that share a large common part have cosines near 1
            whatever they mean.

    Raises:
        ValueError: shapes differ, fewer than two sentences, or a value is not finite.
    """
    unit_a, unit_b = _unit_pair(acts_a_DH, acts_b_DH, centred)
    return CosineSimilarity(
        np.einsum("dh,dh->d", unit_a, unit_b), float(unit_a.mean(axis=0) @ unit_b.mean(axis=0))
    )


def sentence_gaps(acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, centred: bool = False) -> np.ndarray:
    """What each sentence adds to ``cosine(...).gap``, its mean: float64 [D].

    The cosine of the translation minus the mean cosine of either side to all sentences of the other language. One such
    number for each sentence is what tests between runs on the same sentences need.
    """
    unit_a, unit_b = _unit_pair(acts_a_DH, acts_b_DH, centred)
    random_D = (unit_a @ unit_b.mean(axis=0) + unit_b @ unit_a.mean(axis=0)) / 2
    return np.einsum("dh,dh->d", unit_a, unit_b) - random_D


def resampled_cosine_gap(
    acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, counts_RD: np.ndarray, centred: bool = False
) -> np.ndarray:
    """``cosine(...).gap`` of every resample of the sentences: float64 [R].

    Args:
        acts_a_DH: float [D, H].
        acts_b_DH: float [D, H].
        counts_RD: [R, D]. As ``resampling.resample_counts`` gives them.
        centred: subtract each language's mean (over all sentences, not over the resample) first.
    """
    unit_a, unit_b = _unit_pair(acts_a_DH, acts_b_DH, centred)
    if counts_RD.ndim != 2 or counts_RD.shape[1] != len(unit_a):
        raise ValueError(f"counts_RD has shape {counts_RD.shape}; there are {len(unit_a)} sentences.")
    weight_RD = counts_RD / len(unit_a)
    translation_R = weight_RD @ np.einsum("dh,dh->d", unit_a, unit_b)
    return translation_R - np.einsum("rh,rh->r", weight_RD @ unit_a, weight_RD @ unit_b)


def _unit_pair(acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH)
    if centred:
        acts_a, acts_b = centre(acts_a), centre(acts_b)
    return unit_rows(acts_a), unit_rows(acts_b)


@dataclass(frozen=True)
class Pwcca:
    """Projection-weighted canonical correlation."""

    value: float
    """Sum of weight times coefficient."""
    coefficients: np.ndarray
    """float64 [C]: canonical correlations, descending (``split``: in the order of the half they were fitted on)."""
    weights: np.ndarray
    """float64 [C], adding up to 1: how much of the first representation each direction accounts for."""
    rank_a: int
    """Directions of the first representation that were used."""
    rank_b: int
    """Directions of the second."""
    width_a: int = field(default=0, kw_only=True)
    """Features of the first representation."""
    width_b: int = field(default=0, kw_only=True)
    """Of the second."""

    @property
    def rank_deficient(self) -> bool:
        """Whether directions were left out of one of the two: constant or dependent features, or too few sentences."""
        return self.rank_a < self.width_a or self.rank_b < self.width_b


@dataclass(frozen=True)
class PwccaWithBaseline:
    """PWCCA in both directions and what it is for pairs that do not belong together."""

    forward: float
    """Weights from the first representation."""
    backward: float
    """Weights from the second."""
    permuted: float
    """Mean of both directions under shuffled pairs: the floor, well above 0 unless there are many more sentences than
    features."""
    rank_a: int
    rank_b: int

    @property
    def mean(self) -> float:
        """Mean of both directions."""
        return (self.forward + self.backward) / 2


def pwcca(
    acts_a_DH: np.ndarray,
    acts_b_DH: np.ndarray,
    mode: Literal["definition", "svcca", "split"] = "definition",
    epsilon: float = 0.0,
) -> Pwcca:
    """Projection-weighted CCA of two representations of the same sentences.

    - ``definition``: as published. Canonical directions h_i of the centred first representation, weights
      sum_j |<h_i, x_j>| over its centred features. Directions below a relative variance of 1e-6 are left out, so
      rank-deficient inputs have a value. Invariant to a shift and, in the correlations, to any invertible linear map.
      With fewer sentences than both ranks together some correlations are 1 whatever the data, the directions among
      those are arbitrary, and the value can move in its third digit with the linear algebra library.
    - ``svcca``: what google/svcca computes, number for number, and with it the study: directions without the whitening
      factor, the mean of feature i added to direction i, weights from features that are not centred. It moves when a
      common vector is added or features are reordered. Where a representation is rank-deficient and ``epsilon`` 0, the
      original fails or gives one of many values; here directions without variance are left out, which the ranks say.
    - ``split``: fitted as ``definition`` on sentences 0, 2, 4, ...; correlations taken on the others. Unrelated
      representations score near 0, where the other modes have a floor that depends on D/H. A correlation may be
      negative.

    Not symmetric: the weights are those of the first representation (``svcca``: of the one with fewer features).

    Args:
        acts_a_DH: float [D, H_a].
        acts_b_DH: float [D, H_b].
        mode: see above.
        epsilon: ridge on the diagonals of both covariances, as a share of each one's largest entry; in ``svcca`` also
            the variance below which a feature is dropped.

    Raises:
        ValueError: numbers of sentences differ, a value is not finite, there are too few sentences (``svcca``: not more
            than features), a representation is constant, or ``epsilon`` leaves no feature of one.

    Source: Morcos et al. 2018, arXiv:1806.05759; google/svcca ``pwcca.py`` and ``cca_core.py``.
    """
    if not 0.0 <= epsilon < np.inf:
        raise ValueError(f"epsilon={epsilon} must be a number that is not negative.")
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH, 4 if mode == "split" else 2, same_width=False)
    check_varies(acts_a, "acts_a_DH")
    check_varies(acts_b, "acts_b_DH")
    if mode == "svcca":
        if len(acts_a) <= acts_a.shape[1]:
            raise ValueError(
                f"mode='svcca' needs more sentences than features; {len(acts_a)} sentences of {acts_a.shape[1]} "
                "features were given. mode='definition' has no such limit."
            )
        return pwcca_from_moments(_moments(acts_a, acts_b), mode, epsilon, consume=True)
    if mode == "definition":
        if len(acts_a) > max(acts_a.shape[1], acts_b.shape[1]):
            return pwcca_from_moments(_moments(acts_a, acts_b), mode, epsilon, consume=True)
        white_a, white_b = _whiten(acts_a, epsilon), _whiten(acts_b, epsilon)
        left, coefficients, _ = _canonical(white_a.data_DC.T @ white_b.data_DC)
    elif mode == "split":
        for name, acts in (("acts_a_DH", acts_a), ("acts_b_DH", acts_b)):
            check_varies(acts[::2], f"every other sentence of {name}")
        white_a, white_b = _whiten(acts_a[::2], epsilon), _whiten(acts_b[::2], epsilon)
        left, _, right = _canonical(white_a.data_DC.T @ white_b.data_DC)
        held_out_a = white_a.apply(acts_a[1::2]) @ left
        held_out_b = white_b.apply(acts_b[1::2]) @ right
        coefficients = _column_correlations(held_out_a, held_out_b)
    else:
        raise ValueError(f"mode={mode!r} is not one of definition, svcca, split.")
    weights = white_a.weights_of(left)
    return Pwcca(
        float(weights @ coefficients), coefficients, weights, white_a.rank, white_b.rank, width_a=acts_a.shape[1],
        width_b=acts_b.shape[1],
    )  # fmt: skip


def pwcca_from_moments(
    moments: PairMoments,
    mode: Literal["definition", "svcca"] = "definition",
    epsilon: float = 0.0,
    consume: bool = False,
) -> Pwcca:
    """``pwcca`` from sums over sentences, which were never all in memory; the same value to 1e-8 and better.

    Args:
        moments: sums over blocks, batches or processes. ``split`` needs the sentences and is not to be had from them.
        mode: see ``pwcca``.
        epsilon: see ``pwcca``.
        consume: let the moments' memory be overwritten: 3 matrices of H x H are then all that is needed besides them.

    Raises:
        ValueError: a representation is constant, there are fewer than two sentences (``svcca``: not more than
            features), or ``epsilon`` leaves no feature of one.
    """
    if mode not in ("definition", "svcca"):
        raise ValueError(f"mode={mode!r} is not one of definition, svcca; split needs the sentences themselves.")
    if not 0.0 <= epsilon < np.inf:
        raise ValueError(f"epsilon={epsilon} must be a number that is not negative.")
    width_a, width_b = moments.width_a, moments.width_b
    if mode == "svcca" and moments.num_sentences <= width_a:
        raise ValueError(
            f"mode='svcca' needs more sentences than features; these are {moments.num_sentences} sentences of "
            f"{width_a} features. mode='definition' has no such limit."
        )
    scatter = moments.scatter(consume)
    for name, own_HH in (("acts_a_DH", scatter.aa_HH), ("acts_b_DH", scatter.bb_HH)):
        if not own_HH.diagonal().max() > 0.0:
            raise ValueError(
                f"{name} is the same for all {scatter.num_sentences} sentences; there is no direction in it."
            )
    if mode == "svcca":
        return _pwcca_of_google_svcca(scatter, epsilon)
    aa, cross, bb = scatter.take()
    white_a = canonical.whiten(aa, epsilon * np.abs(aa).max() if epsilon else 0.0)
    del aa
    cross = white_a.rows(cross)
    white_b = canonical.whiten(bb, epsilon * np.abs(bb).max() if epsilon else 0.0)
    del bb
    cross, rank_b = white_b.columns(cross), white_b.rank
    del white_b
    if canonical.is_large(cross):
        cross = canonical.gram(cross)
        left, coefficients = canonical.correlate_gram(cross)
    else:
        left, coefficients = canonical.correlate(cross)
    del cross
    weights = white_a.weights_of(left)
    return Pwcca(
        float(weights @ coefficients), coefficients, weights, white_a.rank, rank_b, width_a=width_a, width_b=width_b
    )


def _moments(acts_a: np.ndarray, acts_b: np.ndarray) -> PairMoments:
    moments = PairMoments(acts_a.shape[1], acts_b.shape[1])
    moments.update(acts_a, acts_b)
    return moments


def pwcca_with_baseline(
    acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, num_permutations: int = 5, seed: int = 0
) -> PwccaWithBaseline:
    """``definition`` PWCCA in both directions, and its mean over shuffled pairs; every whitening is done once.

    Raises:
        ValueError: as ``pwcca``, or ``num_permutations`` is below 1.
    """
    if num_permutations < 1:
        raise ValueError(f"num_permutations={num_permutations} must be positive.")
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH, same_width=False)
    check_varies(acts_a, "acts_a_DH")
    check_varies(acts_b, "acts_b_DH")
    white_a, white_b = _whiten(acts_a), _whiten(acts_b)

    def both_directions(order: np.ndarray | slice) -> tuple[float, float]:
        left, coefficients, right = _canonical(white_a.data_DC.T @ white_b.data_DC[order])
        return float(white_a.weights_of(left) @ coefficients), float(white_b.weights_of(right) @ coefficients)

    generator = np.random.default_rng(seed)
    forward, backward = both_directions(slice(None))
    permuted = [np.mean(both_directions(generator.permutation(len(acts_a)))) for _ in range(num_permutations)]
    return PwccaWithBaseline(forward, backward, float(np.mean(permuted)), white_a.rank, white_b.rank)


@dataclass(frozen=True)
class _Whitened:
    """A centred representation in its principal axes, each scaled to a sum of squares of 1 (less with a ridge)."""

    data_DC: np.ndarray
    map_HC: np.ndarray  # from centred features to the axes
    mean_H: np.ndarray
    loading_CH: np.ndarray  # product of every axis with every centred feature

    @property
    def rank(self) -> int:
        return self.map_HC.shape[1]

    def apply(self, acts_DH: np.ndarray) -> np.ndarray:
        return (acts_DH - self.mean_H) @ self.map_HC

    def weights_of(self, rotation_CC: np.ndarray) -> np.ndarray:
        """Projection weights of the rotated axes, adding up to 1."""
        weights = np.abs(rotation_CC.T @ self.loading_CH).sum(axis=1)
        return weights / weights.sum()


def _whiten(acts_DH: np.ndarray, epsilon: float = 0.0) -> _Whitened:
    mean_H = acts_DH.mean(axis=0)
    centred_DH = acts_DH - mean_H
    if len(acts_DH) <= acts_DH.shape[1]:
        # The scatter of features would be larger than the sentences themselves.
        left_DC, size_C, axes_CH = np.linalg.svd(centred_DH, full_matrices=False)
        keep = size_C**2 > RANK_TOLERANCE * size_C[0] ** 2
        power_C, axes_HC = size_C[keep] ** 2, axes_CH[keep].T
        largest = np.abs(np.einsum("dh,dh->h", centred_DH, centred_DH)).max() if epsilon else 0.0
        scale_C = np.sqrt(power_C + epsilon * largest)
        data_DC = left_DC[:, keep] * (size_C[keep] / scale_C)
        return _Whitened(data_DC, axes_HC / scale_C, mean_H, (power_C / scale_C)[:, None] * axes_HC.T)
    scatter_HH = centred_DH.T @ centred_DH
    power_H, axes_HH = np.linalg.eigh(scatter_HH)
    keep_H = power_H > RANK_TOLERANCE * power_H[-1]
    power_C, axes_HC = power_H[keep_H], axes_HH[:, keep_H]
    # The largest entry of a scatter lies on its diagonal.
    scale_C = np.sqrt(power_C + epsilon * scatter_HH.diagonal().max())
    map_HC = axes_HC / scale_C
    return _Whitened(centred_DH @ map_HC, map_HC, mean_H, (power_C / scale_C)[:, None] * axes_HC.T)


def _canonical(cross_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular vectors and values of the product of two whitened representations: (left, correlations, right)."""
    left, coefficients, right = np.linalg.svd(cross_CC, full_matrices=False)
    return left, np.minimum(coefficients, 1.0), right.T


def _column_correlations(first_DC: np.ndarray, second_DC: np.ndarray) -> np.ndarray:
    first_DC, second_DC = centre(first_DC), centre(second_DC)
    norm_C = np.linalg.norm(first_DC, axis=0) * np.linalg.norm(second_DC, axis=0)
    product_C = np.einsum("dc,dc->c", first_DC, second_DC)
    return np.divide(product_C, norm_C, out=np.zeros_like(norm_C), where=norm_C > 0)


def _pwcca_of_google_svcca(scatter: Scatter, epsilon: float) -> Pwcca:
    """google/svcca's ``compute_pwcca`` with the study's repair of its second branch, quirks kept, from sums alone.

    Its directions are D = U'(X - mu) + mu, row i with the mean of feature i; its weights come from an orthonormal basis
    Q of their rows by w_i = sum_j |<Q_i, x_j>|. With S the scatter, DD' = U'SU + n mu mu' = RR' and DX' = U'S + n mu
    mu', so Q X' = R^-1 DX'.
    """
    num, width_a, width_b = scatter.num_sentences, len(scatter.aa_HH), len(scatter.bb_HH)
    largest_a, largest_b = (matrix.diagonal().max() / (num - 1) for matrix in (scatter.aa_HH, scatter.bb_HH))
    keep_a, keep_b = (
        matrix.diagonal() / (num - 1) / largest >= epsilon
        for matrix, largest in ((scatter.aa_HH, largest_a), (scatter.bb_HH, largest_b))
    )
    if not (keep_a.any() and keep_b.any()):
        raise ValueError(f"epsilon={epsilon} leaves no feature of one representation; use a smaller one.")
    if not (keep_a.all() and keep_b.all()):
        aa, ab, bb = scatter.take()
        # Of a symmetric matrix the lower triangle stays the lower one.
        scatter = Scatter(
            num, scatter.mean_a_H[keep_a], scatter.mean_b_H[keep_b], np.asfortranarray(aa[np.ix_(keep_a, keep_a)]),
            np.asfortranarray(ab[np.ix_(keep_a, keep_b)]), np.asfortranarray(bb[np.ix_(keep_b, keep_b)]),
        )  # fmt: skip
    mean_a, mean_b = scatter.mean_a_H, scatter.mean_b_H
    aa, ab, bb = (matrix / (num - 1) for matrix in scatter.take())
    root_a, rank_a = canonical.inverse_root(aa / largest_a, epsilon)
    root_b, rank_b = canonical.inverse_root(bb / largest_b, epsilon)
    # Its value depends on the signs of singular vectors (the mean is not turned with them), so it takes the same
    # matrix through the same decomposition.
    left, coefficients, right = np.linalg.svd(root_a @ (ab / np.sqrt(largest_a * largest_b)) @ root_b)
    del root_a, root_b, ab
    count = min(rank_a, rank_b)
    if len(aa) <= len(bb):
        directions_CH, covariance, mean_H = left.T[:count], canonical.full_symmetric(aa), mean_a
    else:
        directions_CH, covariance, mean_H = right[:count], canonical.full_symmetric(bb), mean_b
    del left, right, aa, bb
    mean_C = mean_H[:count]
    products_CH = directions_CH @ covariance
    gram_CC = products_CH @ directions_CH.T + num / (num - 1) * np.outer(mean_C, mean_C)
    products_CH += num / (num - 1) * np.outer(mean_C, mean_H)
    weights = canonical.sizes_in_orthonormal_basis(gram_CC, products_CH)
    coefficients = coefficients[:count]
    return Pwcca(
        float(weights @ coefficients), coefficients, weights, rank_a, rank_b, width_a=width_a, width_b=width_b
    )


@dataclass(frozen=True)
class Svcca:
    """Canonical correlation of the leading principal directions."""

    value: float
    """Mean of the coefficients."""
    coefficients: np.ndarray
    """float64 [C], descending."""
    num_directions_a: int
    """Principal directions kept of the first representation."""
    num_directions_b: int
    """And of the second."""


def svcca(
    acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, num_directions: int | None = None, variance: float = 0.99
) -> Svcca:
    """Keep the leading principal directions of both representations, then correlate them canonically.

    Args:
        acts_a_DH: float [D, H_a].
        acts_b_DH: float [D, H_b].
        num_directions: how many to keep (the tutorial keeps 20); if left out, as many as reach ``variance``.
        variance: share of each one's variance to keep, in (0, 1].

    Raises:
        ValueError: numbers of sentences differ, a value is not finite, a representation is constant, or there are fewer
            directions than asked for.

    Source: Raghu et al. 2017, arXiv:1706.05806; ridge 1e-10 as in its tutorial.
    """
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH, same_width=False)
    if not 0.0 < variance <= 1.0:
        raise ValueError(f"variance={variance} is outside (0, 1].")
    sides = []
    for name, acts in (("acts_a_DH", acts_a), ("acts_b_DH", acts_b)):
        check_varies(acts, name)
        left_DC, scale_C, _ = np.linalg.svd(centre(acts), full_matrices=False)
        power_C = scale_C**2
        if num_directions is None:
            share_C = np.cumsum(power_C) / power_C.sum()
            # Rounding can leave the last share a hair below 1.
            keep = min(int(np.searchsorted(share_C, variance)) + 1, len(power_C))
        else:
            keep = num_directions
        if not 1 <= keep <= min(len(acts) - 1, acts.shape[1]):
            raise ValueError(
                f"num_directions={keep} is outside [1, {min(len(acts) - 1, acts.shape[1])}], the directions "
                f"{len(acts)} sentences of {acts.shape[1]} features can have."
            )
        relative_C = power_C[:keep] / power_C[0]
        relative_C = relative_C[relative_C >= SVCCA_EPSILON]
        shrink_C = np.sqrt(relative_C / (relative_C + SVCCA_EPSILON))
        sides.append((left_DC[:, : len(relative_C)] * shrink_C, keep))
    (white_a, keep_a), (white_b, keep_b) = sides
    _, coefficients, _ = _canonical(white_a.T @ white_b)
    return Svcca(float(coefficients.mean()), coefficients, keep_a, keep_b)


def linear_cka(acts_a_DH: np.ndarray, acts_b_DH: np.ndarray, debiased: bool = False) -> float:
    """Linear centred kernel alignment: 1 for equal up to rotation, scale and shift.

    ||Y'X||^2 / (||X'X|| ||Y'Y||) of the centred representations. The plain value grows with H/D also where nothing is
    shared; the debiased one (unbiased HSIC) does not, may be negative, and is the one to use below D = 10 H.

    Args:
        acts_a_DH: float [D, H_a].
        acts_b_DH: float [D, H_b].
        debiased: use the unbiased estimator; needs four sentences.

    Raises:
        ValueError: numbers of sentences differ, a value is not finite, or a representation is constant.

    Source: Kornblith et al. 2019, arXiv:1905.00414, and its notebook; Song et al. 2012 for the unbiased form.
    """
    acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH, 4 if debiased else 2, same_width=False)
    for name, acts in (("acts_a_DH", acts_a), ("acts_b_DH", acts_b)):
        check_varies(acts, name)
    acts_a, acts_b = centre(acts_a), centre(acts_b)
    # The ratio does not depend on scale; without this, squares of squares of large values would overflow.
    acts_a, acts_b = acts_a / np.abs(acts_a).max(), acts_b / np.abs(acts_b).max()
    own_a, own_b = _alignment(acts_a, acts_a, debiased), _alignment(acts_b, acts_b, debiased)
    if own_a <= 0 or own_b <= 0:
        raise ValueError("a representation has no structure beyond chance to compare; more sentences are needed.")
    return float(_alignment(acts_a, acts_b, debiased) / np.sqrt(own_a * own_b))


def _alignment(acts_a: np.ndarray, acts_b: np.ndarray, debiased: bool) -> float:
    """Squared norm of Y'X of centred representations, or its unbiased form (times a factor that cancels)."""
    num = len(acts_a)
    if num < max(acts_a.shape[1], acts_b.shape[1]):
        total = float(np.vdot(acts_a @ acts_a.T, acts_b @ acts_b.T))
    else:
        total = float(np.square(acts_a.T @ acts_b).sum())
    if not debiased:
        return total
    square_a, square_b = np.einsum("dh,dh->d", acts_a, acts_a), np.einsum("dh,dh->d", acts_b, acts_b)
    together = float(square_a @ square_b)
    return total - num / (num - 2) * together + float(square_a.sum() * square_b.sum()) / ((num - 1) * (num - 2))


@dataclass
class MinibatchCka:
    """Debiased CKA of more sentences than fit into memory: unbiased HSIC averaged over batches, then one ratio.

    The mean of the CKA of the batches is another number. Batches of equal size weigh the same; sentences are not
    counted, as each batch gives one unbiased estimate.

    Source: Nguyen et al. 2021, arXiv:2010.15327.
    """

    num_batches: int = 0
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def update(self, acts_a_DH: np.ndarray, acts_b_DH: np.ndarray) -> None:
        """Add one batch of aligned sentences.

        Raises:
            ValueError: numbers of sentences differ, a value is not finite, or there are fewer than four sentences.
        """
        acts_a, acts_b = as_pair(acts_a_DH, acts_b_DH, 4, same_width=False)
        acts_a, acts_b = centre(acts_a), centre(acts_b)
        num = len(acts_a)
        self._sums += (
            np.array([
                _alignment(acts_a, acts_b, True), _alignment(acts_a, acts_a, True), _alignment(acts_b, acts_b, True)
            ])
            / (num * (num - 3))
        )  # fmt: skip
        self.num_batches += 1

    def merge(self, other: MinibatchCka) -> None:
        """Add the batches of another process."""
        self._sums = self._sums + other._sums
        self.num_batches += other.num_batches

    @property
    def value(self) -> float:
        """CKA of the batches so far.

        Raises:
            ValueError: there are none, or a representation has no structure beyond chance in them.
        """
        together, own_a, own_b = self._sums
        if self.num_batches == 0 or own_a <= 0 or own_b <= 0:
            raise ValueError(
                f"{self.num_batches} batches have no structure beyond chance in one representation; more are needed."
            )
        return float(together / np.sqrt(own_a * own_b))


def cka_from_moments(moments: PairMoments) -> float:
    """Plain ``linear_cka`` from sums over sentences.

    Raises:
        ValueError: a representation is constant, or there are fewer than two sentences.
    """
    scatter = moments.scatter()
    own_a, own_b = (
        np.linalg.norm(canonical.full_symmetric(matrix)) for matrix in (scatter.aa_HH, scatter.bb_HH)
    )
    if not (own_a > 0 and own_b > 0):
        raise ValueError("a representation is the same for all sentences; there is no direction in it.")
    return float(np.linalg.norm(scatter.ab_HH / own_a) / own_b * np.linalg.norm(scatter.ab_HH))


def permuted_cka(
    acts_a_DH: np.ndarray,
    acts_b_DH: np.ndarray,
    debiased: bool = False,
    num_permutations: int = 5,
    seed: int = 0,
) -> float:
    """Mean linear CKA under shuffled pairs: its floor for these two representations.

    Raises:
        ValueError: as ``linear_cka``, or ``num_permutations`` is below 1.
    """
    if num_permutations < 1:
        raise ValueError(f"num_permutations={num_permutations} must be positive.")
    generator = np.random.default_rng(seed)
    acts_b = np.asarray(acts_b_DH)
    return float(
        np.mean(
            [
                linear_cka(acts_a_DH, acts_b[generator.permutation(len(acts_b))], debiased)
                for _ in range(num_permutations)
            ]
        )
    )
