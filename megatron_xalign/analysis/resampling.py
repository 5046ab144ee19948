"""How much a number would move with other sentences: the bootstrap, with the same draws wherever it is used.

It covers the choice of sentences only. How much another training seed would move the number, no resampling of one run
can say.
"""

# R resamples, D sentences

from __future__ import annotations

from collections.abc import Callable

import numpy as np

NUM_RESAMPLES = 1000
LEVEL = 0.95


def resample_counts(num_sentences: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each sentence is drawn in each resample: float64 [R, D], rows adding up to D.

    A mean over a resample is then a matrix product with ``counts / D``, for many quantities at once; and two quantities
    that use the same counts are resampled as pairs.

    Raises:
        ValueError: a number is below 1.
    """
    if num_sentences < 1 or num_resamples < 1:
        raise ValueError(f"num_sentences={num_sentences} and num_resamples={num_resamples} must be positive.")
    drawn_RD = np.random.default_rng(seed).integers(0, num_sentences, (num_resamples, num_sentences))
    return np.stack([np.bincount(row, minlength=num_sentences) for row in drawn_RD]).astype(np.float64)


def percentile_interval(values_R: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The middle ``level`` of resampled values, linear between order statistics.

    Raises:
        ValueError: a value is not finite, there is none, or ``level`` is outside (0, 1).
    """
    values = np.asarray(values_R, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError("values_R must be a list of at least one finite number.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level} is outside (0, 1).")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values_D: np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile interval of a statistic of per-sentence values.

    Args:
        values_D: float [D] or [D, ...]. One entry per sentence; sentences are drawn with replacement.
        statistic: from such an array to a number; the mean if left out.
        num_resamples: how many draws.
        seed: of the draws; the same seed and number of sentences give the same draws as ``resample_counts``.
        level: share of the resampled statistics inside the interval.

    Raises:
        ValueError: there is no sentence, or a value or statistic is not finite.
    """
    values = np.asarray(values_D, np.float64)
    if values.ndim < 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("values_D must hold at least one sentence and only finite numbers.")
    compute = statistic if statistic is not None else np.mean
    drawn_RD = np.random.default_rng(seed).integers(0, len(values), (num_resamples, len(values)))
    return percentile_interval(np.array([compute(values[row]) for row in drawn_RD]), level)
