"""What a series of runs says for or against the claims that studies of parallel data make.

Three claims, after Leino and Tiedemann 2026 (arXiv:2603.29026): parallel data *accelerates early sharing*, leaves
*fewer language-specific neurons*, and leads to *the same final level*. Each is put to a test that could come out either
way: over runs where there are at least two seeds a fraction, else over sentences, which then says so.
"""

# D sentences, T probed steps

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_xalign.analysis.inference import (
    areas_until,
    holm,
    paired_difference_interval,
    sign_flip_test,
    trend_test,
)
from megatron_xalign.analysis.resampling import resample_counts
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.results import Results, read_results
from megatron_xalign.formats.run_folder import RunFolder

LEVEL = 0.05
"""p-values up to this count as evidence."""
EARLY = 1 / 3
"""Share of training that counts as early."""
MARGIN = 0.05
"""Final levels this close (as shares of sentences) are the same."""
_RETRIEVAL = "retrieval_centred"

Verdict = Literal["for", "against", "undecided"]


@dataclass(frozen=True)
class Claim:
    """One claim about one pair of languages, and what the series says about it."""

    claim: str
    pair: str
    verdict: Verdict
    numbers: str
    """What was measured, per fraction."""
    test: str
    """Which test, over what, with its p-value or interval."""


@dataclass(frozen=True)
class _Run:
    name: str
    fraction: float
    seeds: tuple[int, int]
    results: Results
    steps: list[int]


def weigh_claims(run_folders: Sequence[Path], controls: Mapping[str, str] | None = None) -> list[Claim]:
    """Put the three claims to the test for every pair of languages.

    Args:
        run_folders: analysed runs of a series; those that belong to a control take no part in the tests, and their
            numbers stand beside those of the series.
        controls: name of the control by run name.

    Returns:
        three claims a pair; none if all runs have the same parallel fraction.

    Raises:
        FormatError: a run was not analysed, or its results lack what each sentence adds.
    """
    controls = controls or {}
    every = sorted(map(_read, run_folders), key=lambda run: (run.fraction, run.seeds))
    runs = [run for run in every if run.name not in controls]
    if len({run.fraction for run in runs}) < 2:
        return []
    steps = set(_shared_steps(runs))
    beside: dict[str, list[_Run]] = {}
    for run in every:
        if run.name in controls and steps.issubset(run.steps):
            beside.setdefault(controls[run.name], []).append(run)
    pairs = sorted({row.subject for row in runs[0].results.select(measure=_RETRIEVAL)})
    claims = []
    for pair in pairs:
        layer = _shared_best_layer(runs, pair)
        hits = {run.name: _hits(run, pair, layer) for run in every}
        claims += [
            _early(runs, beside, pair, layer, hits), _neurons(runs, beside, pair),
            _final(runs, beside, pair, layer, hits),
        ]
    return claims


def _read(folder: Path) -> _Run:
    run = RunFolder(Path(folder))
    config, results = run.config(), read_results(run.analysis)
    steps, hits = results.context.get("steps"), results.arrays.get("sentence_retrieval")
    if not isinstance(steps, list) or hits is None or hits.ndim != 4 or len(hits) != len(steps):
        raise FormatError(
            f"{run.analysis} does not hold which translations were found at each step (sentence_retrieval); run "
            f"`xalign analyze {run.path}` again."
        )
    return _Run(config.name, config.parallel_fraction, (config.seed, config.data.mixture.seed), results, steps)


def _shared_steps(runs: Sequence[_Run]) -> list[int]:
    return sorted(set.intersection(*(set(run.steps) for run in runs)))


def _shared_best_layer(runs: Sequence[_Run], pair: str) -> int:
    """The layer that retrieves best on average over all runs: no run chooses for itself."""
    step = _shared_steps(runs)[-1]
    by_layer: dict[int, list[float]] = {}
    for run in runs:
        for row in run.results.select(measure=_RETRIEVAL, subject=pair, step=step):
            if row.layer is not None:
                by_layer.setdefault(row.layer, []).append(row.value)
    return max(by_layer, key=lambda layer: (float(np.mean(by_layer[layer])), -layer))


def _hits(run: _Run, pair: str, layer: int) -> dict[int, np.ndarray]:
    """By step, for each sentence: the share of both directions that find its translation, float [D]."""
    # [T, J, L+1, P] of directions found, 0 to 2; the embedding output is the first layer.
    hits_TP = run.results.arrays["sentence_retrieval"][:, run.results.context["language_pairs"].index(pair), layer + 1]
    return dict(zip(run.steps, hits_TP.astype(np.float64) / 2, strict=True))


def _languages(run: _Run, pair: str) -> tuple[str, str]:
    languages = run.results.context["probed_languages"]
    return next((one, other) for one in languages for other in languages if f"{one}-{other}" == pair)


def _seeds_per_fraction(runs: Sequence[_Run]) -> int:
    fractions = [run.fraction for run in runs]
    return min(fractions.count(fraction) for fraction in fractions)


def _by_fraction(runs: Sequence[_Run], values: Sequence[float], digits: int = 3) -> str:
    told = []
    for fraction in sorted({run.fraction for run in runs}):
        own = [value for run, value in zip(runs, values, strict=True) if run.fraction == fraction]
        spread = f" ({min(own):.{digits}f} to {max(own):.{digits}f})" if len(own) > 1 else ""
        told.append(f"{np.mean(own):.{digits}f}{spread} at {100 * fraction:g} %")
    return ", ".join(told)


def _told(
    runs: Sequence[_Run], controls: Mapping[str, Sequence[_Run]], value_of: Callable[[_Run], float], digits: int = 3
) -> str:
    """A number of every fraction, and of the controls, without which nobody knows what a rise is due to."""
    parts = [_by_fraction(runs, [value_of(run) for run in runs], digits)]
    for name, own in sorted(controls.items()):
        parts.append(f"in the control {name}: {_by_fraction(own, [value_of(run) for run in own], digits)}")
    return "; ".join(parts)


def _trend(runs: Sequence[_Run], values: Sequence[float], rising: bool, name: str) -> tuple[Verdict, str]:
    """Evidence from runs as units."""
    found = trend_test(values, [run.fraction for run in runs], "spearman", "two-sided")
    verdict: Verdict = "undecided"
    if found.p_value <= LEVEL:
        verdict = "for" if (found.statistic > 0) == rising else "against"
    # A perfect order and its reverse are the most extreme arrangements there are.
    least = 2 / found.num_arrangements
    possible = "" if least <= LEVEL else f"; {len(runs)} runs cannot give less than p = {least:.3f}"
    return verdict, (
        f"rank correlation of {name} with the fraction over {len(runs)} runs, "
        f"{'every order' if found.exact else f'{found.num_arrangements:,} orders'} of runs compared: "
        f"{found.statistic:.2f}, p = {found.p_value:.3f}{possible}"
    )


def _paired(
    runs: Sequence[_Run], values_D: Mapping[str, np.ndarray]
) -> tuple[dict[float, np.ndarray], list[tuple[float, float, float]]]:
    """Differences to fraction 0 (the smallest) per sentence, mean over seeds; and (fraction, mean, Holm's p)."""
    least = min(run.fraction for run in runs)

    def mean_of(fraction: float) -> np.ndarray:
        return np.mean([values_D[run.name] for run in runs if run.fraction == fraction], axis=0)

    differences = {
        fraction: mean_of(fraction) - mean_of(least)
        for fraction in sorted({run.fraction for run in runs}) if fraction > least
    }
    tests = [sign_flip_test(difference) for difference in differences.values()]
    adjusted = holm([test.p_value for test in tests]).tolist()
    return differences, [
        (fraction, test.statistic, p) for fraction, test, p in zip(differences, tests, adjusted, strict=True)
    ]


def _early(
    runs: Sequence[_Run], controls: Mapping[str, Sequence[_Run]], pair: str, layer: int,
    hits: Mapping[str, dict[int, np.ndarray]],
) -> Claim:
    steps = _shared_steps(runs)
    until = steps[0] + EARLY * (steps[-1] - steps[0])
    if len(steps) < 3:
        return Claim(
            "accelerates early sharing", pair, "undecided", f"probed at {len(steps)} steps only",
            "none: a curve needs at least 3 probed steps",
        )

    def area_of(run: _Run) -> np.ndarray:
        return areas_until(steps, np.stack([hits[run.name][step] for step in steps]), until)

    area = {run.name: area_of(run) for run in runs}
    values = [float(area[run.name].mean()) for run in runs]
    numbers = (
        f"mean share of translations found up to step {until:.0f} (area under the curve, layer {layer}): "
        + _told(runs, controls, lambda run: float(area_of(run).mean()))
    )
    _, tests = _paired(runs, area)
    told = "; ".join(f"{100 * fraction:g} %: {mean:+.3f}, p = {p:.3f}" for fraction, mean, p in tests)
    over_sentences = f"over sentences (sign flips against the smallest fraction, Holm): {told}"
    if _seeds_per_fraction(runs) > 1:
        verdict, trend = _trend(runs, values, rising=True, name="this area")
        return Claim("accelerates early sharing", pair, verdict, numbers, f"{trend}; {over_sentences}")
    return Claim(
        "accelerates early sharing", pair, _of_sentences(tests), numbers,
        f"{over_sentences}. One seed a fraction: another seed may differ",
    )


def _of_sentences(tests: Sequence[tuple[float, float, float]]) -> Verdict:
    clear = [mean for _, mean, p in tests if p <= LEVEL]
    if clear and all(mean > 0 for mean in clear):
        return "for"
    if clear and all(mean < 0 for mean in clear):
        return "against"
    return "undecided"


def _neurons(runs: Sequence[_Run], controls: Mapping[str, Sequence[_Run]], pair: str) -> Claim:
    step = _shared_steps(runs)[-1]

    def count_of(run: _Run) -> float:
        rows = [
            row for language in _languages(run, pair)
            for row in run.results.select(measure="ap_count_0.9", layer=None, subject=language, step=step)
        ]
        if not rows:
            raise FormatError(f"run {run.name}: no ap_count_0.9 of {pair} at step {step}; run `xalign analyze` again.")
        return sum(row.value for row in rows)

    numbers = f"neurons with AP at least 0.9, both languages, step {step}: {_told(runs, controls, count_of, 0)}"
    if _seeds_per_fraction(runs) > 1:
        verdict, test = _trend(runs, [count_of(run) for run in runs], rising=False, name="their number")
    else:
        verdict, test = "undecided", "none: neurons of two runs do not correspond, so one seed a fraction tells nothing"
    return Claim("fewer language-specific neurons", pair, verdict, numbers, test)


def _final(
    runs: Sequence[_Run], controls: Mapping[str, Sequence[_Run]], pair: str, layer: int,
    hits: Mapping[str, dict[int, np.ndarray]],
) -> Claim:
    step = _shared_steps(runs)[-1]
    last = {run.name: hits[run.name][step] for run in runs}
    differences, _ = _paired(runs, last)
    fraction, difference_D = max(differences.items())
    difference, low, high = paired_difference_interval(
        np.zeros(len(difference_D)), difference_D, resample_counts(len(difference_D))
    )
    verdict: Verdict = "undecided"
    if low >= -MARGIN and high <= MARGIN:
        verdict = "for"
    elif low > MARGIN or high < -MARGIN:
        verdict = "against"
    told = _told(runs, controls, lambda run: float(hits[run.name][step].mean()))
    numbers = f"share of translations found at step {step}, layer {layer}: {told}"
    seeds = _seeds_per_fraction(runs)
    about = "seeds averaged" if seeds > 1 else "one seed a fraction: another seed may differ"
    return Claim(
        "same final level", pair, verdict, numbers,
        f"difference of {100 * fraction:g} % to the smallest fraction {difference:+.3f}, 95 % interval "
        f"over sentences {low:+.3f} to {high:+.3f}; the same if inside ±{MARGIN:g}, not the same if outside; {about}",
    )


def claims_tree(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """As plain mappings, for a file or a page."""
    return [
        {"claim": claim.claim, "pair": claim.pair, "verdict": claim.verdict, "numbers": claim.numbers,
         "test": claim.test}
        for claim in claims
    ]  # fmt: skip
