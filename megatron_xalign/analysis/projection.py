"""Sentences as points in a plane, and how far apart the languages lie."""

# D sentences, H features, C components



from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_xalign.analysis.representations import as_representations, check_varies

_BLOCK_DISTANCES = 1 << 22


@dataclass(frozen=True)
class Projection:
    """Principal components of a cloud of points."""

    coordinates_DC: np.ndarray
    """float64 [D, C]: the points in the new axes."""
    explained_ratio_C: np.ndarray
    """float64 [C]: share of the total variance along each axis."""
    basis_CH: np.ndarray
    """float64 [C, H]: the axes, orthonormal."""
    mean_H: np.ndarray
    """float64 [H]: what was subtracted first."""

    def project(self, acts_DH: np.ndarray) -> np.ndarray:
        """Other points in the same axes: float64 [D, C]. So pictures of several checkpoints can be compared."""
        acts = as_representations(acts_DH)
        if acts.shape[1] != len(self.mean_H):
            raise ValueError(f"acts_DH has {acts.shape[1]} features; the basis has {len(self.mean_H)}.")
        return (acts - self.mean_H) @ self.basis_CH.T


def pca(acts_DH: np.ndarray, num_components: int = 2) -> Projection:
    """Principal component analysis by a full singular value decomposition: the same answer every time.

    The largest entry of every axis is positive, as in scikit-learn from 1.5 on.

    Raises:
        ValueError: a value is not finite, all sentences are the same point, or there are fewer sentences or features
            than components.
    """
    acts = as_representations(acts_DH, min_sentences=2)
    if not 1 <= num_components <= min(acts.shape):
        raise ValueError(f"num_components={num_components} is outside [1, {min(acts.shape)}] for shape {acts.shape}.")
    check_varies(acts, "acts_DH")
    mean_H = acts.mean(axis=0)
    left_DC, scale_C, basis_CH = np.linalg.svd(acts - mean_H, full_matrices=False)
    largest_C = basis_CH[np.arange(len(basis_CH)), np.abs(basis_CH).argmax(axis=1)]
    sign_C = np.where(largest_C < 0, -1.0, 1.0)
    power_C = scale_C**2
    return Projection(
        coordinates_DC=(left_DC * scale_C * sign_C)[:, :num_components],
        explained_ratio_C=(power_C / power_C.sum())[:num_components],
        basis_CH=(basis_CH * sign_C[:, None])[:num_components],
        mean_H=mean_H,
    )


def silhouette(points_DH: np.ndarray, group_D: np.ndarray) -> float:
    """How separate the groups are: 1 far apart and tight, 0 on top of each other, below 0 mixed up.

    Mean over points of (b - a) / max(a, b): a the mean Euclidean distance to the others of its group, b to those of the
    nearest other group; 0 for a point alone in its group, and where all distances are 0.

    Args:
        points_DH: float [D, H].
        group_D: integers [D], such as the language of each sentence.

    Raises:
        ValueError: lengths differ, a value is not finite, or there are not between 2 and D - 1 groups.

    Source: Rousseeuw 1987.
    """
    points = as_representations(points_DH, "points_DH")
    if np.shape(group_D) != (len(points),):
        raise ValueError(f"group_D has shape {np.shape(group_D)}; points_DH has {len(points)} points.")
    groups, member_D = np.unique(group_D, return_inverse=True)
    if not 2 <= len(groups) < len(points):
        raise ValueError(f"{len(groups)} groups of {len(points)} points; between 2 and {len(points) - 1} are needed.")
    one_hot = np.eye(len(groups))[member_D]
    size = one_hot.sum(axis=0)
    # Distances come from a matrix product; a common shift would cost their digits.
    points = points - points.mean(axis=0)
    square_D = np.einsum("dh,dh->d", points, points)
    total = 0.0
    block = max(1, _BLOCK_DISTANCES // len(points))
    for start in range(0, len(points), block):
        rows = np.arange(start, min(start + block, len(points)))
        squared = square_D[rows, None] + square_D - 2 * (points[rows] @ points.T)
        squared[rows - start, rows] = 0.0
        sums = np.sqrt(np.maximum(squared, 0.0)) @ one_hot
        own = member_D[rows]
        in_row = np.arange(len(rows))
        within = sums[in_row, own] / np.maximum(size[own] - 1, 1)
        between = sums / size
        between[in_row, own] = np.inf
        nearest = between.min(axis=1)
        larger = np.maximum(within, nearest)
        score = np.divide(nearest - within, larger, out=np.zeros(len(rows)), where=larger > 0)
        total += float(score[size[own] > 1].sum())
    return total / len(points)


@dataclass(frozen=True)
class LinearProbe:
    """How well a linear classifier tells the groups apart on sentences it was not fitted on."""

    accuracy: float
    """Share of all sentences classified right, each by the fold it was held out of."""
    by_fold: np.ndarray
    """float64 [folds]: the same by fold."""
    chance: float
    """Share of the largest group."""


def linear_probe(
    points_DH: np.ndarray,
    group_D: np.ndarray,
    unit_D: np.ndarray | None = None,
    num_folds: int = 5,
    ridge: float = 1e-3,
    seed: int = 0,
) -> LinearProbe:
    """Cross-validated accuracy of ridge regression to one-hot groups: the statistic beside the picture.

    Args:
        points_DH: float [D, H].
        group_D: [D]. What to tell, such as the language of each sentence.
        unit_D: [D]. What must not be split between fitting and testing, such as the pair a sentence is of; each
            sentence by itself if left out.
        num_folds: units are dealt to so many parts.
        ridge: as a share of the mean variance of a feature.
        seed: of the dealing.

    Raises:
        ValueError: lengths differ, a value is not finite, there are fewer than two groups or fewer units than folds, a
            fold leaves no sentence of a group to fit on, or all sentences are the same point.
    """
    points = as_representations(points_DH, "points_DH", min_sentences=2)
    num = len(points)
    unit_D = np.arange(num) if unit_D is None else np.asarray(unit_D)
    if np.shape(group_D) != (num,) or unit_D.shape != (num,):
        raise ValueError(
            f"group_D has shape {np.shape(group_D)} and unit_D {unit_D.shape}; points_DH has {num} points."
        )
    check_varies(points, "points_DH")
    groups, member_D = np.unique(group_D, return_inverse=True)
    units, number_D = np.unique(unit_D, return_inverse=True)
    if len(groups) < 2 or not 2 <= num_folds <= len(units):
        raise ValueError(f"{len(groups)} group(s) and {len(units)} units in {num_folds} folds; two of each are needed.")
    fold_D = (np.random.default_rng(seed).permutation(len(units)) % num_folds)[number_D]
    points = points - points.mean(axis=0)
    points /= np.sqrt(np.square(points).mean())
    right_D = np.zeros(num, np.bool_)
    for fold in range(num_folds):
        held_D = fold_D == fold
        fit, own = points[~held_D], member_D[~held_D]
        counts = np.bincount(own, minlength=len(groups))
        if not counts.all():
            raise ValueError(f"fold {fold} leaves no sentence of group {groups[counts.argmin()]} to fit on.")
        mean_H = fit.mean(axis=0)
        target = np.eye(len(groups))[own] - counts / len(own)
        fit = fit - mean_H
        slack = ridge * len(fit)
        if len(fit) <= fit.shape[1]:
            dual = np.linalg.solve(fit @ fit.T + slack * np.eye(len(fit)), target)
            weight = fit.T @ dual
        else:
            weight = np.linalg.solve(fit.T @ fit + slack * np.eye(fit.shape[1]), fit.T @ target)
        scores = (points[held_D] - mean_H) @ weight + counts / len(own)
        right_D[held_D] = scores.argmax(axis=1) == member_D[held_D]
    by_fold = np.array([right_D[fold_D == fold].mean() for fold in range(num_folds)])
    return LinearProbe(float(right_D.mean()), by_fold, float(np.bincount(member_D).max() / num))
