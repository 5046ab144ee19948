"""Runs of a series side by side: tests on the same sentences, trends over fractions, speed, shared neurons.

What goes in is what ``series`` wrote. Tests of two runs are over sentences: they say whether these two models differ,
not whether two fractions do. Trends and differences over seeds are over runs.
"""

# P pairs of sentences, M = L + 1 layers, J pairs of languages, K languages, T steps, R resamples

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_xalign.analysis import inference, neurons, resampling
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.results import Results

SPEED_OF = ("retrieval_centred", "cosine_gap", "cosine_centred_gap", "cka", "mexa")
"""Measures whose speed over training is compared, at the mean over layers."""
REACH_SHARE = 0.5
"""``steps_to_reach`` is asked for this share of the best level any run has at its last step, above chance."""


def compare_runs(runs: Sequence[Results], num_draws: int = 10_000, seed: int = 1234) -> dict[str, Any]:
    """Compare analysed runs of one series.

    Args:
        runs: results of each; same languages, sentences, layers, steps. Fractions and seeds come from their contexts.
        num_draws: behind every p-value that is not exact.
        seed: of the draws and resamples.

    Returns:
        JSON-able: ``pairwise`` (for two runs of one seed and different fractions: difference of every measure with one
        value per sentence, at every layer of the last step, interval, p-value, and p-value by Holm over layers),
        ``trends`` (over runs), ``speed`` (area under the curve and steps to reach, by run), ``neurons`` (Jaccard of
        best neurons between runs) and ``levels`` (mean over seeds and its uncertainty by fraction).

    Raises:
        FormatError: runs differ in languages, sentences, layers or steps, or lack what is compared; the message names
            both runs and what differs.
    """
    if not runs:
        raise ValueError("there is no run to compare.")
    _check_one_series(runs)
    speed = _speed(runs)
    return {
        "pairwise": _pairwise(runs, num_draws, seed),
        "trends": _trends(runs, speed, num_draws, seed),
        "speed": speed,
        "levels": _levels(runs, seed),
        "neurons": _shared_neurons(runs),
        "covers": {
            "pairwise": "the choice of sentences: two trained models, not two fractions",
            "trends": "runs; with one run per fraction only as many numbers as fractions",
            "levels": "training seeds and sentences where there are seeds, else sentences",
        },
    }


def _check_one_series(runs: Sequence[Results]) -> None:
    first = runs[0]
    for run in runs:
        for name in ("sentence_gap", "sentence_retrieval", "sentence_nll", "ap_scores"):
            if name not in run.arrays:
                raise FormatError(
                    f"run {run.context['run']} has no {name} in its analysis; analyse it again with this version, "
                    "and capture with a probe of two languages."
                )
        for name in (
            "languages", "probed_languages", "num_layers", "ffn_hidden_size", "pooling", "probe_sha256", "pair_ids",
            "steps", "num_permutations", "analysis_seed",
        ):  # fmt: skip
            one, other = first.context[name], run.context[name]
            if one != other:
                detail = f": {other!r} against {one!r}" if len(f"{one!r}{other!r}") < 300 else ""
                raise FormatError(
                    f"runs {run.context['run']} and {first.context['run']} differ in {name}{detail}. Only runs of one "
                    "shape, probe and cadence can be compared."
                )


def _dose(run: Results) -> float:
    fraction = run.context["parallel_fraction"]
    return 0.0 if fraction is None else float(fraction)


def _pairwise(runs: Sequence[Results], num_draws: int, seed: int) -> list[dict[str, Any]]:
    counts_RP = resampling.resample_counts(len(runs[0].context["pair_ids"]), seed=seed)
    found = []
    for one, other in itertools.combinations(sorted(runs, key=_dose), 2):
        if _dose(one) == _dose(other) or one.context["seed"] != other.context["seed"]:
            continue
        names = {"runs": [one.context["run"], other.context["run"]], "fractions": [_dose(one), _dose(other)]}
        for measure, array, scale in (("cosine_gap", "sentence_gap", 1.0), ("retrieval_centred",
                                                                            "sentence_retrieval", 0.5)):  # fmt: skip
            for number, subject in enumerate(runs[0].context["language_pairs"]):
                first_MP, second_MP = (run.arrays[array][-1, number].astype(np.float64) * scale for run in (one, other))
                found += _tests(
                    names | {"measure": measure, "subject": subject}, first_MP, second_MP, counts_RP, num_draws, seed,
                    -1,
                )  # fmt: skip
        for number, language in enumerate(runs[0].context["probed_languages"]):
            first_MP, second_MP = (run.arrays["sentence_nll"][-1, number][None].astype(np.float64)
                                   for run in (one, other))  # fmt: skip
            found += _tests(
                names | {"measure": "nll_per_sentence", "subject": language}, first_MP, second_MP, counts_RP, num_draws,
                seed, None,
            )  # fmt: skip
    return found


def _tests(
    names: dict[str, Any], first_MP: np.ndarray, second_MP: np.ndarray, counts_RP: np.ndarray, num_draws: int,
    seed: int, first_layer: int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    tests = inference.sign_flip_tests((second_MP - first_MP).T, num_draws=num_draws, seed=seed)
    corrected = inference.holm([test.p_value for test in tests])
    rows = []
    for position, (test, holm) in enumerate(zip(tests, corrected, strict=True)):
        difference, low, high = inference.paired_difference_interval(
            first_MP[position], second_MP[position], counts_RP
        )
        layer = None if first_layer is None else first_layer + position
        rows.append(
            names | {"layer": layer, "difference": difference, "low": low, "high": high, "p_value": test.p_value,
                     "p_value_holm": float(holm)}
        )  # fmt: skip
    return rows


def _speed(runs: Sequence[Results]) -> list[dict[str, Any]]:
    found = []
    for measure in SPEED_OF:
        for subject in runs[0].context["language_pairs"]:
            curves = [_curve(run, measure, subject) for run in runs]
            if any(len(curve) < 2 for curve in curves):
                continue
            steps = runs[0].context["steps"]
            chance = runs[0].context["chance"]["retrieval"] if measure.startswith("retrieval") else 0.0
            target = chance + REACH_SHARE * (max(curve[-1] for curve in curves) - chance)
            for run, curve in zip(runs, curves, strict=True):
                found.append(
                    {
                        "run": run.context["run"], "fraction": _dose(run), "seed": run.context["seed"],
                        "measure": measure, "subject": subject, "final": curve[-1], "target": target,
                        "area": inference.area_under_curve(steps, curve),
                        "steps_to_reach": inference.steps_to_reach(steps, curve, target),
                    }
                )  # fmt: skip
    return found


def _curve(run: Results, measure: str, subject: str) -> list[float]:
    """Mean over layers at every step."""
    rows = run.select(measure=measure, subject=subject)
    return [float(np.mean([row.value for row in rows if row.step == step])) for step in run.context["steps"]]


def _trends(
    runs: Sequence[Results], speed: list[dict[str, Any]], num_draws: int, seed: int
) -> list[dict[str, Any]]:
    """Over runs: final level, area, and neurons of one language, against the fraction."""
    if len({_dose(run) for run in runs}) < 2:
        return []
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for item in speed:
        for name in ("final", "area"):
            key = (f"{item['measure']}_{name}", item["subject"])
            series.setdefault(key, []).append((item["fraction"], item[name]))
    for run in runs:
        last = run.context["steps"][-1]
        for row in run.select(measure="ap_count_0.9", layer=None, step=last):
            series.setdefault(("ap_count_0.9_final", row.subject), []).append((_dose(run), row.value))
        for row in run.select(measure="bits_per_byte", layer=None, step=last):
            series.setdefault(("bits_per_byte_final", row.subject), []).append((_dose(run), row.value))
    found = []
    for (measure, subject), points in series.items():
        doses, values = zip(*points, strict=True)
        test = inference.trend_test(values, doses, alternative="two-sided", num_draws=num_draws, seed=seed)
        rank = inference.trend_test(values, doses, "spearman", "two-sided", num_draws, seed)
        found.append(
            {"measure": measure, "subject": subject, "num_runs": len(points), "spearman": rank.statistic}
            | {"jonckheere": test.statistic, "p_value": test.p_value, "exact": test.exact}
        )
    return found


def _levels(runs: Sequence[Results], seed: int) -> list[dict[str, Any]]:
    """Gap at the last step, mean over layers, by fraction: seeds and sentences apart."""
    found = []
    for fraction in sorted({_dose(run) for run in runs}):
        group = [run for run in runs if _dose(run) == fraction]
        for number, subject in enumerate(runs[0].context["language_pairs"]):
            values_SP = np.stack([run.arrays["sentence_gap"][-1, number].mean(axis=0) for run in group])
            level = inference.hierarchical_interval(values_SP, seed=seed)
            found.append(
                {"fraction": fraction, "measure": "cosine_gap", "subject": subject, "covers": level.covers}
                | asdict(level)
            )
    return found


def _shared_neurons(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """Jaccard of the best neurons of every language at the last step, between runs."""
    found = []
    languages, size = runs[0].context["languages"], runs[0].context["top_neurons"]
    for language in runs[0].context["probed_languages"]:
        sets = [
            neurons.top_neurons(run.arrays["ap_scores"][languages.index(language)], size) for run in runs
        ]
        found.append(
            {
                "subject": language, "runs": [run.context["run"] for run in runs], "top_neurons": size,
                "jaccard": neurons.jaccard_matrix(sets).tolist(),
                "chance": neurons.chance_jaccard(size, size, runs[0].context["num_neurons"]),
            }
        )  # fmt: skip
    return found
