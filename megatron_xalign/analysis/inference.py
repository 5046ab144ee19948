"""Whether a difference is more than the choice of sentences or of seeds would give: tests, trends, speed of learning.

Sentences and seeds are two sources of uncertainty, and no test of one says anything about the other. ``sign_flip_test``
is about sentences: two models, the same sentences. ``trend_test`` is about runs: one number for each, so that seeds are
what varies. ``hierarchical_interval`` draws both.
"""

# D sentences, R runs, S seeds, L layers, T steps

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_xalign.analysis.resampling import LEVEL, NUM_RESAMPLES, percentile_interval

Alternative = Literal["two-sided", "greater", "less"]

_MOST_EXACT = 1 << 16
"""Arrangements up to which a test goes through all of them instead of drawing."""
_TIE = 1e-12
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Significance:
    """What a test found."""

    statistic: float
    """Of the data."""
    p_value: float
    """Share of the arrangements that are as extreme; the data's own is one of them, so it is never 0."""
    exact: bool
    """Whether all arrangements were gone through; if not, the p-value is of a seeded draw of them."""
    num_arrangements: int
    """How many were looked at."""


def sign_flip_test(
    differences_D: np.ndarray, alternative: Alternative = "two-sided", num_draws: int = 10_000, seed: int = 0
) -> Significance:
    """Whether a mean of paired differences is other than 0: each difference might as well have had the other sign.

    Args:
        differences_D: float [D]. One number of two models on the same sentence, such as ``similarity.sentence_gaps``,
            subtracted. Exact up to 16 sentences.
        alternative: ``greater`` if only a positive mean counts.
        num_draws: of signs, where not all are gone through.
        seed: of the draws.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    return sign_flip_tests(np.asarray(differences_D)[:, None], alternative, num_draws, seed)[0]


def sign_flip_tests(
    differences_DL: np.ndarray, alternative: Alternative = "two-sided", num_draws: int = 10_000, seed: int = 0
) -> list[Significance]:
    """``sign_flip_test`` of every column, such as a layer, with the same signs. ``holm`` corrects for their number."""
    differences = np.asarray(differences_DL, np.float64)
    if differences.ndim != 2 or differences.shape[0] < 1 or not np.isfinite(differences).all():
        raise ValueError(f"differences of shape {differences.shape} must be finite, at least one sentence.")
    num, columns = differences.shape
    observed_L = differences.mean(axis=0)
    exact = 2**num <= _MOST_EXACT
    count = 2**num if exact else num_draws
    if count < 1:
        raise ValueError(f"num_draws={num_draws} must be positive.")
    generator = np.random.default_rng(seed)
    extreme_L = np.zeros(columns, np.int64)
    block = max(1, _BLOCK // num)
    for start in range(0, count, block):
        size = min(block, count - start)
        if exact:
            bits = np.arange(start, start + size)[:, None] >> np.arange(num) & 1
        else:
            bits = generator.integers(0, 2, (size, num), dtype=np.int8)
        means = (1.0 - 2.0 * bits) @ differences / num
        extreme_L += _as_extreme(means, observed_L, alternative).sum(axis=0)
    return [
        _test(observed, int(extreme), count, exact)
        for observed, extreme in zip(observed_L.tolist(), extreme_L, strict=True)
    ]


def trend_test(
    values_R: Sequence[float] | np.ndarray,
    doses_R: Sequence[float] | np.ndarray,
    statistic: Literal["jonckheere", "spearman"] = "jonckheere",
    alternative: Alternative = "greater",
    num_draws: int = 10_000,
    seed: int = 0,
) -> Significance:
    """Whether a number goes up with a dose over runs, such as alignment with the fraction of parallel data.

    The unit is a run: with one run per fraction it rests on as few numbers as there are fractions (the smallest p of
    four is 1/24), and with several seeds each it takes in what seeds change.

    Args:
        values_R: one number for each run.
        doses_R: the dose of each run; equal for seeds of one fraction.
        statistic: ``jonckheere``: pairs of runs of different doses in the order of the doses, ties half (the statistic
            is their number); ``spearman``: correlation of ranks.
        alternative: ``greater`` if only an upward trend counts.
        num_draws: of arrangements of the values, where there are more than 65,536 different ones.
        seed: of the draws.

    Raises:
        ValueError: lengths differ, a number is not finite, or there are fewer than two different doses.
    """
    values, doses = np.asarray(values_R, np.float64), np.asarray(doses_R, np.float64)
    if values.ndim != 1 or values.shape != doses.shape or not (np.isfinite(values).all() and np.isfinite(doses).all()):
        raise ValueError(f"values of shape {values.shape} and doses of {doses.shape} must be finite, one for each run.")
    levels, sizes = np.unique(doses, return_counts=True)
    if len(levels) < 2:
        raise ValueError("a trend needs runs of at least two different doses.")
    order = np.argsort(doses, kind="stable")
    values, doses = values[order], doses[order]
    compute = _jonckheere(doses) if statistic == "jonckheere" else _spearman(doses)
    arrangements = math.factorial(len(values)) // math.prod(math.factorial(size) for size in sizes)
    exact = arrangements <= _MOST_EXACT
    observed = compute(values)
    centre = _expected(statistic, sizes)
    extreme, count = 0, 0
    for arranged in _arrangements(values, sizes.tolist()) if exact else _shuffles(values, num_draws, seed):
        one = compute(arranged)
        extreme += int(_as_extreme(np.array(one - centre), np.array(observed - centre), alternative))
        count += 1
    return _test(observed, extreme, count, exact)


def _jonckheere(doses_R: np.ndarray) -> Callable[[np.ndarray], float]:
    later = doses_R[None, :] > doses_R[:, None]

    def compute(values_R: np.ndarray) -> float:
        difference = values_R[None, :] - values_R[:, None]
        return float((later & (difference > 0)).sum() + 0.5 * (later & (difference == 0)).sum())

    return compute


def _spearman(doses_R: np.ndarray) -> Callable[[np.ndarray], float]:
    ranks = _ranks(doses_R) - (len(doses_R) + 1) / 2

    def compute(values_R: np.ndarray) -> float:
        own = _ranks(values_R) - (len(values_R) + 1) / 2
        size = np.sqrt((own @ own) * (ranks @ ranks))
        return float(own @ ranks / size) if size > 0 else 0.0

    return compute


def _expected(statistic: str, sizes: np.ndarray) -> float:
    if statistic == "spearman":
        return 0.0
    return float((sizes.sum() ** 2 - (sizes**2).sum()) / 4)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _arrangements(values: np.ndarray, sizes: list[int]) -> Sequence[np.ndarray] | itertools.chain[np.ndarray]:
    """All ways to deal the values to groups of these sizes; the order inside a group does not matter."""

    def deal(left: tuple[int, ...], groups: list[int]) -> itertools.chain[tuple[int, ...]]:
        if len(groups) == 1:
            return itertools.chain([left])
        return itertools.chain.from_iterable(
            (
                chosen + rest
                for rest in deal(tuple(item for item in left if item not in chosen), groups[1:])
            )
            for chosen in itertools.combinations(left, groups[0])
        )

    return itertools.chain(values[list(order)] for order in deal(tuple(range(len(values))), sizes))


def _shuffles(values: np.ndarray, count: int, seed: int) -> itertools.chain[np.ndarray]:
    generator = np.random.default_rng(seed)
    return itertools.chain(generator.permutation(values) for _ in range(count))


def _as_extreme(found: np.ndarray, observed: np.ndarray, alternative: Alternative) -> np.ndarray:
    slack = _TIE * np.maximum(np.abs(observed), 1e-300)
    if alternative == "greater":
        return found >= observed - slack
    if alternative == "less":
        return found <= observed + slack
    if alternative == "two-sided":
        return np.abs(found) >= np.abs(observed) - slack
    raise ValueError(f"alternative={alternative!r} is not one of two-sided, greater, less.")


def _test(statistic: float, extreme: int, count: int, exact: bool) -> Significance:
    # Of draws, the data's own arrangement is counted with them (Phipson and Smyth 2010).
    p_value = extreme / count if exact else (extreme + 1) / (count + 1)
    return Significance(float(statistic), float(p_value), exact, count)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """P-values corrected for their number by Holm's step-down rule, in the order given: float64.

    Raises:
        ValueError: one is outside [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p_values must be a list of numbers in [0, 1].")
    order = np.argsort(p, kind="stable")
    raised = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    adjusted = np.empty(len(p))
    adjusted[order] = raised
    return adjusted


def paired_difference_interval(
    values_a_D: np.ndarray, values_b_D: np.ndarray, counts_RD: np.ndarray, level: float = LEVEL
) -> tuple[float, float, float]:
    """Mean of b - a over the same sentences and its bootstrap interval: (difference, low, high).

    Args:
        values_a_D: float [D].
        values_b_D: float [D], of the same sentences.
        counts_RD: as ``resampling.resample_counts`` gives them.
        level: share of the resampled differences inside.

    Raises:
        ValueError: shapes do not fit or a value is not finite.
    """
    a, b = np.asarray(values_a_D, np.float64), np.asarray(values_b_D, np.float64)
    if a.ndim != 1 or a.shape != b.shape or counts_RD.shape[1:] != a.shape:
        raise ValueError(f"values of shapes {a.shape} and {b.shape} and counts of {counts_RD.shape} do not fit.")
    difference = b - a
    low, high = percentile_interval(counts_RD @ difference / len(difference), level)
    return float(difference.mean()), low, high


@dataclass(frozen=True)
class TwoLevels:
    """A mean over seeds and sentences, and where its uncertainty comes from."""

    mean: float
    low: float
    high: float
    """Interval over seeds and sentences; over sentences alone where there is one seed."""
    num_seeds: int
    seed_deviation: float | None
    """Standard deviation of the seeds' means, what sentences alone would make of it taken off; None for one seed."""
    sentence_error: float
    """Standard error of the mean from the choice of sentences, which all seeds share."""

    @property
    def covers(self) -> str:
        """What the interval is about, in words."""
        return "training seeds and sentences" if self.num_seeds > 1 else "sentences only (one seed)"


def hierarchical_interval(
    values_SD: np.ndarray, num_resamples: int = NUM_RESAMPLES, seed: int = 0, level: float = LEVEL
) -> TwoLevels:
    """Mean of per-sentence values of several seeds, by drawing seeds and, once for all of them, sentences.

    Seeds of one fraction are measured on the same sentences, so a resample has one draw of sentences. With few seeds
    (below about five) the interval is too narrow: a draw with replacement of three seeds varies less than
    training does.

    Args:
        values_SD: float [S, D].
        num_resamples: how many draws.
        seed: of the draws.
        level: share of the resampled means inside.

    Raises:
        ValueError: there is no seed or sentence, or a value is not finite.
    """
    values = np.asarray(values_SD, np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(f"values_SD of shape {values.shape} must be finite, [seeds, sentences].")
    num_seeds, num = values.shape
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for resample in range(num_resamples):
        weight_S = np.bincount(generator.integers(0, num_seeds, num_seeds), minlength=num_seeds) / num_seeds
        weight_D = np.bincount(generator.integers(0, num, num), minlength=num) / num
        means[resample] = weight_S @ values @ weight_D
    low, high = percentile_interval(means, level)
    deviation = None
    if num_seeds > 1:
        residual = values - values.mean(axis=0)
        # Of a seed's mean over these sentences, what the sentences themselves bring in beside the seed.
        noise = residual.var(axis=1, ddof=1).mean() / num if num > 1 else 0.0
        deviation = math.sqrt(max(values.mean(axis=1).var(ddof=1) - noise, 0.0))
    error = values.mean(axis=0).std(ddof=1) / math.sqrt(num) if num > 1 else 0.0
    return TwoLevels(float(values.mean()), low, high, num_seeds, deviation, float(error))


def area_under_curve(steps_T: Sequence[float] | np.ndarray, values_T: Sequence[float] | np.ndarray) -> float:
    """Mean height of a curve over its steps, by trapezia: early speed and final level in one number.

    Raises:
        ValueError: lengths differ, steps do not ascend, there are fewer than two, or a number is not finite.
    """
    steps, values = _curve(steps_T, values_T)
    if len(steps) < 2:
        raise ValueError("a curve of one step has no area.")
    return float(np.sum(np.diff(steps) * (values[1:] + values[:-1]) / 2) / (steps[-1] - steps[0]))


def areas_until(steps_T: Sequence[float], values_TD: np.ndarray, until: float) -> np.ndarray:
    """``area_under_curve`` of many curves up to a step, which may lie between two measurements: float64 [D].

    Raises:
        ValueError: as ``area_under_curve``, or ``until`` is not above the first and up to the last step.
    """
    steps, values = np.asarray(steps_T, np.float64), np.asarray(values_TD, np.float64)
    if not (len(steps) > 1 and steps[0] < until <= steps[-1]):
        raise ValueError(f"until={until} is not in ({steps[0]:g}, {steps[-1]:g}], the steps of the curves.")
    place = int(np.searchsorted(steps, until))
    share = (until - steps[place - 1]) / (steps[place] - steps[place - 1])
    last_D = values[place - 1] + share * (values[place] - values[place - 1])
    cut_T, cut_TD = np.append(steps[:place], until), np.concatenate([values[:place], last_D[None]])
    return np.array([area_under_curve(cut_T, curve_T) for curve_T in cut_TD.T])


def steps_to_reach(
    steps_T: Sequence[float] | np.ndarray, values_T: Sequence[float] | np.ndarray, target: float
) -> float | None:
    """Step at which a curve first reaches a value, straight between measurements; None if it does not.

    Raises:
        ValueError: lengths differ, steps do not ascend, there is none, or a number is not finite.
    """
    steps, values = _curve(steps_T, values_T)
    reached = np.flatnonzero(values >= target)
    if not reached.size:
        return None
    first = int(reached[0])
    if first == 0:
        return float(steps[0])
    share = (target - values[first - 1]) / (values[first] - values[first - 1])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def _curve(steps_T: Sequence[float] | np.ndarray, values_T: Sequence[float] | np.ndarray) -> tuple[np.ndarray, ...]:
    steps, values = np.asarray(steps_T, np.float64), np.asarray(values_T, np.float64)
    if steps.ndim != 1 or steps.shape != values.shape or steps.size == 0:
        raise ValueError(f"steps of shape {steps.shape} and values of {values.shape} are not one curve.")
    if not (np.isfinite(values).all() and np.isfinite(steps).all() and (np.diff(steps) > 0).all()):
        raise ValueError("steps must ascend and all numbers be finite.")
    return steps, values
