"""Whether a difference between runs is more than the luck of sentences or of seeds, and how fast a run got somewhere.

Two sources of luck are kept apart. *Sentences*: the same probe sentences are measured in every run, so runs are
compared sentence by sentence (:func:`sign_flip_test`); that says nothing about another training seed. *Seeds*: runs are
the units (:func:`trend_test`); few runs give few possible p-values, which is why the smallest one is told.
"""

# D sentences, R runs, T probed steps

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_PERMUTATIONS = 10_000
"""Random sign flips or permutations where all of them would be too many."""
_MOST_EXACT = 50_000


@dataclass(frozen=True)
class TestResult:
    """One test of a null hypothesis."""

    statistic: float
    """Mean difference (sign flips) or rank correlation (trend)."""
    p_value: float
    """Two-sided. Never 0: the data as they are count as one of the permutations."""
    smallest_p_value: float
    """The least that this design can give; above 0.05 the test could not have found anything."""
    exact: bool
    """Whether every permutation was looked at."""


def sign_flip_test(
    differences_D: np.ndarray, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> TestResult:
    """Test whether paired differences have mean 0, by flipping their signs at random.

    Args:
        differences_D: float [D]. One run's value minus the other's, on the same sentence.
        num_permutations: random flips where 2^D is more than 50,000.
        seed: of the flips.

    Raises:
        ValueError: there is no difference, or one is not finite.

    Source: Fisher 1935, The Design of Experiments, section 21.
    """
    values = _finite(differences_D, "differences_D")
    observed = float(values.mean())
    # Zeros stay zeros: only the others have a sign to flip.
    moved = values[values != 0]
    total = len(values)
    if len(moved) == 0:
        return TestResult(0.0, 1.0, 1.0, True)
    if 2 ** len(moved) <= _MOST_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(moved))))
        means = signs @ moved / total
        extreme = np.sum(np.abs(means) >= abs(observed) - 1e-12 * np.abs(moved).max())
        return TestResult(observed, float(extreme) / len(means), 2.0 / len(means), True)
    random = np.random.default_rng(seed)
    extreme = 1
    for start in range(0, num_permutations, 1000):
        count = min(1000, num_permutations - start)
        means = random.choice((1.0, -1.0), (count, len(moved))) @ moved / total
        extreme += int(np.sum(np.abs(means) >= abs(observed) - 1e-12 * np.abs(moved).max()))
    return TestResult(observed, extreme / (num_permutations + 1), 1.0 / (num_permutations + 1), False)


def trend_test(
    doses_R: Sequence[float], values_R: Sequence[float], num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> TestResult:
    """Test whether a number rises or falls with a dose over runs, by permuting which run has which dose.

    The statistic is Spearman's rank correlation; with several seeds a dose, runs of one dose are tied.

    Args:
        doses_R: the parallel fraction of every run.
        values_R: the number of every run.
        num_permutations: random permutations where the number of different ones is more than 50,000.
        seed: of the permutations.

    Raises:
        ValueError: fewer than 3 runs, lengths differ, a value is not finite, or all doses are the same.
    """
    doses, values = _finite(np.asarray(doses_R), "doses_R"), _finite(np.asarray(values_R), "values_R")
    if len(doses) != len(values) or len(doses) < 3:
        raise ValueError(f"{len(doses)} doses and {len(values)} values; at least 3 runs are needed, one of each a run.")
    if np.all(doses == doses[0]):
        raise ValueError(f"every run has the dose {doses[0]:g}; there is nothing to trend over.")
    ranks, doses_ranked = _ranks(values), _ranks(doses)
    if np.all(ranks == ranks[0]):
        return TestResult(0.0, 1.0, 1.0, True)
    a, b = doses_ranked - doses_ranked.mean(), ranks - ranks.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    observed = float(a @ b) / scale
    counts = np.unique(doses, return_counts=True)[1]
    arrangements = math.factorial(len(doses))
    for count in counts:
        arrangements //= math.factorial(int(count))
    if arrangements <= _MOST_EXACT:
        found = [float(np.array(order) @ b) / scale for order in _arrangements(a)]
        correlations = np.array(found)
        # The largest possible correlation, in either direction, is what the design can give at best.
        best = np.sum(np.abs(correlations) >= np.abs(correlations).max() - 1e-12)
        extreme = np.sum(np.abs(correlations) >= abs(observed) - 1e-12)
        return TestResult(observed, float(extreme) / len(found), float(best) / len(found), True)
    random = np.random.default_rng(seed)
    extreme = 1 + sum(
        abs(float(random.permutation(a) @ b) / scale) >= abs(observed) - 1e-12 for _ in range(num_permutations)
    )
    return TestResult(observed, extreme / (num_permutations + 1), 1.0 / (num_permutations + 1), False)


def _arrangements(values: np.ndarray) -> list[tuple[float, ...]]:
    """Different orders of values of which some are equal."""
    distinct, counts = np.unique(values, return_counts=True)
    orders: list[tuple[float, ...]] = []

    def extend(prefix: tuple[float, ...], left: tuple[int, ...]) -> None:
        if not any(left):
            orders.append(prefix)
            return
        for index, count in enumerate(left):
            if count:
                rest = (*left[:index], count - 1, *left[index + 1 :])
                extend((*prefix, float(distinct[index])), rest)

    extend((), tuple(int(count) for count in counts))
    return orders


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    for value in np.unique(values):
        ranks[values == value] = ranks[values == value].mean()
    return ranks


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of a family of tests so that the chance of any false alarm stays at its level.

    Raises:
        ValueError: one is outside [0, 1].

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    values = np.asarray(p_values, np.float64)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p_values={list(p_values)} are not all in [0, 1].")
    adjusted = np.empty(len(values))
    largest = 0.0
    for place, index in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, float(values[index]) * (len(values) - place)))
        adjusted[index] = largest
    return [float(value) for value in adjusted]


def area_under_curve(x_T: Sequence[float], y_T: np.ndarray, until: float | None = None) -> np.ndarray:
    """Mean height of a curve over its range, by the trapezoid rule: how much was reached, and how early.

    Args:
        x_T: float [T]. Tokens or steps, ascending.
        y_T: float [T] or [T, ...]. Heights; further axes (sentences) are kept.
        until: the end of the range; between two points the curve is straight. The last point if left out.

    Returns:
        float [...]: the integral divided by the range.

    Raises:
        ValueError: fewer than 2 points, x does not ascend, or ``until`` is outside the range.
    """
    x, y = np.asarray(x_T, np.float64), np.asarray(y_T, np.float64)
    if len(x) < 2 or len(x) != len(y) or not (np.diff(x) > 0).all():
        raise ValueError(f"x_T={list(x_T)} must ascend and have at least 2 points, one per height.")
    end = float(x[-1]) if until is None else float(until)
    if not x[0] < end <= x[-1]:
        raise ValueError(f"until={end:g} is outside ({x[0]:g}, {x[-1]:g}].")
    inside = x < end
    place = int(np.sum(inside))
    share = (end - x[place - 1]) / (x[place] - x[place - 1])
    last = y[place - 1] + share * (y[place] - y[place - 1])
    points = np.concatenate([x[inside], [end]])
    heights = np.concatenate([y[inside], last[None]])
    area: np.ndarray = np.trapezoid(heights, points, axis=0) / (end - x[0])
    return area


def steps_to_reach(x_T: Sequence[float], y_T: Sequence[float], level: float) -> float | None:
    """Where a curve first reaches a level, straight between points; None if it never does.

    Raises:
        ValueError: lengths differ or x does not ascend.
    """
    x, y = np.asarray(x_T, np.float64), np.asarray(y_T, np.float64)
    if len(x) != len(y) or not (np.diff(x) > 0).all():
        raise ValueError(f"x_T={list(x_T)} must ascend, one per height.")
    reached = np.flatnonzero(y >= level)
    if len(reached) == 0:
        return None
    first = int(reached[0])
    if first == 0:
        return float(x[0])
    share = (level - y[first - 1]) / (y[first] - y[first - 1])
    return float(x[first - 1] + share * (x[first] - x[first - 1]))


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a list of at least one finite number.")
    return array
