"""Canonical correlation from products of features: no sentence is needed once they are summed."""

# H features, C directions; a and b the two representations

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import blas, eigh, lapack

RANK_TOLERANCE = 1e-6
"""Directions with less than this share of the largest variance are rounding, not signal."""

_DIRECT_SIZE = 512
"""Up to here singular vectors come from the matrix itself; beyond, from its product with its transpose, which takes a
fraction of the time and memory. Correlations are then right to 1e-8 instead of 1e-15."""


@dataclass(frozen=True)
class Whitening:
    """How a representation becomes uncorrelated directions of sum of squares 1 (less with a ridge)."""

    rank: int
    cholesky_HH: np.ndarray | None
    """Lower triangle L with LL' the scatter, where it has full rank; else None and axes are used."""
    map_HC: np.ndarray | None = None
    """From centred features to directions."""
    loading_CH: np.ndarray | None = None
    """Product of every direction with every centred feature."""

    def rows(self, cross_HX: np.ndarray) -> np.ndarray:
        """Directions in place of the features along the first axis: [C, X]. ``cross_HX`` may be overwritten."""
        if self.cholesky_HH is not None:
            right = cross_HX if cross_HX.flags.f_contiguous else np.asfortranarray(cross_HX)
            return blas.dtrsm(1.0, self.cholesky_HH, right, lower=1, overwrite_b=1)
        assert self.map_HC is not None
        return self.map_HC.T @ cross_HX

    def columns(self, cross_XH: np.ndarray) -> np.ndarray:
        """The same along the second axis: [X, C]."""
        if self.cholesky_HH is not None:
            left = cross_XH if cross_XH.flags.f_contiguous else np.asfortranarray(cross_XH)
            return blas.dtrsm(1.0, self.cholesky_HH, left, side=1, lower=1, trans_a=1, overwrite_b=1)
        assert self.map_HC is not None
        return cross_XH @ self.map_HC

    def weights_of(self, rotation_CC: np.ndarray) -> np.ndarray:
        """Projection weights of the rotated directions, adding up to 1."""
        if self.cholesky_HH is not None:
            # h_i . x_j = u_i' L' e_j; the product with a triangle in place, as nothing needs the rotation any more.
            turned = blas.dtrmm(1.0, self.cholesky_HH, np.asfortranarray(rotation_CC), lower=1)
            weights = _column_sums_of_sizes(turned)
        else:
            assert self.loading_CH is not None
            weights = np.abs(rotation_CC.T @ self.loading_CH).sum(axis=1)
        return weights / weights.sum()


def whiten(scatter_HH: np.ndarray, ridge: float = 0.0) -> Whitening:
    """Whiten by a Cholesky factor where the scatter surely has full rank, else along its axes without the small ones.

    Args:
        scatter_HH: float64 [H, H], lower triangle; overwritten.
        ridge: added to the diagonal.
    """
    upper = False
    if ridge == 0.0:
        # The upper triangle keeps what the factor overwrites, so that no copy of the whole is needed.
        diagonal_H = scatter_HH.diagonal().copy()
        largest = _mirror(scatter_HH)
        factor, failed = lapack.dpotrf(scatter_HH, lower=1, clean=0, overwrite_a=1)
        if not failed:
            reciprocal, _ = lapack.dpocon(factor, largest, uplo="L")
            # It bounds the ratio of the eigenvalues from below, up to how well LAPACK estimates it.
            if reciprocal > 10 * RANK_TOLERANCE:
                return Whitening(len(scatter_HH), factor)
        scatter_HH, upper = factor, True
        np.fill_diagonal(scatter_HH, diagonal_H)
    power_H, axes_HH = eigh(scatter_HH, lower=not upper, overwrite_a=True, driver="evr", check_finite=False)
    keep_H = power_H > RANK_TOLERANCE * power_H[-1]
    power_C, axes_HC = power_H[keep_H], axes_HH[:, keep_H]
    scale_C = np.sqrt(power_C + ridge)
    return Whitening(len(power_C), None, axes_HC / scale_C, (power_C / scale_C)[:, None] * axes_HC.T)


def inverse_root(covariance_HH: np.ndarray, ridge: float) -> tuple[np.ndarray, int]:
    """Symmetric root of the inverse, and the rank: directions without variance are left out of both."""
    power_H, axes_HH = eigh(covariance_HH, lower=True, overwrite_a=True, driver="evr", check_finite=False)
    power_H = power_H + ridge
    # Below this a direction is rounding, and one as good as any other.
    keep_H = power_H > len(power_H) * np.finfo(np.float64).eps * power_H[-1]
    axes_HC = axes_HH[:, keep_H]
    return (axes_HC / np.sqrt(power_H[keep_H])) @ axes_HC.T, int(keep_H.sum())


def sizes_in_orthonormal_basis(gram_CC: np.ndarray, products_CX: np.ndarray) -> np.ndarray:
    """Sum over X of the size of the products with an orthonormal basis of C directions, in their order, as shares.

    Args:
        gram_CC: products of the directions with one another.
        products_CX: their products with X other vectors; may be overwritten.

    Raises:
        ValueError: the directions depend on one another.
    """
    factor, failed = lapack.dpotrf(gram_CC, lower=1, clean=1)
    if failed:
        raise ValueError(
            "the directions of mode='svcca' depend on one another, so that their order has no meaning; use "
            "mode='definition', or epsilon=1e-5."
        )
    basis_CX = blas.dtrsm(1.0, factor, np.asfortranarray(products_CX), lower=1, overwrite_b=1)
    weights = np.abs(basis_CX).sum(axis=1)
    return weights / weights.sum()


def correlate(cross_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors and values of the product of two whitened representations: (directions, correlations).

    There are as many as the smaller side has directions; correlations descend. From the matrix itself.
    """
    left, coefficients, _ = np.linalg.svd(cross_CC, full_matrices=False)
    return left, np.minimum(coefficients, 1.0)


def is_large(cross_CC: np.ndarray) -> bool:
    """Whether ``correlate_gram`` is the way: a large matrix of no more rows than columns."""
    return _DIRECT_SIZE < len(cross_CC) <= cross_CC.shape[1]


def gram(cross_CC: np.ndarray) -> np.ndarray:
    """The matrix times its transpose, lower triangle: what ``correlate_gram`` takes, after which it can be let go."""
    matrix = cross_CC if cross_CC.flags.f_contiguous else np.asfortranarray(cross_CC)
    return blas.dsyrk(1.0, matrix, lower=1)


def correlate_gram(gram_CC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``correlate`` from ``gram``, which is overwritten."""
    power, axes = eigh(gram_CC, lower=True, overwrite_a=True, driver="evr", check_finite=False)
    return axes[:, ::-1], np.sqrt(np.clip(power[::-1], 0.0, 1.0))


def full_symmetric(lower_HH: np.ndarray) -> np.ndarray:
    """Both triangles of a matrix of which only the lower one is filled; a copy."""
    full = np.tril(lower_HH)
    full += np.tril(lower_HH, -1).T
    return full


def _mirror(lower_HH: np.ndarray) -> float:
    """Copy the lower triangle to the upper one, in place; return the largest sum of absolute values of a column."""
    size, block = len(lower_HH), 256
    sums = np.zeros(size)
    for start in range(0, size, block):
        stop = min(start + block, size)
        square = lower_HH[start:stop, start:stop]
        square[:] = full_symmetric(square)
        lower_HH[start:stop, stop:] = lower_HH[stop:, start:stop].T
    for start in range(0, size, block):
        sums[start : start + block] = np.abs(lower_HH[:, start : start + block]).sum(axis=0)
    return float(sums.max())


def _column_sums_of_sizes(matrix: np.ndarray) -> np.ndarray:
    """Sum of absolute values of every column, without a copy of the whole."""
    sums = np.empty(matrix.shape[1])
    for start in range(0, matrix.shape[1], 256):
        sums[start : start + 256] = np.abs(matrix[:, start : start + 256]).sum(axis=0)
    return sums
