"""Runs of one series are compared on the same sentences; what does not belong together is named."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from megatron_xalign.analysis import inference
from megatron_xalign.analysis.comparison import compare_runs
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.results import Results, Row

LANGUAGES, STEPS, PAIRS, LAYERS = ["eng_Latn", "fin_Latn"], [0, 10, 20], 60, 2
SUBJECT = "eng_Latn-fin_Latn"


def invented_run(fraction: float, seed: int = 1, **context: Any) -> Results:
    generator = np.random.default_rng([int(1000 * fraction), seed])
    # Sentences are easy or hard for every run alike.
    ease = np.random.default_rng(0).normal(size=PAIRS)
    gap = (0.1 * ease + fraction + generator.normal(0, 0.05, (3, 1, LAYERS + 1, PAIRS))).astype(np.float32)
    rows = [
        Row(step, step * 64, measure, layer, SUBJECT, (fraction + 0.01 * seed) * number / 2)
        for number, step in enumerate(STEPS)
        for measure in ("retrieval_centred", "cosine_gap", "cosine_centred_gap", "cka", "mexa")
        for layer in (-1, 0, 1)
    ]
    for language in LANGUAGES:
        rows += [
            Row(20, 20 * 64, "ap_count_0.9", None, language, 100 - 100 * fraction - seed),
            Row(20, 20 * 64, "bits_per_byte", None, language, 2.0),
        ]
    facts: dict[str, Any] = {
        "run": f"p{fraction}-s{seed}", "parallel_fraction": fraction, "seed": seed, "languages": LANGUAGES,
        "probed_languages": LANGUAGES, "num_layers": LAYERS, "ffn_hidden_size": 50, "num_neurons": 100,
        "pooling": "mean", "probe_sha256": "ab", "pair_ids": [f"p{number}" for number in range(PAIRS)], "steps": STEPS,
        "num_permutations": 5, "analysis_seed": 1, "language_pairs": [SUBJECT], "top_neurons": 10,
        "chance": {"retrieval": 1 / PAIRS},
    }  # fmt: skip
    arrays = {
        "sentence_gap": gap,
        "sentence_retrieval": generator.integers(0, 3, gap.shape).astype(np.uint8),
        "sentence_nll": generator.uniform(10, 20, (3, 2, PAIRS)).astype(np.float32),
        "ap_scores": generator.random((2, LAYERS, 50)).astype(np.float32),
    }
    return Results(facts | context, rows, arrays)


@pytest.fixture(scope="module")
def compared() -> tuple[list[Results], dict[str, Any]]:
    runs = [invented_run(fraction, seed) for fraction in (0.05, 0.0, 0.02) for seed in (1, 2)]
    return runs, compare_runs(runs, num_draws=500)


def test_it_is_json(compared: tuple[list[Results], dict[str, Any]]) -> None:
    assert json.loads(json.dumps(compared[1], allow_nan=False)) == compared[1]


def test_two_runs_are_tested_on_the_same_sentences_within_a_seed(
    compared: tuple[list[Results], dict[str, Any]],
) -> None:
    runs, found = compared
    gaps = [item for item in found["pairwise"] if item["measure"] == "cosine_gap"]
    assert {tuple(item["runs"]) for item in gaps} == {
        (f"p{low}-s{seed}", f"p{high}-s{seed}")
        for seed in (1, 2) for low, high in ((0.0, 0.02), (0.0, 0.05), (0.02, 0.05))
    }  # fmt: skip
    assert {item["layer"] for item in gaps} == {-1, 0, 1}
    by_name = {run.context["run"]: run for run in runs}
    (item,) = [one for one in gaps if one["runs"] == ["p0.0-s2", "p0.05-s2"] and one["layer"] == 1]
    one, other = (by_name[name].arrays["sentence_gap"][-1, 0, 2].astype(float) for name in item["runs"])
    assert item["difference"] == pytest.approx((other - one).mean()) and item["low"] < item["difference"] < item["high"]
    assert item["p_value"] == inference.sign_flip_test(other - one, num_draws=500, seed=1234).p_value == 1 / 501
    assert item["p_value_holm"] == pytest.approx(3 / 501)


def test_trends_and_speed_are_over_runs(compared: tuple[list[Results], dict[str, Any]]) -> None:
    found = compared[1]
    (trend,) = [item for item in found["trends"] if item["measure"] == "ap_count_0.9_final"
                and item["subject"] == "fin_Latn"]  # fmt: skip
    assert trend["num_runs"] == 6 and trend["spearman"] < -0.9 and trend["exact"] and trend["p_value"] == 2 / 90
    area = next(item for item in found["speed"] if item["run"] == "p0.05-s1" and item["measure"] == "cka")
    assert area["area"] == pytest.approx(0.06 / 2) and area["target"] == pytest.approx(0.07 / 2)
    assert area["steps_to_reach"] == pytest.approx(20 * 0.035 / 0.06)
    slow = next(item for item in found["speed"] if item["run"] == "p0.0-s1" and item["measure"] == "cka")
    assert slow["steps_to_reach"] is None


def test_levels_say_what_they_cover_and_neurons_are_compared_with_chance(
    compared: tuple[list[Results], dict[str, Any]],
) -> None:
    runs, found = compared
    assert [item["num_seeds"] for item in found["levels"]] == [2, 2, 2]
    alone = compare_runs(runs[:1], num_draws=50)
    assert alone["levels"][0]["covers"] == "sentences only (one seed)" and alone["trends"] == alone["pairwise"] == []
    shared = found["neurons"][0]
    assert np.diag(shared["jaccard"]).tolist() == [1.0] * 6 and shared["chance"] == pytest.approx(1 / 19)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 3, "runs odd and p0.0-s1 differ in num_layers: 3 against 2"),
        ("steps", [0, 20], r"differ in steps: \[0, 20\] against \[0, 10, 20\]"),
        ("pair_ids", ["p0"], "differ in pair_ids"),
        ("probed_languages", ["eng_Latn"], "differ in probed_languages"),
    ],
)
def test_runs_of_different_shape_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        compare_runs([invented_run(0.0), invented_run(0.1, run="odd", **{name: value})])


def test_a_run_without_values_of_sentences_is_named() -> None:
    old = invented_run(0.1)
    old = dataclasses.replace(old, arrays={key: array for key, array in old.arrays.items() if key != "sentence_gap"})
    with pytest.raises(FormatError, match=r"run p0\.1-s1 has no sentence_gap"):
        compare_runs([invented_run(0.0), old])
