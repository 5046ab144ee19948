"""The answer says what the numbers carry, and no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatron_xalign.report.answer import answer, explanations
from megatron_xalign.report.canvas import build_palette
from megatron_xalign.report.series import RETRIEVAL, Series, read_series

MakeRun = Callable[..., Path]


@pytest.fixture
def series_with(make_run: MakeRun, tmp_path: Path) -> Callable[..., Series]:
    """A series whose retrieval at the last step is set: fraction -> (value, low, high) at every layer."""

    def build(retrieval: Mapping[float, tuple[float, float, float]], runs_per_fraction: int = 1) -> Series:
        folders = []
        for fraction, (value, low, high) in retrieval.items():
            for number in range(runs_per_fraction):
                name = f"p{fraction}-{number}"
                folder = make_run(tmp_path / name, fraction, name=name, steps=(0, 50))
                path = folder / "analysis" / "results.json"
                content = json.loads(path.read_text())
                for row in content["rows"]:
                    if row["measure"] == RETRIEVAL and row["step"] == 50:
                        row.update(value=value + 0.02 * number, low=low, high=high)
                path.write_text(json.dumps(content))
                folders.append(folder)
        return read_series(folders)

    return build


def test_a_clear_difference_is_said_with_its_numbers(series_with: Callable[..., Series]) -> None:
    sentences = answer(series_with({0.0: (0.10, 0.07, 0.13), 0.3: (0.40, 0.35, 0.45)}))
    assert "is 40.0\u00a0% (35.0 to 45.0\u00a0%) with 30\u00a0% parallel data and 10.0\u00a0%" in sentences[0]
    assert "translations with languages centred, at the best layer" in sentences[0]
    assert "chance is 0.5\u00a0%" in sentences[0]
    assert sentences[1].startswith("With 30\u00a0% parallel data retrieval is higher than with 0\u00a0%")
    assert "what another training seed would give" in sentences[-1]


def test_overlapping_intervals_are_no_difference(series_with: Callable[..., Series]) -> None:
    text = " ".join(answer(series_with({0.0: (0.10, 0.07, 0.13), 0.3: (0.14, 0.11, 0.17)})))
    assert "overlap: these sentences do not tell the two runs apart" in text
    assert "higher" not in text


def test_a_harm_is_said_as_plainly_as_a_gain(series_with: Callable[..., Series]) -> None:
    text = " ".join(answer(series_with({0.0: (0.40, 0.35, 0.45), 0.3: (0.14, 0.11, 0.17)})))
    assert "retrieval is lower than with 0\u00a0%" in text


def test_runs_at_chance_are_said_to_be_at_chance(series_with: Callable[..., Series]) -> None:
    text = " ".join(answer(series_with({0.0: (0.006, 0.0, 0.01), 0.3: (0.007, 0.001, 0.012)})))
    assert "No run is above chance." in text


def test_a_run_above_chance_but_within_reach_of_random_weights_is_not_praised(
    series_with: Callable[..., Series],
) -> None:
    series = series_with({0.0: (0.06, 0.03, 0.09), 0.3: (0.40, 0.35, 0.45)})
    pair = series.pairs[0]
    for run in series.runs:
        for row in run.by_layer(RETRIEVAL, pair, 0):
            assert 0.03 < row.value < 0.35  # or the test would say nothing
    untrained = [max(run.by_layer(RETRIEVAL, pair, 0), key=lambda row: row.value).value for run in series.runs]
    text = " ".join(answer(series))
    low, high = (f"{100 * value:.1f}\u00a0%" for value in (min(untrained), max(untrained)))
    assert f"random weights already retrieve {low} to {high} at their best layer" in text
    assert "The run with 0\u00a0% parallel data is not clearly above that." in text
    assert "above chance" not in text


def test_without_step_zero_nothing_is_said_about_random_weights(make_run: MakeRun, tmp_path: Path) -> None:
    text = " ".join(answer(read_series([make_run(tmp_path / "a", 0.1, steps=(50, 100))])))
    assert "random weights" not in text and "clearly above" not in text


def test_several_runs_at_chance_are_named_together(series_with: Callable[..., Series]) -> None:
    low = (0.006, 0.0, 0.01)
    text = " ".join(answer(series_with({0.0: low, 0.1: low, 0.3: (0.40, 0.35, 0.45)})))
    assert "The runs with 0\u00a0% and 10\u00a0% parallel data are not above chance." in text


def test_several_runs_of_a_fraction_give_mean_and_range(series_with: Callable[..., Series]) -> None:
    sentences = answer(series_with({0.0: (0.10, 0.07, 0.13), 0.3: (0.40, 0.35, 0.45)}, runs_per_fraction=2))
    assert "41.0\u00a0% (mean of 2 runs, 40.0\u00a0% to 42.0\u00a0%) with 30\u00a0% parallel data" in sentences[0]
    assert "One training run" not in " ".join(sentences)


def test_only_measures_that_were_taken_are_explained(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 0.1, steps=(0, 50), skip_measures=("mexa", "pwcca", "pwcca_permuted"))
    names = [item.name for item in explanations(read_series([run]))]
    assert "Translations retrieved, languages centred" in names and "MEXA" not in names and "PWCCA" not in names


def test_a_fraction_has_one_colour_and_eight_can_be_told_apart() -> None:
    fractions = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]
    palette = build_palette([*fractions, 0.3], ["eng_Latn"])
    for mode in (0, 1):
        colors = [palette.fractions[fraction][mode] for fraction in fractions]
        assert len(set(colors)) == len(fractions)
        brightness = [sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in colors[1:]]
        assert brightness == sorted(brightness, reverse=mode == 0)  # stronger: darker on white, brighter on black
