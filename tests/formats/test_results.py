"""What analysis writes is what the report reads, or an error that says what is wrong."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.results import Results, Row, read_results, write_results

ROWS = [
    Row(0, 0, "retrieval", -1, "eng_Latn-fin_Latn", 0.1, 0.05, 0.2),
    Row(0, 0, "retrieval", 0, "eng_Latn-fin_Latn", 1 / 3),
    Row(50, 4096, "nll_per_token", None, "fin_Latn", 5.25),
    Row(50, 4096, "lape_count", 0, "ell_Grek", 7.0),
]
RESULTS = Results(
    {"run": "p 0.05 – тест", "languages": ["ell_Grek", "eng_Latn", "fin_Latn"], "chance": {"retrieval": 0.1}},
    ROWS,
    {"pca_steps": np.array([0, 50]), "pca_explained": np.ones((2, 2), np.float32)},
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_results(tmp_path / "analysis", RESULTS)
    back = read_results(tmp_path / "analysis")
    assert back.context == RESULTS.context
    assert back.rows == RESULTS.rows
    assert set(back.arrays) == set(RESULTS.arrays)
    for name, array in RESULTS.arrays.items():
        assert back.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(back.arrays[name], array)


def test_the_json_and_the_csv_hold_the_same_rows(tmp_path: Path) -> None:
    write_results(tmp_path, RESULTS)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[1] == {
        "step": 0, "consumed_tokens": 0, "measure": "retrieval", "layer": 0, "subject": "eng_Latn-fin_Latn",
        "value": 1 / 3, "low": None, "high": None,
    }
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(line["value"]) for line in table] == [row["value"] for row in rows]
    assert table[2]["layer"] == "" and table[0]["layer"] == "-1"


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    row = Row(np.int64(3), np.int64(7), "cka", np.int64(1), "a-b", np.float32(0.5), np.float64(0.25), np.float64(0.75))  # type: ignore[arg-type]
    write_results(tmp_path, Results({}, [row]))
    assert read_results(tmp_path).rows == [Row(3, 7, "cka", 1, "a-b", 0.5, 0.25, 0.75)]


def test_no_rows_at_all_is_still_a_file(tmp_path: Path) -> None:
    write_results(tmp_path, Results({"run": "x"}, []))
    assert read_results(tmp_path) == Results({"run": "x"}, [], {})


def test_select_tells_the_whole_model_from_every_layer() -> None:
    assert RESULTS.select(layer=None) == [ROWS[2]]
    assert RESULTS.select(measure="retrieval") == ROWS[:2]
    assert RESULTS.select(measure="retrieval", layer=-1) == ROWS[:1]
    assert RESULTS.select(step=50, subject="ell_Grek") == ROWS[3:]
    assert RESULTS.select() == ROWS
    assert RESULTS.steps == [0, 50]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match=r"step 0, layer 0, retrieval of eng_Latn-fin_Latn is -?(nan|inf)"):
        write_results(tmp_path, Results({}, [replace(ROWS[1], value=bad)]))
    assert not list(tmp_path.iterdir())


def test_an_array_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="array ap_scores holds 1 value"):
        write_results(tmp_path, Results({}, [], {"ap_scores": np.array([1.0, np.nan])}))


def test_half_an_interval_an_upside_down_one_and_a_repeated_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one end of an interval"):
        write_results(tmp_path, Results({}, [replace(ROWS[1], low=0.0)]))
    with pytest.raises(ValueError, match=r"interval \[1, 0\]"):
        write_results(tmp_path, Results({}, [replace(ROWS[1], low=1, high=0)]))
    with pytest.raises(ValueError, match="whole model, nll_per_token of fin_Latn is there twice"):
        write_results(tmp_path, Results({}, [ROWS[2], replace(ROWS[2], value=1.0)]))


def test_arrays_of_another_run_are_noticed(tmp_path: Path) -> None:
    write_results(tmp_path / "one", RESULTS)
    write_results(tmp_path / "two", Results({}, [], {"pca_steps": np.array([0, 51])}))
    (tmp_path / "two" / "arrays.safetensors").replace(tmp_path / "one" / "arrays.safetensors")
    with pytest.raises(FormatError, match=r"arrays\.safetensors is not the file"):
        read_results(tmp_path / "one")


def test_truncated_missing_foreign_and_newer_files_are_named(tmp_path: Path) -> None:
    write_results(tmp_path, RESULTS)
    path = tmp_path / "results.json"
    text = path.read_text()
    path.write_text(text[:-30])
    with pytest.raises(FormatError, match=r"results\.json is not a readable JSON file"):
        read_results(tmp_path)
    path.write_text("{}")
    with pytest.raises(FormatError, match="not a results file"):
        read_results(tmp_path)
    path.write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(FormatError, match="version 99"):
        read_results(tmp_path)
    path.write_text(text.replace('"subject"', '"subjekt"', 1))
    with pytest.raises(FormatError, match="row 0 should have the fields"):
        read_results(tmp_path)
    path.write_text(text)
    (tmp_path / "arrays.safetensors").unlink()
    with pytest.raises(FormatError, match=r"arrays\.safetensors does not exist"):
        read_results(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        read_results(tmp_path / "nowhere")
